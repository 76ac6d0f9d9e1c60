"""Draws the scenes of the small world: flat colours, anti-aliased, the same bytes on every machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from gesso.micro import figures
from gesso.micro.figures import COLOURS, Point, Rgb
from gesso.micro.world import COLOURS as COLOUR_NAMES
from gesso.micro.world import NEON, SIDE, Jitter, Scene

_OVER = 8
"""Each pixel is the mean of this many by this many painted ones."""
_TILE = 4
"""Side of a mosaic's tiles in pixels."""
_INK: Rgb = (20, 18, 22)
TONES: dict[str | None, tuple[Rgb, Rgb, Rgb]] = {
    "sepia": ((44, 26, 14), (178, 132, 84), (252, 240, 214)),
    NEON: (COLOURS["black"], COLOURS["red"], COLOURS["yellow"]),
}
"""Dark, middle and light of the styles that map brightness to colour."""
GROUND = 45.0
"""Where sky and ground meet, in pixels from the top."""


def paint(scene: Scene) -> Image.Image:
    """The picture, RGB, 64 x 64 pixels. The scene's facts must be complete."""
    facts = scene.facts
    assert facts.place is not None
    brush = Brush(scene.jitter)
    place(brush, facts.place)
    brush.enter_figure(outlined=facts.style == "outlined" or facts.style in TONES)
    figures.draw(brush, facts, skin=scene.jitter.skin)
    picture = brush.finished()
    if facts.style in TONES:
        return toned(picture, TONES[facts.style])
    return tiled(picture) if facts.style == "mosaic" else picture


def backdrop(name: str, *, jitter: Jitter | None = None) -> Image.Image:
    """A place without anybody in it."""
    brush = Brush(jitter or Jitter())
    place(brush, name)
    return brush.finished()


class Brush:
    """Draws in pixel coordinates; a figure's are moved and scaled by the jitter about the picture's centre."""

    def __init__(self, jitter: Jitter) -> None:
        self._jitter = jitter
        self._image = Image.new("RGB", (SIDE * _OVER, SIDE * _OVER))
        self._pen = ImageDraw.Draw(self._image)
        self._figure, self._outlined = False, False

    @property
    def horizon(self) -> float:
        """Offset of the horizon in pixels."""
        return self._jitter.horizon

    def enter_figure(self, *, outlined: bool) -> None:
        """From here on, what is drawn is the figure and not the place."""
        self._figure, self._outlined = True, outlined

    def polygon(self, points: Sequence[Point], colour: Rgb) -> None:
        """A filled polygon; in the outlined style its contour is drawn in ink."""
        at = [self._at(*point) for point in points]
        self._pen.polygon(at, fill=colour)
        if self._outlined:
            self._pen.line([*at, at[0], at[1]], fill=_INK, width=_OVER * 5 // 4, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb) -> None:
        """A filled ellipse about (x, y)."""
        corners = [self._at(x - rx, y - ry), self._at(x + rx, y + ry)]
        self._pen.ellipse(corners, fill=colour, outline=_INK if self._outlined else None, width=_OVER * 5 // 4)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
        """A filled rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def stroke(self, points: Sequence[Point], width: float, colour: Rgb) -> None:
        """An open line, without an outline."""
        self._pen.line([self._at(*p) for p in points], fill=colour, width=max(round(width * _OVER), 1), joint="curve")

    def finished(self) -> Image.Image:
        """The picture at its final size."""
        return self._image.resize((SIDE, SIDE), Image.Resampling.BOX)

    def _at(self, x: float, y: float) -> Point:
        if self._figure:
            j, middle = self._jitter, SIDE / 2
            x, y = (x - middle) * j.scale + middle + j.x, (y - middle) * j.scale + middle + j.y
        return x * _OVER, y * _OVER


def place(brush: Brush, name: str) -> None:
    """Paint a place over the whole picture."""
    if name in COLOUR_NAMES:
        brush.box(0, 0, SIDE, SIDE, COLOURS[name])
        return
    ground = GROUND + brush.horizon
    match name:
        case "steppe":
            brush.box(0, 0, SIDE, SIDE, (150, 208, 242))
            brush.box(0, ground, SIDE, SIDE, (122, 184, 84))
        case "market":
            brush.box(0, 0, SIDE, SIDE, (246, 226, 186))
            brush.box(0, ground, SIDE, SIDE, (172, 120, 74))
            for i in range(8):
                stripe = (214, 84, 60) if i % 2 == 0 else (250, 246, 236)
                brush.box(8 * i, 0, 8 * i + 8, 9, stripe)
                brush.ellipse(8 * i + 4, 9, 4, 4, stripe)
        case "mountains":
            brush.box(0, 0, SIDE, SIDE, (206, 224, 238))
            for x, peak in ((8, 12), (54, 8)):
                brush.polygon([(x - 26, ground), (x, peak), (x + 26, ground)], (104, 122, 152))
                cap = (ground - peak) * 0.28
                brush.polygon([(x - 7.3, peak + cap), (x, peak), (x + 7.3, peak + cap)], (246, 250, 254))
            brush.box(0, ground, SIDE, SIDE, (92, 130, 110))
        case "night":
            brush.box(0, 0, SIDE, SIDE, (22, 26, 74))
            brush.box(0, ground, SIDE, SIDE, (34, 58, 58))
            for x, y in ((5, 8), (13, 22), (22, 5), (41, 9), (52, 4), (58, 18), (48, 27), (6, 36), (60, 38)):
                brush.ellipse(x, y, 1.1, 1.1, (250, 244, 206))


def toned(picture: Image.Image, tones: Sequence[Rgb]) -> Image.Image:
    """The picture's brightness on a scale of three colours."""
    levels = np.asarray(picture.convert("L"), dtype=np.float32)
    stops = np.linspace(0, 255, len(tones))
    channels = [np.interp(levels, stops, [tone[i] for tone in tones]) for i in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def tiled(picture: Image.Image) -> Image.Image:
    """The picture in square tiles of one colour each, with darker joints."""
    cells = SIDE // _TILE
    tiles = np.asarray(picture.resize((cells, cells), Image.Resampling.BOX), dtype=np.float32)
    large = tiles.repeat(_TILE, axis=0).repeat(_TILE, axis=1)
    large[_TILE - 1 :: _TILE] *= 0.78
    large[:, _TILE - 1 :: _TILE] *= 0.78
    return Image.fromarray(large.round().astype(np.uint8))
