"""Where the pixels of a sample come from, decoded from pictures whose colours are their own coordinates.

The six numbers that SDXL is conditioned on must describe these pixels: peers report the crop on the wrong axis, of the
centre where it was random, or in a frame that was not flipped.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from gesso.config.run import Buckets, Data, Source
from gesso.data.images import fit
from gesso.data.places import Place
from gesso.data.plan import Plan, Visit
from gesso.data.rows import Row

SHAPES = [(120, 64), (64, 120), (101, 77), (64, 64), (90, 71), (200, 64), (75, 222), (133, 134), (64, 97), (250, 250)]


def row(number: int, size: tuple[int, int], *, repeats: float = 1.0) -> Row:
    name = f"{number:032x}"
    place = Place(f"/nowhere/{number}.png")
    return Row(id=name, image=name, place=place, width=size[0], height=size[1], caption="", repeats=repeats)


def plan_of(rows: list[Row], *, world_size: int = 1, batch_size: int = 1, seed: int = 4, **changes: object) -> Plan:
    fields = {"sources": (Source(path="x"),), "resolution": 64, "buckets": Buckets(step=16)} | changes
    data = Data.model_validate(fields)
    return Plan(rows, data=data, batch_size=batch_size, world_size=world_size, seed=seed)


def epochs(plan: Plan, count: int) -> list[Visit]:
    return [visit for step in range(count * plan.steps_per_epoch) for visit in plan.window(step)]


def coordinates(width: int, height: int) -> Image.Image:
    """Red is the column, green the line, blue the distance from the right edge."""
    columns, lines = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, lines, width - 1 - columns], axis=-1).astype(np.uint8))


def source_pixels(
    length: int, resized: int, crop: int, count: int, *, mirrored: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(centres of `count` cropped pixels in the original, and which of these lie inside by more than a filter)."""
    scale = Fraction(length, resized)
    centres = np.array([float((crop + i + Fraction(1, 2)) * scale - Fraction(1, 2)) for i in range(count)])
    centres = length - 1 - centres if mirrored else centres
    reach = 3 * max(1.0, float(scale)) + 1
    return centres, centres > reach, centres < length - 1 - reach


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("buckets", [True, False])
def test_the_six_numbers_say_where_the_pixels_are_from(crop: str, buckets: bool) -> None:
    """Every pixel of every sample, over flips, random crops, up and down scaling and eleven shapes of buckets."""
    rows = [row(i, size) for i, size in enumerate(SHAPES)]
    plan = plan_of(rows, crop=crop, flip=True, buckets=Buckets(step=16, enabled=buckets))
    seen = {(v.row.id, v.fit.crop, v.fit.flip): v for v in epochs(plan, 8)}
    assert {v.fit.flip for v in seen.values()} == {True, False}
    for visit in seen.values():
        width, height = visit.row.width, visit.row.height
        pixels, geometry = fit(coordinates(width, height), visit.fit)
        assert geometry == visit.geometry
        assert (geometry.original_height, geometry.original_width) == (height, width)
        assert (geometry.target_height, geometry.target_width) == pixels.shape[1:]
        found = (pixels.astype(np.float64) + 1) * 127.5
        mirrored = bool(found[0, 0, 0] > found[0, 0, -1])
        assert mirrored == visit.fit.flip
        wide, high = visit.fit.resized
        columns, left, right = source_pixels(width, wide, geometry.crop_left, pixels.shape[2], mirrored=mirrored)
        lines, top, bottom = source_pixels(height, high, geometry.crop_top, pixels.shape[1], mirrored=False)
        # Filters see past the edge of a picture only near it; inside, a ramp stays a ramp to the 8-bit rounding.
        inside = (top & bottom)[:, None] & (left & right)[None, :]
        assert inside.sum() > 0.2 * inside.size
        for channel, wanted in ((0, columns[None, :]), (1, lines[:, None]), (2, width - 1 - columns[None, :])):
            assert np.abs(found[channel] - wanted)[inside].max() < 1.1


@pytest.mark.parametrize(
    ("size", "corner", "resized"),
    [
        ((1000, 1500), (256, 0), (1024, 1536)),  # sd-scripts says (170, 0) here
        ((1500, 1000), (0, 256), (1536, 1024)),
        ((2048, 1024), (0, 512), (2048, 1024)),
        ((512, 512), (0, 0), (1024, 1024)),
        ((4096, 3072), (0, 170), (1365, 1024)),
    ],
)
def test_a_centred_crop_of_a_square(size: tuple[int, int], corner: tuple[int, int], resized: tuple[int, int]) -> None:
    """Cover, then cut the middle: (top, left) in the resized picture, worked out by hand."""
    plan = plan_of([row(1, size)], resolution=1024, buckets=Buckets(enabled=False))
    (visit,) = plan.window(0)
    assert visit.fit.resized == resized
    assert visit.geometry == (size[1], size[0], *corner, 1024, 1024)


def test_the_resize_keeps_the_shape_and_covers_the_bucket_with_the_least() -> None:
    """One side fits exactly, the other is the proportional length to the pixel: 200 random pictures."""
    draws = np.random.default_rng(8)
    rows = [row(i, (int(w), int(h))) for i, (w, h) in enumerate(np.exp(draws.uniform(4.2, 7.5, (200, 2))))]
    for visit in epochs(plan_of(rows, resolution=512, buckets=Buckets(step=64)), 1):
        (wide, high), (across, down) = visit.fit.bucket, visit.fit.resized
        scale = max(Fraction(wide, visit.row.width), Fraction(high, visit.row.height))
        assert wide == across or high == down
        assert across >= wide
        assert down >= high
        assert abs(across - visit.row.width * scale) < 1
        assert abs(down - visit.row.height * scale) < 1
        assert visit.fit.crop == ((across - wide) // 2, (down - high) // 2)
        area = wide * high
        assert area <= 512**2
        assert wide % 64 == high % 64 == 0


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_out_the_samples_of_one_process_and_no_key_comes_twice(world: int) -> None:
    """Peers draw one noise on all ranks: here each rank has samples, and so keys, of its own, in every epoch."""
    rows = [row(i, SHAPES[i % 4], repeats=3) for i in range(11)]
    alone = plan_of(rows, batch_size=2 * world)
    spread = plan_of(rows, batch_size=2, world_size=world)
    keys = []
    for step in range(3 * alone.steps_per_epoch):
        whole = alone.window(step)
        parts = [spread.share(whole, rank) for rank in range(world)]
        assert [v for part in parts for v in part] == whole == spread.window(step)
        keys += [(v.epoch, v.key) for v in whole]
    assert len(keys) == len(set(keys)) == 3 * 33
