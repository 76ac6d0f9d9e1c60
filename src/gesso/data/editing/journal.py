"""Changes to a data set's files, written down beside the data before they are made, so that each can be taken back."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from gesso.core.folder import write_atomic
from gesso.data.editing.record import Change, Entry, Kind, Record
from gesso.errors import LockedError, Problems, ResourceError, UserError

FOLDER = ".gesso"
"""The hidden folder beside the data: the record `edits.jsonl`, and `originals/` with the files as they were."""


@dataclass(frozen=True)
class Undone:
    """A command that was taken back or repeated, and how many changes it had made."""

    command: str
    time: str
    changes: int


class Journal:
    """The record of changes to one folder. `also` names other folders that changes may reach, as moving files does."""

    def __init__(self, folder: Path, *, also: Sequence[Path] = ()) -> None:
        self.folder = folder.expanduser().resolve()
        self.roots = (self.folder, *(other.expanduser().resolve() for other in also))
        self.home = self.folder / FOLDER
        self.record = Record(self.home / "edits.jsonl")

    @contextmanager
    def begin(self, command: str) -> Iterator[Transaction]:
        """One command's changes, each made at once; an error or crash leaves those made, and `undo` takes them back.

        Nothing is recorded if nothing is changed. Raises `LockedError` while another process edits this folder.
        """
        with self._held():
            self._recover()
            with self._transaction("edit", command) as edit:
                yield edit

    def undo(self, *, last: int = 1, force: bool = False) -> list[Undone]:
        """Take back the last commands that still stand, newest first, to the byte.

        Where a file was changed since, nothing is done and all such files are named, unless `force`: then what is
        there now is kept as an original as well.
        """
        with self._held():
            self._recover()
            standing = [
                entry for entry in self.entries() if entry.kind == "edit" and entry.changes and not entry.undone
            ]
            if not standing:
                raise UserError("there is nothing to undo", where=str(self.folder))
            chosen = standing[: -last - 1 : -1]
            self._check(chosen, force=force)
            for entry in chosen:
                self._reverse(entry, "undo", of=entry.id, force=force)
            return [Undone(entry.command, entry.time, len(entry.changes)) for entry in chosen]

    def redo(self, *, last: int = 1, force: bool = False) -> list[Undone]:
        """Repeat the commands that were taken back last and after which nothing else was edited; refuses as `undo`."""
        with self._held():
            self._recover()
            entries = self.entries()
            by_id = {entry.id: entry for entry in entries}
            since = max((i for i, entry in enumerate(entries) if entry.kind == "edit" and not entry.undone), default=-1)
            latest = {entry.of: entry for entry in entries if entry.kind == "undo" and entry.state == "done"}
            waiting = [u for u in latest.values() if by_id[u.of].undone and entries.index(u) > since]
            waiting.sort(key=entries.index)
            if not waiting:
                raise UserError("there is nothing to redo", where=str(self.folder))
            chosen = waiting[: -last - 1 : -1]
            self._check(chosen, force=force)
            for undo in chosen:
                self._reverse(undo, "redo", of=undo.of, force=force)
            commands = [by_id[undo.of] for undo in chosen]
            return [Undone(entry.command, entry.time, len(entry.changes)) for entry in commands]

    def entries(self) -> list[Entry]:
        """All that was recorded, oldest first."""
        return self.record.entries()

    @contextmanager
    def _held(self) -> Iterator[None]:
        if not self.folder.is_dir():
            raise UserError("there is no such folder", where=str(self.folder))
        if self.home.is_symlink():
            raise UserError("this is a link; the record of edits must be in the folder", where=str(self.home))
        try:
            self.home.mkdir(exist_ok=True)
            handle = (self.home / "lock").open("a")
        except OSError as error:
            raise ResourceError(f"cannot be written: {error.strerror}", where=str(self.home)) from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise LockedError("another command is editing this folder", where=str(self.folder)) from None
            yield

    @contextmanager
    def _transaction(self, kind: Kind, command: str, *, of: str = "") -> Iterator[Transaction]:
        entry = Entry(_new_id(), kind, command, datetime.now(UTC).isoformat(timespec="seconds"), of)
        try:
            yield Transaction(self, entry)
        except BaseException:
            if entry.changes:
                self.settle(entry)
            raise
        # What takes something back says so even where there was nothing to change.
        if entry.changes or of:
            if not entry.changes:
                self.record.begin(entry)
            self.record.end(entry, "done", made=len(entry.changes))

    def _recover(self) -> None:
        """Settle what was cut short, and roll it back where it was itself taking something back."""
        for entry in self.entries():
            if entry.state == "unfinished":
                self.settle(entry)
        entries = self.entries()
        settled = {entry.of for entry in entries if entry.kind == "rollback" and entry.state == "done"}
        for entry in reversed(entries):
            if entry.kind != "edit" and entry.state != "done" and entry.id not in settled:
                self._check([entry], force=False)
                self._reverse(entry, "rollback", of=entry.id, force=False)

    def _check(self, entries: Sequence[Entry], *, force: bool) -> None:
        """Whether taking these back, in this order, would find every file as they left it."""
        now: dict[Path, str | None] = {}
        problems: list[UserError] = []

        def look(path: Path) -> str | None:
            if path not in now:
                now[path] = _hash(path)
            return now[path]

        for entry in entries:
            for change in reversed(entry.changes):
                path, to = self.place(change.path), self.place(change.to or change.path)
                if change.op != "rename":
                    problems += [] if force or look(path) == change.after else [_changed(path, look(path))]
                    problems += self._original(entry, change)
                    now[path] = change.before
                    continue
                if look(to) != change.after and (look(to) is None or not force):
                    problems.append(_changed(to, look(to)))
                if look(path) is not None and not force:
                    problems.append(_changed(path, look(path)))
                now[path], now[to] = change.before, None
        if problems:
            raise Problems(problems, what="cannot be taken back: files were changed since")

    def _original(self, entry: Entry, change: Change) -> list[UserError]:
        if change.before is None or _hash(self.kept(entry.id, change.kept)) == change.before:
            return []
        where = str(self.kept(entry.id, change.kept))
        return [UserError(f"the original of {change.path} was lost or changed", where=where, fix="restore it")]

    def settle(self, entry: Entry) -> None:
        """End an entry that was cut short; only the disk says whether the last change written down was made."""
        made = len(entry.changes)
        if made:
            last = entry.changes[-1]
            path, to = self.place(last.path), self.place(last.to or last.path)
            if _hash(path) == last.before and (last.op != "rename" or _hash(to) is None):
                made -= 1
        self.record.end(entry, "stopped", made=made)

    def _reverse(self, entry: Entry, kind: Kind, *, of: str, force: bool) -> None:
        with self._transaction(kind, f"{kind}: {entry.command}", of=of) as edit:
            for change in reversed(entry.changes):
                path, to = self.place(change.path), self.place(change.to or change.path)
                if change.op == "rename":
                    if force and path.exists():
                        edit.remove(path)
                    edit.rename(to, path)
                elif change.before is not None:
                    edit.write(path, self.kept(entry.id, change.kept).read_bytes())
                elif path.exists():
                    edit.remove(path)
                for folder in reversed(change.made):
                    with suppress(OSError):  # it holds something else by now
                        self.place(folder).rmdir()

    def place(self, name: str | Path) -> Path:
        """Where a recorded or given path is; one outside the folders of this journal is refused."""
        path = self.folder / name
        real = path.parent.resolve() / path.name
        root = next((root for root in self.roots if real.is_relative_to(root)), None)
        if root is None:
            fix = f"if that is meant: gesso dataset undo {self.folder} --also {real.parent}"
            raise UserError("outside the data set's folder", where=str(real), fix=fix)
        if FOLDER in real.relative_to(root).parts[:1]:
            raise UserError("this is in the record of edits itself", where=str(real))
        if real.is_symlink():
            raise UserError("this is a link, which is not edited", where=str(real), fix="put the file itself there")
        return real

    def kept(self, id: str, name: str) -> Path:
        """Where a transaction's original is."""
        folder = self.home / "originals"
        path = folder / id / name
        if path.resolve().parent.parent != folder.resolve():
            raise UserError("the record of edits names a file elsewhere", where=str(path), fix=f"remove {self.home}")
        return path


