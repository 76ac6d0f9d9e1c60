"""Hugging Face data sets: of the hub, and those that `datasets` saved to a disk."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gesso.config.run import Source
from gesso.data.places import Place, cell_bytes
from gesso.data.sources import pairs
from gesso.data.sources.folder import caption_text
from gesso.data.sources.found import Entry, Found, counted, listed
from gesso.data.sources.parquet import choose_picture, pair_columns, weight_column
from gesso.data.sources.table import choose_caption
from gesso.data.sources.weights import weight_of
from gesso.errors import UserError

if TYPE_CHECKING:
    import datasets

PREFIX = "hub:"
_NAME = re.compile(
    r"hub:(?P<name>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>refs/[\w.-]+/[\w.-]+|[\w.-]+))?(?:/(?P<config>[\w. +-]+))?"
)


def looks_like_a_name(path: str) -> bool:
    """Whether a path could be the OWNER/NAME of a data set."""
    return _NAME.fullmatch(PREFIX + path) is not None


def is_saved(names: Any) -> bool:
    """Whether a folder with these files is what `save_to_disk` writes."""
    return "dataset_dict.json" in names or ("state.json" in names and "dataset_info.json" in names)


def entries(target: str, source: Source, found: Found) -> list[Entry]:
    """The rows of a data set: `target` is hub:OWNER/NAME[@revision][/config] or a folder."""
    if source.mask == "file":
        raise UserError("data sets have no mask files", where=source.path, fix="set mask to alpha or none")
    url = f"{target}#{source.split}"
    dataset = open_dataset(url)
    where = f"{target} ({source.split})"
    pair = pair_columns(dataset.features.arrow_schema, source, where)
    if pair is not None:
        return _pairs(dataset, pair, url, source, found)
    image = choose_picture(dataset.features.arrow_schema, source, where)
    caption = choose_caption(dataset.column_names, source, where)
    weight = weight_column(dataset.features.arrow_schema, source, where)
    captions, weights = (_plain(dataset, column) for column in (caption, weight))
    bare = _bare(dataset, image, url)
    made: list[Entry] = []
    for row, (text, cell) in enumerate(zip(captions, weights, strict=True)):
        if row in bare:
            continue
        place = Place(url, "dataset", image, row)
        try:
            own = caption_text(text, str(place))
            weighs = weight_of(cell, weight, str(place))
        except UserError as error:
            found.problems.append(error)
            continue
        made.append(Entry(place.name, place, own, str(place), concept="", weight=weighs))
    if bare:
        found.problems.append(_no_pictures(bare, len(dataset), image, where))
    return made


def _pairs(dataset: datasets.Dataset, pair: pairs.Columns, url: str, source: Source, found: Found) -> list[Entry]:
    """The pairs of a data set. A row without one of its pictures is left out; one with a path alone is a problem."""
    where = f"{url.rpartition('#')[0]} ({source.split})"
    caption = choose_caption(dataset.column_names, source, where)
    weight = weight_column(dataset.features.arrow_schema, source, where)
    captions, weights = (_plain(dataset, column) for column in (caption, weight))
    labels = _plain(dataset, pair.label, named=False)
    bare = {column: _bare(dataset, column, url) for column in pair[:2]}
    paths = {column: {row: path for row, path in rows.items() if path} for column, rows in bare.items()}
    found.problems += [_no_pictures(rows, len(dataset), column, where) for column, rows in paths.items() if rows]
    made: list[Entry] = []
    for row, (text, label, cell) in enumerate(zip(captions, labels, weights, strict=True)):
        if any(row in rows for rows in paths.values()):
            continue
        first, second = (None if row in bare[column] else Place(url, "dataset", column, row) for column in pair[:2])
        place = str(Place(url, "dataset", pair.first, row))
        try:
            two = pairs.decided(first, second, label, pair, place, found)
            if two is not None:
                own, weighs = caption_text(text, place), weight_of(cell, weight, place)
                made.append(Entry(two[0].name, two[0], own, place, concept="", rejected=two[1], weight=weighs))
        except UserError as error:
            found.problems.append(error)
    return made


def _no_pictures(bare: Mapping[int, str], total: int, image: str, where: str) -> UserError:
    names = [f"row {row + 1}{f' (only the path {path!r})' if path else ''}" for row, path in bare.items()]
    have = "has" if len(bare) == 1 else "have"
    return UserError(
        f"{counted(len(bare), 'row')} of {total} {have} no picture in '{image}': {listed(names)}",
        where=where,
        fix="put the pictures' bytes into the data set; paths out of it are not followed",
    )


@functools.lru_cache(maxsize=4)
def open_dataset(url: str) -> datasets.Dataset:
    """The rows of TARGET#SPLIT; what is wrong with it is a `UserError` that says whether the hub may be asked."""
    target, _, split = url.rpartition("#")
    try:
        import datasets
    except ImportError as error:
        raise UserError("needs the package 'datasets'", where=target, fix="pip install datasets") from error
    try:
        if not target.startswith(PREFIX):
            if not is_saved(os.listdir(target)):
                return datasets.load_dataset(target, split=split)
            loaded = datasets.load_from_disk(target)
            if isinstance(loaded, datasets.Dataset):
                return loaded
            if split not in loaded:
                what = f"there is no split '{split}'; the splits are: {', '.join(loaded)}"
                raise UserError(what, where=target, fix="set split")
            return loaded[split]
        name, revision, config = parse(target)
        if os.path.exists(name):
            what = f"a local folder is called {name}, too, and `datasets` would read that"
            raise UserError(what, where=target, fix="start from another folder, or rename it")
        return datasets.load_dataset(name, config, revision=revision, split=split)
    except UserError:
        raise
    except Exception as error:
        # What `datasets` raises for a name, a split, a configuration or a line that is wrong is of many kinds.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the data set cannot be read: {reason}", where=target, fix=_advice(target, reason)) from error


