"""The record of edits: JSON lines beside the data, each on disk before the change that it tells of."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gesso.errors import UserError

Kind = Literal["edit", "undo", "redo", "rollback"]


@dataclass(frozen=True)
class Change:
    """One file's change. Hashes are SHA-256 of its content; None: there was, or is, no such file."""

    op: Literal["write", "rename", "remove"]
    path: str
    """Relative to the data set's folder where it is inside it."""
    to: str = ""
    """The new name, of a rename."""
    before: str | None = None
    after: str | None = None
    kept: str = ""
    """Name of the original in the transaction's folder."""
    made: tuple[str, ...] = ()
    """Folders that were made for it, outermost first."""


@dataclass
class Entry:
    """One command's changes, as the record has them."""

    id: str
    kind: Kind
    command: str
    time: str
    of: str = ""
    """The entry that this one takes back or repeats."""
    changes: list[Change] = field(default_factory=list)
    state: str = "unfinished"
    """done; stopped, by an error; or unfinished, after a crash."""
    undone: bool = False


class Record:
    """The file that holds the entries; only ever added to."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def entries(self) -> list[Entry]:
        """All of them, oldest first; a damaged line is a `UserError` that names it."""
        found: dict[str, Entry] = {}
        for number, line in enumerate(self._lines(), start=1):
            try:
                _take(found, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                home = self.file.parent
                raise UserError(
                    "this line of the record of edits is damaged",
                    where=f"{self.file}:{number}",
                    fix=f"restore it, or remove {home} to forget all edits, with the originals in it",
                ) from error
        for entry in found.values():
            if entry.kind in ("undo", "redo") and entry.state == "done":
                found[entry.of].undone = entry.kind == "undo"
        return list(found.values())

    def begin(self, entry: Entry) -> None:
        """Say that a command begins to change files."""
        facts = {"begin": entry.id, "kind": entry.kind, "command": entry.command, "time": entry.time}
        self._append({**facts, "of": entry.of} if entry.of else facts)

    def change(self, entry: Entry, change: Change) -> None:
        """Say what is changed next."""
        facts = {name: value for name, value in vars(change).items() if value not in ("", ())}
        self._append({"change": entry.id, **facts})

    def end(self, entry: Entry, state: str, *, made: int) -> None:
        """Say how it ended, and how many of its changes were made."""
        self._append({"end": entry.id, "state": state, "made": made})

    def _lines(self) -> list[bytes]:
        # What follows the last line feed was torn by a crash, before its change was made.
        return self.file.read_bytes().split(b"\n")[:-1] if self.file.is_file() else []

    def _append(self, facts: dict[str, Any]) -> None:
        with self.file.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.truncate(sum(len(line) + 1 for line in self._lines()))
            # ASCII with escapes: names of files may hold what is not UTF-8.
            file.write((json.dumps(facts) + "\n").encode())
            file.flush()
            # On disk before the change is made, so that even a power cut leaves nothing that is not written down.
            os.fsync(file.fileno())


def _take(found: dict[str, Entry], facts: dict[str, Any]) -> None:
    if "begin" in facts:
        of = facts.get("of", "")
        if of:
            found[of]  # what it takes back must be there
        found[facts["begin"]] = Entry(facts["begin"], facts["kind"], facts["command"], facts["time"], of)
    elif "end" in facts:
        entry = found[facts["end"]]
        entry.state, entry.changes = facts["state"], entry.changes[: facts["made"]]
    else:
        entry = found[facts.pop("change")]
        entry.changes.append(Change(**{**facts, "made": tuple(facts.get("made", ()))}))
