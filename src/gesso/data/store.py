"""The store of encodings: arrays by key, one file an entry, checked at every read. No torch.

An entry is written beside its place and renamed into it, so any number of processes may use one folder. Its layout:

    0   8  b"gesso-2\\n"
    8  16  xxh3_128 of the key and of everything after these 24 bytes
    24  8  length of the header, little-endian
    32     header, two lines of JSON: [name, dtype, shape, start, size] of each array; kind, encoder, of, made
           arrays; each begins at a multiple of 64 bytes of the file

The modification time says when an entry was last used, and proves that it was whole then: its microseconds are a hash
of key, inode, size and seconds (the seal). Whoever writes to a file, copies it or swaps it for another breaks the seal,
and what has no seal is read and checked again before it is trusted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import os
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
import xxhash
from numpy.typing import NDArray

from gesso.errors import ResourceError

SUFFIX = ".gesso"
"""Ending of an entry's file."""

State = Literal["good", "missing", "damaged", "unsure"]
"""Of an entry; unsure is one that must be read to tell."""

Bytes = NDArray[np.uint8]

_MAGIC = b"gesso-2\n"
_CHECKSUM = slice(8, 24)
_LENGTH = slice(24, 32)
_HEADER = 32
_ALIGN = 64
_RECENT = 600.0
"""Seconds after which another use of an entry is written down."""


class About(NamedTuple):
    """What an entry says of itself: "latents" or "text", the encoder's fingerprint, a name for people, when made."""

    kind: str
    encoder: str
    of: str
    made: float


