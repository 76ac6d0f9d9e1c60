"""What is found in a source: records, and all that is wrong or worth knowing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from gesso.data.places import Place
from gesso.errors import UserError


class Record(NamedTuple):
    """One captioned picture, not opened yet."""

    place: Place
    caption: str
    """As it was written, with its lines, but without blanks around it; empty only where the source allows that."""
    source: int = 0
    concept: str = ""
    repeats: float = 1.0
    mask: Place | None = None
    rejected: Place | None = None
    """Of a pair the picture that was not preferred."""
    weight: float = 1.0
    """Its own, without the source's."""


class Entry(NamedTuple):
    """A picture as its layout gives it, before the source's rules for captions and concepts."""

    name: str
    """Relative to the source, with forward slashes."""
    place: Place
    caption: str | None
    """None: there is none."""
    where: str
    """Where the caption is, or was looked for."""
    mask: Place | None = None
    concept: str | None = None
    """None: as the first sub-folder says."""
    repeats: float = 1.0
    beside: str = ""
    """Where there is no caption: a file of the picture's name whose ending is not read."""
    rejected: Place | None = None
    """Of a pair the picture that was not preferred."""
    weight: float | None = None
    """What its loss counts; None: no table says it."""


class Dropped(NamedTuple):
    """A pair of pictures that cannot be trained on: the reason, and which pair it is."""

    why: str
    where: str


@dataclass
class Found:
    """What one source holds: records, problems that must be mended, and notices worth reading."""

    records: list[Record] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    """Pictures that are hidden, or in hidden folders, so not read."""
    refused: set[str] = field(default_factory=set)
    """Files and folders, as they are shown, of which a problem says already why they are not read."""
    dropped: list[Dropped] = field(default_factory=list)
    """Pairs of which the source itself says that they cannot be trained on; a notice tells of them too."""

    def refuse(self, shown: str, what: str, *, fix: str) -> None:
        """A file or folder that is not read, and why."""
        self.problems.append(UserError(what, where=shown, fix=fix))
        self.refused.add(shown)

    def is_refused(self, shown: str) -> bool:
        """Whether there is a problem about this file, or a folder that it is in."""
        while shown and self.refused:
            if shown in self.refused:
                return True
            shown = shown.rpartition("/")[0]
        return False


def some(names: Iterable[str], most: int = 10) -> str:
    """A few of the names and how many more there are."""
    whole = list(names)
    more = f" and {len(whole) - most} more" if len(whole) > most else ""
    return ", ".join(whole[:most]) + more


def counted(count: int, thing: str) -> str:
    """A number with its noun in the singular or plural."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def listed(names: Iterable[str]) -> str:
    """The files that a problem is about: as many as somebody would mend one by one."""
    return some(names, 100)
