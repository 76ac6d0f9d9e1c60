"""What every figure of the small world covers, part by part: the judge's patterns, made by the painter's own hand."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from gesso.micro import figures, painter, world
from gesso.micro.figures import Point, Rgb
from gesso.micro.world import DOMBRA, SIDE, Facts, Jitter

Array = NDArray[np.float32]

MARGIN = 8
"""Pixels that a template extends beyond the picture on every side, so that it can be moved by as much."""
SPAN = SIDE + 2 * MARGIN
PAD = 2 * MARGIN
TILE = 4
"""Side of a mosaic's tiles in pixels."""
LUMA = np.asarray((0.299, 0.587, 0.114), dtype=np.float32)
"""What each channel adds to the brightness, as Pillow has it."""
SCALES = (0.87, 0.91, 0.95, 0.99, 1.03, 1.07, 1.12)
VALUES: dict[str, tuple[str, ...]] = {
    "colour": world.COLOURS,
    "hat_colour": world.COLOURS,
    "hair": world.HAIR,
    "skin": tuple(str(i) for i in range(len(figures.SKIN))),
    "fixed": ("",),
}
"""What decides the colour of a part, and its values."""
CHOICES = max(len(values) for values in VALUES.values())
_LABELS = 24
_SAMPLED = np.array((0, 2, 5, 7))
"""Which rows and columns of a pixel are looked at, of the eight that the painter has: as many on either side."""
_SAMPLES = len(_SAMPLED)


def _looks() -> tuple[Facts, ...]:
    """Everything that differs in shape, in fixed colours; the mouth is left for later."""
    person = Facts(colour="blue", hair="brown", expression="calm")
    things = [Facts(subject=s, colour="blue") for s in world.SUBJECTS if s not in world.PEOPLE]
    people = [
        replace(
            person,
            subject=subject,
            pose=pose,
            pattern=pattern,
            hat=hat,
            hat_colour=None if hat == "none" else "blue",
            beard=beard,
        )
        for subject, beard in (*(("man", b) for b in world.BEARDS), ("woman", "none"))
        for pose in world.POSES
        for hat in world.HATS
        for pattern in world.PATTERNS
    ]
    return (*things, Facts(subject=DOMBRA), *people)


LOOKS = _looks()


@dataclass(frozen=True)
class Sheet:
    """The parts of some looks at one size, each kept once.

    A part is a row of `cover`, in the colours of a row of `colours`. Parts of one look whose colours have the same
    cause are a group, and a look is a set of groups.
    """

    cover: Array
    """[parts, SPAN * SPAN], the share of each pixel that the part covers."""
    coarse: Array
    """The same at half the size, [parts, (SPAN / 2) ** 2]."""
    colours: Array
    """[parts, CHOICES, 3] in 0..1: the part's colour for each value of its factor (the last repeated)."""
    groups: tuple[tuple[int, ...], ...]
    """The parts of each group."""
    factors: tuple[str, ...]
    """The factor of each group."""
    looks: tuple[tuple[int, ...], ...]
    """The groups of each look."""

    @functools.cached_property
    def entries(self) -> NDArray[np.intp]:
        """The parts of all groups, one after the other."""
        return np.concatenate([np.asarray(group, dtype=np.intp) for group in self.groups])

    @functools.cached_property
    def starts(self) -> NDArray[np.intp]:
        """Where in `entries` each group starts."""
        return np.cumsum([0, *(len(group) for group in self.groups[:-1])])

    @functools.cached_property
    def members(self) -> Array:
        """[looks, groups]: 1 where a look has a group."""
        table = np.zeros((len(self.looks), len(self.groups)), dtype=np.float32)
        for look, groups in enumerate(self.looks):
            table[look, list(groups)] = 1
        return table

    def only(self, look: int) -> Sheet:
        """The sheet of one look."""
        groups = [self.groups[group] for group in self.looks[look]]
        parts = [part for group in groups for part in group]
        inside = tuple(tuple(parts.index(part) for part in group) for group in groups)
        factors = tuple(self.factors[group] for group in self.looks[look])
        every = (tuple(range(len(groups))),)
        return Sheet(self.cover[parts], self.coarse[parts], self.colours[parts], inside, factors, every)