class Transaction:
    """The changes of one command; made by `Journal.begin`. Paths are absolute or relative to the folder."""

    def __init__(self, journal: Journal, entry: Entry) -> None:
        self._journal, self._entry = journal, entry

    @property
    def count(self) -> int:
        """How many changes were made."""
        return len(self._entry.changes)

    def write(self, path: Path, content: bytes) -> None:
        """Make the file, or replace what it holds, whole or not at all. The same content changes nothing."""
        target = self._journal.place(path)
        before, after = _hash(target), hashlib.sha256(content).hexdigest()
        if before == after:
            return
        with _named(target):
            kept = self._keep(target) if before is not None else ""
            made = self._missing(target.parent)
            self._note(Change("write", self._name(target), before=before, after=after, kept=kept, made=made))
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, content)

    def rename(self, path: Path, to: Path) -> None:
        """Move a file; where there is a file already, that is a `UserError`."""
        source, target = self._journal.place(path), self._journal.place(to)
        content = _hash(source)
        if content is None:
            raise UserError("there is no such file", where=str(source))
        if target.exists():
            raise UserError(
                f"{source.name} cannot be moved there: the file exists", where=str(target), fix="move one of them away"
            )
        with _named(target):
            made = self._missing(target.parent)
            name, new = self._name(source), self._name(target)
            self._note(Change("rename", name, to=new, before=content, after=content, made=made))
            target.parent.mkdir(parents=True, exist_ok=True)
            _move(source, target)

    def remove(self, path: Path) -> None:
        """Take a file away, into the originals."""
        target = self._journal.place(path)
        before = _hash(target)
        if before is None:
            raise UserError("there is no such file", where=str(target))
        with _named(target):
            kept = self._keep(target)
            self._note(Change("remove", self._name(target), before=before, kept=kept))
            target.unlink()

    def _keep(self, path: Path) -> str:
        name = f"{self.count:06}-{path.name[-40:]}"
        kept = self._journal.kept(self._entry.id, name)
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, kept)  # the file itself: what follows replaces it under its old name only
        except OSError:
            write_atomic(kept, path.read_bytes())
            shutil.copystat(path, kept)
        return name

    def _missing(self, folder: Path) -> tuple[str, ...]:
        return tuple(self._name(p) for p in [*reversed(folder.parents), folder] if not p.exists())

    def _name(self, path: Path) -> str:
        folder = self._journal.folder
        return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()

    def _note(self, change: Change) -> None:
        entry, record = self._entry, self._journal.record
        if not entry.changes:
            record.begin(entry)
        entry.changes.append(change)
        record.change(entry, change)


def _new_id() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"


def _hash(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the file") from error


def _changed(path: Path, now: str | None) -> UserError:
    what = "the file is gone" if now is None else "the file was changed, or is in the way"
    return UserError(what, where=str(path), fix="put it back as it was, or use --force")


def _move(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        write_atomic(target, source.read_bytes())
        shutil.copystat(source, target)
        source.unlink()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Inside: the system's errors name the file and say what happened."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot be written: {error.strerror}", where=str(path), fix="free space, or check permissions"
        ) from error
