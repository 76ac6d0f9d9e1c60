"""The index: every picture of a run, decoded once to prove it can be, with its identity, size, caption and split."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gesso.config.run import Captions, Data, Source
from gesso.core import resolve
from gesso.data import captions, pairs, settings
from gesso.data.images import background_colour
from gesso.data.places import Place
from gesso.data.rows import SCHEMA, Row, Rows, Split
from gesso.data.scans import Scan, scan
from gesso.data.sources import forget, some
from gesso.data.sources.found import Dropped, counted
from gesso.data.sources.pairs import tell_dropped
from gesso.errors import Problems, UserError

__all__ = ["Index", "Row", "Rows", "Split", "build", "cache_folder", "held_folder", "held_out"]


@dataclass(frozen=True)
class Index:
    """The samples of a run, sorted by id, and what the user should know about them.

    `fingerprint` names the data set: it changes with any content, caption, split, weight, role or repeat, and with
    nothing else (not with file names).
    """

    rows: Rows
    notices: tuple[str, ...]
    fingerprint: str

    @property
    def train(self) -> Rows:
        """The rows to train on."""
        return self.rows.where(split="train")

    @property
    def validation(self) -> Rows:
        """The held-out rows."""
        return self.rows.where(split="validation")


def cache_folder(data: Data) -> Path:
    """Where encodings and scans are kept: `data.cache`, else $GESSO_CACHE, else ~/.cache/gesso."""
    return data.cache.expanduser() if data.cache is not None else resolve.cache_root()


def build(data: Data, *, progress: Callable[[int, int], None] | None = None) -> Index:
    """Read all sources and decode every picture, so that everything wrong is known before the run starts.

    A picture that was decoded before and has not been touched since is not decoded again. All problems are
    raised together as `Problems`; with `data.skip_bad` unreadable pictures become a notice instead.
    """
    forget()
    background_colour(data.background)  # a wrong name is one mistake, not one for each picture
    memory = cache_folder(data) / "scans"
    sources = [*data.sources, *held_folder(data)]
    scans = [
        scan(source, index=i, background=data.background, memory=memory, progress=progress)
        for i, source in enumerate(sources)
    ]
    notices = [notice for one in scans for notice in one.notices]
    problems = [problem for one in scans for problem in one.problems]
    bad = [error for one in scans for error in one.unreadable]
    if bad and data.skip_bad:
        reasons = "".join(f"\n  {error.where}: {error.what}" for error in bad)
        notices.append(f"{len(bad)} unreadable {'picture' if len(bad) == 1 else 'pictures'} left out:{reasons}")
    else:
        problems += bad
    for source, one in zip(sources, scans, strict=True):
        problems += _bad_captions(settings.words(source, data), one)
    if problems:
        raise Problems(problems)
    tables = [_columns(source, i, one) for i, (source, one) in enumerate(zip(sources, scans, strict=True))]
    kept = _usable_pairs(tables, scans, data, notices)
    rows = _split(pa.concat_tables(kept), data.validation.fraction, held=len(data.sources))
    if not pc.any(pc.equal(pc.cast(rows.column("split"), pa.string()), "train")).as_py():
        raise UserError("no picture is left to train on", where="data.sources", fix="mend the pictures named above")
    rows = _distinct_ids(rows)
    notices += _conversions(scans) + _repeated(rows)
    return Index(Rows(rows), tuple(notices), _fingerprint(rows))


def held_folder(data: Data) -> list[Source]:
    """The source that the validation folder makes, if there is one."""
    if data.validation.path is None:
        return []
    # Validation captions follow the rules of the training ones: same columns, trigger and policy.
    first = settings.leading(data)
    listing = first.metadata if first.metadata and (data.validation.path / first.metadata).is_file() else None
    changes = {
        "path": str(data.validation.path),
        "layout": "auto",
        "metadata": listing,
        "repeats": 1.0,
        "weight": 1.0,
        "weight_column": None,
        "share": None,
    }
    return [first.model_copy(update=changes)]


def _bad_captions(options: Captions, one: Scan) -> list[UserError]:
    if not (options.wildcards or options.keep_separator):
        return []
    texts, places = one.table.column("caption").to_pylist(), one.table.column("place").to_pylist()
    return [
        UserError(problem, where=str(Place(**place)), fix="mend the caption, or turn the option off")
        for text, place in zip(texts, places, strict=True)
        for problem in captions.problems(text, options)
    ]


def _columns(source: Source, index: int, one: Scan) -> pa.Table:
    """A source's pictures as rows, all of them to train on."""
    table, count = one.table, one.table.num_rows
    fixed: dict[str, Any] = {"split": "train", "role": source.role, "source": index}
    columns = {"id": _ids(table), "weight": pc.multiply(table.column("weight"), source.weight)}
    for field in SCHEMA:
        if field.name in fixed:
            columns[field.name] = pa.array([fixed[field.name]], _plain(field.type)).take(pa.array(np.zeros(count, int)))
        elif field.name not in columns:
            columns[field.name] = table.column(field.name)
    return pa.table({field.name: columns[field.name].cast(_plain(field.type)) for field in SCHEMA})


