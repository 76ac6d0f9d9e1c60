"""Parquet tables with the pictures in them. Only captions are read here; a picture is read where it is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gesso.config.run import Source
from gesso.data.places import Place, edge, open_file
from gesso.data.sources import pairs
from gesso.data.sources.folder import caption_text
from gesso.data.sources.found import Entry, Found, counted, listed
from gesso.data.sources.table import IMAGE_COLUMNS, choose_caption, choose_weight
from gesso.data.sources.weights import weight_of
from gesso.errors import UserError


def holds_pictures(url: str, source: Source) -> bool:
    """Whether a table has a column of pictures rather than of paths."""
    schema = _open(url).schema_arrow
    if source.image_column is not None and source.image_column in schema.names:
        return _is_image(schema.field(source.image_column).type)
    return any(_is_image(field.type) for field in schema)


def entries(urls: Sequence[str], source: Source, found: Found) -> list[Entry]:
    """The rows of all tables; what is wrong with a table or a row goes to `found`."""
    if source.mask == "file":
        raise UserError("tables have no mask files", where=source.path, fix="set mask to alpha or none")
    made: list[Entry] = []
    for url in urls:
        try:
            with edge(url, "cannot be read as Parquet", fix="write it again"):
                made += _rows(url, source, found)
        except UserError as error:
            found.problems.append(error)
    return made


def _open(url: str) -> Any:
    import pyarrow.parquet as pq

    with edge(url, "cannot be read as Parquet", fix="write it again"):
        return pq.ParquetFile(open_file(url))


def _rows(url: str, source: Source, found: Found) -> Iterator[Entry]:
    file = _open(url)
    schema = file.schema_arrow
    pair = pair_columns(schema, source, url)
    if pair is not None:
        yield from _pairs(file, pair, source, url, found)
        return
    image, caption = choose_picture(schema, source, url), choose_caption(schema.names, source, url)
    _require_text(schema, caption, url)
    weight = weight_column(schema, source, url)
    number, bare = 0, []
    for group in range(file.num_row_groups):
        captions, weights = (_cells(file, group, column) for column in (caption, weight))
        empty = _empty_cells(file, group, image)
        for offset, (text, cell) in enumerate(zip(captions, weights, strict=True)):
            number += 1
            if offset in empty:
                bare.append(_bare_row(number, empty[offset]))
                continue
            place = Place(url, "parquet", image, number - 1)
            own = caption_text(text, str(place))
            entry = Entry(place.name, place, own, str(place), concept="")
            if (weighed := _weighed(entry, cell, weight, found)) is not None:
                yield weighed
    if bare:
        found.problems.append(_no_pictures(bare, number, image, url))


def _pairs(file: Any, pair: pairs.Columns, source: Source, url: str, found: Found) -> Iterator[Entry]:
    """The pairs of a table. A row without one of its pictures is left out; one with a path alone is a problem."""
    schema = file.schema_arrow
    caption = choose_caption(schema.names, source, url)
    _require_text(schema, caption, url)
    weight = weight_column(schema, source, url)
    number = 0
    bare: dict[str, list[str]] = {}
    plain = [column for column in (caption, pair.label) if column is not None]
    for group in range(file.num_row_groups):
        cells = file.read_row_group(group, columns=plain)
        weights = _cells(file, group, weight)
        empty = {column: _empty_cells(file, group, column) for column in pair[:2]}
        for offset in range(file.metadata.row_group(group).num_rows):
            number += 1
            where = f"{url} row {number}"
            paths = {column: rows[offset] for column, rows in empty.items() if rows.get(offset)}
            for column, path in paths.items():
                bare.setdefault(column, []).append(_bare_row(number, path))
            if paths:
                continue
            first, second = (
                None if offset in empty[column] else Place(url, "parquet", column, number - 1) for column in pair[:2]
            )
            label = None if pair.label is None else cells.column(pair.label)[offset].as_py()
            two = pairs.decided(first, second, label, pair, where, found)
            if two is not None:
                text = None if caption is None else caption_text(cells.column(caption)[offset].as_py(), where)
                entry = Entry(two[0].name, two[0], text, where, concept="", rejected=two[1])
                if (weighed := _weighed(entry, weights[offset], weight, found)) is not None:
                    yield weighed
    found.problems += [_no_pictures(rows, number, column, url) for column, rows in bare.items()]


def _cells(file: Any, group: int, column: str | None) -> list[Any]:
    if column is None:
        return [None] * file.metadata.row_group(group).num_rows
    cells: list[Any] = file.read_row_group(group, columns=[column]).column(column).to_pylist()
    return cells


def _weighed(entry: Entry, cell: Any, column: str | None, found: Found) -> Entry | None:
    """The entry with its weight; None where that is a problem, so that all such rows are named at once."""
    try:
        return entry._replace(weight=weight_of(cell, column, entry.where))
    except UserError as error:
        found.problems.append(error)
        return None


def pair_columns(schema: Any, source: Source, where: str) -> pairs.Columns | None:
    """The columns of pairs of pictures in an Arrow schema; None where it has none."""
    return pairs.columns(schema.names, [field.name for field in schema if _is_image(field.type)], source, where)


def _require_text(schema: Any, caption: str | None, where: str) -> None:
    if caption is not None and not _is_text(schema.field(caption).type):
        what = f"the caption column '{caption}' holds {schema.field(caption).type}, not text"
        raise UserError(what, where=where, fix="name another with caption_column")


def weight_column(schema: Any, source: Source, where: str) -> str | None:
    """The column of weights in an Arrow schema, if the source names one; it must be able to hold numbers."""
    import pyarrow as pa

    column = choose_weight(schema.names, source, where)
    if column is None:
        return None
    kind = schema.field(column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_number = pa.types.is_integer(plain) or pa.types.is_floating(plain) or pa.types.is_decimal(plain)
    is_list = pa.types.is_list(plain) or pa.types.is_large_list(plain)
    if is_list or not (is_number or _is_text(plain)):
        what = f"the weight column '{column}' holds {kind}, not numbers"
        raise UserError(what, where=where, fix="name another with weight_column")
    return column


def _bare_row(number: int, path: str) -> str:
    return f"row {number}{f' (only the path {path!r})' if path else ''}"


def _no_pictures(bare: Sequence[str], total: int, image: str, url: str) -> UserError:
    have = "has" if len(bare) == 1 else "have"
    return UserError(
        f"{counted(len(bare), 'row')} of {total} {have} no picture in '{image}': {listed(bare)}",
        where=url,
        fix="put the pictures' bytes into the table; paths in it are not followed",
    )


def choose_picture(schema: Any, source: Source, where: str) -> str:
    """The column of pictures in an Arrow schema."""
    names = [field.name for field in schema if _is_image(field.type)]
    there = ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"
    if source.image_column is not None:
        if source.image_column in names:
            return source.image_column
        kind = "holds no pictures" if source.image_column in schema.names else "is not there"
        what = f"the column '{source.image_column}' {kind}; the columns are: {there}"
        raise UserError(what, where=where, fix="set image_column to a column of bytes")
    usual = [name for name in IMAGE_COLUMNS if name in names]
    if usual or len(names) == 1:
        return (usual or names)[0]
    if names:
        what = f"several columns may hold the pictures: {', '.join(names)}"
        raise UserError(what, where=where, fix="name one with image_column")
    raise UserError(
        f"no column of pictures (bytes); the columns are: {there}",
        where=where,
        fix="download the pictures and put their bytes into the table, or list files in the folder by their names",
    )


def _is_image(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in kind)
    return _is_bytes(kind)


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _empty_cells(file: Any, group: int, image: str) -> dict[int, str]:
    """The rows of a group without bytes, each with the path that it has instead, or an empty one."""
    facts = file.metadata.row_group(group)
    leaves = [facts.column(i) for i in range(facts.num_columns)]
    counts = [
        leaf.statistics.null_count if leaf.statistics is not None and leaf.statistics.has_null_count else None
        for leaf in leaves
        if leaf.path_in_schema in (image, f"{image}.bytes")
    ]
    if counts == [0]:
        return {}  # so that no picture need be read
    empty = {}
    cells = file.read_row_group(group, columns=[image]).column(image)
    for offset, cell in enumerate(cells):
        value = cell.as_py()
        if (value.get("bytes") if isinstance(value, dict) else value) is None:
            path = value.get("path") if isinstance(value, dict) else None
            empty[offset] = path or ""
    return empty