def parse(target: str) -> tuple[str, str | None, str | None]:
    """OWNER/NAME, revision and configuration of a hub:... path."""
    match = _NAME.fullmatch(target)
    if match is None:
        raise UserError(
            "not the name of a data set", where=target, fix="write hub:OWNER/NAME, then @REVISION and /CONFIG if needed"
        )
    return match["name"], match["revision"], match["config"]


def read_cell(url: str, row: int, column: str) -> bytes:
    """The picture in a row. A path in it is followed only into the folder itself or the cache of `datasets`."""
    value = _raw(url, column)[row][column]
    if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
        if not _is_own(url, str(value["path"])):
            raise ValueError(f"no picture in this row, only the path '{value['path']}', which is not followed")
        with open(value["path"], "rb") as file:
            return file.read()
    return cell_bytes(value)


@functools.lru_cache(maxsize=4)
def _raw(url: str, column: str) -> Any:
    return _undecoded(open_dataset(url), column)


def _undecoded(dataset: datasets.Dataset, column: str) -> Any:
    import datasets

    only = dataset.select_columns([column])
    is_image = isinstance(dataset.features[column], datasets.Image)
    return only.cast_column(column, datasets.Image(decode=False)) if is_image else only


def _plain(dataset: datasets.Dataset, column: str | None, *, named: bool = True) -> list[Any]:
    """A column's values, those of a class label by their names; nothing in each row where there is no column."""
    import datasets

    if column is None:
        return [None] * len(dataset)
    feature = dataset.features[column]
    values = list(dataset.select_columns([column])[:][column])
    if named and isinstance(feature, datasets.ClassLabel):
        return [None if value is None else feature.int2str(value) for value in values]
    return values


def _bare(dataset: datasets.Dataset, column: str, url: str) -> dict[int, str]:
    """The rows without bytes and without a path that may be followed, each with the path that it has."""
    import pyarrow as pa
    import pyarrow.compute as pc

    cells = dataset.with_format("arrow").select_columns([column])[:].column(column)
    if not pa.types.is_struct(cells.type):
        return dict.fromkeys(pc.indices_nonzero(pc.is_null(cells)).to_pylist(), "")
    empty = pc.indices_nonzero(pc.is_null(pc.struct_field(cells, "bytes"))).to_pylist()
    names = [field.name for field in cells.type]
    paths = {row: (cells[row].as_py() or {}).get("path") or "" for row in empty} if "path" in names else {}
    return {row: paths.get(row, "") for row in empty if not paths.get(row) or not _is_own(url, paths[row])}


def _is_own(url: str, path: str) -> bool:
    target = url.rpartition("#")[0]
    return _is_under(path, _caches() | (set() if target.startswith(PREFIX) else {target}))


def _caches() -> set[str]:
    import datasets
    from huggingface_hub import constants

    return {str(datasets.config.HF_DATASETS_CACHE), str(constants.HF_HUB_CACHE)}


def _is_under(path: str, folders: set[str]) -> bool:
    real = os.path.realpath(path)
    return any(real.startswith(os.path.realpath(folder) + os.sep) for folder in folders)


def _advice(target: str, reason: str) -> str:
    if not target.startswith(PREFIX):
        return "check the folder"
    if _offline():
        return "it is not in the cache, and HF_HUB_OFFLINE is set: unset that, or load it once with a connection"
    if "Config name is missing" in reason:
        return f"name one of them: {target}/CONFIG"
    if "gated" in reason.lower() or "401" in reason or "403" in reason:
        return "accept its terms on the hub and log in (hf auth login)"
    endpoint = os.environ.get("HF_ENDPOINT")
    return f"check the name; the hub that is asked is HF_ENDPOINT={endpoint}" if endpoint else "check the name"


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def forget() -> None:
    """Let go of opened data sets."""
    open_dataset.cache_clear()
    _raw.cache_clear()