@functools.cache
def sheet(scale: float, *, outlined: bool) -> Sheet:
    """All of `LOOKS` at a scale."""
    parts: dict[tuple[bytes, _Part], int] = {}
    covers: list[NDArray[np.uint8]] = []
    groups: dict[tuple[str, tuple[int, ...]], int] = {}
    looks: list[tuple[int, ...]] = []
    for look in LOOKS:
        grouped: dict[str, list[int]] = {}
        for part, cover in zip(*_rendered(look, scale, outlined=outlined), strict=True):
            if cover.any():
                number = parts.setdefault((cover.tobytes(), part), len(covers))
                if number == len(covers):
                    covers.append(cover)
                grouped.setdefault(part.factor, []).append(number)
        keys = [(factor, tuple(numbers)) for factor, numbers in grouped.items()]
        looks.append(tuple(groups.setdefault(key, len(groups)) for key in keys))
    cover_all = np.stack(covers).astype(np.float32) / np.float32(_SAMPLES**2)
    half = cover_all.reshape(-1, SPAN // 2, 2, SPAN // 2, 2).mean(axis=(2, 4)).reshape(len(covers), -1)
    tables = [[*part.colours, *[part.colours[-1]] * (CHOICES - len(part.colours))] for _, part in parts]
    colours = np.asarray(tables, dtype=np.float32) / np.float32(255)
    return Sheet(
        cover=cover_all,
        coarse=half,
        colours=colours,
        groups=tuple(numbers for _, numbers in groups),
        factors=tuple(factor for factor, _ in groups),
        looks=tuple(looks),
    )


@dataclass(frozen=True)
class _Part:
    """Shapes of one look that always have the same colour: what decides it, and which it is for each value."""

    factor: str
    colours: tuple[Rgb, ...]


@dataclass(frozen=True)
class _Shape:
    kind: str
    points: tuple[Point, ...]
    width: float
    colour: Rgb


class _Recorder:
    """A pen that keeps what it is told to draw."""

    def __init__(self) -> None:
        self.shapes: list[_Shape] = []

    def polygon(self, points: Sequence[Point], colour: Rgb) -> None:
        self.shapes.append(_Shape("polygon", tuple(points), 0, colour))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb) -> None:
        self.shapes.append(_Shape("ellipse", ((x, y), (rx, ry)), 0, colour))

    def box(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
        self.shapes.append(_Shape("box", ((left, top), (right, bottom)), 0, colour))

    def stroke(self, points: Sequence[Point], width: float, colour: Rgb) -> None:
        self.shapes.append(_Shape("stroke", tuple(points), width, colour))


class _Labels(painter.Brush):
    """The painter's brush on a larger canvas, where a shape's number stands in the red channel."""

    def __init__(self, scale: float, *, outlined: bool) -> None:
        super().__init__(Jitter(x=MARGIN, y=MARGIN, scale=scale))
        self._over = self._image.width // SIDE
        self._image = Image.new("RGB", (SPAN * self._over, SPAN * self._over))
        self._pen = ImageDraw.Draw(self._image)
        self.enter_figure(outlined=outlined)

    def counts(self) -> NDArray[np.uint8]:
        """How often each number is seen in each pixel, of `_SAMPLES` ** 2; [_LABELS, SPAN * SPAN]."""
        at = (np.arange(SPAN)[:, None] * self._over + _SAMPLED).ravel()
        seen = np.asarray(self._image)[..., 0][np.ix_(at, at)].astype(np.intp)
        pixel = np.arange(SPAN).repeat(_SAMPLES)
        index = (pixel[:, None] * SPAN + pixel) * _LABELS + seen
        counts = np.bincount(index.ravel(), minlength=SPAN * SPAN * _LABELS)
        return counts.reshape(SPAN * SPAN, _LABELS).T.astype(np.uint8)


_INK_LABEL = 20
"""The red channel of the painter's ink, which no other label may have."""
_INK: Rgb = (20, 18, 22)


def _rendered(look: Facts, scale: float, *, outlined: bool) -> tuple[list[_Part], NDArray[np.uint8]]:
    """The parts of a look, and the samples that each covers in each pixel."""
    shapes, part_of = _parts(look)
    parts = list(dict.fromkeys(part_of))
    assert len(parts) < _INK_LABEL
    brush = _Labels(scale, outlined=outlined)
    for shape, part in zip(shapes, part_of, strict=True):
        label: Rgb = (parts.index(part) + 1, 0, 0)
        match shape.kind:
            case "polygon":
                brush.polygon(shape.points, label)
            case "ellipse":
                brush.ellipse(*shape.points[0], *shape.points[1], label)
            case "box":
                brush.box(*shape.points[0], *shape.points[1], label)
            case "stroke":
                brush.stroke(shape.points, shape.width, label)
    counts = brush.counts()
    labels = list(range(1, len(parts) + 1))
    if outlined:
        return [*parts, _Part("fixed", (_INK,))], counts[[*labels, _INK_LABEL]]
    return parts, counts[labels]


@functools.cache
def _parts(look: Facts) -> tuple[list[_Shape], list[_Part]]:
    """The shapes of a look, and for each the part that it belongs to: found by changing one colour at a time."""
    base = _recorded(look, 0)
    tables: dict[str, list[list[_Shape]]] = {"skin": [_recorded(look, skin) for skin in range(len(figures.SKIN))]}
    if look.colour is not None:
        tables["colour"] = [_recorded(replace(look, colour=value), 0) for value in VALUES["colour"]]
    if look.hat_colour is not None:
        tables["hat_colour"] = [_recorded(replace(look, hat_colour=value), 0) for value in VALUES["hat_colour"]]
    if look.hair is not None:
        tables["hair"] = [_recorded(replace(look, hair=value), 0) for value in VALUES["hair"]]
    parts = []
    for i, shape in enumerate(base):
        part = _Part("fixed", (shape.colour,))
        for factor, rows in tables.items():
            colours = tuple(row[i].colour for row in rows)
            if len(set(colours)) > 1:
                part = _Part(factor, colours)
        parts.append(part)
    return base, parts


def _recorded(look: Facts, skin: int) -> list[_Shape]:
    recorder = _Recorder()
    figures.draw(recorder, look, skin=skin)
    return recorder.shapes


# Laid over a picture.


def pixels_of(picture: Image.Image) -> Array:
    """The colours of a picture in 0..1, [height, width, 3]."""
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255)