def _ids(table: pa.Table) -> pa.Array:
    """The picture's content; of a pair that of both, whichever was preferred, so that either order draws the same."""
    if not _paired(table):
        return table.column("image")
    images, rivals = (table.column(name).to_pylist() for name in ("image", "rejected_hash"))
    both = zip(images, rivals, strict=True)
    return pa.array([_digest("pair", *sorted(pair)) if pair[1] else pair[0] for pair in both], pa.string())


def _paired(table: pa.Table) -> bool:
    return bool(pc.any(pc.not_equal(table.column("rejected_hash"), "")).as_py())


def _usable_pairs(tables: Sequence[pa.Table], scans: Sequence[Scan], data: Data, notices: list[str]) -> list[pa.Table]:
    """The rows without the pairs that teach nothing, which are told in `notices`."""
    listed: list[pairs.Facts] = []
    places: list[tuple[int, int]] = []
    for i, one in enumerate(scans):
        if not _paired(one.table):
            continue
        held = i == len(data.sources)
        columns = (one.table.column(name).to_pylist() for name in _PAIR)
        for j, (caption, chosen, rejected, *sides) in enumerate(zip(*columns, strict=True)):
            if rejected:
                sizes = (sides[0], sides[1]), (sides[2], sides[3])
                listed.append(pairs.Facts(held, caption, chosen, rejected, *sizes))
                places.append((i, j))
    dropped = pairs.unusable(listed, upscale=data.buckets.upscale)
    kept = []
    for i, table in enumerate(tables):
        own = {places[k][1]: why for k, why in dropped.items() if places[k][0] == i}
        stays = np.ones(table.num_rows, bool)
        stays[list(own)] = False
        kept.append(table.filter(pa.array(stays)) if own else table)
        both = {j: [str(Place(**table.column(name)[j].as_py())) for name in ("place", "rejected")] for j in own}
        left = [Dropped(why, " and ".join(both[j])) for j, why in own.items()]
        source = data.sources[i].path if i < len(data.sources) else str(data.validation.path)
        tell_dropped(source, left, sum(a == i for a, _ in places), notices)
    if uneven := sum(pair.size != pair.rejected_size for k, pair in enumerate(listed) if k not in dropped):
        told = "both are fitted alike, and the size that SDXL is told is the preferred picture's"
        notices.append(f"{counted(uneven, 'pair')} of one shape in two sizes: {told}")
    return kept


_PAIR = ("caption", "image", "rejected_hash", "width", "height", "rejected_width", "rejected_height")


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def held_out(images: Iterable[str], fraction: float, *, where: str = "data.validation.fraction") -> set[str]:
    """Which pictures, given by their content hashes, are kept from training: each by its own hash.

    So adding pictures moves no other across. At least one is held out and at least one is not; a single picture is a
    `UserError`.
    """
    places = {image: int(_digest("holdout", image), 16) / 16**32 for image in images}
    order = sorted(places, key=places.__getitem__)
    if len(order) == 1:
        raise UserError(
            "one picture, or pairs that share theirs, cannot be both trained on and held out",
            where=where,
            fix="add pictures, or set it to 0",
        )
    chosen = {image for image in order if places[image] < fraction} or set(order[:1])
    return chosen - set(order[-1:]) if len(chosen) == len(order) else chosen


