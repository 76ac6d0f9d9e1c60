"""Sets of captioned pictures in any common layout -> records. All that is wrong is found in one look, and nothing is
dropped silently."""

from __future__ import annotations

import os
import posixpath
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from gesso.config.run import Source
from gesso.data import places
from gesso.data.places import is_url
from gesso.data.sources import archive, folder, hub, nothing, pairs, parquet, table, webdataset, weights
from gesso.data.sources.found import Entry, Found, Record, some
from gesso.data.sources.local import local_tree, stamp_of_files, stamp_of_folder
from gesso.data.sources.policy import MAX_CAPTION, records_of, with_masks
from gesso.data.sources.splits import of_split
from gesso.data.sources.tree import Kinds, LocalTree, Tree, classify, notice_hidden, remote_tree
from gesso.errors import Problems, UserError

__all__ = ["MAX_CAPTION", "Found", "Record", "collect", "forget", "listing_stamp", "records", "some"]

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")


def records(sources: Sequence[Source]) -> tuple[list[Record], list[str]]:
    """The records and notices of all sources; all problems of all of them at once as `Problems`."""
    found = [collect(source, index=i) for i, source in enumerate(sources)]
    problems = [problem for one in found for problem in one.problems]
    if problems:
        raise Problems(problems)
    return [r for one in found for r in one.records], [n for one in found for n in one.notices]


def collect(source: Source, *, index: int = 0) -> Found:
    """Everything in one source, problems included instead of raised."""
    found = Found()
    try:
        entries = _entries(source, found)
    except UserError as error:
        found.problems.append(error)
        return found
    entries = pairs.settle(source, entries, found)
    if not entries and not found.problems:
        found.problems.append(UserError("no picture is left", where=source.path, fix="see the notices"))
    notice_hidden(source.path, found)
    weights.check_listed(source, entries, found)
    found.records = records_of(source, index, entries, found)
    weights.tell_zeros(source, found.records, found)
    return found


def forget() -> None:
    """Let go of everything that is kept open, so that a process that lives long sees what was replaced."""
    places.forget()
    hub.forget()


def listing_stamp(source: Source) -> str | None:
    """Says without reading any of them whether the files of a source are as they were: a hash of their names, sizes,
    times and inodes. None where that is not cheaply known: URLs, the hub, and files written this very moment.
    """
    path = source.path
    if path.startswith((hub.PREFIX, "pipe:")) or (is_url(path) and not path.startswith("file://")):
        return None
    local = _local(path)
    if os.path.isdir(local):
        return stamp_of_folder(local)
    if os.path.isfile(local):
        if local.lower().endswith((".jsonl", ".csv", ".parquet")):
            return stamp_of_folder(os.path.dirname(local))
        return stamp_of_files([local])
    return stamp_of_files(webdataset.expand(local)) if webdataset.is_pattern(local) else None


def _local(path: str) -> str:
    # A folder by its real name, since links are judged by it; a file by the name that was given, for its ending.
    absolute = os.path.abspath(os.path.expanduser(path.removeprefix("file://")))
    return os.path.realpath(absolute) if os.path.isdir(absolute) else absolute


def _entries(source: Source, found: Found) -> list[Entry]:
    path = source.path
    if path.startswith("pipe:"):
        raise UserError("commands are never run to read data", where=path, fix="name the files by a path or a URL")
    if path.startswith(hub.PREFIX):
        _only(source, "dataset")
        return hub.entries(path, source, found)
    if is_url(path) and not path.startswith("file://"):
        if webdataset.is_pattern(path):
            return _shards(webdataset.expand(path), source, found)
        return _one_file(path, source, found) if _is_file_name(path) else _tree(remote_tree(path, found), source, found)
    local = _local(path)
    if os.path.isdir(local):
        return _tree(local_tree(local, found), source, found)
    if os.path.isfile(local):
        return _one_file(local, source, found)
    if webdataset.is_pattern(local):
        return _shards(webdataset.expand(local), source, found)
    if source.layout == "dataset" and hub.looks_like_a_name(path):
        return hub.entries(hub.PREFIX + path, source, found)
    raise nothing.no_such_path(path, Path(local))


def _is_file_name(path: str) -> bool:
    return path.lower().endswith((".zip", ".tar", *_PACKED, ".parquet", ".jsonl", ".csv"))


def _only(source: Source, layout: str) -> None:
    if source.layout not in ("auto", layout):
        what = f"layout is '{source.layout}', but this is a {layout}"
        raise UserError(what, where=source.path, fix=f"set layout to {layout}, or to auto")


