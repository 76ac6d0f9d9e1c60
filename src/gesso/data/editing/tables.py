"""`metadata.jsonl` and `metadata.csv` as files to edit: lines that are not changed stay as they are, to the byte."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gesso.data.sources.folder import caption_text
from gesso.data.sources.table import CAPTION_COLUMNS, IMAGE_COLUMNS
from gesso.data.texts import read_text
from gesso.errors import UserError

_BOM = b"\xef\xbb\xbf"


@dataclass
class TableRow:
    """One row: its line's number, the picture it names (None: there is no such file) and its caption as written."""

    number: int
    raw: str
    values: dict[str, Any]
    name: str
    picture: Path | None
    caption: str | None
    changed: bool = False


class CaptionTable:
    """A table of pictures and captions that can be changed and written again.

    Raises `UserError` with file and line where it cannot be read, or has no column for the pictures.
    """

    def __init__(self, file: Path, *, image_column: str | None = None, caption_column: str | None = None) -> None:
        self.file = file
        if file.suffix.lower() not in (".jsonl", ".csv"):
            raise UserError("only .jsonl and .csv tables can be edited", where=str(file), fix="convert it to .jsonl")
        self._is_csv = file.suffix.lower() == ".csv"
        self._bom = file.read_bytes().startswith(_BOM) if file.is_file() else False
        text = read_text(file)
        self._ending = "\r\n" if "\r\n" in text else "\n"
        self._header, read = _read_csv(file, text) if self._is_csv else ("", _read_jsonl(file, text))
        if not read:
            raise UserError(
                "the metadata file has no rows", where=str(file), fix='add lines like {"file_name": "a.png"}'
            )
        self.columns = list(read[0][2])
        found = _column(self.columns, image_column, IMAGE_COLUMNS, file, "image_column")
        if found is None:
            there = ", ".join(self.columns)
            raise UserError(
                f"no image column; the columns are: {there}", where=f"{file}:1", fix="name it with --image-column"
            )
        self.image_column = found
        self.caption_column = _column(self.columns, caption_column, CAPTION_COLUMNS, file, "caption_column") or "text"
        self.rows = [self._row(number, raw, values) for number, raw, values in read]

    def _row(self, number: int, raw: str, values: dict[str, Any]) -> TableRow:
        where = f"{self.file}:{number}"
        name, caption = values.get(self.image_column), caption_text(values.get(self.caption_column), where)
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"the image path is not text: {name!r}", where=where, fix="write the picture's path")
        return TableRow(number, raw, values, name, self._picture(name), caption)

    def _picture(self, name: str) -> Path | None:
        if "\x00" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
            return None
        base = self.file.parent.resolve()
        places = [folder / each for each in (name, name.replace("\\", "/")) for folder in (base, base / "images")]
        return next((p.resolve() for p in places if p.is_file() and p.resolve().is_relative_to(base)), None)

    def set_caption(self, row: TableRow, caption: str) -> None:
        """Give a row another caption."""
        several = isinstance(row.values.get(self.caption_column), list)
        value = caption.split("\n") if several else caption
        row.caption, row.values, row.changed = caption, {**row.values, self.caption_column: value}, True

    def add(self, name: str, caption: str, *, picture: Path) -> TableRow:
        """A new row at the end."""
        values: dict[str, Any] = {self.image_column: name, self.caption_column: caption}
        row = TableRow(0, "", values, name, picture, caption, changed=True)
        self.rows.append(row)
        return row

    def content(self) -> bytes:
        """The file as it should be now."""
        new = self.caption_column not in self.columns and any(row.changed for row in self.rows)
        lines = [self._header] if self._header else []
        if self._is_csv and new:
            self.columns.append(self.caption_column)
            lines = [self._csv(self.columns)]
        for row in self.rows:
            lines.append(self._line(row) if row.changed or (self._is_csv and new) else row.raw)
        # A last line without its line feed must get one before others follow.
        whole = [line if line.endswith("\n") else line + self._ending for line in lines[:-1]] + lines[-1:]
        return (_BOM if self._bom else b"") + "".join(whole).encode()

    def _line(self, row: TableRow) -> str:
        if self._is_csv:
            return self._csv(["" if row.values.get(name) is None else row.values[name] for name in self.columns])
        return json.dumps(row.values, ensure_ascii=False) + self._ending

    def _csv(self, cells: list[str]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator=self._ending).writerow(cells)
        return text.getvalue()


def json_line(name: str, caption: str, *, image_column: str = "file_name", caption_column: str = "text") -> str:
    """One line of a metadata.jsonl, with its line feed."""
    return json.dumps({image_column: name, caption_column: caption}, ensure_ascii=False) + "\n"


def _read_jsonl(file: Path, text: str) -> list[tuple[int, str, dict[str, Any]]]:
    read = []
    # Only real line feeds end a line: JSON strings may hold U+2028 and the like.
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON: {error}", where=where, fix="write one JSON object on each line") from error
        if not isinstance(values, dict):
            raise UserError("not a JSON object", where=where, fix='write {"file_name": ..., "text": ...}')
        read.append((number, line, values))
    return read


def _read_csv(file: Path, text: str) -> tuple[str, list[tuple[int, str, dict[str, Any]]]]:
    lines = _lines(text)
    reader = csv.reader(lines, strict=True)
    read: list[tuple[int, str, dict[str, Any]]] = []
    header: list[str] | None = None
    raw_header, before = "", 0
    try:
        for cells in reader:
            number, raw = before + 1, "".join(lines[before : reader.line_num])
            before = reader.line_num
            if not cells:
                continue
            if header is None:
                header, raw_header = cells, raw
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{len(cells)} cells, but the header has {len(header)}: {', '.join(header)}",
                    where=f"{file}:{number}",
                    fix="put text that holds commas in double quotes",
                )
            read.append((number, raw, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise UserError(f"not CSV: {error}", where=f"{file}:{reader.line_num}", fix="mend the line") from error
    return raw_header, read


def _lines(text: str) -> list[str]:
    lines = [line + "\n" for line in text.split("\n")]
    return [*lines[:-1], lines[-1][:-1]]


def _column(columns: list[str], wanted: str | None, usual: tuple[str, ...], file: Path, key: str) -> str | None:
    if wanted is not None and wanted not in columns:
        there = ", ".join(columns)
        raise UserError(f"there is no column '{wanted}'; the columns are: {there}", where=f"{file}:1", fix=f"set {key}")
    return wanted or next((name for name in usual if name in columns), None)
