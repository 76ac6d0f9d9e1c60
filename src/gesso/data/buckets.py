"""Aspect buckets and the plan: which picture is seen when, how it is cropped. Pure numbers, no torch.

The order depends only on the samples per optimiser step, never on how these are split into batches,
accumulation and processes; every number is keyed by (seed, epoch, sample), so position is one integer.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from gesso.core.batch import Geometry
from gesso.core.random import Draws, SampleKey, generator, permutation
from gesso.errors import Problems, UserError

if TYPE_CHECKING:
    from gesso.config.run import Data
    from gesso.data.index import Row

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Fit:
    """How one upright picture becomes the pixels of its bucket: resize, crop, then flip.

    `bucket` and `resized` are (width, height); `crop` is (left, top) in the resized picture before the flip.
    """

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    flip: bool = False

    @property
    def crop_loss(self) -> float:
        """Share of the picture's area that is cropped away."""
        return 1 - (self.bucket[0] * self.bucket[1]) / (self.resized[0] * self.resized[1])

    def geometry(self, width: int, height: int) -> Geometry:
        """What SDXL is told about a picture of this upright size; the crop as seen in the flipped picture."""
        left, top = self.crop
        if self.flip:
            left = self.resized[0] - left - self.bucket[0]
        return Geometry(height, width, top, left, self.bucket[1], self.bucket[0])