def _one_file(path: str, source: Source, found: Found) -> list[Entry]:
    """An archive, a shard or a table."""
    name = path.lower()
    pictured = name.endswith(".parquet") and source.layout in ("auto", "parquet")
    if pictured and (source.layout == "parquet" or parquet.holds_pictures(path, source)):
        return parquet.entries([path], source, found)
    if name.endswith((".jsonl", ".csv", ".parquet")):
        _only(source, "metadata")
        root, _, file = path.rpartition("/")
        tree = remote_tree(root, found) if is_url(path) else local_tree(root or "/", found)
        return _tables(source, tree, [file], classify(tree, captions=folder.caption_endings(source)), found)
    local = not is_url(path)
    if name.endswith(".zip") or (local and not name.endswith((".tar", *_PACKED)) and zipfile.is_zipfile(path)):
        return _archive(path, archive.zip_members(path, found), source, found)
    packed = name.endswith(_PACKED)
    if not packed and not name.endswith(".tar") and not (local and tarfile.is_tarfile(path)):
        raise nothing.not_a_source(source.path, os.path.splitext(name)[1])
    members = archive.tar_members(path, found, packed=packed)
    if source.layout == "webdataset":
        entries = webdataset.entries_of(path, members, source, found)
        if not entries and not found.problems:
            inside = archive.tree_of(path, members)
            raise nothing.no_pictures(source, inside, classify(inside), "folder")
        return entries
    return _archive(path, members, source, found, can_be_shard=True)


def _archive(
    path: str, members: Sequence[archive.Member], source: Source, found: Found, *, can_be_shard: bool = False
) -> list[Entry]:
    if source.layout in ("parquet", "webdataset", "dataset"):
        what = f"an archive that is to be read with layout '{source.layout}'"
        raise UserError(what, where=source.path, fix="unpack it and name the folder, or set layout to auto")
    tree = archive.tree_of(path, members)
    if can_be_shard and source.layout == "auto" and source.metadata is None:
        kinds = classify(tree, captions=folder.caption_endings(source))
        tables = table.metadata_tables(source, tree, kinds, Found())
        if not tables and not folder.is_kohya(source, kinds) and webdataset.pairs_up(members, source):
            return webdataset.entries_of(path, members, source, found)
    return _tree(tree, source, found)


def _shards(urls: Sequence[str], source: Source, found: Found) -> list[Entry]:
    """What a pattern names: TAR shards, or tables with pictures."""
    if all(url.lower().endswith(".parquet") for url in urls):
        _only(source, "parquet")
        return parquet.entries(urls, source, found)
    _only(source, "webdataset")
    packed = [url for url in urls if url.lower().endswith(_PACKED)]
    if packed:
        fix = "decompress them to plain .tar files (gunzip, xz -d)"
        raise UserError(f"compressed shards have no random access: {some(packed)}", where=source.path, fix=fix)
    entries = webdataset.entries(urls, source, found)
    if not entries and not found.problems:
        what = f"no pictures found in {len(urls)} shards"
        raise UserError(what, where=source.path, fix="a shard holds KEY.jpg and KEY.txt under one KEY")
    return entries


def _tree(tree: Tree, source: Source, found: Found) -> list[Entry]:
    """A folder or an archive, by its layout."""
    kinds = classify(tree, captions=folder.caption_endings(source))
    layout = _layout(tree, kinds, source, found)
    if layout == "dataset":
        if not isinstance(tree, LocalTree):
            raise UserError("a saved data set is read from this machine only", where=tree.root, fix="copy it here")
        return hub.entries(tree.root, source, found)
    _notice_unread(tree, kinds, layout, found)
    if layout == "parquet":
        names = [name for name in kinds.tables if name.lower().endswith(".parquet")]
        if not names:
            raise nothing.no_pictures(source, tree, kinds, layout)
        chosen = of_split(names, source.split, where=tree.root, found=found)
        return parquet.entries([tree.place(name).url for name in chosen], source, found)
    if layout == "webdataset":
        names = [name for name in kinds.archives if name.lower().endswith(".tar")]
        if not names:
            raise nothing.no_pictures(source, tree, kinds, layout)
        chosen = of_split(names, source.split, where=tree.root, found=found)
        return _shards([tree.place(name).url for name in chosen], source, found)
    if layout == "metadata":
        tables = table.metadata_tables(source, tree, kinds, found)
        if tables:
            return _tables(source, tree, tables, kinds, found)
        fix = f"name one of these with `metadata`: {some(kinds.tables)}" if kinds.tables else "set layout to folder"
        raise UserError("there is no metadata.jsonl, .csv or .parquet in it", where=tree.root, fix=fix)
    if not kinds.pictures:
        if found.problems:
            return []
        raise nothing.no_pictures(source, tree, kinds, layout)
    if layout == "kohya":
        return folder.kohya_entries(source, tree, kinds, found)
    two = pairs.folders(kinds) if source.pairs != "none" else None
    if two is not None:
        return pairs.folder_entries(source, tree, kinds, two, found)
    folder.notice_repeat_folders(source, kinds, found)
    return folder.entries(source, tree, kinds, found)


