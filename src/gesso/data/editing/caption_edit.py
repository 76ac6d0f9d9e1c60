"""Changes to many captions at once, worked out before a single file is touched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gesso.data.editing.collection import Item, Library
from gesso.data.editing.journal import Journal
from gesso.errors import UserError


@dataclass(frozen=True)
class CaptionEdit:
    """What to do with every line of every caption, in the order of these fields."""

    find: str | None = None
    replace: str = ""
    """Stands for `find`; with `regex`, \\1 or \\g<name> is what a group matched."""
    regex: bool = False
    ignore_case: bool = False
    remove_tags: tuple[str, ...] = ()
    """Taken out where they are a whole tag, in any case."""
    add_tags: tuple[str, ...] = ()
    """Put behind the last tag, unless they are there."""
    unique: bool = False
    """Keep the first of equal tags only."""
    prepend: str = ""
    append: str = ""
    lower: bool = False
    separator: str = ","

    def __post_init__(self) -> None:
        changes = (self.find, self.remove_tags, self.add_tags, self.unique, self.prepend, self.append, self.lower)
        if not any(changes):
            raise UserError("nothing to change was named", fix="give --find, --add-tag, --prepend or another change")
        if not self.separator:
            raise UserError("the separator of tags is empty", where="--separator", fix="use , or ;")
        try:
            self._pattern()
        except re.error as error:
            raise UserError(f"not a regular expression: {error}", where="--find", fix="mend it") from error

    def apply(self, caption: str) -> str:
        """The caption as it will be; lines that become empty are left out."""
        pattern = self._pattern() if self.find else None
        lines = [self._line(line, pattern) if line.strip() else line for line in caption.split("\n")]
        return "\n".join(
            new for new, old in zip(lines, caption.split("\n"), strict=True) if new.strip() or not old.strip()
        ).strip()

    def _line(self, line: str, pattern: re.Pattern[str] | None) -> str:
        if pattern is not None:
            try:
                line = pattern.sub(self.replace if self.regex else lambda _: self.replace, line)
            except (re.error, IndexError) as error:
                raise UserError(f"not a replacement: {error}", where="--replace", fix="mend it") from error
        if self.remove_tags or self.add_tags or self.unique:
            line = self._tags(line)
        line = f"{self.prepend}{line}{self.append}"
        return line.lower() if self.lower else line

    def _tags(self, line: str) -> str:
        unwanted = {tag.strip().casefold() for tag in self.remove_tags}
        tags = [tag.strip() for tag in line.split(self.separator)]
        tags = [tag for tag in tags if tag and tag.casefold() not in unwanted]
        there = {tag.casefold() for tag in tags}
        tags += [tag.strip() for tag in self.add_tags if tag.strip().casefold() not in there]
        if self.unique:
            first: dict[str, str] = {}
            for tag in tags:
                first.setdefault(tag.casefold(), tag)
            tags = list(first.values())
        return f"{self.separator} ".join(tags)

    def _pattern(self) -> re.Pattern[str]:
        flags = re.IGNORECASE if self.ignore_case else 0
        return re.compile((self.find or "") if self.regex else re.escape(self.find or ""), flags)


@dataclass(frozen=True)
class Edited:
    """A caption before and after."""

    item: Item
    before: str
    after: str


def preview(library: Library, change: CaptionEdit) -> list[Edited]:
    """What the change would do; pictures without a caption are left alone.

    Raises `UserError` if a caption would become empty, which would make it a missing one.
    """
    edited = [Edited(i, i.caption, change.apply(i.caption)) for i in library.items if i.caption is not None]
    empty = [one.item.name for one in edited if not one.after]
    if empty:
        raise UserError(
            f"{len(empty)} captions would become empty, such as that of {empty[0]}",
            where=str(library.folder),
            fix="leave something in them, or remove the pictures",
        )
    return [one for one in edited if one.after != one.before]


def apply(library: Library, edited: Sequence[Edited], *, command: str = "caption-edit") -> None:
    """Write the captions of a preview."""
    with Journal(library.folder).begin(command) as edit:
        for one in edited:
            library.write(edit, one.item, one.after)
        library.flush(edit)
