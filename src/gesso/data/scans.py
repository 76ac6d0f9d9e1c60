"""Every picture of a source, decoded once to prove that it can be; what has not been touched since is not opened again.

What was learnt is kept in the cache folder as one Arrow file a source. A source whose files are all as they were (see
`sources.listing_stamp`) is read from it whole; otherwise each picture that is as it was is taken from it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from gesso.config.run import Source
from gesso.core.random import key as hash_key
from gesso.data.images import content_hash, decode_bytes, decode_mask
from gesso.data.places import Place, stamp_of
from gesso.data.rows import ALPHA, PLACE
from gesso.data.sources import Record, collect, listing_stamp
from gesso.data.threads import ahead
from gesso.errors import ResourceError, UserError

_VERSION = 6
_DIGEST = 16
"""Bytes of the checksum in front of what is remembered."""
SCHEMA = pa.schema(
    [
        ("place", PLACE),
        ("mask", PLACE),
        ("caption", pa.string()),
        ("concept", pa.string()),
        ("repeats", pa.float64()),
        ("weight", pa.float64()),
        ("image", pa.string()),
        ("mask_hash", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("notes", pa.list_(pa.string())),
        ("stamp", pa.string()),
        ("rejected", PLACE),
        ("rejected_hash", pa.string()),
        ("rejected_width", pa.int32()),
        ("rejected_height", pa.int32()),
    ]
)


@dataclass(frozen=True)
class Scan:
    """What a source holds: a row for each picture that could be decoded, and all that was wrong."""

    table: pa.Table
    notices: tuple[str, ...]
    problems: tuple[UserError, ...]
    unreadable: tuple[UserError, ...]
    """Pictures that cannot be decoded, which `data.skip_bad` leaves out."""


@dataclass(frozen=True, slots=True)
class _Look:
    """What a full decode of one picture, its mask and its rival told; with an empty stamp it is not remembered."""

    image: str
    mask_hash: str
    width: int
    height: int
    notes: tuple[str, ...]
    stamp: str
    rejected_hash: str = ""
    rejected_width: int = 0
    rejected_height: int = 0


def scan(
    source: Source, *, index: int, background: str, memory: Path, progress: Callable[[int, int], None] | None = None
) -> Scan:
    """Decode every picture of a source, as far as that was not done before; `memory` is the folder of what is known."""
    settings = source.model_dump_json(exclude={"share", "weight", "resolution", "captions", "crop", "flip"})
    file = memory / f"{hash_key(_VERSION, 'scan', settings, background):032x}.arrow"
    listing = listing_stamp(source)
    known = _remembered(file)
    if known is not None and listing and known.schema.metadata[b"listing"] == listing.encode():
        if progress is not None:
            progress(known.num_rows, known.num_rows)
        return Scan(known.replace_schema_metadata(None), tuple(json.loads(known.schema.metadata[b"notices"])), (), ())
    found = collect(source, index=index)
    looks = _look_all(found.records, source, background, _by_place(known), progress)
    seen = [(record, look) for record, look in zip(found.records, looks, strict=True) if isinstance(look, _Look)]
    unreadable = [look for look in looks if isinstance(look, UserError)]
    table = pa.Table.from_pylist([_row(record, look) for record, look in seen], schema=SCHEMA)
    # What changes while it is read is not what was listed before.
    settled = not found.problems and not unreadable and all(look.stamp for _, look in seen)
    whole = listing if settled and listing == listing_stamp(source) else None
    _remember(file, table, listing=whole or "", notices=found.notices)
    return Scan(table, tuple(found.notices), tuple(found.problems), tuple(unreadable))


def _row(record: Record, look: _Look) -> dict[str, Any]:
    places = {"place": record.place, "mask": record.mask, "rejected": record.rejected}
    own = {name: None if place is None else asdict(place) for name, place in places.items()}
    told = {"caption": record.caption, "concept": record.concept}
    return own | told | {"repeats": record.repeats, "weight": record.weight} | asdict(look)


def _look_all(
    records: Sequence[Record],
    source: Source,
    background: str,
    known: dict[_Files, _Look],
    progress: Callable[[int, int], None] | None,
) -> list[_Look | UserError]:
    stamps = functools.cache(stamp_of)  # an archive is asked once, not for each member

    def look(record: Record) -> _Look | UserError:
        try:
            container = Place(record.place.url, record.place.kind)
            stamp = stamps(container) if record.place.kind != "file" else stamp_of(record.place)
            for beside in (record.mask, record.rejected):
                if beside is not None and stamp:
                    own = stamp_of(beside) if beside.kind == "file" else stamps(Place(beside.url, beside.kind))
                    stamp = f"{stamp} {own}" if own else ""
            before = known.get((record.place, record.rejected))
            if before is not None and stamp and before.stamp == stamp and source.mask == _mask_kind(before):
                return before
            return _decode(record, source, background, stamp)
        except UserError as error:
            return error
        except OSError as error:
            where, reason = str(record.place), error.strerror or str(error)
            return UserError(f"cannot be read: {reason}", where=where, fix="check the file")

    threads = min(8, os.cpu_count() or 1)
    found = []
    for done, result in enumerate(ahead(look, records, threads=threads, depth=8 * threads), start=1):
        found.append(result)
        if progress is not None and (done == len(records) or done % max(1, len(records) // 500) == 0):
            progress(done, len(records))
    return found


def _mask_kind(look: _Look) -> str:
    return {"": "none", ALPHA: "alpha"}.get(look.mask_hash, "file")


def _decode(record: Record, source: Source, background: str, stamp: str) -> _Look:
    data = record.place.read()
    image, notes, alpha = decode_bytes(data, path=record.place, background=background)
    mask_hash = ""
    if source.mask == "alpha":
        mask_hash = ALPHA
        notes = tuple(note for note in notes if not note.startswith("transparency")) if alpha is not None else (
            *notes,
            "no transparency, so the loss counts everywhere",
        )  # fmt: skip
    elif record.mask is not None:
        mask = record.mask.read()
        decode_mask(mask, place=record.mask, size=image.size)
        mask_hash = content_hash(mask)
    look = _Look(content_hash(data), mask_hash, image.width, image.height, notes, stamp)
    return look if record.rejected is None else _with_rejected(look, record.rejected, background)


def _with_rejected(look: _Look, place: Place, background: str) -> _Look:
    data = place.read()
    try:
        image, notes, _ = decode_bytes(data, path=place, background=background)
    except UserError as error:
        # A row of a table has two pictures.
        where = f"{error.where} ({place.part})" if place.is_row else error.where
        raise UserError(error.what, where=where, fix=error.fix) from error
    return replace(
        look,
        notes=tuple(dict.fromkeys([*look.notes, *notes])),
        rejected_hash=content_hash(data),
        rejected_width=image.width,
        rejected_height=image.height,
    )


_Files = tuple[Place, Place | None]
"""A picture and the one it was preferred to."""


def _by_place(table: pa.Table | None) -> dict[_Files, _Look]:
    if table is None:
        return {}
    names = [field.name for field in fields(_Look)]
    columns = [table.column(name).to_pylist() for name in names]
    ours, rivals = (table.column(name).to_pylist() for name in ("place", "rejected"))
    places = [(Place(**a), None if b is None else Place(**b)) for a, b in zip(ours, rivals, strict=True)]
    looks = (_Look(**{**dict(zip(names, row, strict=True))}) for row in zip(*columns, strict=True))
    return dict(zip(places, looks, strict=True))


def _remembered(file: Path) -> pa.Table | None:
    try:
        content = memoryview(file.read_bytes())
    except OSError:
        return None  # only a memory of work done: without it every picture is decoded again
    if xxhash.xxh3_128_digest(content[_DIGEST:]) != bytes(content[:_DIGEST]):
        return None
    table = pa.ipc.open_file(pa.py_buffer(content[_DIGEST:])).read_all()
    known = table.schema.remove_metadata() == SCHEMA and {b"listing", b"notices"} <= set(table.schema.metadata or {})
    return table if known else None


def _remember(file: Path, table: pa.Table, *, listing: str, notices: Sequence[str]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{time.monotonic_ns()}")
    told = table.replace_schema_metadata({"listing": listing, "notices": json.dumps(list(notices))})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, told.schema) as writer:
            writer.write_table(told)
        content = sink.getvalue().to_pybytes()
        temporary.write_bytes(xxhash.xxh3_128_digest(content) + content)
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ResourceError(
            f"the cache folder cannot be written: {error.strerror}",
            where=str(file.parent),
            fix="set data.cache to a folder with space",
        ) from error