def bucket_sizes(resolution: int, *, step: int, smallest: int | None = None, largest: int | None = None) -> list[Size]:
    """The bucket sizes: for each side the longest other side with area <= resolution^2, and the square.

    Sides are multiples of `step` within [smallest, largest] (default: half and twice the resolution).
    Raises `UserError` if the bounds leave no size.
    """
    area = resolution * resolution
    low = max(1, math.ceil((resolution // 2 if smallest is None else smallest) / step))
    high = (resolution * 2 if largest is None else largest) // step
    square = resolution // step
    sizes = {(square * step, square * step)} if low <= square <= high else set()
    for side in range(low, high + 1):
        other = min(high, area // (side * step * step))
        if other >= low:
            sizes |= {(side * step, other * step), (other * step, side * step)}
    if not sizes:
        raise UserError(
            f"no bucket of at most {resolution} x {resolution} pixels has sides in multiples of {step} "
            f"between {low * step} and {high * step}",
            where="data.buckets",
            fix="lower data.buckets.step or smallest, raise largest, or set data.buckets.enabled to false",
        )
    return sorted(sizes)


def sizes_for(data: Data, *, multiple: int = 8) -> tuple[list[Size], int]:
    """The bucket sizes of a run and their step; `multiple` is what the family needs of every side."""
    if not data.buckets.enabled:
        side = data.resolution // multiple * multiple
        return [(side, side)], multiple
    step = data.buckets.step
    if step % multiple:
        raise UserError(
            f"{step} is not a multiple of {multiple}, which this model needs",
            where="data.buckets.step",
            fix=f"use {max(multiple, step // multiple * multiple)}",
        )
    sizes = bucket_sizes(data.resolution, step=step, smallest=data.buckets.smallest, largest=data.buckets.largest)
    return sizes, step


def assign(width: int, height: int, *, sizes: Sequence[Size], step: int, upscale: bool = True) -> Fit:
    """The bucket nearest in log aspect, and the smallest resize that covers it, cropped in the middle.

    Without `upscale` a picture smaller than its bucket gets the largest size in multiples of `step` that lies
    inside it (a square one if all buckets are squares); `UserError` if not even one step fits.
    """
    aspect = math.log(width / height)
    bucket = min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1], s))
    if not upscale and (width < bucket[0] or height < bucket[1]):
        bucket = _inside(width, height, sizes, step)
    wide, high = bucket
    # Integer arithmetic: the side that decides is met exactly, the other is rounded and never falls short.
    if wide * height >= high * width:
        resized = (wide, max(high, (2 * height * wide + width) // (2 * width)))
    else:
        resized = (max(wide, (2 * width * high + height) // (2 * height)), high)
    return Fit(bucket, resized, ((resized[0] - wide) // 2, (resized[1] - high) // 2))


def _inside(width: int, height: int, sizes: Sequence[Size], step: int) -> Size:
    if min(width, height) < step:
        raise UserError(
            f"{width} x {height} pixels is less than one bucket step of {step}",
            fix="remove the picture, or set data.buckets.upscale to true",
        )
    longest, area = max(max(s) for s in sizes), max(w * h for w, h in sizes)
    wide, high = (min(side, longest) // step * step for side in (width, height))
    if all(w == h for w, h in sizes):
        wide = high = min(wide, high)
    if wide * high > area:
        if wide > high:
            wide = max(step, area // high // step * step)
        else:
            high = max(step, area // wide // step * step)
    return wide, high


@dataclass(frozen=True)
class Visit:
    """One look at one picture: which repeat in which epoch, how it is cropped, and what its caption says."""

    row: Row
    epoch: int
    repeat: int
    fit: Fit
    caption: str

    @property
    def key(self) -> SampleKey:
        """The name under which this visit's random numbers are drawn."""
        return SampleKey(self.row.id, self.repeat)

    @property
    def crop(self) -> tuple[int, int]:
        """(left, top) of the crop in the resized picture, before the flip."""
        return self.fit.crop

    @property
    def flip(self) -> bool:
        """Whether the picture is mirrored."""
        return self.fit.flip

    @property
    def geometry(self) -> Geometry:
        """The SDXL size and crop conditioning."""
        return self.fit.geometry(self.row.width, self.row.height)


class BucketRow(NamedTuple):
    """One bucket for humans; `crop_loss` is the mean share of a picture's area that is cropped away."""

    bucket: Size
    images: int
    crop_loss: float


class Plan:
    """Which samples each optimiser step sees, as a pure function of (seed, step).

    Every visit (row x repeat) comes exactly once an epoch and none is dropped. A step takes a window of
    G = batch_size * accumulation * world_size visits; only the last window of an epoch may be shorter.
    Within a bucket visits are shuffled and cut into windows; the rest of all buckets share mixed windows.
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
        self.seed, self.batch_size = seed, batch_size
        self.step_size = batch_size * accumulation * world_size
        self._data = data
        # Sorted by content, so that renaming files changes no run.
        ordered = sorted(rows, key=lambda row: row.id)
        fits = _assign_all(ordered, data, multiple)
        self._train = [(row, fit) for row, fit in zip(ordered, fits, strict=True) if row.split == "train"]
        self._held = [(row, fit) for row, fit in zip(ordered, fits, strict=True) if row.split == "validation"]
        self._visits = [(i, repeat) for i, (row, _) in enumerate(self._train) for repeat in range(row.repeats)]
        if len(self._visits) < self.step_size:
            raise UserError(
                f"an epoch has {len(self._visits)} samples ({len(self._train)} pictures x repeats), but one step takes "
                f"{self.step_size} = batch_size {batch_size} x accumulation {accumulation} x {world_size} process(es)",
                where="data.sources",
                fix="lower training.batch_size or training.accumulation, or raise repeats",
            )
        self._by_bucket: dict[Size, list[int]] = {}
        for visit, (i, _) in enumerate(self._visits):
            self._by_bucket.setdefault(self._train[i][1].bucket, []).append(visit)
        self._windows = functools.lru_cache(maxsize=4)(self._build_epoch)

    @property
    def visits_per_epoch(self) -> int:
        """Samples in one epoch."""
        return len(self._visits)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch: ceil(visits / samples per step)."""
        return -(-len(self._visits) // self.step_size)

    @property
    def validation(self) -> list[Visit]:
        """One unvarying visit of each held-out picture: cropped in the middle, not flipped, captioned."""
        return [Visit(row, 0, 0, fit, row.caption) for row, fit in self._held]

    @property
    def captions(self) -> list[str]:
        """Every caption that a visit can have, sorted; the empty one where captions are dropped out."""
        dropped = {""} if self._data.caption_dropout else set()
        return sorted({row.caption for row, _ in [*self._train, *self._held]} | dropped)

    def window_size(self, step: int) -> int:
        """Samples in optimiser step `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return len(self._windows(epoch)[position])

    def window(self, step: int) -> list[Visit]:
        """The samples of optimiser step `step` (0-based)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return [self._visit(epoch, *self._visits[v]) for v in self._windows(epoch)[position]]

    def microbatches(self, window: Sequence[Visit]) -> list[list[Visit]]:
        """A window as batches of one shape and at most `batch_size` samples."""
        groups: dict[Size, list[Visit]] = {}
        for visit in window:
            groups.setdefault(visit.fit.bucket, []).append(visit)
        size = self.batch_size
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]

    def renditions(self, steps: range, *, limit: int = 20_000) -> list[Visit]:
        """One visit for each distinct (picture, crop, flip) in these steps, the held-out ones included.

        These are what a cache must hold. With random crops nearly every visit is a new rendition: more than
        `limit` is a `UserError`, because the disk would fill silently.
        """
        bounded = self._data.crop == "center"
        most = len({(row.image, fit) for row, fit in self._train}) * (2 if self._data.flip else 1)
        found: dict[tuple[str, Fit], Visit] = {}
        for step in steps:
            for visit in self.window(step):
                found.setdefault((visit.row.image, visit.fit), visit)
            if bounded and len(found) == most:
                break
            if not bounded and len(found) > limit:
                raise UserError(
                    f"random crops need a cached encoding for nearly every visit, and this run has over {limit} "
                    f"({len(steps)} steps x {self.step_size} samples)",
                    where="data.crop",
                    fix="set data.crop to center, or train for fewer steps",
                )
        for visit in self.validation:
            found.setdefault((visit.row.image, visit.fit), visit)
        return list(found.values())

    def describe(self) -> list[BucketRow]:
        """Training pictures and mean crop loss of each bucket, the fullest bucket first."""
        buckets: dict[Size, list[float]] = {}
        for _, fit in self._train:
            buckets.setdefault(fit.bucket, []).append(fit.crop_loss)
        rows = [BucketRow(bucket, len(loss), sum(loss) / len(loss)) for bucket, loss in buckets.items()]
        return sorted(rows, key=lambda row: (-row.images, row.bucket))

    @property
    def notices(self) -> list[str]:
        """Pictures that are much enlarged or much cropped, in words."""
        pairs = [*self._train, *self._held]
        enlarged = [row.path.name for row, fit in pairs if fit.resized[0] > 1.5 * row.width]
        cropped = [row.path.name for row, fit in pairs if fit.crop_loss > 0.3]
        notices = []
        if enlarged:
            notices.append(f"enlarged more than 1.5 times (blurred): {_some(enlarged)}")
        if cropped:
            notices.append(f"more than 30 % cropped away: {_some(cropped)}")
        return notices

    def _visit(self, epoch: int, index: int, repeat: int) -> Visit:
        row, fit = self._train[index]
        draws = Draws(self.seed, epoch, (SampleKey(row.id, repeat),))
        data = self._data
        if data.crop == "random":
            slack = [fit.resized[0] - fit.bucket[0] + 1, fit.resized[1] - fit.bucket[1] + 1]
            left, top = generator(self.seed, "crop", epoch, row.id, repeat).integers(0, slack)
            fit = replace(fit, crop=(int(left), int(top)))
        if data.flip and draws.uniform("flip")[0] < 0.5:
            fit = replace(fit, flip=True)
        dropped = data.caption_dropout > 0 and draws.uniform("caption dropout")[0] < data.caption_dropout
        return Visit(row, epoch, repeat, fit, "" if dropped else row.caption)

    def _build_epoch(self, epoch: int) -> list[list[int]]:
        size, windows, rests = self.step_size, [], []
        for bucket in sorted(self._by_bucket):
            visits = self._by_bucket[bucket]
            order = permutation(len(visits), self.seed, "order", epoch, f"{bucket[0]}x{bucket[1]}")
            shuffled = [visits[i] for i in order]
            whole = len(shuffled) // size * size
            windows += [shuffled[i : i + size] for i in range(0, whole, size)]
            rests.append(shuffled[whole:])
        # The rests stay together by bucket, so that mixed windows fall into as few shapes as possible.
        pool = [v for i in permutation(len(rests), self.seed, "remainder", epoch) for v in rests[i]]
        windows += [pool[i : i + size] for i in range(0, len(pool), size)]
        short = windows.pop() if len(windows[-1]) < size else None
        windows = [windows[i] for i in permutation(len(windows), self.seed, "windows", epoch)]
        return [*windows, short] if short else windows


def _assign_all(rows: Sequence[Row], data: Data, multiple: int) -> list[Fit]:
    if not any(row.split == "train" for row in rows):
        raise UserError("there is no picture to train on", where="data.sources", fix="add pictures")
    sizes, step = sizes_for(data, multiple=multiple)
    fits, problems = [], []
    for row in rows:
        try:
            fits.append(assign(row.width, row.height, sizes=sizes, step=step, upscale=data.buckets.upscale))
        except UserError as error:
            problems.append(UserError(error.what, where=str(row.path), fix=error.fix))
    if problems:
        raise Problems(problems)
    return fits


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
