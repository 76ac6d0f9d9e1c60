"""Pictures with caption files beside them, and kohya's trees of folders named REPEATS_CONCEPT."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from gesso.config.run import Source
from gesso.data.sources.found import Entry, Found, counted, listed, some
from gesso.data.sources.policy import with_masks
from gesso.data.sources.tree import CAPTION_ENDINGS, ArchiveTree, Kinds, Tree
from gesso.data.texts import decode_text
from gesso.errors import UserError

CAPTION_KEYS = ("caption", "text", "prompt", "tags")
"""Keys of a .json caption file, in the order in which they are looked for."""

_REPEATS = re.compile(r"^(\d+)_(.+)$")


def caption_endings(source: Source) -> tuple[str, ...]:
    """Endings of caption files, lower case with their dot."""
    if source.caption_extension is None:
        return CAPTION_ENDINGS
    return ("." + source.caption_extension.lstrip(".").lower(),)


def has_repeats(folder: str) -> bool:
    """Whether a folder's name is as kohya's: REPEATS_CONCEPT."""
    return _REPEATS.match(folder) is not None


def is_kohya(source: Source, kinds: Kinds) -> bool:
    """Whether all pictures lie in sub-folders that say how often each is to be seen."""
    if source.repeats != 1 or not kinds.pictures:
        return False
    folders = {name.partition("/")[0] if "/" in name else "" for _, name in kinds.pictures}
    return all(map(has_repeats, folders))


def entries(source: Source, tree: Tree, kinds: Kinds, found: Found) -> list[Entry]:
    """The pictures of a tree with the captions beside them."""
    sides, shared, doubled = _sides_of(kinds)
    if doubled:
        found.problems.append(
            UserError(
                f"{counted(len(doubled), 'picture')} with several caption files each: {listed(doubled)}",
                where=tree.root,
                fix="set caption_extension to the one that counts, or remove the others",
            )
        )
    for first, second, one in shared:
        what = f"{_base(first)} and {_base(second)} would share the caption file {_base(one)}"
        fix = "rename one of the pictures and give it a caption file of its own"
        found.problems.append(UserError(what, where=tree.shown(second), fix=fix))
    expected = caption_endings(source)
    files = [side for side in sides if side is not None]
    captions = dict(zip(files, tree.texts(files), strict=True))
    made = []
    for (stem, name), side in zip(kinds.pictures, sides, strict=True):
        beside = "" if side is not None else kinds.others.get(stem, [""])[0]
        try:
            where = tree.shown(side if side is not None else stem + expected[0])
            caption = None if side is None else read_caption(captions[side], where, key=source.caption_column)
        except UserError as error:
            found.problems.append(error)
            continue
        made.append(Entry(name, tree.place(name), caption, where, beside=beside))
    _notice_orphans(kinds, tree, expected, found)
    return with_masks(source, made, {stem: tree.place(name) for stem, name in kinds.masks.items()}, found)


def kohya_entries(source: Source, tree: Tree, kinds: Kinds, found: Found) -> list[Entry]:
    """As `entries`; a folder's name gives the repeats and the concept of what is in it."""
    outside = [name for _, name in kinds.pictures if not _REPEATS.match(name.partition("/")[0]) or "/" not in name]
    if outside:
        found.problems.append(
            UserError(
                f"{counted(len(outside), 'picture')} not in a sub-folder named REPEATS_CONCEPT: {listed(outside)}",
                where=tree.root,
                fix=_other_root(tree, outside) or 'name the folders as in "10_sks dog", or set layout to folder',
            )
        )
    folders: dict[str, tuple[float, str]] = {}
    for _, name in kinds.pictures:
        folder = name.partition("/")[0]
        match = _REPEATS.match(folder)
        if match and folder not in folders:
            folders[folder] = (float(match[1]), match[2])
    never = [folder for folder, (repeats, _) in folders.items() if repeats == 0]
    if never:
        found.notices.append(f"{tree.root}: left out, because their names say 0 repeats: {some(never)}")
    told = [f"{folder}: {repeats:g} times, '{words}'" for folder, (repeats, words) in folders.items() if repeats]
    if told:
        found.notices.append(f"{tree.root}: the folders' names give repeats and concepts: {some(told)}")
    made = []
    for entry in entries(source, tree, kinds, found):
        repeats, words = folders.get(entry.name.partition("/")[0], (1.0, ""))
        if repeats:
            made.append(entry._replace(concept=words, repeats=repeats))
    return made


