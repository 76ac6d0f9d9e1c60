"""Looking after a store of encodings: what is in it, whether it is whole, and what to throw away. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple

from gesso.data import store
from gesso.data.threads import ahead
from gesso.errors import ResourceError

OLD = "older version"
"""The kind of entries that an earlier Gesso wrote and this one never reads."""

UNKNOWN = "unreadable"
"""The kind of entries whose header cannot be read."""

GRACE = timedelta(hours=1)
"""What was used within this time is never pruned."""

LEFTOVER = timedelta(days=1)
"""Age at which a file that was being written is taken for what a killed process left."""

_OLD_SUFFIX = ".entry"
_HEX = set("0123456789abcdef")


class Part(NamedTuple):
    """The entries of one kind by one encoder; `oldest` and `newest` are the times of last use, seconds since 1970."""

    kind: str
    encoder: str
    entries: int
    bytes: int
    oldest: float
    newest: float


@dataclass(frozen=True)
class Contents:
    """What is in a store: its parts, the largest first, and the files that were being written when looked at."""

    parts: tuple[Part, ...]
    unfinished: int
    unfinished_bytes: int

    @property
    def entries(self) -> int:
        """All entries."""
        return sum(part.entries for part in self.parts)

    @property
    def bytes(self) -> int:
        """Their bytes."""
        return sum(part.bytes for part in self.parts)


class Damaged(NamedTuple):
    """An entry whose checksum is wrong; `of` is what its header still says, or empty."""

    path: Path
    kind: str
    of: str
    deleted: bool


class Verified(NamedTuple):
    """What checking every entry found; `skipped` are entries of an older version."""

    good: int
    bytes: int
    skipped: int
    damaged: tuple[Damaged, ...]


class Pruned(NamedTuple):
    """What was, or would be, removed, and what stays; `leftovers` are unfinished files of dead processes."""

    entries: int
    bytes: int
    leftovers: int
    leftover_bytes: int
    kept_entries: int
    kept_bytes: int
    newest: float | None
    """Last use of the youngest entry that goes."""


class _File(NamedTuple):
    path: Path
    kind: Literal["entry", "old", "unfinished"]
    size: int
    used: float


def stats(folder: Path) -> Contents:
    """Count the entries of a store by kind and encoder; reads their headers, not their content."""
    parts: dict[tuple[str, str], Part] = {}
    unfinished: list[_File] = []
    for file in _files(folder):
        if file.kind == "unfinished":
            unfinished.append(file)
            continue
        about = store.read_about(file.path) if file.kind == "entry" else None
        kind, encoder = (about.kind, about.encoder) if about else (UNKNOWN if file.kind == "entry" else OLD, "")
        part = parts.get((kind, encoder), Part(kind, encoder, 0, 0, file.used, file.used))
        parts[kind, encoder] = Part(
            kind,
            encoder,
            part.entries + 1,
            part.bytes + file.size,
            min(part.oldest, file.used),
            max(part.newest, file.used),
        )
    ordered = sorted(parts.values(), key=lambda part: (-part.bytes, part.kind, part.encoder))
    return Contents(tuple(ordered), len(unfinished), sum(file.size for file in unfinished))


def verify(folder: Path, *, delete: bool = False, progress: Callable[[int, int], None] | None = None) -> Verified:
    """Read every entry and compare its checksum; with `delete` the damaged ones are removed.

    A check is not a use: the times of last use stay as they are.
    """
    files = list(_files(folder))
    entries = [file for file in files if file.kind == "entry"]
    good = size = 0
    damaged: list[Damaged] = []
    results = ahead(lambda file: _is_whole(file.path), entries, threads=4, depth=16)
    for done, (file, whole) in enumerate(zip(entries, results, strict=True), start=1):
        if whole:
            good, size = good + 1, size + file.size
        elif whole is not None:
            about = store.read_about(file.path)
            # It may have been made again since it was read.
            deleted = delete and _is_whole(file.path) is False and _remove(file.path)
            damaged.append(Damaged(file.path, about.kind if about else UNKNOWN, about.of if about else "", deleted))
        if progress is not None:
            progress(done, len(entries))
    return Verified(good, size, sum(file.kind == "old" for file in files), tuple(damaged))


def prune(
    folder: Path,
    *,
    unused_for: timedelta | None = None,
    larger_than: int | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Remove entries not used for some time, then the least recently used ones until `larger_than` bytes are left.

    Leftovers of killed processes go in any case, and what was used within `GRACE` in none. With `dry_run` nothing is
    removed, only counted.
    """
    now = time.time()
    files = list(_files(folder))
    entries = sorted((file for file in files if file.kind != "unfinished"), key=lambda file: file.used)
    left = sum(file.size for file in entries)
    going: list[_File] = []
    for file in entries:
        unused = unused_for is not None and now - file.used > unused_for.total_seconds()
        too_much = larger_than is not None and left > larger_than
        if (unused or too_much) and now - file.used > GRACE.total_seconds():
            going.append(file)
            left -= file.size
    leftovers = [f for f in files if f.kind == "unfinished" and now - f.used > LEFTOVER.total_seconds()]
    if not dry_run:
        going = [file for file in going if _remove_unused(file)]
        leftovers = [file for file in leftovers if _remove(file.path)]
    size = sum(file.size for file in going)
    return Pruned(
        len(going),
        size,
        len(leftovers),
        sum(file.size for file in leftovers),
        len(entries) - len(going),
        sum(file.size for file in entries) - size,
        max((file.used for file in going), default=None),
    )


def _files(folder: Path) -> Iterator[_File]:
    """The store's own files; anything else in the folder is left alone."""
    try:
        subs = sorted(sub.path for sub in os.scandir(folder) if len(sub.name) == 2 and set(sub.name) <= _HEX)
    except FileNotFoundError:
        return  # a cache that nothing was put into yet
    except OSError as error:
        raise ResourceError(
            f"the cache cannot be read: {error.strerror}", where=str(folder), fix="check the folder"
        ) from error
    for sub in subs:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(sub) as listed:
            for found in listed:
                kind: Literal["entry", "old", "unfinished"]
                if found.name.startswith("."):
                    kind = "unfinished"
                elif found.name.endswith(store.SUFFIX):
                    kind = "entry"
                elif found.name.endswith(_OLD_SUFFIX):
                    kind = "old"
                else:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = found.stat(follow_symlinks=False)
                    yield _File(Path(found.path), kind, status.st_size, status.st_mtime)


def _is_whole(path: Path) -> bool | None:
    """None where it is gone."""
    try:
        return store.is_whole(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EIO:
            return False
        raise ResourceError(f"cannot be read: {error.strerror}", where=str(path), fix="check who owns it") from error


def _remove(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ResourceError(
            f"cannot be removed: {error.strerror}", where=str(path), fix="check who owns the folder"
        ) from error
    return True


def _remove_unused(file: _File) -> bool:
    # A run may have begun to use it since the folder was listed.
    with contextlib.suppress(FileNotFoundError):
        return file.path.stat().st_mtime == file.used and _remove(file.path)
    return False
