"""`metadata.jsonl`, `.csv` and `.parquet`: a row for each picture, with its path and its caption in columns."""

from __future__ import annotations

import bisect
import csv
import difflib
import io
import json
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gesso.config.run import Source
from gesso.data.places import Place, edge, open_file
from gesso.data.sources import pairs
from gesso.data.sources.folder import caption_text
from gesso.data.sources.found import Entry, Found, counted, some
from gesso.data.sources.tree import MASK, TABLE_ENDINGS, Kinds, Tree
from gesso.data.sources.weights import weight_of
from gesso.data.texts import decode_text
from gesso.errors import UserError

IMAGE_COLUMNS = ("file_name", "image_path", "image", "path", "filename", "file", "img", "jpg", "png", "webp")
CAPTION_COLUMNS = ("text", "prompt", "caption", "captions", "description")

_ABSOLUTE = re.compile(r"^(?:[\\/]|[A-Za-z]:|[A-Za-z][A-Za-z0-9+.-]*://)")
_GUESSES = 20
_NEAR = 1_000


@dataclass
class Table:
    """A table's columns (where they are named, too) and its rows, each with the place to name in a message."""

    columns: tuple[str, ...]
    where: str
    rows: Iterable[tuple[str, dict[str, Any]]]


def metadata_tables(source: Source, tree: Tree, kinds: Kinds, found: Found) -> list[str]:
    """The tables that list a tree's pictures: the one that is named, the one at the root, or those in sub-folders."""
    if source.metadata is not None:
        return [_named(source.metadata, tree, kinds)]
    usual = [f"metadata{ending}" for ending in TABLE_ENDINGS]
    at_root = [name for name in usual if name in tree]
    if at_root:
        if len(at_root) > 1:
            found.notices.append(f"{tree.shown(at_root[0])}: read, and not {', '.join(at_root[1:])} beside it")
        return at_root[:1]
    below: dict[str, str] = {}
    for name in sorted(kinds.tables, key=lambda n: TABLE_ENDINGS.index("." + n.rpartition(".")[2].lower())):
        folder, _, base = name.rpartition("/")
        if base in usual:
            below.setdefault(folder, name)
    # One inside another's folder would list its pictures twice.
    return [
        name for folder, name in sorted(below.items()) if not any(folder.startswith(f"{other}/") for other in below)
    ]


def _named(metadata: str, tree: Tree, kinds: Kinds) -> str:
    name = posixpath.normpath(metadata.replace("\\", "/"))
    where = tree.shown(name)
    if _ABSOLUTE.match(metadata) or name.startswith("../"):
        raise UserError("the metadata file is outside the source's folder", where=where, fix="keep it in the folder")
    if not name.lower().endswith(TABLE_ENDINGS):
        raise UserError("metadata must be a .jsonl, .csv or .parquet file", where=where, fix="convert it")
    if name not in tree:
        fix = (
            f"the folder holds: {some(kinds.tables)}"
            if kinds.tables
            else "remove `metadata` to use caption files beside the images"
        )
        raise UserError("there is no such metadata file", where=where, fix=fix)
    return name


def entries(source: Source, tree: Tree, file: str, found: Found, listed: set[str]) -> list[Entry]:
    """The pictures that a table lists, or its pairs; each row that cannot be used is a problem with its line.

    The names of all pictures that it names go to `listed`.
    """
    table = read_table(tree, file, found)
    locate = _Locator(tree, file, found, listed)
    pair = pairs.columns(table.columns, table.columns, source, table.where)
    if pair is not None:
        caption = choose_caption(table.columns, source, table.where)
    else:
        image, caption = choose_columns(table, source)
    weight = choose_weight(table.columns, source, table.where)
    made = []
    for where, row in table.rows:
        try:
            if pair is not None:
                entry = _pair(row, pair, caption, where, tree, locate, found)
            else:
                entry = _entry(row, image, caption, where, tree, locate)
            if entry is not None and weight is not None:
                _require(row, weight, where)
                entry = entry._replace(weight=weight_of(row[weight], weight, where))
        except UserError as error:
            found.problems.append(error)
            continue
        if entry is not None:
            made.append(entry)
    return made


def read_table(tree: Tree, file: str, found: Found) -> Table:
    """A table of a tree; lines that are no rows go to `found`."""
    shown = tree.shown(file)
    ending = file.lower().rpartition(".")[2]
    if ending == "parquet":
        return _parquet(tree, file, shown)
    text = decode_text(tree.read(file), where=shown)
    return _jsonl(text, shown, found) if ending == "jsonl" else _csv(text, shown, found)


