"""The index: every picture of a run, decoded once to prove it can be, with its identity, size, caption and split."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gesso.config.run import Data
from gesso.core import resolve
from gesso.data.images import background_colour, content_hash, decode_bytes, read
from gesso.data.sources import Found, Record, collect, some
from gesso.data.threads import ahead
from gesso.errors import Problems, ResourceError, UserError

Split = Literal["train", "validation"]
_SCAN_VERSION = 1
_RACY_NS = 100_000_000


@dataclass(frozen=True)
class Row:
    """One sample. `image` names the file's content; `id` is the same unless several rows share that content."""

    id: str
    image: str
    path: Path
    width: int
    height: int
    caption: str
    split: Split = "train"
    weight: float = 1.0
    repeats: int = 1
    role: str = "instance"


@dataclass(frozen=True)
class Index:
    """The samples of a run, sorted by id, and what the user should know about them.

    `fingerprint` names the data set: it changes with any content, caption, split, weight or repeat, and with
    nothing else (not with file names).
    """

    rows: tuple[Row, ...]
    notices: tuple[str, ...]
    fingerprint: str

    @property
    def train(self) -> tuple[Row, ...]:
        """The rows to train on."""
        return tuple(row for row in self.rows if row.split == "train")

    @property
    def validation(self) -> tuple[Row, ...]:
        """The held-out rows."""
        return tuple(row for row in self.rows if row.split == "validation")


@dataclass(frozen=True)
class _Scan:
    """What a full decode of one file told: content hash, upright size, conversions done."""

    image: str
    width: int
    height: int
    notes: tuple[str, ...]


def cache_folder(data: Data) -> Path:
    """Where encodings and scans are kept: `data.cache`, else $GESSO_CACHE, else ~/.cache/gesso."""
    return data.cache.expanduser() if data.cache is not None else resolve.cache_root()


def build(data: Data, *, progress: Callable[[int, int], None] | None = None) -> Index:
    """Read all sources and decode every picture, so that everything wrong is known before the run starts.

    A picture that was decoded before and has not been touched since is not decoded again. All problems are
    raised together as `Problems`; with `data.skip_bad` unreadable pictures become a notice instead.
    """
    background_colour(data.background)  # a wrong name is one mistake, not one for each picture
    found = [collect(source, index=i) for i, source in enumerate(data.sources)]
    held = _held_folder(data)
    notices = [notice for one in [*found, held] for notice in one.notices]
    problems = [problem for one in [*found, held] for problem in one.problems]
    records = [record for one in found for record in one.records]
    scans, bad = _scan({r.path: None for r in [*records, *held.records]}, data, progress)
    if bad and data.skip_bad:
        reasons = "".join(f"\n  {error.where}: {error.what}" for error in bad)
        notices.append(f"{len(bad)} unreadable pictures left out:{reasons}")
    else:
        problems += bad
    if problems:
        raise Problems(problems)
    rows = [_row(record, scans[record.path], "train") for record in records if record.path in scans]
    rows = _split(rows, data.validation.fraction)
    rows += [_row(record, scans[record.path], "validation") for record in held.records if record.path in scans]
    if not any(row.split == "train" for row in rows):
        raise UserError("no picture is left to train on", where="data.sources", fix="mend the pictures named above")
    rows = _distinct_ids(rows)
    notices += _notices(rows, scans.values())
    return Index(tuple(rows), tuple(notices), _fingerprint(rows))


def _held_folder(data: Data) -> Found:
    if data.validation.path is None:
        return Found()
    # Validation captions follow the rules of the training ones: same columns, trigger and policy.
    first = data.sources[0]
    listing = first.metadata if first.metadata and (data.validation.path / first.metadata).is_file() else None
    source = first.model_copy(update={"path": data.validation.path, "metadata": listing, "repeats": 1, "weight": 1.0})
    return collect(source, index=len(data.sources))


def _row(record: Record, scan: _Scan, split: Split) -> Row:
    return Row(
        id=scan.image,
        image=scan.image,
        path=record.path,
        width=scan.width,
        height=scan.height,
        caption=record.caption,
        split=split,
        weight=record.weight,
        repeats=record.repeats,
    )