def _split(rows: pa.Table, fraction: float, *, held: int) -> pa.Table:
    """Say of each row whether it is held out; those of source `held` are the validation folder's.

    Prior pictures are not held out: validation measures what is taught.
    """
    is_held = rows.column("source").to_numpy() == held
    prior = pc.equal(pc.cast(rows.column("role"), pa.string()), "prior").to_numpy()
    if fraction and rows.num_rows and not prior.all():
        # Pairs that share a picture stay together, so that none is both trained on and held out.
        both = zip(*(rows.column(name).to_pylist() for name in ("image", "rejected_hash")), strict=True)
        groups = np.array(pairs.connected(list(both)), object)
        chosen = held_out(groups[~is_held & ~prior], fraction)
        is_held |= np.fromiter((group in chosen for group in groups), bool, len(groups)) & ~prior
    words = pa.DictionaryArray.from_arrays(is_held.astype(np.int32), ["train", "validation"])
    return _replaced(rows, "split", words).cast(SCHEMA)


def _replaced(rows: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), name, column)


def _distinct_ids(rows: pa.Table) -> pa.Table:
    """Give rows that share their content ids of their own, by caption; the first keeps the plain id. Sorted by id."""
    ids: NDArray[Any] = np.array(rows.column("id").to_pylist(), object)
    groups = _same(rows)
    for members in groups:
        seen: Counter[str] = Counter()
        for i in _ordered(rows, members):
            suffix = f"-{_digest(rows.column('caption')[i].as_py())[:8]}" if seen[ids[i]] else ""
            seen[ids[i]] += 1
            name = ids[i] + suffix
            if suffix:
                seen[name] += 1
                name += f"-{seen[name]}" if seen[name] > 1 else ""
            ids[i] = name
    rows = _replaced(rows, "id", pa.array(ids, pa.string()))
    return rows.take(pc.sort_indices(rows.column("id")))


def _ordered(rows: pa.Table, members: Sequence[int]) -> list[int]:
    def facts(i: int) -> tuple[object, ...]:
        row = rows.slice(i, 1).to_pylist()[0]
        told = (row[name] for name in ("split", "caption", "source", "concept", "repeats", "weight", "mask_hash"))
        return (*told, str(Place(**row["place"])))

    return sorted(members, key=facts)


def _same(rows: pa.Table) -> list[list[int]]:
    """The positions of rows that share their content, of pairs that of both pictures; group by group."""
    ids = _ids(rows)
    codes = (ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids).dictionary_encode()
    codes = codes.combine_chunks() if isinstance(codes, pa.ChunkedArray) else codes
    numbers = codes.indices.to_numpy()
    counts = np.bincount(numbers)
    several = np.flatnonzero(counts[numbers] > 1)
    groups: dict[int, list[int]] = {}
    for i in several.tolist():
        groups.setdefault(int(numbers[i]), []).append(i)
    return list(groups.values())


def _conversions(scans: Sequence[Scan]) -> list[str]:
    notes = Counter(note for one in scans for note in pc.list_flatten(one.table.column("notes")).to_pylist())
    return [f"{count} pictures: {note}" if count > 1 else f"1 picture: {note}" for note, count in sorted(notes.items())]


def _repeated(rows: pa.Table) -> list[str]:
    notices = []
    for members in _same(rows):
        group = rows.take(pa.array(members)).to_pylist()
        paths = sorted({str(Place(**row["place"])) for row in group})
        if len(paths) > 1:
            notices.append(f"the same picture {len(paths)} times: {some(paths)}")
        else:
            notices.append(f"listed {len(group)} times: {paths[0]}")
        if {row["split"] for row in group} == {"train", "validation"}:
            notices.append(f"both trained on and held out, so its validation loss means little: {some(paths)}")
    held = pc.sum(pc.equal(pc.cast(rows.column("split"), pa.string()), "validation")).as_py()
    if held:
        things = "pairs" if _paired(rows) else "pictures"
        notices.append(f"{held} of {rows.num_rows} {things} {'is' if held == 1 else 'are'} held out for validation")
    return notices


_FACTS = ("id", "caption", "split", "weight", "repeats", "role", "concept", "mask_hash", "source")


def _fingerprint(rows: pa.Table) -> str:
    # Which picture of a pair won is in none of the others.
    names = (*_FACTS, "image", "rejected_hash") if _paired(rows) else _FACTS
    columns = [pc.cast(rows.column(name), pa.string()) for name in names]
    found = hashlib.sha256()
    # In columns: a row at a time would take as long as all the rest of a scan that finds nothing new.
    for chunk in pc.binary_join_element_wise(*columns, "\x1d", "\x1e").chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        found.update(memoryview(chunk.buffers()[2])[ends[0] : ends[-1]])
    return found.hexdigest()[:32]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\x1f".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
