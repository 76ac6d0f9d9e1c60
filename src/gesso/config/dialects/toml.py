"""TOML text to plain values with the line of every key; `tomllib` reads the values, this finds where they stand."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from gesso.config import document
from gesso.config.document import Document, KeyPath
from gesso.errors import UserError

_LINE = re.compile(r" \(at line (\d+), column \d+\)")
_KEY = re.compile(r"[A-Za-z0-9_-]+")
_STRINGS = ('"""', "'''", '"', "'")


def read(path: Path, *, what: str) -> Document:
    """Read a TOML file, or one of YAML or JSON by its ending. Raises `UserError` with the line of a mistake."""
    ending = path.suffix.lower()
    if ending not in (".toml", ".json") or not path.is_file():
        return document.read(path, what=what)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UserError("not UTF-8 text", where=f"{path}:{line}", fix="save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    # JSON is YAML but for tabs, which it has only between values.
    return document.parse(text.replace("\t", " "), file=str(path)) if ending == ".json" else parse(text, file=str(path))


def parse(text: str, *, file: str) -> Document:
    """Parse TOML text; raises `UserError` with the line."""
    text = text.replace("\r\n", "\n")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        match = _LINE.search(str(error))
        # A mistake at the very end has no line of its own.
        line = int(match.group(1)) if match else text.rstrip().count("\n") + 1
        what = f"not valid TOML: {_LINE.sub('', str(error)).removesuffix(' (at end of document)')}"
        raise UserError(what, where=f"{file}:{line}", fix="text needs quotes; true and false are small") from None
    if not data:
        raise UserError("the file is empty", where=file)
    return Document(data, _Finder(text).lines(), file)


class _Finder:
    """Walks over text that is known to be valid TOML and notes the line of each key and list item."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.found: dict[KeyPath, int] = {}
        self.counts: dict[KeyPath, int] = {}

    def lines(self) -> dict[KeyPath, int]:
        """The 1-based line of each key."""
        table: KeyPath = ()
        while self._skip():
            if self.text.startswith("[", self.at):
                table = self._header()
            else:
                self._pair(table)
        return self.found

    def _header(self) -> KeyPath:
        many = self.text.startswith("[[", self.at)
        self.at += 2 if many else 1
        path = self._place(self._key())
        if many:
            self.counts[path] = self.counts.get(path, 0) + 1
            self._note(path)
            path = (*path, self.counts[path] - 1)
        self._note(path)
        self._skip()
        self.at += 2 if many else 1
        return path

    def _place(self, key: tuple[str, ...]) -> KeyPath:
        """A header's key with the position in each list of tables that it goes through."""
        path: KeyPath = ()
        for i, part in enumerate(key):
            path = (*path, part)
            if i < len(key) - 1 and path in self.counts:
                path = (*path, self.counts[path] - 1)
        return path

    def _pair(self, table: KeyPath) -> None:
        path = (*table, *self._key())
        for length in range(len(table) + 1, len(path) + 1):
            self._note(path[:length])
        self._skip()
        self.at += 1  # =
        self._value(path)

    def _key(self) -> tuple[str, ...]:
        parts = []
        while True:
            self._skip()
            if self.text[self.at] in "\"'":
                start = self.at
                self._string()
                parts.append(next(iter(tomllib.loads(f"{self.text[start : self.at]} = 0"))))
            else:
                match = _KEY.match(self.text, self.at)
                assert match is not None, "valid TOML has a key here"
                parts.append(match.group())
                self.at = match.end()
            self._skip()
            if self.text[self.at] != ".":
                return tuple(parts)
            self.at += 1

    def _value(self, path: KeyPath) -> None:
        self._skip()
        first = self.text[self.at]
        if first in "\"'":
            self._string()
        elif first in "[{":
            self._inside(path, "]" if first == "[" else "}")
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\n":
                self.at += 1

    def _inside(self, path: KeyPath, end: str) -> None:
        self.at += 1
        index = 0
        while self._skip() and self.text[self.at] != end:
            if end == "}":
                self._pair(path)
            else:
                self._note((*path, index))
                self._value((*path, index))
            index += 1
            self._skip()
            self.at += self.text[self.at] == ","
        self.at += 1

    def _string(self) -> None:
        mark = next(mark for mark in _STRINGS if self.text.startswith(mark, self.at))
        self.at += len(mark)
        while not self.text.startswith(mark, self.at):
            self.at += 2 if self.text[self.at] == "\\" and '"' in mark else 1
        self.at += len(mark)
        # A multi-line string may end in one or two quotes of its own before the mark.
        while len(mark) == 3 and self.text.startswith(mark[0], self.at):
            self.at += 1

    def _skip(self) -> bool:
        """Go past blanks, line ends and comments; whether anything is left."""
        while self.at < len(self.text):
            if self.text[self.at] == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif self.text[self.at] in " \t\n":
                self.at += 1
            else:
                return True
        return False

    def _note(self, path: KeyPath) -> None:
        self.found.setdefault(path, self.text.count("\n", 0, self.at) + 1)
