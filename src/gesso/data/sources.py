"""Folders of captioned pictures -> records. All that is wrong is found in one look; nothing is dropped silently."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gesso.config.run import Source
from gesso.data.images import EXTENSIONS
from gesso.data.metadata import Entry, Metadata, read_metadata
from gesso.data.texts import read_text
from gesso.errors import Problems, UserError

MAX_CAPTION = 10_000
"""Characters; longer captions are files that are no captions."""

_UNREAD = (".heic", ".heif", ".jxl", ".psd", ".svg", ".jp2", ".exr", ".hdr", ".tga", ".dng", ".cr2", ".nef", ".jfif")
_REPEATS_FOLDER = re.compile(r"^(\d+)_(.+)$")


@dataclass(frozen=True)
class Record:
    """One picture with its caption, not opened yet."""

    path: Path
    caption: str
    source_index: int
    repeats: int
    weight: float


@dataclass
class Found:
    """What one source holds: records, problems that must be mended, and notices worth reading."""

    records: list[Record] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


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
        root = _root(source.path)
        images = _list_images(root, found)
        listing = _metadata_file(source, root)
        if listing is not None:
            pairs = _from_metadata(source, root, listing, images, found)
        else:
            pairs = _from_side_files(source, images, found)
        if not pairs and not found.problems:
            raise _nothing(root)
    except UserError as error:
        found.problems.append(error)
        return found
    found.records = _with_captions(source, index, pairs, found)
    return found


def some(names: Iterable[str], most: int = 10) -> str:
    """A few of the names and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _root(path: Path) -> Path:
    folder = path.expanduser()
    if folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        fix = "unpack it and name the folder" if folder.suffix in (".zip", ".tar", ".gz") else "name its folder"
        raise UserError("this is a file; a source is a folder of pictures", where=str(path), fix=fix)
    parent = folder.absolute().parent
    while not parent.is_dir():
        parent = parent.parent
    names = [p.name for p in sorted(parent.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    close = difflib.get_close_matches(folder.name, names, n=1)
    there = f"did you mean {parent / close[0]}?" if close else f"{parent} holds: {some(names) or 'no folders'}"
    raise UserError("there is no such folder", where=str(path), fix=there)


def _list_images(root: Path, found: Found) -> list[Path]:
    images, unread, links = [], Counter[str](), []
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not _hidden(n))
        links += [str((Path(folder) / n).relative_to(root)) for n in names if (Path(folder) / n).is_symlink()]
        for name in sorted(f for f in files if not _hidden(f)):
            path = Path(folder) / name
            ending = path.suffix.lower()
            if ending in _UNREAD:
                unread[ending] += 1
            if ending not in EXTENSIONS:
                continue
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                found.problems.append(_outside(path, "this is a link to a file outside the folder"))
            else:
                images.append(path)
    if unread:
        kinds = ", ".join(f"{count} {ending}" for ending, count in sorted(unread.items()))
        found.notices.append(f"{root}: not read, convert them to PNG or JPEG to use them: {kinds}")
    if links:
        found.notices.append(f"{root}: links to folders are not followed: {some(links)}")
    return images


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _outside(path: Path | str, what: str) -> UserError:
    return UserError(what, where=str(path), fix="keep the pictures inside the source's folder")


def _metadata_file(source: Source, root: Path) -> Path | None:
    if source.metadata is None:
        default = root / "metadata.jsonl"
        return default if default.is_file() else None
    path = root / source.metadata
    if not path.resolve().is_relative_to(root):
        raise _outside(path, "the metadata file is outside the source's folder")
    if path.suffix.lower() != ".jsonl":
        raise UserError("metadata must be a .jsonl file: one JSON object a line", where=str(path), fix="convert it")
    if not path.is_file():
        there = [str(p.relative_to(root)) for p in sorted(root.rglob("*.jsonl"))]
        fix = (
            f"the folder holds: {some(there)}" if there else "remove `metadata` to use caption files beside the images"
        )
        raise UserError("there is no such metadata file", where=str(path), fix=fix)
    return path


def _from_side_files(source: Source, images: Sequence[Path], found: Found) -> list[Entry]:
    ending = source.caption_extension
    ending = ending if ending.startswith(".") else f".{ending}"
    entries: list[Entry] = []
    owners: dict[Path, Path] = {}
    for path in images:
        side = path.with_suffix(ending)
        if side in owners:
            found.problems.append(
                UserError(
                    f"{owners[side].name} and {path.name} would share the caption file {side.name}",
                    where=str(path),
                    fix="rename one of the pictures and give it a caption file of its own",
                )
            )
        owners[side] = path
        try:
            caption = read_text(side) if side.is_file() else None
        except UserError as error:
            found.problems.append(error)
            continue
        entries.append(Entry(path, caption, str(side)))
    orphans = [
        str(p)
        for folder in sorted({path.parent for path in images})
        for p in sorted(folder.glob(f"*{ending}"))
        if p not in owners and not _hidden(p.name)
    ]
    if orphans:
        found.notices.append(f"caption files without a picture: {some(orphans)}")
    _notice_repeat_folders(source, images, found)
    return entries


def _notice_repeat_folders(source: Source, images: Sequence[Path], found: Found) -> None:
    folders = sorted({path.parent.name for path in images})
    named = [name for name in folders if _REPEATS_FOLDER.match(name)]
    if named and source.repeats == 1:
        found.notices.append(
            f"{source.path}: folder names with a number in front do not set repeats ({some(named)}); "
            "make each a source of its own with `repeats`"
        )


def _from_metadata(source: Source, root: Path, file: Path, images: Sequence[Path], found: Found) -> list[Entry]:
    metadata: Metadata = read_metadata(
        file, root=root, image_column=source.image_column, caption_column=source.caption_column
    )
    found.problems += metadata.problems
    if metadata.caption_column is None and source.missing_captions == "error":
        columns = ", ".join(metadata.columns)
        raise UserError(
            f"no caption column (text, prompt or caption); the columns are: {columns}",
            where=f"{file}:1",
            fix="name it with caption_column, or set missing_captions",
        )
    listed = {entry.path.resolve() for entry in metadata.entries}
    unlisted = [str(p.relative_to(root)) for p in images if p.resolve() not in listed]
    if unlisted:
        found.notices.append(f"{file}: pictures in the folder that it does not list are not used: {some(unlisted)}")
    return metadata.entries


def _with_captions(source: Source, index: int, entries: Sequence[Entry], found: Found) -> list[Record]:
    missing, made = [], []
    for entry in entries:
        caption = " ".join(line.strip() for line in (entry.caption or "").splitlines() if line.strip())
        try:
            _check_caption(entry.caption or "", entry.where)
        except UserError as error:
            found.problems.append(error)
            continue
        if caption:
            caption = _with_trigger(caption, source.trigger)
        else:
            missing.append(entry)
            caption = (source.trigger or "") if source.missing_captions == "trigger" else ""
        made.append(Record(entry.path, caption, index, source.repeats, source.weight))
    if missing and source.missing_captions == "error":
        found.problems.append(
            UserError(
                f"{len(missing)} of {len(entries)} pictures have no caption: {some(e.where for e in missing)}",
                where=str(source.path),
                fix="write the missing or empty captions, or set missing_captions to empty or trigger",
            )
        )
    if missing and source.missing_captions == "trigger" and not source.trigger:
        found.problems.append(
            UserError(
                "missing_captions is 'trigger', but the source has no trigger",
                where=f"data.sources.{index}.trigger",
                fix="set the trigger word",
            )
        )
    return made


def _with_trigger(caption: str, trigger: str | None) -> str:
    # As a whole word and in any case, as the tokenisers see it: "sks" is not in "asks".
    if not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{trigger}, {caption}"


def _check_caption(caption: str, where: str) -> None:
    if len(caption) > MAX_CAPTION:
        raise UserError(
            f"a caption of {len(caption)} characters (at most {MAX_CAPTION})", where=where, fix="shorten it"
        )
    for character in caption:
        # Control characters and half of a surrogate pair: tokenisers fail on them or drop them.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise UserError(
                f"the caption holds the control character U+{ord(character):04X}", where=where, fix="remove it"
            )


