"""A run file under construction: native values, where each came from, and what became of every foreign key."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gesso.config.document import Document, KeyPath, plain
from gesso.config.problems import Place, show
from gesso.errors import UserError

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


@dataclass(frozen=True)
class Entry:
    """One line of a report: a key of the foreign file, its line, and our key or the reason."""

    key: str
    line: int | None
    note: str


@dataclass(frozen=True)
class DialectReport:
    """What became of every key of another tool's file, and what was filled in from that tool's defaults."""

    tool: str
    mapped: tuple[Entry, ...]
    ignored: tuple[Entry, ...]
    refused: tuple[Entry, ...]
    assumed: tuple[Entry, ...]
    hub_repo: str | None = None
    resume: str | None = None


@dataclass(frozen=True)
class Converted:
    """Native values with their places, the report, and the problems that keep the file from running."""

    data: dict[str, Any]
    places: dict[KeyPath, Place]
    report: DialectReport
    problems: tuple[UserError, ...]


@dataclass(frozen=True)
class Item:
    """A key of the foreign file with its value."""

    path: KeyPath
    value: Any
    line: int | None
    file: str | None = None
    """Where it is not the file under `Draft.document`."""

    @property
    def key(self) -> str:
        """Dotted, as the user knows it."""
        return ".".join(str(part) for part in self.path)

    @property
    def at(self) -> tuple[str | None, KeyPath]:
        """File and path, which tell it from any other."""
        return self.file, self.path


@dataclass
class Draft:
    """Collects what the rules decide. `items` holds the values still to be read, by canonical name."""

    tool: str
    document: Document
    folder: Path
    items: dict[str, Item] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[UserError] = field(default_factory=list)
    mapped: list[Entry] = field(default_factory=list)
    ignored: list[Entry] = field(default_factory=list)
    refused: list[Entry] = field(default_factory=list)
    assumed: list[Entry] = field(default_factory=list)
    hub_repo: str | None = None
    resume: str | None = None

    def item(self, path: KeyPath, value: Any) -> Item:
        """A value of the file with its line."""
        return Item(path, value, self.document.lines.get(path))

    def add(self, name: str, item: Item) -> None:
        """Queue a recognised key; the same setting twice with two values is a problem."""
        if name not in self.items:
            self.items[name] = item
        elif self.items[name].value == item.value:
            self.ignore(item, f"says the same as {self.items[name].key}")
        else:
            other = self.items[name]
            what = f"{item.key} is {show(item.value)} but {other.key} (line {other.line}) is {show(other.value)}"
            self.problem(item, what, fix="keep one of them")

    def take(self, name: str) -> Item | None:
        """Remove and return a queued key, or None where the file lacks it or leaves it empty."""
        item = self.items.pop(name, None)
        if item is not None and item.value is None:
            self.ignore(item, "empty")
            return None
        return item

    def set(self, native: str, value: Any, item: Item, *, note: str = "") -> None:
        """Give a native key the value of a foreign one; `note` adds to the report what is not quite the same."""
        self._put(native, value, self.place(item))
        name = re.sub(r"\.\d+(?=\.)", "[]", native)
        self.mapped.append(self.entry(item, f"{name} ({note})" if note else name))

    def assume(self, native: str, value: Any, why: str) -> None:
        """Fill in what the other tool does where its file says nothing."""
        self._put(native, value, Place(f"as {self.tool} does"))
        self.assumed.append(Entry(re.sub(r"\.\d+(?=\.)", "[]", native), None, f"{show(value)}: {why}"))

    def ignore(self, item: Item, why: str) -> None:
        """Report a key that changes nothing here."""
        self.ignored.append(self.entry(item, why))

    def refuse(self, item: Item, what: str, *, fix: str = "") -> None:
        """Report a key that asks for something that is not there."""
        self.refused.append(self.entry(item, what))
        self.problem(item, f"{item.key}: {show(item.value)}: {what}", fix=fix)

    def problem(self, item: Item, what: str, *, fix: str = "") -> None:
        """A mistake in the file."""
        found = UserError(what, where=self.where(item), fix=fix)
        # A key that several sources share is read once for each.
        if all(found.lines() != other.lines() for other in self.problems):
            self.problems.append(found)

    def where(self, item: Item) -> str:
        """File and line of a key."""
        file = item.file or self.document.file
        return f"{file}:{item.line}" if item.line else file

    def place(self, item: Item) -> Place:
        """Where a key stands, for messages about the native value."""
        return Place(self.where(item), item.key)

    def entry(self, item: Item, note: str) -> Entry:
        """A line of the report."""
        key = item.key if item.file is None else f"{Path(item.file).name}: {item.key}"
        return Entry(key, item.line, note)

    def path(self, text: str, *, folder: Path | None = None) -> str:
        """A path as the other tool sees it: from the working directory, else from the file's folder; absolute.

        URLs and names of data sets on the hub stay as they are.
        """
        if "://" in text or text.startswith("hub:"):
            return text
        given = Path(text).expanduser()
        beside = (folder or self.folder) / given
        return str((beside if not given.exists() and beside.exists() else given).absolute())

    def flag(self, item: Item) -> bool | None:
        """A truth value, with the words that YAML 1.1 took for one; anything else is a problem, and None."""
        value = _WORDS.get(item.value.lower()) if isinstance(item.value, str) else item.value
        if isinstance(value, bool):
            return value
        self.problem(item, f"{item.key} must be true or false, not {show(item.value)}")
        return None

    def finish(self) -> Converted:
        """The result; every queued key must have been taken by a rule."""
        assert not self.items, f"no rule for {sorted(self.items)}"
        report = DialectReport(
            tool=self.tool,
            mapped=tuple(dict.fromkeys(self.mapped)),
            ignored=tuple(dict.fromkeys(self.ignored)),
            refused=tuple(dict.fromkeys(self.refused)),
            assumed=tuple(dict.fromkeys(self.assumed)),
            hub_repo=self.hub_repo,
            resume=self.resume,
        )
        return Converted(self.data, self.places, report, tuple(self.problems))

    def _put(self, native: str, value: Any, place: Place) -> None:
        path = tuple(int(part) if part.isdigit() else part for part in native.split("."))
        holder: Any = self.data
        for part, following in pairwise(path):
            if isinstance(part, int):
                if part == len(holder):
                    holder.append({})
                holder = holder[part]
            else:
                holder = holder.setdefault(part, [] if isinstance(following, int) else {})
        holder[path[-1]] = value
        self.places[path] = place


def number(value: Any) -> Any:
    """Text that spells a number as that number; YAML 1.1 readers take 1e-4 for text, so their users quote freely."""
    return plain(value.strip()) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value


def words(value: Any) -> list[str]:
    """A list of names, or names with commas or blanks between them, as a list."""
    if isinstance(value, str):
        return [word for word in re.split(r"[,\s]+", value) if word]
    return [str(word) for word in value] if isinstance(value, Iterable) else [str(value)]