def features_of(pixels: Array, drop: Array) -> Array:
    """What a figure's gain is linear in, [5, SIDE + 2 PAD, SIDE + 2 PAD]: one, colour, and the backdrop's loss.

    Over the backdrop B, colour c instead of B gains |I - B|^2 - |I - c|^2 = |B|^2 - 2 I B + 2 I c - |c|^2.
    """
    loss = (drop * (drop - 2 * pixels)).sum(-1)
    stack = np.stack([np.ones_like(loss), *np.moveaxis(pixels, -1, 0), loss])
    return np.pad(stack, ((0, 0), (PAD, PAD), (PAD, PAD)))


def under(features: Array, shifts: NDArray[np.intp], *, half: bool = False) -> Array:
    """The features under a template that is moved by each shift (x, y), [SPAN * SPAN, 5 * shifts]."""
    span, first = (SPAN // 2, (PAD - MARGIN) // 2) if half else (SPAN, PAD - MARGIN)
    windows = sliding_window_view(features, (span, span), axis=(1, 2))
    return windows[:, first + shifts[:, 1], first + shifts[:, 0]].reshape(-1, span * span).T


def gains_of(page: Sheet, moved: Array, *, half: bool = False, toned: bool) -> tuple[Array, NDArray[np.intp]]:
    """How much of the squared difference each look explains at each shift, and the value that each group takes there.

    [looks, shifts] and [groups, shifts].
    """
    sums = ((page.coarse if half else page.cover) @ moved).reshape(len(page.colours), 5, -1)
    colours = as_seen(page.colours, toned)
    gains = 2 * (colours @ sums[:, 1:4]) - (colours**2).sum(-1)[..., None] * sums[:, :1] + sums[:, 4:]
    grouped = np.add.reduceat(gains[page.entries], page.starts, axis=0)
    return page.members @ grouped.max(axis=1), grouped.argmax(axis=1)


def as_seen(colours: Array, toned: bool) -> Array:
    """Colours, or in styles without any their brightness in three equal channels."""
    return np.repeat((colours @ LUMA)[..., None], 3, axis=-1) if toned else colours


@functools.cache
def shifts_within(reach_x: int, reach_y: int) -> NDArray[np.intp]:
    """All moves (x, y) by whole pixels, [shifts, 2]."""
    grid = np.mgrid[-reach_x : reach_x + 1, -reach_y : reach_y + 1]
    return grid.reshape(2, -1).T


def recolour(cover: Array, pixels: Array, tables: Array, values: NDArray[np.intp], sizes: Sequence[int]) -> None:
    """Better `values` for the groups, in place: the first ones took no account of pixels that parts share.

    cover [parts, pixels], pixels [pixels, 3] less the backdrop's share, tables [parts, CHOICES, 3], values [parts].
    """
    wanted, shared = cover @ pixels, cover @ cover.T
    colours = tables[np.arange(len(values)), values]
    for _ in range(2):
        first = 0
        for size in sizes:
            mine = slice(first, first + size)
            first += size
            rest = wanted[mine] - shared[mine] @ colours + shared[mine, mine] @ colours[mine]
            options = np.moveaxis(tables[mine], 1, 0)
            errors = (options * (shared[mine, mine] @ options - 2 * rest)).sum(axis=(1, 2))
            values[mine] = errors.argmin()
            colours[mine] = options[values[first - 1]]


def valued(factor: str, column: int) -> int:
    """The value that a column of a factor's table stands for: the last one is repeated to fill the table."""
    return min(int(column), len(VALUES[factor]) - 1)


CROSS = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)])
"""No move, and one to each side."""