def _nothing(root: Path) -> UserError:
    found = Counter(p.suffix.lower() or "no ending" for p in root.rglob("*") if p.is_file() and not _hidden(p.name))
    there = ", ".join(f"{count} {ending}" for ending, count in sorted(found.items())) or "nothing"
    near = _nearest(root)
    return UserError(
        f"no pictures found; looked for {' '.join(EXTENSIONS)} in it and its sub-folders, found: {there}",
        where=str(root),
        fix=f"{near} holds pictures" if near else "put the pictures there, or name another folder",
    )


def _nearest(root: Path) -> Path | None:
    """The closest folder beside or above `root` that holds pictures."""
    beside = [p for p in sorted(root.parent.iterdir()) if p.is_dir() and p != root and not _hidden(p.name)]
    below = [q for p in beside for q in _folders(p)]
    for folder in [root.parent, *beside, *below, root.parent.parent]:
        if any(p.suffix.lower() in EXTENSIONS and not _hidden(p.name) for p in _files(folder)):
            return folder
    return None


def _folders(path: Path) -> list[Path]:
    try:
        return [p for p in sorted(path.iterdir()) if p.is_dir() and not _hidden(p.name)]
    except OSError:
        return []  # only a hint is looked for: a folder we may not read is no hint


def _files(path: Path) -> list[Path]:
    try:
        return [p for p in path.iterdir() if p.is_file()]
    except OSError:
        return []