def _other_root(tree: Tree, pictures: Sequence[str]) -> str:
    """What to name instead of a folder that is not the one around those named REPEATS_CONCEPT, if that is clear."""
    if isinstance(tree, ArchiveTree):
        return ""
    around, _, own = tree.root.rpartition("/")
    if has_repeats(own):
        return f"name the folder that it lies in: {around}"
    inner = {_before_repeats(name) for name in pictures}
    only = inner.pop() if len(inner) == 1 else ""
    return f"name the folder in it: {tree.shown(only)}" if only else ""


def _before_repeats(name: str) -> str:
    """The folders in which one that is named REPEATS_CONCEPT lies; empty if none is."""
    parts = name.split("/")[:-1]
    return next(("/".join(parts[:i]) for i, part in enumerate(parts) if has_repeats(part)), "")


def notice_repeat_folders(source: Source, kinds: Kinds, found: Found) -> None:
    """Say that folder names with a number in front are not read as repeats here."""
    named = sorted({part for _, name in kinds.pictures for part in name.split("/")[:-1] if _REPEATS.match(part)})
    if named:
        found.notices.append(
            f"{source.path}: folder names with a number in front do not set repeats here ({some(named)}); for that, "
            "name the folder that they lie in, with layout kohya"
        )


def read_caption(data: bytes | UserError, where: str, *, key: str | None = None) -> str:
    """The caption in a caption file's bytes; `where` ends as the file does, `key` is the caption's in a .json file."""
    if isinstance(data, UserError):
        raise data
    text = decode_text(data, where=where)
    if where[-5:].lower() != ".json":
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error}", where=f"{where}:{error.lineno}", fix="mend it") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", where=where, fix="mend it") from error
    if isinstance(value, dict):
        keys = CAPTION_KEYS if key is None else (key,)
        there = next((k for k in keys if k in value), None)
        if there is None:
            what = f"none of the keys {', '.join(keys)} in it; its keys are: {some(value) or 'none'}"
            raise UserError(what, where=where, fix="name the caption's key with caption_column")
        return caption_text(value[there], where, tags=there == "tags") or ""
    return caption_text(value, where) or ""


def caption_text(value: Any, where: str, *, tags: bool = False) -> str | None:
    """A caption as text: a list is several lines, or with `tags` one line of tags."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return (", " if tags else "\n").join(value)
    raise UserError(f"the caption is not text: {_short(value)}", where=where, fix="write it as a string")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _sides_of(kinds: Kinds) -> tuple[list[str | None], list[tuple[str, str, str]], list[str]]:
    """Each picture's caption file; pairs that would share one; pictures that have several."""
    sides: list[str | None] = []
    shared: list[tuple[str, str, str]] = []
    doubled: list[str] = []
    owners: dict[str, str] = {}
    for stem, name in kinds.pictures:
        own = kinds.sides.get(stem)
        sides.append(own[0] if own else None)
        if own is None:
            continue
        if len(own) > 1:
            doubled.append(f"{name} ({', '.join(_base(side) for side in own)})")
        if stem in owners:
            shared.append((owners[stem], name, own[0]))
        owners[stem] = name
    return sides, shared, doubled


def _notice_orphans(kinds: Kinds, tree: Tree, endings: Sequence[str], found: Found) -> None:
    owned = {stem for stem, _ in kinds.pictures}
    folders = {stem.rpartition("/")[0] for stem in owned}
    lost = [
        tree.shown(side)
        for stem, files in kinds.sides.items()
        if stem not in owned and stem.rpartition("/")[0] in folders
        for side in files
        # A .json file alone is as likely a tool's settings.
        if endings == (".json",) or not side.lower().endswith(".json")
    ]
    if lost:
        found.notices.append(f"caption files without a picture: {some(lost)}")
