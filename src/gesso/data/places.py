"""Where the bytes of a picture are: a file, a stretch of one, a member of a ZIP, a cell of a table; local or remote."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import os
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from gesso.errors import UserError

Kind = Literal["file", "stretch", "packed", "zip", "parquet", "dataset"]

MAX_PACKED = 1 << 30
"""Largest compressed TAR, in bytes unpacked: it has no random access and is held in memory."""

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "sftp": "paramiko",
}
_TRIES = 3
RACY_NS = 100_000_000
"""A file written less than this ago may be written again without its times showing it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a picture's (or mask's) bytes are, and how it is named in messages.

    `url` is an absolute local path, a URL that fsspec reads, or for a data set what `datasets` opens. `part` is the
    member of an archive, or the column of a table, whose row is `start`, from 0. A stretch is `size` bytes from `start`
    (a member of a TAR); packed is the same of a compressed TAR, counted in what it unpacks to.
    """

    url: str
    kind: Kind = "file"
    part: str = ""
    start: int = 0
    size: int = 0

    def __str__(self) -> str:
        if self.is_row:
            return f"{self.url} row {self.start + 1}"
        return f"{self.url}::{self.part}" if self.part else self.url

    @property
    def name(self) -> str:
        """The last part of it, as a file's name; of a table its row, counted from 1."""
        return f"row {self.start + 1}" if self.is_row else (self.part or self.url).rpartition("/")[2]

    @property
    def path(self) -> Path:
        """The local file it is (in); meaningless for a URL."""
        return Path(self.url)

    @property
    def is_row(self) -> bool:
        """Whether it is a cell of a table."""
        return self.kind in ("parquet", "dataset")

    @property
    def is_remote(self) -> bool:
        """Whether it is read through fsspec."""
        return is_url(self.url)

    def read(self) -> bytes:
        """The bytes; what cannot be read is a `UserError` that names it."""
        try:
            return _READERS[self.kind](self)
        except UserError:
            raise
        except FileNotFoundError as error:
            raise UserError("cannot be read: it is not there any more", where=str(self), fix="start again") from error
        except Exception as error:
            # Archives and remote stores raise whatever their libraries make of a damaged file: an untrusted edge.
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            raise UserError(f"cannot be read: {reason}", where=str(self), fix="check the file") from error


def is_url(text: str) -> bool:
    """Whether a source's path is a URL rather than a local path."""
    return "://" in text


def stamp_of(place: Place) -> str:
    """Says cheaply whether what a place is in has been touched: size, times and inode, or what a remote store tells.

    Empty where that cannot be known, and where it was written this very moment: it may change again within one tick of
    the file system's clock.
    """
    if place.kind == "dataset":
        return ""
    if place.is_remote:
        store, path = filesystem(place.url)
        try:
            info = store.info(path)
        except Exception:  # whatever a store's library raises: nothing is known, and reading it says why
            return ""
        told = [info.get(name) for name in ("size", "etag", "ETag", "mtime", "LastModified", "last_modified")]
        return str(told) if sum(fact is not None for fact in told) > 1 else ""
    status = place.path.stat()
    if is_racy(status, time.time_ns()):
        return ""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


def is_racy(status: os.stat_result, now: int) -> bool:
    """Whether a file was written so lately that another write could leave its times as they are; `now` in ns."""
    return now - max(status.st_mtime_ns, status.st_ctime_ns) <= RACY_NS


def filesystem(url: str) -> tuple[Any, str]:
    """The store of a URL, as fsspec has it, and the path in it; `UserError` if nothing here reads such a URL."""
    import fsspec

    protocol = url.partition("://")[0].rpartition("::")[2]
    try:
        store, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "the package that reads them")
        what = f"{protocol}:// cannot be read: {error}"
        raise UserError(what, where=url, fix=f"install {package} (pip install {package})") from error
    except ValueError as error:
        raise UserError(f"{protocol}:// cannot be read: {error}", where=url, fix="check the address") from error
    return store, str(path)


def open_file(url: str) -> IO[bytes]:
    """A local file or a URL, opened for reading with random access."""
    if not is_url(url):
        return open(url, "rb")
    store, path = filesystem(url)
    opened: IO[bytes] = store.open(path, "rb")
    return opened


@contextlib.contextmanager
def edge(url: str, what: str, *, fix: str) -> Iterator[None]:
    """Whatever a library makes of an untrusted file becomes a `UserError` that names it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError("there is no such file", where=url, fix="check the name") from error
    except Exception as error:
        raise UserError(f"{what}: {str(error) or type(error).__name__}", where=url, fix=fix) from error


def read_url(url: str, *, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes [start, end) of a URL; a request that fails is made again, a file that is not there is not."""
    store, path = filesystem(url)

    def once() -> bytes:
        content: bytes = store.cat_file(path, start=start, end=end)
        return content

    return retried(once)