def choose_columns(table: Table, source: Source) -> tuple[str, str | None]:
    """The columns with the picture's path and with its caption."""
    _check_there(table.columns, source.image_column, "image_column", table.where)
    image = source.image_column or next((c for c in IMAGE_COLUMNS if c in table.columns), None)
    if image is None:
        there = ", ".join(table.columns) or "none"
        what = f"no image column ({', '.join(IMAGE_COLUMNS)}); the columns are: {there}"
        raise UserError(what, where=table.where, fix="name it with image_column")
    return image, choose_caption(table.columns, source, table.where)


def choose_caption(columns: Sequence[str], source: Source, where: str) -> str | None:
    """The column with the caption; none only where captions may be missing."""
    _check_there(columns, source.caption_column, "caption_column", where)
    caption = source.caption_column or next((c for c in CAPTION_COLUMNS if c in columns), None)
    if caption is None and source.missing_captions == "error":
        what = f"no caption column ({', '.join(CAPTION_COLUMNS)}); the columns are: {', '.join(columns) or 'none'}"
        raise UserError(what, where=where, fix="name it with caption_column, or set missing_captions")
    return caption


def choose_weight(columns: Sequence[str], source: Source, where: str) -> str | None:
    """The column with the weight of each picture's loss; none is read unless it is named."""
    _check_there(columns, source.weight_column, "weight_column", where)
    return source.weight_column


def _check_there(columns: Sequence[str], wanted: str | None, key: str, where: str) -> None:
    if wanted is not None and wanted not in columns:
        close = difflib.get_close_matches(wanted, columns, n=1)
        what = f"there is no column '{wanted}'; the columns are: {', '.join(columns) or 'none'}"
        raise UserError(what, where=where, fix=f"set {key} to {close[0]}" if close else f"set {key}")


def _jsonl(text: str, shown: str, found: Found) -> Table:
    rows: list[tuple[str, dict[str, Any]]] = []
    bad = False
    # Only real line feeds end a line: JSON strings may hold U+2028 and the like.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"{shown}:{number}", _object(line, f"{shown}:{number}")))
            except UserError as error:
                bad = True
                found.problems.append(error)
    if not rows and not bad:
        raise UserError("the metadata file has no rows", where=shown, fix='add lines like {"file_name": "a.png"}')
    if not rows:
        raise UserError("no line of the metadata file can be used", where=shown, fix="mend the lines named above")
    columns = dict.fromkeys(key for _, row in rows for key in row)
    return Table(tuple(columns), rows[0][0], rows)


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", where=where, fix="write one JSON object on each line") from error
    if not isinstance(row, dict):
        raise UserError("not a JSON object", where=where, fix='write {"file_name": ..., "text": ...}')
    return row