def _split(rows: Sequence[Row], fraction: float) -> list[Row]:
    """Hold out by content: a picture's side depends on its own hash, so adding pictures moves no other across."""
    if not fraction or not rows:
        return list(rows)
    places = {row.image: int(_digest("holdout", row.image), 16) / 16**32 for row in rows}
    order = sorted(places, key=places.__getitem__)
    held = {image for image in order if places[image] < fraction} or {order[0]}
    if len(order) == 1:
        raise UserError(
            "one picture cannot be both trained on and held out",
            where="data.validation.fraction",
            fix="add pictures, or set it to 0",
        )
    if len(held) == len(order):
        held.discard(order[-1])
    return [replace(row, split="validation") if row.image in held else row for row in rows]


def _distinct_ids(rows: Iterable[Row]) -> list[Row]:
    """Give rows that share their content ids of their own, by caption; the first keeps the plain id."""
    seen: Counter[str] = Counter()
    distinct = []
    for row in sorted(rows, key=lambda r: (r.image, r.split, r.caption, str(r.path))):
        suffix = f"-{_digest(row.caption)[:8]}" if seen[row.image] else ""
        seen[row.image] += 1
        name = row.image + suffix
        if suffix:
            seen[name] += 1
            name += f"-{seen[name]}" if seen[name] > 1 else ""
        distinct.append(replace(row, id=name))
    return sorted(distinct, key=lambda r: r.id)


def _notices(rows: Sequence[Row], scans: Iterable[_Scan]) -> list[str]:
    notices = [
        f"{count} pictures: {note}" if count > 1 else f"1 picture: {note}"
        for note, count in sorted(Counter(note for scan in scans for note in scan.notes).items())
    ]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.image, []).append(row)
    for group in groups.values():
        paths = sorted({str(row.path) for row in group})
        if len(paths) > 1:
            notices.append(f"the same picture {len(paths)} times: {some(paths)}")
        elif len(group) > 1:
            notices.append(f"listed {len(group)} times: {paths[0]}")
        if {row.split for row in group} == {"train", "validation"}:
            notices.append(f"both trained on and held out, so its validation loss means little: {some(paths)}")
    held = sum(row.split == "validation" for row in rows)
    if held:
        notices.append(f"{held} of {len(rows)} pictures are held out for validation")
    return notices


def _fingerprint(rows: Sequence[Row]) -> str:
    facts = [[r.id, r.caption, r.split, r.weight, r.repeats, r.role] for r in rows]
    return _digest(json.dumps(facts))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _scan(
    paths: Iterable[Path], data: Data, progress: Callable[[int, int], None] | None
) -> tuple[dict[Path, _Scan], list[UserError]]:
    """Decode every file in full; those that are remembered unchanged are not read."""
    ordered = list(paths)
    folders = sorted(str(source.path.expanduser().resolve()) for source in data.sources)
    file = cache_folder(data) / "scans" / f"{_digest(str(_SCAN_VERSION), data.background, *folders)}.json"
    known = _remembered(file)
    kept: dict[str, list[Any]] = {}
    scans: dict[Path, _Scan] = {}
    bad: list[UserError] = []

    def look(path: Path) -> tuple[Path, list[int], _Scan] | UserError:
        try:
            stamp = _stamp(path)
            before = known.get(str(path))
            if before is not None and before[0] == stamp:
                return path, stamp, _Scan(before[1], before[2], before[3], tuple(before[4]))
            return path, stamp, _decode(path, data.background)
        except UserError as error:
            return error

    threads = min(8, os.cpu_count() or 1)
    for done, result in enumerate(ahead(look, ordered, threads=threads, depth=2 * threads), start=1):
        if isinstance(result, UserError):
            bad.append(result)
        else:
            path, stamp, scan = result
            scans[path] = scan
            # A file written this very moment may change again within one tick of the file system's clock.
            if time.time_ns() - max(stamp[1], stamp[2]) > _RACY_NS:
                kept[str(path)] = [stamp, scan.image, scan.width, scan.height, scan.notes]
        if progress is not None:
            progress(done, len(ordered))
    _remember(file, kept)
    return scans, bad


def _decode(path: Path, background: str) -> _Scan:
    data = read(path)
    image, notes = decode_bytes(data, path=path, background=background)
    return _Scan(content_hash(data), image.width, image.height, notes)


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the file") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _remembered(file: Path) -> dict[str, list[Any]]:
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # only a memory of work done: without it every picture is decoded again
    return known if isinstance(known, dict) else {}


def _remember(file: Path, kept: dict[str, list[Any]]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept), "utf-8")
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ResourceError(
            f"the cache folder cannot be written: {error.strerror}",
            where=str(file.parent),
            fix="set data.cache to a folder with space",
        ) from error