def _layout(tree: Tree, kinds: Kinds, source: Source, found: Found) -> str:
    tables = [name for name in kinds.tables if posixpath.basename(name) in _METADATA]
    if source.layout != "auto":
        if source.layout in ("folder", "kohya") and tables:
            found.notices.append(f"{tree.root}: not read, because layout is '{source.layout}': {some(tables)}")
        return source.layout
    if source.metadata is not None:
        return "metadata"
    if hub.is_saved(tree):
        return "dataset"
    parquets = [name for name in kinds.tables if name.lower().endswith(".parquet")]
    if tables:
        at_root = [name for name in tables if name in parquets and isinstance(tree, LocalTree)]
        if at_root == tables and parquet.holds_pictures(tree.place(tables[0]).url, source):
            return "parquet"
        return "metadata"
    if kinds.pictures:
        return "kohya" if folder.is_kohya(source, kinds) else "folder"
    shards = [name for name in kinds.archives if name.lower().endswith(".tar")]
    return "parquet" if parquets else "webdataset" if shards else "folder"


_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def _tables(source: Source, tree: Tree, files: Sequence[str], kinds: Kinds, found: Found) -> list[Entry]:
    """The pictures that tables list; where tables are only in sub-folders, those outside them with their side files."""
    entries: list[Entry] = []
    listed: set[str] = set()
    for file in files:
        try:
            entries += table.entries(source, tree, file, found, listed)
        except UserError as error:
            found.problems.append(error)
    folders = tuple(f"{file.rpartition('/')[0]}/" for file in files if "/" in file)
    if len(files) > 1 or (source.metadata is None and folders):
        found.notices.append(f"{tree.root}: captions come from {some(files)}")
    left = [(stem, name) for stem, name in kinds.pictures if name not in listed]
    masks = {stem: tree.place(name) for stem, name in kinds.masks.items()}
    if source.metadata is None and folders and len(folders) == len(files):
        outside = [(stem, name) for stem, name in left if not name.startswith(folders)]
        left = [(stem, name) for stem, name in left if name.startswith(folders)]
        if outside:
            # Masks are matched once, for all pictures together.
            beside = {stem: kinds.sides[stem] for stem, _ in outside if stem in kinds.sides}
            rest = Kinds(pictures=outside, sides=beside, others=kinds.others)
            entries += folder.entries(source.model_copy(update={"mask": "none"}), tree, rest, found)
    if left:
        names = some(name for _, name in left)
        found.notices.append(f"{tree.root}: pictures that {some(files)} does not list are not used: {names}")
    sides = [side for stem in {name.rpartition(".")[0] for name in listed} for side in kinds.sides.get(stem, ())]
    if sides:
        found.notices.append(
            f"{tree.root}: {len(sides)} caption files beside the pictures are not read, because {some(files)} gives "
            f"the captions: {some(sorted(sides))}"
        )
    return with_masks(source, entries, masks, found)


def _notice_unread(tree: Tree, kinds: Kinds, layout: str, found: Found) -> None:
    if kinds.unread:
        counts: dict[str, int] = {}
        for name in kinds.unread:
            ending = "." + name.rpartition(".")[2].lower()
            counts[ending] = counts.get(ending, 0) + 1
        told = ", ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))
        found.notices.append(
            f"{tree.root}: not read, convert them to PNG or JPEG to use them: {told} ({some(kinds.unread)})"
        )
    if kinds.odd_masks:
        found.notices.append(
            f"{tree.root}: a mask is one NAME-masklabel.png, so these are not used: {some(kinds.odd_masks)}"
        )
    if layout in ("parquet", "webdataset"):
        if kinds.pictures:
            left = some(name for _, name in kinds.pictures)
            found.notices.append(f"{tree.root}: not used, because layout is '{layout}': {left}")
        return
    if kinds.archives and kinds.pictures:
        found.notices.append(f"{tree.root}: archives beside the pictures are not read: {some(kinds.archives)}")
    others = [name for name in kinds.tables if posixpath.basename(name) not in _METADATA]
    if others and layout != "metadata" and kinds.pictures:
        found.notices.append(f"{tree.root}: tables that are not read, name one with `metadata`: {some(others)}")