def _csv(text: str, shown: str, found: Found) -> Table:
    head = text.partition("\n")[0]
    separator = max(",;\t", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[tuple[str, dict[str, Any]]] = []
    columns: tuple[str, ...] = ()
    line = 1
    bad = False
    try:
        for cells in reader:
            where, line = f"{shown}:{line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns = tuple(cell.strip() for cell in cells)
                if len(set(columns)) < len(columns):
                    what = f"two columns of one name: {', '.join(columns)}"
                    raise UserError(what, where=where, fix="rename one")
            elif len(cells) != len(columns):
                bad = True
                what = f"{counted(len(cells), 'cell')}, but {len(columns)} columns ({', '.join(columns)})"
                found.problems.append(UserError(what, where=where, fix='put texts with commas in "quotes"'))
            else:
                rows.append((where, dict(zip(columns, cells, strict=True))))
    except csv.Error as error:
        raise UserError(
            f"not CSV: {error}", where=f"{shown}:{line}", fix='put texts with commas in "quotes"'
        ) from error
    if not rows and not bad:
        raise UserError("the metadata file has no rows", where=shown, fix="add a header and a line for each picture")
    return Table(columns, f"{shown}:1", rows)


def _parquet(tree: Tree, file: str, shown: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = tree.place(file)
    with edge(shown, "cannot be read as Parquet", fix="write it again"):
        opened = pq.ParquetFile(open_file(place.url) if place.kind == "file" else pa.BufferReader(place.read()))
        columns = tuple(opened.schema_arrow.names)

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        number = 0
        with edge(shown, "cannot be read as Parquet", fix="write it again"):
            for batch in opened.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{shown} row {number}", row

    if not opened.metadata.num_rows:
        raise UserError("the metadata file has no rows", where=shown, fix="add a row for each picture")
    return Table(columns, shown, rows())


def _entry(
    row: dict[str, Any], image: str, caption: str | None, where: str, tree: Tree, locate: Callable[[str, str], str]
) -> Entry | None:
    for column in (image, caption):
        _require(row, column, where)
    text = None if caption is None else caption_text(row[caption], where)
    found = _picture(row[image], where, locate)
    return Entry(found, tree.place(found), text, where) if found else None


def _pair(
    row: dict[str, Any],
    pair: pairs.Columns,
    caption: str | None,
    where: str,
    tree: Tree,
    locate: Callable[[str, str], str],
    found: Found,
) -> Entry | None:
    _require(row, caption, where)
    text = None if caption is None else caption_text(row[caption], where)
    names: dict[Place, str] = {}
    sides: list[Place | None] = []
    for column in (pair.first, pair.second):
        name = row.get(column)
        if name is None or name == "":
            sides.append(None)
            continue
        path = _picture(name, where, locate)
        if not path:
            return None
        sides.append(tree.place(path))
        names[tree.place(path)] = path
    label = None if pair.label is None else row.get(pair.label)
    two = pairs.decided(sides[0], sides[1], label, pair, where, found)
    return None if two is None else Entry(names[two[0]], two[0], text, where, rejected=two[1])


def _require(row: dict[str, Any], column: str | None, where: str) -> None:
    if column is not None and column not in row:
        there = ", ".join(row) or "none"
        raise UserError(f"no column '{column}'; this row has: {there}", where=where, fix="add it")


def _picture(name: Any, where: str, locate: Callable[[str, str], str]) -> str:
    """The file that a cell names; empty where a problem says already why it is not read."""
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"the image path is not text: {name!r}", where=where, fix="write the picture's path")
    found = locate(name, where)
    if found.rpartition(".")[0].lower().endswith(MASK):
        raise UserError(f"'{name}' is a mask, not a picture", where=where, fix="list the picture that it masks")
    return found


class _Locator:
    """Finds the file that a row names: relative to the table, to `images/` beside it, or to the source's root.

    Empty for one that is a problem already, so that the row is none. What was found goes to `listed`.
    """

    def __init__(self, tree: Tree, file: str, found: Found, listed: set[str]) -> None:
        base = file.rpartition("/")[0]
        folders = [base, f"{base}/images" if base else "images", ""]
        self._tree, self._found, self._folders, self._listed = tree, found, list(dict.fromkeys(folders)), listed
        self._guesses = _GUESSES  # each costs a look at a thousand names

    def __call__(self, name: str, where: str) -> str:
        path = self._locate(name, where)
        self._listed.add(path)
        return path

    def _locate(self, name: str, where: str) -> str:
        if "\x00" in name or _ABSOLUTE.match(name):
            raise UserError(f"'{name}' is not a path relative to the folder", where=where, fix="write a relative path")
        names = [name, name.replace("\\", "/")] if "\\" in name else [name]
        for folder in self._folders:
            for each in names:
                path = f"{folder}/{each}" if folder else each
                if path in self._tree:
                    return path
                path = posixpath.normpath(path)
                if path.startswith("../"):
                    raise UserError(
                        f"'{name}' leads out of the folder", where=where, fix="keep pictures inside the folder"
                    )
                if path in self._tree:
                    return path
                if self._found.is_refused(self._tree.shown(path)):
                    return ""
        looked = ", ".join(self._tree.shown(folder) for folder in self._folders)
        close = self._close(names[-1])
        raise UserError(
            f"there is no picture '{name}' (looked in {looked})",
            where=where,
            fix=f"did you mean {close}?" if close else "add the picture or remove the line",
        )

    def _close(self, name: str) -> str:
        if not self._guesses:
            return ""
        self._guesses -= 1
        near: set[str] = set()
        for folder in self._folders:
            path = posixpath.normpath(f"{folder}/{name}" if folder else name)
            at, inside = bisect.bisect(self._tree.names, path), path.rpartition("/")[0]
            around = self._tree.names[max(0, at - _NEAR) : at + _NEAR]
            near |= {other.rpartition("/")[2] for other in around if other.rpartition("/")[0] == inside}
        close = difflib.get_close_matches(posixpath.basename(name), sorted(near), n=1, cutoff=0.5)
        return close[0] if close else ""