def peak(gains: Array) -> tuple[float, float]:
    """Where between the moves of `CROSS` the gain is greatest, by parabolas."""
    middle, left, right, up, down = gains.tolist()
    return _vertex(left, middle, right), _vertex(up, middle, down)


def _vertex(before: float, middle: float, after: float) -> float:
    """Where a parabola through -1, 0 and 1 is greatest, but no farther than 1."""
    bend = before - 2 * middle + after
    return min(max(0.5 * (before - after) / bend, -1.0), 1.0) if bend < 0 else 0.0


def between(sizes: Sequence[float], at: int, gains: Sequence[tuple[int, float]]) -> float:
    """The size at which the gain is greatest, by a parabola through the neighbours of the best one."""
    known = dict(gains)
    if at - 1 not in known or at + 1 not in known:
        return sizes[at]
    step = _vertex(known[at - 1], known[at], known[at + 1])
    return sizes[at] + step * 0.5 * (sizes[at + 1] - sizes[at - 1])


def pooled(pixels: Array) -> Array:
    """Means over tiles of 4 by 4 pixels, [16, 16, ...]."""
    cells = SIDE // TILE
    return pixels.reshape(cells, TILE, cells, TILE, *pixels.shape[2:]).mean(axis=(1, 3))


def halved(pixels: Array) -> Array:
    """Means over 2 by 2 pixels."""
    return 0.25 * (pixels[::2, ::2] + pixels[1::2, ::2] + pixels[::2, 1::2] + pixels[1::2, 1::2])


def smoothed(pixels: Array) -> Array:
    """Each pixel the mean of its tile."""
    return pooled(pixels).repeat(TILE, axis=0).repeat(TILE, axis=1)


def noise_of(pixels: Array) -> float:
    """The squared difference that noise makes, by what is left between neighbours over most of the picture."""
    detail = 0.5 * (pixels[::2, ::2] - pixels[1::2, ::2] - pixels[::2, 1::2] + pixels[1::2, 1::2])
    return 3 * float(np.median(np.abs(detail)) / 0.6745) ** 2


def difference(pixels: Array, shown: Array) -> float:
    """Mean squared difference, no pixel counting more than a far one does."""
    return float(np.minimum(((pixels - shown) ** 2) @ np.ones(3, dtype=np.float32), 0.3).mean())


@functools.cache
def curve(style: str) -> Array:
    """The tones of a style for the 256 levels of brightness, [256, 3]."""
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    return pixels_of(painter.toned(levels, painter.TONES[style]))[0]


def along(pixels: Array, tones: Array) -> tuple[Array, Array]:
    """Of each pixel the nearest point of a curve, in 0..1 along it, and the distance to it."""
    coarse = tones[::5]
    squares = (pixels**2).sum(-1)[..., None] - 2 * pixels @ coarse.T + (coarse**2).sum(-1)
    at = squares.argmin(-1)
    distance = np.sqrt(np.maximum(np.take_along_axis(squares, at[..., None], -1)[..., 0], 0))
    return (at * (5 / 255)).astype(np.float32), distance
