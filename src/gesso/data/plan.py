"""The plan: which picture is seen when, how it is cropped and what its caption says. Pure numbers, no torch.

The order depends only on the samples per optimiser step, never on how these are split into batches, accumulation and
processes; every number is keyed by (seed, epoch, sample), so position is one integer. A million rows cost some tens of
bytes each beside their table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gesso.core.batch import Geometry
from gesso.core.random import SampleKey, generator, permutation
from gesso.data import captions, settings
from gesso.data.buckets import BucketRow, Fit, Fits, Size, fit_all, sizes_for, too_small
from gesso.data.captions import Draws
from gesso.data.pairs import sides
from gesso.data.places import Place
from gesso.data.rows import Row, Rows
from gesso.data.shares import Repeats, repeats_of
from gesso.errors import Problems, UserError

if TYPE_CHECKING:
    from gesso.config.run import Data, Source

MOST_UNREPEATED = 20_000
"""Encodings that a run may need for visits that never come back (random crops or words without `data.variants`)."""


@dataclass(frozen=True)
class Visit:
    """One look at one picture: which repeat in which epoch, how it is cropped, and what its caption says."""

    row: Row
    id: str
    """The row's id, with the resolution where the picture is seen at several."""
    epoch: int
    repeat: int
    fit: Fit
    caption: str

    @property
    def key(self) -> SampleKey:
        """The name under which this visit's random numbers are drawn."""
        return SampleKey(self.id, self.repeat)

    @property
    def geometry(self) -> Geometry:
        """The SDXL size and crop conditioning."""
        return self.fit.geometry(self.row.width, self.row.height)


class _Epoch(NamedTuple):
    """The visits of an epoch in the order of training; step k is the k-th stretch of `step_size`."""

    samples: NDArray[np.int32]
    repeats: NDArray[np.int32]


class _Samples(NamedTuple):
    """Pictures at one resolution each, in columns: row, resolution, bucket and resized size."""

    rows: NDArray[np.int32]
    resolutions: NDArray[np.int32]
    buckets: NDArray[np.int32]
    resized: NDArray[np.int32]

    def fit(self, sample: int) -> Fit:
        return Fits(self.buckets, self.resized).one(sample)

    @property
    def crop_loss(self) -> NDArray[np.float64]:
        areas = self.resized.astype(np.int64).prod(1)
        return 1 - self.buckets.astype(np.int64).prod(1) / areas