def retried(request: Callable[[], Any]) -> Any:
    """The answer of a request to a remote store, which may fail twice."""
    for attempt in range(1, _TRIES):
        try:
            return request()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception:
            # Each store's library has errors of its own for a dead line.
            time.sleep(0.2 * attempt)
    return request()


def _decompressor(url: str, file: IO[bytes]) -> Any:
    import bz2
    import gzip
    import lzma

    magic = file.read(6)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)
    if magic[:3] == b"BZh":
        return bz2.BZ2File(file)
    if magic == b"\xfd7zXZ\x00":
        return lzma.LZMAFile(file)
    raise UserError("not compressed with gzip, bzip2 or xz", where=url, fix="repack it as .zip or .tar")


def _version(url: str) -> tuple[int, ...]:
    # What is kept open belongs to the file that was there: a new one under the name is opened anew.
    if is_url(url):
        return ()
    status = os.stat(url)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read_file(place: Place) -> bytes:
    return read_url(place.url) if place.is_remote else place.path.read_bytes()


def _read_stretch(place: Place) -> bytes:
    if place.is_remote:
        content = read_url(place.url, start=place.start, end=place.start + place.size)
    else:
        with place.path.open("rb") as file:
            file.seek(place.start)
            content = file.read(place.size)
    if len(content) < place.size:
        raise tarfile.ReadError(f"the archive ends within it, after {len(content)} of {place.size} bytes")
    return content


_lock = threading.Lock()


def unpacked(url: str) -> bytes:
    """What a compressed TAR unpacks to; the last four are kept in memory. A `UserError` above `MAX_PACKED` bytes."""
    with _lock:  # several threads would unpack it several times
        return _unpacked(url, _version(url))


@functools.lru_cache(maxsize=4)
def _unpacked(url: str, _version: tuple[int, ...]) -> bytes:
    with open_file(url) as file, _decompressor(url, file) as stream:
        content: bytes = stream.read(MAX_PACKED + 1)
    if len(content) > MAX_PACKED:
        raise UserError(
            f"a compressed TAR has no random access and is held in memory, up to {MAX_PACKED >> 20} MiB; this is more",
            where=url,
            fix="decompress it to a plain .tar (gunzip, xz -d) and name that, which is read piece by piece",
        )
    return content


def _read_packed(place: Place) -> bytes:
    return unpacked(place.url)[place.start : place.start + place.size]


_open_files: list[IO[bytes]] = []


def _kept_open(url: str) -> IO[bytes]:
    """Opened until `forget`."""
    _open_files.append(open_file(url))
    return _open_files[-1]


@functools.lru_cache(maxsize=16)
def _archive(url: str, _version: tuple[int, ...]) -> zipfile.ZipFile:
    return zipfile.ZipFile(_kept_open(url))


def _read_member(place: Place) -> bytes:
    # One open archive serves all threads, and its file has one position.
    with _lock:
        return _archive(place.url, _version(place.url)).read(place.part)


def cell_bytes(value: Any) -> bytes:
    """The picture in a table's cell: bytes, or a struct of `bytes` and `path` as `datasets` writes it.

    A path without bytes is never followed: a table must not make us read files of its choice.
    """
    inner = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(inner, bytes):
        return inner
    if isinstance(value, dict) and value.get("path"):
        raise ValueError(f"no picture in this cell, only the path '{value['path']}'")
    raise ValueError("no picture in this cell")


@functools.lru_cache(maxsize=16)
def _parquet(url: str, _version: tuple[int, ...]) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(_kept_open(url))


@functools.lru_cache(maxsize=4)
def _row_group(url: str, version: tuple[int, ...], group: int, column: str) -> Any:
    return _parquet(url, version).read_row_group(group, columns=[column]).column(column)


@functools.lru_cache(maxsize=16)
def _group_ends(url: str, version: tuple[int, ...]) -> list[int]:
    """How many rows a table has up to the end of each of its row groups."""
    facts = _parquet(url, version).metadata
    return list(itertools.accumulate(facts.row_group(i).num_rows for i in range(facts.num_row_groups)))


def _read_parquet(place: Place) -> bytes:
    with _lock:
        version = _version(place.url)
        ends = _group_ends(place.url, version)
        group = bisect.bisect_right(ends, place.start)
        if group == len(ends):
            raise ValueError("the table has no such row")
        first = ends[group - 1] if group else 0
        return cell_bytes(_row_group(place.url, version, group, place.part)[place.start - first].as_py())


def _read_dataset(place: Place) -> bytes:
    from gesso.data.sources.hub import read_cell

    return read_cell(place.url, place.start, place.part)


_READERS = {
    "file": _read_file,
    "stretch": _read_stretch,
    "packed": _read_packed,
    "zip": _read_member,
    "parquet": _read_parquet,
    "dataset": _read_dataset,
}


def forget() -> None:
    """Let go of open archives and tables, so that what stands behind a URL is asked for anew."""
    with _lock:
        for kept in (_unpacked, _archive, _parquet, _row_group, _group_ends):
            kept.cache_clear()
        for file in _open_files:
            file.close()
        _open_files.clear()
