"""`metadata.jsonl`: one JSON object a line, with a column for the picture's path and one for its caption."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gesso.data.texts import read_text
from gesso.errors import UserError

IMAGE_COLUMNS = ("file_name", "image_path", "image")
CAPTION_COLUMNS = ("text", "prompt", "caption")


@dataclass(frozen=True)
class Entry:
    """A picture, its caption as written (None: there is none), and where that was looked for."""

    path: Path
    caption: str | None
    where: str


@dataclass
class Metadata:
    """A read metadata file; `columns` are those of its first row."""

    columns: tuple[str, ...] = ()
    image_column: str | None = None
    caption_column: str | None = None
    entries: list[Entry] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)


def read_metadata(file: Path, *, root: Path, image_column: str | None, caption_column: str | None) -> Metadata:
    """The rows of a metadata file; bad rows are collected as problems with their line.

    Paths are relative to the file's folder, to `images/` beside it, or to `root`, which none may leave.
    Raises `UserError` if the file as a whole cannot be used (encoding, no rows, no image column).
    """
    metadata = Metadata()
    rows: list[tuple[int, dict[str, Any]]] = []
    # Only real line feeds end a line: JSON strings may hold U+2028 and the like.
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((number, _parse(line, f"{file}:{number}")))
            except UserError as error:
                metadata.problems.append(error)
    if not rows:
        if metadata.problems:
            return metadata
        raise UserError("the metadata file has no rows", where=str(file), fix='add lines like {"file_name": "a.png"}')
    _choose_columns(metadata, rows[0], file, image_column, caption_column)
    for number, row in rows:
        try:
            metadata.entries.append(_entry(metadata, row, file, number, root))
        except UserError as error:
            metadata.problems.append(error)
    return metadata


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not JSON: {error}", where=where, fix="write one JSON object on each line") from error
    if not isinstance(row, dict):
        raise UserError("not a JSON object", where=where, fix='write {"file_name": ..., "text": ...}')
    return row


def _choose_columns(
    metadata: Metadata, first: tuple[int, dict[str, Any]], file: Path, image: str | None, caption: str | None
) -> None:
    number, row = first
    metadata.columns = tuple(row)
    there = ", ".join(row) or "none"
    for wanted, key in ((image, "image_column"), (caption, "caption_column")):
        if wanted is not None and wanted not in row:
            raise UserError(
                f"there is no column '{wanted}'; the columns are: {there}", where=f"{file}:{number}", fix=f"set {key}"
            )
    metadata.image_column = image or next((c for c in IMAGE_COLUMNS if c in row), None)
    metadata.caption_column = caption or next((c for c in CAPTION_COLUMNS if c in row), None)
    if metadata.image_column is None:
        raise UserError(
            f"no image column ({', '.join(IMAGE_COLUMNS)}); the columns are: {there}",
            where=f"{file}:{number}",
            fix="name it with image_column",
        )


def _entry(metadata: Metadata, row: dict[str, Any], file: Path, number: int, root: Path) -> Entry:
    where = f"{file}:{number}"
    for column in (metadata.image_column, metadata.caption_column):
        if column is not None and column not in row:
            raise UserError(
                f"no column '{column}'; this row has: {', '.join(row) or 'none'}", where=where, fix="add it"
            )
    name = row[metadata.image_column]  # type: ignore[index]
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"the image path is not text: {name!r}", where=where, fix="write the picture's path")
    caption = row[metadata.caption_column] if metadata.caption_column is not None else None
    if caption is not None and not isinstance(caption, str):
        raise UserError(f"the caption is not text: {caption!r}", where=where, fix="write it as a string")
    return Entry(_locate(name, file, root, where), caption, where)


def _locate(name: str, file: Path, root: Path, where: str) -> Path:
    if "\x00" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise UserError(f"'{name}' is not a path relative to the folder", where=where, fix="write a relative path")
    base = file.parent
    folders = list(dict.fromkeys([base, base / "images", root]))
    names = [name, name.replace("\\", "/")] if "\\" in name else [name]
    for path in [folder / each for each in names for folder in folders]:
        if not path.resolve().is_relative_to(root):
            raise UserError(f"'{name}' leads out of the folder", where=where, fix="keep pictures inside the folder")
        if path.is_file():
            return path
    wanted = PurePosixPath(names[-1])
    near = [
        p.name for folder in folders if (folder / wanted.parent).is_dir() for p in (folder / wanted.parent).iterdir()
    ]
    close = difflib.get_close_matches(wanted.name, sorted(near), n=1, cutoff=0.5)
    raise UserError(
        f"there is no picture '{name}' (looked in {', '.join(str(folder) for folder in folders)})",
        where=where,
        fix=f"did you mean {close[0]}?" if close else "add the picture or remove the line",
    )