class Plan:
    """Which samples each optimiser step sees, as a pure function of (seed, step).

    Every visit (picture x resolution x repeat) comes exactly once an epoch and none is dropped. A step takes a window
    of G = batch_size * accumulation * world_size visits; only the last window of an epoch may be shorter. Within a
    bucket visits are shuffled and cut into windows; the rest of all buckets share mixed windows.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        data: Data,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        seed: int = 0,
        multiple: int = 8,
    ) -> None:
        self.seed, self.batch_size, self.world_size = seed, batch_size, world_size
        self.step_size = batch_size * accumulation * world_size
        self._data = data
        ordered = Rows.of(rows).sorted()
        self._train, self._held = ordered.where(split="train"), ordered.where(split="validation")
        if not len(self._train):
            raise UserError("there is no picture to train on", where="data.sources", fix="add pictures")
        # Validation pictures follow the first source where they have a folder of their own.
        self._sources = [*data.sources, data.sources[0]]
        self._several = [len(settings.resolutions(source, data)) > 1 for source in self._sources]
        self._samples = self._fit(self._train, multiple)
        self._held_samples = self._fit(self._held, multiple)
        self._repeats: Repeats = repeats_of(self._train, self._samples.rows, data, seed=seed)
        if len(self._repeats) < self.step_size:
            raise UserError(
                f"an epoch has {len(self._repeats)} samples ({len(self._train)} pictures x repeats), but one step "
                f"takes {self.step_size} = batch_size {batch_size} x accumulation {accumulation} x "
                f"{world_size} process(es)",
                where="data.sources",
                fix="lower training.batch_size or training.accumulation, or raise repeats",
            )
        self._bucket, self._bucket_sizes = _codes(self._samples.buckets)
        self._epoch = functools.lru_cache(maxsize=2)(self._build_epoch)

    @property
    def visits_per_epoch(self) -> int:
        """Samples in one epoch."""
        return len(self._repeats)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch: ceil(visits / samples per step)."""
        return -(-len(self._repeats) // self.step_size)

    @property
    def validation(self) -> list[Visit]:
        """One unvarying visit of each held-out picture and resolution: cropped in the middle, captioned."""
        return [
            Visit(row, id_, 0, 0, self._held_samples.fit(sample), self._caption(row, None))
            for sample, (row, id_) in enumerate(self._named(self._held, self._held_samples))
        ]

    def texts(self) -> dict[str, Row]:
        """Every caption without what is random, and the first row that has it."""
        found: dict[str, Row] = {}
        for rows in (self._train, self._held):
            seen: set[tuple[str, int]] = set()
            for i, pair in enumerate(self._pairs(rows)):
                if pair not in seen:
                    seen.add(pair)
                    row = rows[i]
                    found.setdefault(self._caption(row, None), row)
        return found

    def captions(self, steps: range) -> list[str]:
        """Every caption that a visit in these steps or a held-out picture can have, sorted.

        Where words are random without `data.variants`, more than `MOST_UNREPEATED` captions are a `UserError`.
        """
        dropped = any(settings.words(source, self._data).dropout for source in self._sources)
        wordy, unrepeated = self._wordy(), 0
        found = {visit.caption for visit in self.validation} | ({""} if dropped else set())
        found |= {self._render(text, source, None) for text, source in set(self._pairs(self._train)) - wordy}
        for visit in self._visits(steps) if wordy else ():
            varies = not self._data.variants and (visit.row.caption, visit.row.source) in wordy
            unrepeated += varies and visit.caption not in found
            found.add(visit.caption)
            self._refuse_more(unrepeated, steps, "captions", "captions.shuffle, tag_dropout, wildcards or lines")
        return sorted(found)

    def window_size(self, step: int) -> int:
        """Samples in optimiser step `step`."""
        position = step % self.steps_per_epoch
        return min(self.step_size, len(self._repeats) - position * self.step_size)

    def window(self, step: int) -> list[Visit]:
        """The samples of optimiser step `step` (0-based)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = self._epoch(epoch)
        part = slice(position * self.step_size, (position + 1) * self.step_size)
        return [
            self._visit(epoch, int(sample), int(repeat))
            for sample, repeat in zip(order.samples[part], order.repeats[part], strict=True)
        ]

    def share(self, window: Sequence[Visit], rank: int) -> list[Visit]:
        """The part of a window that one of `world_size` processes takes; the parts differ by at most one sample."""
        return list(window[len(window) * rank // self.world_size : len(window) * (rank + 1) // self.world_size])

    def microbatches(self, window: Sequence[Visit]) -> list[list[Visit]]:
        """A window as batches of one shape and at most `batch_size` samples."""
        groups: dict[Size, list[Visit]] = {}
        for visit in window:
            groups.setdefault(visit.fit.bucket, []).append(visit)
        size = self.batch_size
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]

    def renditions(self, steps: range) -> list[Visit]:
        """One visit for each distinct version of a picture in these steps, the held-out ones included.

        These are what a cache must hold. Where pictures vary without `data.variants`, nearly every visit is a new
        version: more than `MOST_UNREPEATED` are a `UserError`, because the disk would fill silently.
        """
        varies = [self._random(source) and not self._data.variants for source in self._sources]
        most, seen, unrepeated = int(self._versions().sum()), set(), 0
        found: dict[tuple[str, str, Fit], Visit] = {}
        for visit in self._visits(steps):
            for side in sides(visit):
                key = (side.row.image, side.row.mask_hash, side.fit)
                unrepeated += varies[side.row.source] and key not in found
                found.setdefault(key, side)
            self._refuse_more(unrepeated, steps, "images", "data.crop, rotation or colour")
            seen.add((visit.id, visit.fit))
            # Random crops can coincide, and then this is never reached, which only costs time.
            if not any(varies) and len(seen) == most:
                break
        for side in itertools.chain.from_iterable(map(sides, self.validation)):
            found.setdefault((side.row.image, side.row.mask_hash, side.fit), side)
        return list(found.values())

    def refuse_unrepeated(self, steps: range, *, captions: bool) -> None:
        """Raise what `renditions`, and if they count `captions`, would raise for these steps."""
        if self._data.variants:
            return
        if any(self._random(source) for source in self._sources):
            self.renditions(steps)
        if captions:
            self.captions(steps)

    def describe(self) -> list[BucketRow]:
        """Training pictures and mean crop loss of each bucket, the fullest bucket first."""
        counts = np.bincount(self._bucket, minlength=len(self._bucket_sizes))
        losses = np.bincount(self._bucket, weights=self._samples.crop_loss, minlength=len(self._bucket_sizes))
        rows = [
            BucketRow(size, int(count), float(loss / count))
            for size, count, loss in zip(self._bucket_sizes, counts, losses, strict=True)
        ]
        return sorted(rows, key=lambda row: (-row.images, row.bucket))

    def concepts(self) -> list[tuple[str, int, int]]:
        """Name, training pictures and samples an epoch of each concept, by name."""
        codes, names = self._train.words("concept")
        pictures = np.bincount(codes, minlength=len(names))
        samples = np.bincount(codes[self._samples.rows[self._repeats.of(0).samples]], minlength=len(names))
        return sorted((n, int(p), int(s)) for n, p, s in zip(names, pictures, samples, strict=True) if p)

    @property
    def notices(self) -> list[str]:
        """Pictures that are much enlarged or much cropped, in words."""
        notices = []
        kinds: list[tuple[str, Callable[[Rows, _Samples], NDArray[np.bool_]]]] = [
            ("enlarged more than 1.5 times (blurred)", lambda r, s: s.resized[:, 0] > 1.5 * r.numbers("width")[s.rows]),
            ("more than 30 % cropped away", lambda _, s: s.crop_loss > 0.3),
        ]
        for what, test in kinds:
            names = []
            for rows, samples in ((self._train, self._samples), (self._held, self._held_samples)):
                names += [(rows, int(i)) for i in dict.fromkeys(samples.rows[test(rows, samples)].tolist())]
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                notices.append(f"{what}: {', '.join(_named(rows[i].place) for rows, i in names[:_NAMED])}{more}")
        return notices

    def _fit(self, rows: Rows, multiple: int) -> _Samples:
        """Every row at every resolution of its source."""
        sources, data = rows.numbers("source"), self._data
        widths, heights = rows.numbers("width"), rows.numbers("height")
        parts = []
        for i, source in enumerate(self._sources):
            members = np.flatnonzero(sources == i).astype(np.int32)
            for side in settings.resolutions(source, data):
                sizes, step = sizes_for(data, resolution=side, multiple=multiple)
                fits = fit_all(widths[members], heights[members], sizes=sizes, step=step, upscale=data.buckets.upscale)
                if small := [rows[int(members[j])] for j in np.flatnonzero(~fits.buckets.all(1))]:
                    errors = [(row, too_small(row.width, row.height, step)) for row in small]
                    raise Problems([UserError(e.what, where=str(row.place), fix=e.fix) for row, e in errors])
                parts.append(_Samples(members, np.full(len(members), side, np.int32), *fits))
        joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
        order = np.lexsort((joined[1], joined[0]))
        return _Samples(*(column[order] for column in joined))

    def _named(self, rows: Rows, samples: _Samples) -> Iterator[tuple[Row, str]]:
        for i, side in zip(samples.rows.tolist(), samples.resolutions.tolist(), strict=True):
            row = rows[i]
            yield row, f"{row.id}@{side}" if self._several[row.source] else row.id

    def _visits(self, steps: range) -> Iterator[Visit]:
        return (visit for step in steps for visit in self.window(step))

    def _visit(self, epoch: int, sample: int, repeat: int) -> Visit:
        row = self._train[int(self._samples.rows[sample])]
        id_ = f"{row.id}@{self._samples.resolutions[sample]}" if self._several[row.source] else row.id
        fit, data, source = self._samples.fit(sample), self._data, self._sources[row.source]

        def drawn(domain: str) -> np.random.Generator:
            return generator(self.seed, domain, epoch, id_, repeat)

        varied = drawn
        if data.variants:
            variant = int(drawn("variant").integers(data.variants))

            def varied(domain: str) -> np.random.Generator:
                return generator(self.seed, domain, "variant", variant, id_)

        if settings.crop(source, data) == "random":
            slack = [fit.resized[0] - fit.bucket[0] + 1, fit.resized[1] - fit.bucket[1] + 1]
            left, top = varied("crop").integers(0, slack)
            fit = replace(fit, crop=(int(left), int(top)))
        if data.rotation:
            fit = replace(fit, angle=float(varied("rotation").uniform(-data.rotation, data.rotation)))
        if data.colour:
            light, contrast, saturation = varied("colour").uniform(1 - data.colour, 1 + data.colour, 3).tolist()
            fit = replace(fit, colour=(light, contrast, saturation))
        if settings.flips(source, data) and drawn("flip").random() < 0.5:
            fit = replace(fit, flip=True)

        def words(domain: str) -> np.random.Generator:
            # An empty caption is no version of a caption: it comes at its own rate.
            return drawn(domain) if domain == "caption dropout" else varied(domain)

        return Visit(row, id_, epoch, repeat, fit, self._caption(row, words))

    def _caption(self, row: Row, draws: Draws | None) -> str:
        return self._render(row.caption, row.source, draws)

    def _render(self, text: str, source: int, draws: Draws | None) -> str:
        own = self._sources[source]
        return captions.render(text, settings.words(own, self._data), trigger=own.trigger, draws=draws)

    def _random(self, source: Source) -> bool:
        """Whether the pictures of a source are seen in ever new versions."""
        data = self._data
        return settings.crop(source, data) == "random" or bool(data.rotation or data.colour)

    def _versions(self) -> NDArray[np.int64]:
        """How many versions there are of each sample, where pictures have `data.variants` or do not vary."""
        data = self._data
        each = [
            (max(data.variants, 1) if self._random(source) else 1) * (1 + settings.flips(source, data))
            for source in self._sources
        ]
        return np.array(each)[self._train.numbers("source")[self._samples.rows]]

    def _wordy(self) -> set[tuple[str, int]]:
        """The captions, with their sources, that are rendered in ever new words."""
        found = set()
        for text, source in set(self._pairs(self._train)):
            own = self._sources[source]
            options = settings.words(own, self._data).model_copy(update={"dropout": 0.0})
            if captions.varies(text, options, trigger=own.trigger):
                found.add((text, source))
        return found

    def _pairs(self, rows: Rows) -> Iterator[tuple[str, int]]:
        return zip(rows.table.column("caption").to_pylist(), rows.numbers("source").tolist(), strict=True)

    def _refuse_more(self, count: int, steps: range, what: str, key: str) -> None:
        if count > MOST_UNREPEATED:
            raise UserError(
                f"random {what} need a cached encoding for nearly every visit, and this run has over "
                f"{MOST_UNREPEATED} ({len(steps)} steps x {self.step_size} samples)",
                where=key,
                fix="set data.variants to the number of versions to keep of each, such as 8",
            )

    def _build_epoch(self, epoch: int) -> _Epoch:
        visits = self._repeats.of(epoch)
        bucket, size = self._bucket[visits.samples], self.step_size
        members = np.split(np.argsort(bucket, kind="stable"), np.cumsum(np.bincount(bucket))[:-1])
        whole, rests = [], []
        for code in sorted(range(len(members)), key=lambda code: self._bucket_sizes[code]):
            name = "x".join(map(str, self._bucket_sizes[code]))
            shuffled = members[code][permutation(len(members[code]), self.seed, "order", epoch, name)]
            cut = len(shuffled) // size * size
            whole.append(shuffled[:cut])
            rests.append(shuffled[cut:])
        # The rests stay together by bucket, so that mixed windows fall into as few shapes as possible.
        order = np.concatenate([*whole, *(rests[i] for i in permutation(len(rests), self.seed, "remainder", epoch))])
        full = len(order) // size
        windows = order[: full * size].reshape(full, size)[permutation(full, self.seed, "windows", epoch)]
        order = np.concatenate([windows.ravel(), order[full * size :]])
        return _Epoch(visits.samples[order], visits.repeats[order])


_NAMED = 5


def _named(place: Place) -> str:
    """A file's name; of a member or a row, where it is."""
    return place.name if place.kind == "file" else str(place)


def _codes(buckets: NDArray[np.int32]) -> tuple[NDArray[np.int64], list[Size]]:
    """Each bucket's number, and the buckets."""
    sizes, codes = np.unique(buckets, axis=0, return_inverse=True)
    return codes.ravel(), [(int(wide), int(high)) for wide, high in sizes]
