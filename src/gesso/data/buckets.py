"""Aspect buckets: which sizes there are, and how a picture is resized and cropped to one of them. Pure numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gesso.core.batch import Geometry
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.config.run import Data

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Fit:
    """How one upright picture becomes the pixels of its bucket: resize, crop, turn, flip, change colours.

    `bucket` and `resized` are (width, height); `crop` is (left, top) in the resized picture before the flip; `angle` in
    degrees, counter-clockwise; `colour` the factors of brightness, contrast and saturation.
    """

    bucket: Size
    resized: Size
    crop: tuple[int, int]
    flip: bool = False
    angle: float = 0.0
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0)

    @property
    def facts(self) -> list[object]:
        """Everything that decides the pixels, as JSON holds it."""
        return [self.resized, self.bucket, self.crop, self.flip, self.angle, self.colour]

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


def sizes_for(data: Data, *, resolution: int | None = None, multiple: int = 8) -> tuple[list[Size], int]:
    """The bucket sizes of a run and their step; `multiple` is what the family needs of every side."""
    resolution = resolution or data.resolution
    if not data.buckets.enabled:
        side = resolution // multiple * multiple
        return [(side, side)], multiple
    step = data.buckets.step
    if step % multiple:
        raise UserError(
            f"{step} is not a multiple of {multiple}, which this model needs",
            where="data.buckets.step",
            fix=f"use {max(multiple, step // multiple * multiple)}",
        )
    sizes = bucket_sizes(resolution, step=step, smallest=data.buckets.smallest, largest=data.buckets.largest)
    return sizes, step


class Fits(NamedTuple):
    """How many pictures are fitted at once: int32 [n, 2] each, (width, height).

    Pictures that are smaller than one step, where they may not be enlarged, have buckets of 0 x 0.
    """

    buckets: NDArray[np.int32]
    resized: NDArray[np.int32]

    def one(self, index: int) -> Fit:
        """One of them, cropped in the middle."""
        (wide, high), resized = self.buckets[index].tolist(), self.resized[index].tolist()
        return Fit((wide, high), (resized[0], resized[1]), ((resized[0] - wide) // 2, (resized[1] - high) // 2))


def fit_all(
    widths: NDArray[np.int32], heights: NDArray[np.int32], *, sizes: Sequence[Size], step: int, upscale: bool = True
) -> Fits:
    """The bucket nearest in log aspect for each picture, and the smallest resize that covers it.

    Without `upscale` a picture smaller than its bucket gets the largest size in multiples of `step` that lies
    inside it (a square one if all buckets are squares).
    """
    pairs, inverse = np.unique(
        widths.astype(np.int64) << 32 | heights.astype(np.int64), return_inverse=True
    )  # pictures of one size are fitted alike
    width, height = pairs >> 32, pairs & 0xFFFFFFFF
    # Of equally near buckets the largest comes first, then the narrowest.
    ordered = np.array(sorted(sizes, key=lambda s: (-s[0] * s[1], s)), np.int64)
    aspects = np.log(ordered[:, 0] / ordered[:, 1])
    chosen = np.empty(len(pairs), np.int64)
    for start in range(0, len(pairs), _CHUNK):
        part = slice(start, start + _CHUNK)
        distance = np.abs(aspects[None, :] - np.log(width[part] / height[part])[:, None])
        chosen[part] = distance.round(9).argmin(1)
    buckets = ordered[chosen]
    if not upscale:
        for i in np.flatnonzero((width < buckets[:, 0]) | (height < buckets[:, 1])):
            buckets[i] = _inside(int(width[i]), int(height[i]), sizes, step)
    wide, high = buckets[:, 0], buckets[:, 1]
    # Integer arithmetic: the side that decides is met exactly, the other is rounded and never falls short.
    by_width = wide * height >= high * width
    resized = np.where(
        by_width[:, None],
        np.stack([wide, np.maximum(high, (2 * height * wide + width) // (2 * width))], 1),
        np.stack([np.maximum(wide, (2 * width * high + height) // (2 * height)), high], 1),
    )
    return Fits(buckets[inverse].astype(np.int32), resized[inverse].astype(np.int32))


_CHUNK = 1 << 16


def assign(width: int, height: int, *, sizes: Sequence[Size], step: int, upscale: bool = True) -> Fit:
    """As `fit_all` for one picture, cropped in the middle; `UserError` if not even one step fits inside it."""
    fits = fit_all(np.array([width], np.int32), np.array([height], np.int32), sizes=sizes, step=step, upscale=upscale)
    if not fits.buckets[0].all():
        raise too_small(width, height, step)
    return fits.one(0)


def too_small(width: int, height: int, step: int) -> UserError:
    """The problem with a picture that would have to be enlarged."""
    return UserError(
        f"{width} x {height} pixels is less than one bucket step of {step}",
        fix="remove the picture, or set data.buckets.upscale to true",
    )


def _inside(width: int, height: int, sizes: Sequence[Size], step: int) -> Size:
    if min(width, height) < step:
        return 0, 0
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


class BucketRow(NamedTuple):
    """One bucket for humans; `crop_loss` is the mean share of a picture's area that is cropped away."""

    bucket: Size
    images: int
    crop_loss: float
