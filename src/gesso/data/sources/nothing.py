"""What to say when a path leads to nothing: what was looked for, what is there, and what near it would work."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from gesso.config.run import Source
from gesso.data.images import EXTENSIONS
from gesso.data.sources.found import counted, some
from gesso.data.sources.hub import looks_like_a_name
from gesso.data.sources.tree import ARCHIVE_ENDINGS, ArchiveTree, Kinds, Tree, is_hidden
from gesso.errors import UserError


def no_such_path(path: str, local: Path) -> UserError:
    """There is neither file nor folder: what is near it?"""
    parent = local.parent
    while not parent.is_dir():
        parent = parent.parent
    names = [p.name for p in _entries(parent) if p.is_dir() or p.name.lower().endswith((*ARCHIVE_ENDINGS, ".parquet"))]
    close = difflib.get_close_matches(local.name, names, n=1)
    there = f"did you mean {parent / close[0]}?" if close else f"{parent} holds: {some(names) or 'no folders'}"
    if looks_like_a_name(path) and not close:
        there += f"; a data set of the Hugging Face hub is written hub:{path}"
    what = (
        "there is no such file" if Path(path).suffix.lower() in (*ARCHIVE_ENDINGS, ".parquet", ".jsonl", ".csv") else ""
    )
    return UserError(what or "there is no such folder", where=path, fix=there)


def not_a_source(path: str, ending: str) -> UserError:
    """A file that is none of those that a source can be."""
    if ending in EXTENSIONS:
        what, fix = "this is one picture; a source is a set of them", "name its folder"
    elif ending in (".rar", ".7z", ".gz", ".xz", ".zst", ".bz2"):
        what, fix = f"{ending} files are not read", "unpack it and name the folder, or repack it as .zip or .tar"
    else:
        what = "this is a file; a source is a folder, a .zip or .tar, or a .parquet, .jsonl or .csv table"
        fix = "name its folder"
    return UserError(what, where=path, fix=fix)


def no_pictures(source: Source, tree: Tree, kinds: Kinds, layout: str) -> UserError:
    """A folder or archive in which the layout finds nothing."""
    counts = Counter(_ending(name) for name in tree.names)
    there = ", ".join(f"{count} {ending}" for ending, count in sorted(counts.items())) or "nothing"
    looked = f"looked for {' '.join(EXTENSIONS)} in it and its sub-folders, found: {there}"
    if layout == "parquet":
        looked = f"looked for .parquet tables in it, found: {there}"
    elif layout in ("webdataset", "dataset"):
        looked = f"looked for {'.tar shards' if layout == 'webdataset' else 'what `datasets` saves'}, found: {there}"
    return UserError(f"no pictures found; {looked}", where=tree.root, fix=_fix(source, tree, kinds, layout))


def _fix(source: Source, tree: Tree, kinds: Kinds, layout: str) -> str:
    tars = [name for name in kinds.archives if name.lower().endswith(".tar")]
    parquets = [name for name in kinds.tables if name.lower().endswith(".parquet")]
    if kinds.pictures:
        return f"it holds {counted(len(kinds.pictures), 'picture')}: set layout to folder, or to auto"
    if tars and layout != "webdataset" and source.layout != "auto":
        return "set layout to webdataset, or to auto"
    if parquets and layout != "parquet" and source.layout != "auto":
        return "set layout to parquet, or to auto"
    if kinds.masks or kinds.odd_masks:
        masks = some([*kinds.masks.values(), *kinds.odd_masks])
        return f"put the pictures beside their masks; these are masks, not pictures: {masks}"
    if kinds.archives and isinstance(tree, ArchiveTree):
        return f"unpack it: archives in an archive are not read ({some(kinds.archives)})"
    if kinds.archives:
        return f"name the archive itself: {tree.shown(kinds.archives[0])}"
    if kinds.unread:
        return f"convert these to PNG or JPEG: {some(kinds.unread)}"
    root = Path(tree.root)
    if root.is_dir():
        hidden = next(_hidden_pictures(root), None)
        if hidden is not None:
            return f"{hidden} holds pictures, but hidden folders are not read: name it itself, or rename it"
        near = _nearest(root)
        if near is not None:
            return f"{near} holds pictures"
        archives = [p for p in _entries(root.parent) if p.is_file() and p.name.lower().endswith(ARCHIVE_ENDINGS)]
        if archives:
            return f"name the archive beside it: {archives[0]}"
    return "put the pictures there, or name another folder"


def _ending(name: str) -> str:
    base = name.rpartition("/")[2].lower()
    for ending in ARCHIVE_ENDINGS:
        if base.endswith(ending):
            return ending
    return os.path.splitext(base)[1] or "no ending"


def _nearest(root: Path) -> Path | None:
    """The closest folder beside or above `root` that holds pictures."""
    beside = [p for p in _entries(root.parent) if p.is_dir() and p != root]
    below = [q for p in beside for q in _entries(p) if q.is_dir()]
    for folder in [root.parent, *beside, *below, root.parent.parent]:
        if _holds_pictures(folder):
            return folder
    return None


def _hidden_pictures(root: Path) -> Iterator[Path]:
    try:
        hidden = sorted(p for p in root.iterdir() if p.is_dir() and is_hidden(p.name))
    except OSError:
        return
    yield from (folder for folder in hidden if _holds_pictures(folder))


def _holds_pictures(folder: Path) -> bool:
    return any(p.suffix.lower() in EXTENSIONS for p in _entries(folder))


def _entries(path: Path) -> list[Path]:
    try:
        return sorted(p for p in path.iterdir() if not is_hidden(p.name))
    except OSError:
        return []  # only a hint is looked for: a folder we may not read is no hint