class Array(NamedTuple):
    """An array without its library: torch's name of the dtype, the shape, and the bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: Bytes


class Entry(NamedTuple):
    """An entry; its arrays are views of the one buffer it was read into."""

    arrays: dict[str, Array]
    header: bytes

    @property
    def about(self) -> About:
        """What it says of itself."""
        return _about(self.header)


class Store:
    """Entries by key, in sub-folders of the first two digits of the key (64 hexadecimal ones)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = f"{folder}{os.sep}"

    def path(self, key: str) -> Path:
        """Where an entry is kept."""
        return Path(self._file(key))

    def get(self, key: str) -> Entry | None:
        """The entry, or None if there is none or it is damaged."""
        path = self._file(key)
        try:
            buffer, status = _load(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.EIO:  # a bad sector is one damaged entry, not a useless cache
                return None
            self._fail(error)
        if not _is_whole(key, buffer):
            _break_seal(path, status)
            return None
        if time.time() - status.st_mtime > _RECENT:
            _seal(path, key, status, int(time.time()))
        return _parse(buffer)

    def put(
        self, key: str, arrays: Mapping[str, Array], *, kind: str, encoder: str, of: str, made: float | None = None
    ) -> None:
        """Write an entry; readers see it whole or not at all."""
        about = About(kind, encoder, of, time.time() if made is None else made)
        path = self.path(key)
        temporary = path.with_name(f".{os.getpid()}-{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_pack(key, about, arrays))
            _seal(temporary, key, temporary.stat(), int(time.time()))
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._fail(error)

    def glance(self, key: str) -> State:
        """Whether an entry is there and sealed, which counts as a use; reads no content."""
        path = self._file(key)
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            self._fail(error)
        if not _has_seal(key, status):
            return "unsure"
        if time.time() - status.st_mtime > _RECENT:
            _seal(path, key, status, int(time.time()))
        return "good"

    def check(self, key: str) -> State:
        """As `glance`, but an entry without a seal is read: it is good, and sealed from now on, or damaged."""
        state = self.glance(key)
        if state != "unsure":
            return state
        path = self._file(key)
        try:
            buffer, status = _load(path)
        except FileNotFoundError:
            return "missing"
        except OSError as error:
            if error.errno == errno.EIO:
                return "damaged"
            self._fail(error)
        if not _is_whole(key, buffer):
            return "damaged"
        _seal(path, key, status, int(time.time()))
        return "good"

    def _file(self, key: str) -> str:
        return f"{self._root}{key[:2]}{os.sep}{key[2:]}{SUFFIX}"

    def _fail(self, error: OSError) -> NoReturn:
        raise ResourceError(
            f"the cache cannot be used: {error.strerror or error}",
            where=str(self.folder),
            fix="free some disk space, or set data.cache to another folder",
        ) from error


def read_about(path: Path) -> About | None:
    """What an entry's file says of itself, without a check of its content; None if that cannot be told."""
    try:
        with path.open("rb") as file:
            start = file.read(_HEADER)
            if len(start) < _HEADER or start[:8] != _MAGIC:
                return None
            length = int.from_bytes(start[_LENGTH], "little")
            return None if length > 1_000_000 else _about(file.read(length))
    except (OSError, ValueError, IndexError, TypeError):
        return None


def is_whole(path: Path) -> bool:
    """Whether the content of an entry's file is what was written; if so it is sealed, which is not a use."""
    key = key_of(path)
    buffer, status = _load(path)
    whole = _is_whole(key, buffer)
    if whole and not _has_seal(key, status):
        _seal(path, key, status, int(status.st_mtime))
    return whole


def key_of(path: Path) -> str:
    """The key that an entry's place stands for."""
    return path.parent.name + path.name.removesuffix(SUFFIX)


def _load(path: str | Path) -> tuple[Bytes, os.stat_result]:
    """A file in one read into memory that nobody has cleared or copied before."""
    with open(path, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        buffer = np.empty(status.st_size, np.uint8)
        filled = file.readinto(buffer.data)
        while filled < len(buffer):
            more = file.readinto(buffer[filled:].data)
            if not more:
                return buffer[:filled], status  # truncated while it was read
            filled += more
    return buffer, status


def _pack(key: str, about: About, arrays: Mapping[str, Array]) -> bytearray:
    starts = [0, *itertools.accumulate(_padded(array.data.nbytes) for array in arrays.values())]
    table = [
        [name, array.dtype, array.shape, start, array.data.nbytes]
        for (name, array), start in zip(arrays.items(), starts, strict=False)
    ]
    header = f"{json.dumps(table)}\n{json.dumps(about)}\n".encode()
    begin = _padded(_HEADER + len(header))
    content = bytearray(begin + starts[-1])
    content[:8] = _MAGIC
    content[_LENGTH] = (begin - _HEADER).to_bytes(8, "little")
    content[_HEADER:begin] = header.ljust(begin - _HEADER)
    for array, start in zip(arrays.values(), starts, strict=False):
        content[begin + start : begin + start + array.data.nbytes] = array.data.data
    content[_CHECKSUM] = _checksum(key, memoryview(content)[24:])
    return content


def _parse(buffer: Bytes) -> Entry:
    begin = _HEADER + int.from_bytes(buffer[_LENGTH].data, "little")
    header = buffer[_HEADER:begin].tobytes()
    table = _table(header[: header.index(b"\n")])
    arrays = {
        name: Array(dtype, shape, buffer[begin + start : begin + start + size])
        for name, dtype, shape, start, size in table
    }
    return Entry(arrays, header)


@functools.lru_cache(maxsize=256)
def _table(line: bytes) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    """Few entries differ in this, so most reads need not parse it."""
    return [(name, dtype, tuple(shape), start, size) for name, dtype, shape, start, size in json.loads(line)]


def _about(header: bytes) -> About:
    return About(*json.loads(header.split(b"\n")[1]))


def _is_whole(key: str, buffer: Bytes) -> bool:
    if len(buffer) < _HEADER or buffer[:8].data != _MAGIC:
        return False
    return buffer[_CHECKSUM].data == _checksum(key, buffer[24:].data)


def _checksum(key: str, content: memoryview) -> bytes:
    # The key is part of it: an entry under a wrong name is damaged too.
    digest = xxhash.xxh3_128(key.encode())
    digest.update(content)
    return digest.digest()


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


# The seal.


def _mark(key: str, status: os.stat_result, seconds: int) -> int:
    """The time in nanoseconds that seals a file; whole microseconds, as not every file system keeps more."""
    digest = xxhash.xxh3_64_intdigest(f"{key}/{status.st_ino}/{status.st_size}/{seconds}".encode())
    return seconds * 1_000_000_000 + digest % 1_000_000 * 1000


def _has_seal(key: str, status: os.stat_result) -> bool:
    return status.st_mtime_ns == _mark(key, status, status.st_mtime_ns // 1_000_000_000)


def _seal(path: str | Path, key: str, status: os.stat_result, seconds: int) -> None:
    mark = _mark(key, status, seconds)
    # Another user's file in a shared cache cannot be sealed by us: then it is only checked more often.
    with contextlib.suppress(OSError):
        os.utime(path, ns=(mark, mark))


def _break_seal(path: str | Path, status: os.stat_result) -> None:
    """Make the next fill read this file, although its time says that it was good."""
    other = status.st_mtime_ns + 1000
    with contextlib.suppress(OSError):
        os.utime(path, ns=(other, other))
