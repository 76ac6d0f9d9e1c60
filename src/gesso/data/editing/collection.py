"""A folder of pictures as something to edit: which files belong to a picture, and where its caption is written."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gesso.data.editing.journal import Transaction
from gesso.data.editing.tables import CaptionTable, TableRow
from gesso.data.images import EXTENSIONS
from gesso.data.sources.folder import CAPTION_KEYS, read_caption
from gesso.data.sources.tree import CAPTION_ENDINGS, MASK, TABLE_ENDINGS, is_hidden
from gesso.data.texts import read_text
from gesso.errors import UserError

_TABLES = tuple(f"metadata{ending}" for ending in TABLE_ENDINGS)


@dataclass
class Item:
    """One picture; `caption` as written, without blanks around it, None where there is none."""

    picture: Path
    name: str
    """Relative to the folder, with forward slashes."""
    caption: str | None
    side: Path | None
    """Its caption file, there or to be made; None where captions are in a table."""
    row: TableRow | None = None


class Library:
    """The pictures of a folder and its sub-folders, hidden ones aside, sorted by name.

    Captions are in `metadata` (a .jsonl or .csv file; unless named, metadata.jsonl or metadata.csv where there is
    one), else in files beside the pictures with `extension` (unless named, whichever is there, else .txt).
    """

    def __init__(
        self,
        folder: Path,
        *,
        metadata: Path | None = None,
        extension: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        self.folder = folder.expanduser().resolve()
        if not self.folder.is_dir():
            raise UserError("there is no such folder", where=str(folder), fix="name a folder of pictures on this disk")
        files = _files(self.folder)
        pictures = [path for path in files if is_picture(path)]
        if not pictures:
            known = " ".join(EXTENSIONS)
            raise UserError("no pictures found", where=str(folder), fix=f"put pictures there: {known}")
        # Endings count in any case: a camera's "A.JPG" may have a caption "A.TXT".
        self._sides = {path.with_suffix(path.suffix.lower()): path for path in files if not is_picture(path)}
        file = self._table_file(metadata)
        self.table = (
            None if file is None else CaptionTable(file, image_column=image_column, caption_column=caption_column)
        )
        rows = {row.picture: row for row in self.table.rows if row.picture} if self.table is not None else {}
        endings = (
            CAPTION_ENDINGS if extension is None else (extension if extension.startswith(".") else f".{extension}",)
        )
        stems = Counter(path.with_suffix("") for path in pictures)
        self.shared = {path for path in pictures if stems[path.with_suffix("")] > 1}
        self._unsaved = False
        self.items: list[Item] = []
        for path in pictures:
            name = path.relative_to(self.folder).as_posix()
            if self.table is None:
                side = self._side(path, endings)
                self.items.append(Item(path, name, _read_caption(side), side))
            else:
                row = rows.get(path)
                caption = (row.caption or "").strip() or None if row is not None else None
                self.items.append(Item(path, name, caption, None, row))

    def write(self, edit: Transaction, item: Item, caption: str) -> None:
        """Give a picture a caption; in a table, `flush` writes it."""
        if self.table is not None:
            self._unsaved = True
            if item.row is None:
                name = item.picture.relative_to(self.table.file.parent.resolve()).as_posix()
                item.row = self.table.add(name, caption, picture=item.picture)
            else:
                self.table.set_caption(item.row, caption)
        elif item.side is not None:
            if item.picture in self.shared:
                raise UserError(
                    "another picture has the same name with another ending, and so the same caption file",
                    where=str(item.picture),
                    fix="rename one of them",
                )
            edit.write(item.side, _side_content(item.side, caption))
        item.caption = caption

    def drop_rows(self, pictures: Sequence[Path]) -> None:
        """Take pictures out of the table, if there is one; `flush` writes it."""
        if self.table is not None:
            gone = set(pictures)
            kept = [row for row in self.table.rows if row.picture not in gone]
            self._unsaved = self._unsaved or len(kept) < len(self.table.rows)
            self.table.rows = kept

    def flush(self, edit: Transaction) -> None:
        """Write the table, if captions in it were changed."""
        if self.table is not None and self._unsaved:
            edit.write(self.table.file.resolve(), self.table.content())
            self._unsaved = False

    def belongings(self, item: Item) -> list[Path]:
        """The files that belong to this picture alone: captions and mask."""
        if item.picture in self.shared:
            return []
        stem = item.picture.with_suffix("")
        captions = [self._sides.get(stem.with_name(f"{stem.name}{ending}")) for ending in CAPTION_ENDINGS]
        mask = stem.with_name(f"{stem.name}{MASK}.png")
        found = dict.fromkeys([*captions, item.side, mask])
        return [path for path in found if path is not None and path.is_file()]

    def _side(self, picture: Path, endings: Sequence[str]) -> Path:
        stem = picture.with_suffix("")
        usual = [stem.with_name(f"{stem.name}{ending}") for ending in endings]
        return next((self._sides[path] for path in usual if path in self._sides), usual[0])

    def _table_file(self, metadata: Path | None) -> Path | None:
        if metadata is not None:
            file = metadata if metadata.is_absolute() else self.folder / metadata
            if not file.is_file():
                raise UserError("there is no such metadata file", where=str(file))
            return file
        below = [path for path in self._sides.values() if path.name in _TABLES]
        here = [self.folder / name for name in _TABLES if self.folder / name in below]
        if below and not here:
            raise UserError(
                "the captions are in a table in a sub-folder", where=str(below[0]), fix=f"edit {below[0].parent} itself"
            )
        return here[0] if here else None


def is_picture(path: Path) -> bool:
    """Whether a file is a picture by its name; the masks of others are none."""
    return path.suffix.lower() in EXTENSIONS and not path.stem.endswith(MASK)


def _files(folder: Path) -> list[Path]:
    """The files below a folder, by name, without hidden ones."""
    found = []
    for place, names, files in os.walk(folder):
        names[:] = [name for name in names if not is_hidden(name)]
        found += [Path(place) / name for name in files if not is_hidden(name)]
    return sorted(found)


def _read_caption(side: Path) -> str | None:
    if not side.is_file():
        return None
    text = read_caption(side.read_bytes(), str(side))
    return text.replace("\r\n", "\n").strip() or None


def _side_content(side: Path, caption: str) -> bytes:
    """What the caption file should hold; line ends and what else is in it stay."""
    before = read_text(side) if side.is_file() else ""
    text = caption
    if side.suffix.lower() == ".json":
        value = _put(json.loads(before) if before else {}, caption)
        text = json.dumps(value, ensure_ascii=False, indent=2 if "\n" in before.strip() else None)
    text += "\n" if not before or before.endswith("\n") else ""
    return (text.replace("\n", "\r\n") if "\r\n" in before else text).encode()


def _put(value: Any, caption: str) -> Any:
    """A .json caption file's content with another caption, in the form in which it had it."""
    if isinstance(value, dict):
        key = next((key for key in CAPTION_KEYS if key in value), CAPTION_KEYS[0])
        if key == "tags" and isinstance(value[key], list):
            return {**value, key: [tag.strip() for tag in caption.split(",")]}
        return {**value, key: _put(value.get(key), caption)}
    return caption.split("\n") if isinstance(value, list) else caption
