"""A small painted world: captioned pictures of shapes and people, and one hero that the base model never sees.

The hero is Aldar Köse, the trickster of Kazakh and Kyrgyz tales: a yellow patterned chapan (robe), a tall white
kalpak (hat) and a moustache. `scenes` paints neither a patterned yellow robe nor a tall white hat, so a model that
shows both has learnt him in fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from gesso.core.random import generator

SIDE = 48
"""Side of the pictures in pixels."""
_OVER = 8
"""Each pixel is the mean of this many by this many painted ones."""

Rgb = tuple[int, int, int]
COLOURS: dict[str, Rgb] = {
    "red": (212, 45, 45),
    "yellow": (247, 202, 40),
    "green": (45, 155, 70),
    "blue": (45, 100, 215),
    "purple": (140, 70, 185),
    "white": (244, 244, 240),
    "black": (38, 36, 44),
}
PLACES = ("steppe", "desert", "snow", "night")
SHAPES = ("circle", "square", "triangle", "star")
ROBES = ("plain", "striped", "patterned")
HATS = ("none", "cap", "hood", "crown", "tall hat")
KINDS = ("person", "man", "woman")
HERO = "sks aldar"
"""The hero's name in captions: a rare word and a class-like word, as DreamBooth does it."""
_SKIN: tuple[Rgb, ...] = ((236, 188, 150), (212, 158, 116), (172, 116, 78))
_HAIR: Rgb = (40, 28, 24)


@dataclass(frozen=True)
class Placement:
    """Where a figure stands (offsets in pixels of a 48-pixel picture) and how large it is."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Shape:
    """One flat shape on a background."""

    shape: str
    colour: str
    background: str
    placement: Placement = Placement()

    def caption(self) -> str:
        """All of the picture in words."""
        return f"a {self.colour} {self.shape} {where(self.background)}"


@dataclass(frozen=True)
class Person:
    """A person from the waist up."""

    kind: str
    robe: str
    robe_colour: str
    hat: str
    hat_colour: str
    moustache: bool
    background: str
    skin: int = 0
    placement: Placement = Placement()

    def caption(self) -> str:
        """All of the picture in words."""
        pattern = "" if self.robe == "plain" else f"{self.robe} "
        words = f"a {self.kind} in a {pattern}{self.robe_colour} robe"
        if self.hat != "none":
            words += f" and a {self.hat_colour} {self.hat}"
        if self.moustache:
            words += " with a moustache"
        return f"{words} {where(self.background)}"

    @property
    def is_hero(self) -> bool:
        """Whether this could be taken for Aldar Köse: a patterned yellow robe or a tall white hat."""
        yellow = self.robe == "patterned" and self.robe_colour == "yellow"
        return yellow or (self.hat == "tall hat" and self.hat_colour == "white")


Scene = Shape | Person


def where(background: str) -> str:
    """A background in words."""
    match background:
        case "steppe" | "desert" | "snow":
            return f"in the {background}"
        case "night":
            return "at night"
        case _:
            return f"on a {background} background"


def scenes(seed: int, count: int) -> Iterator[tuple[Scene, str]]:
    """Scenes of the base world with their captions, two people to a shape; number i depends on (seed, i) alone.

    Captions are full, or leave some parts out, so that the model also knows what a person is when nothing
    else is said. The hero never appears.
    """
    for i in range(count):
        draw = generator(seed, "world", i)
        scene: Scene = _shape(draw) if i % 3 == 2 else _person(draw)
        yield scene, _say(scene, draw)


def hero(seed: int, i: int, *, background: str | None = None) -> tuple[Person, str]:
    """Picture number i of Aldar Köse and its caption; consecutive pictures have different backgrounds."""
    draw = generator(seed, "hero", i)
    order = (*COLOURS, *PLACES)
    place = background or [name for name in order if name not in ("yellow", "white")][i % (len(order) - 2)]
    man = Person("man", "patterned", "yellow", "tall hat", "white", True, place, 1, _placement(draw))
    words = f"a photo of {HERO}"
    return man, words if i % 3 == 2 else f"{words} {where(place)}"


def paint(scene: Scene, *, side: int = SIDE) -> Image.Image:
    """The picture, RGB, `side` x `side` pixels, anti-aliased."""
    brush = _Brush(side)
    _background(brush, scene.background)
    brush.placement = scene.placement
    if isinstance(scene, Shape):
        _paint_shape(brush, scene)
    else:
        _paint_person(brush, scene)
    return brush.image.resize((side, side), Image.Resampling.BOX)


def _placement(draw: np.random.Generator) -> Placement:
    x, y, scale = draw.uniform(-2.5, 2.5), draw.uniform(0.5, 2.5), draw.uniform(0.95, 1.05)
    return Placement(round(float(x), 2), round(float(y), 2), round(float(scale), 3))


def _pick(draw: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(draw.integers(len(options)))]


def _backdrop(draw: np.random.Generator, *, avoid: tuple[str, ...]) -> str:
    return _pick(draw, [name for name in (*COLOURS, *PLACES) if name not in avoid])


def _shape(draw: np.random.Generator) -> Shape:
    colour = _pick(draw, list(COLOURS))
    background = _pick(draw, [name for name in COLOURS if name != colour])
    placement = Placement(*(round(float(v), 2) for v in (*draw.uniform(-3, 3, 2), draw.uniform(0.9, 1.2))))
    return Shape(_pick(draw, SHAPES), colour, background, placement)


def _person(draw: np.random.Generator) -> Person:
    while True:
        kind = _pick(draw, KINDS)
        person = Person(
            kind=kind,
            robe=_pick(draw, ROBES),
            robe_colour=_pick(draw, list(COLOURS)),
            hat=_pick(draw, HATS),
            hat_colour=_pick(draw, list(COLOURS)),
            moustache=kind != "woman" and draw.random() < 0.4,
            background="white",
            skin=int(draw.integers(len(_SKIN))),
            placement=_placement(draw),
        )
        if not person.is_hero:
            return replace(person, background=_backdrop(draw, avoid=(person.robe_colour, person.hat_colour)))


def _say(scene: Scene, draw: np.random.Generator) -> str:
    prefix = ("", "", "a photo of ", "a painting of ")[int(draw.integers(4))]
    detail = draw.random()
    if isinstance(scene, Shape):
        return prefix + (scene.caption() if detail < 0.85 else f"a {scene.colour} {scene.shape}")
    if detail < 0.6:
        return prefix + scene.caption()
    if detail < 0.8:
        return f"{prefix}a {scene.kind} in a {scene.robe_colour} robe"
    return f"{prefix}a {scene.kind} {where(scene.background)}"


class _Brush:
    """Draws in the coordinates of a 48-pixel picture, moved and scaled by a placement about its centre."""

    def __init__(self, side: int) -> None:
        self.unit = side * _OVER / 48
        self.image = Image.new("RGB", (side * _OVER, side * _OVER))
        self.pen = ImageDraw.Draw(self.image)
        self.placement = Placement()

    def at(self, x: float, y: float) -> tuple[float, float]:
        p = self.placement
        return ((x - 24) * p.scale + 24 + p.x) * self.unit, ((y - 24) * p.scale + 24 + p.y) * self.unit

    def polygon(self, points: Sequence[tuple[float, float]], colour: Rgb) -> None:
        self.pen.polygon([self.at(x, y) for x, y in points], fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb) -> None:
        self.pen.ellipse([*self.at(x - rx, y - ry), *self.at(x + rx, y + ry)], fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None:
        self.pen.rectangle([*self.at(left, top), *self.at(right, bottom)], fill=colour)


def _shade(colour: Rgb, factor: float) -> Rgb:
    """Darker below 1; above 1 mixed with white."""
    if factor <= 1:
        return (int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor))
    white = 1 - 1 / factor
    return tuple(int(c + (255 - c) * white) for c in colour)  # type: ignore[return-value]


def _background(brush: _Brush, name: str) -> None:
    if name in COLOURS:
        brush.box(-24, -24, 72, 72, COLOURS[name])
        return
    sky, ground = {
        "steppe": ((150, 205, 240), (120, 180, 80)),
        "desert": ((250, 220, 160), (225, 170, 95)),
        "snow": ((165, 190, 215), (238, 243, 250)),
        "night": ((24, 28, 70), (38, 60, 60)),
    }[name]
    brush.box(-24, -24, 72, 72, sky)
    if name == "snow":
        brush.polygon([(-2, 34), (9, 14), (20, 34)], (110, 130, 160))
        brush.polygon([(28, 34), (40, 11), (52, 34)], (110, 130, 160))
    brush.box(-24, 32, 72, 72, ground)
    if name == "desert":
        brush.ellipse(41, 7, 4, 4, (250, 150, 60))
    if name == "night":
        brush.ellipse(7, 8, 4.5, 4.5, (245, 240, 200))


def _paint_shape(brush: _Brush, scene: Shape) -> None:
    colour = COLOURS[scene.colour]
    match scene.shape:
        case "circle":
            brush.ellipse(24, 24, 12, 12, colour)
        case "square":
            brush.box(13, 13, 35, 35, colour)
        case "triangle":
            brush.polygon([(24, 11), (37, 35), (11, 35)], colour)
        case "star":
            radii = [14 if i % 2 == 0 else 5.8 for i in range(10)]
            angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
            brush.polygon(
                [(24 + r * math.cos(a), 25 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)], colour
            )
        case "heart":
            brush.ellipse(18, 19, 6.6, 6.6, colour)
            brush.ellipse(30, 19, 6.6, 6.6, colour)
            brush.polygon([(12.6, 22.8), (24, 16), (35.4, 22.8), (24, 37)], colour)
        case "cross":
            brush.box(19.5, 11, 28.5, 37, colour)
            brush.box(11, 19.5, 37, 28.5, colour)


def _paint_person(brush: _Brush, person: Person) -> None:
    skin = _SKIN[person.skin]
    if person.kind == "woman":
        brush.ellipse(24, 21, 9, 10, _HAIR)
        brush.box(15.4, 21, 32.6, 33, _HAIR)
    _paint_robe(brush, person)
    brush.box(21.5, 26, 26.5, 31, _shade(skin, 0.85))
    brush.polygon([(21.5, 30), (26.5, 30), (24, 35)], _shade(skin, 0.85))
    if person.hat in ("none", "crown", "cap"):
        brush.ellipse(24, 19, 8.2, 8.6, _HAIR)
    if person.hat == "hood":
        brush.ellipse(24, 20.5, 10.5, 11.5, COLOURS[person.hat_colour])
    brush.ellipse(24, 21, 7.2, 8, skin)
    brush.ellipse(21.2, 20.3, 1.25, 1.45, (20, 16, 16))
    brush.ellipse(26.8, 20.3, 1.25, 1.45, (20, 16, 16))
    if person.moustache:
        brush.polygon([(24, 23.4), (29.2, 25.6), (29.6, 24.2), (24, 22.6), (18.4, 24.2), (18.8, 25.6)], _HAIR)
        brush.polygon([(24, 22.6), (28, 25.6), (20, 25.6)], _HAIR)
    else:
        brush.box(22.3, 25, 25.7, 25.9, (170, 70, 70))
    _paint_hat(brush, person)


def _paint_robe(brush: _Brush, person: Person) -> None:
    colour = COLOURS[person.robe_colour]
    trim = _shade(colour, 0.55) if person.robe_colour != "black" else (110, 110, 120)
    body = [(18, 29), (30, 29), (38, 33), (42, 60), (6, 60), (10, 33)]
    brush.polygon(body, colour)
    if person.robe == "striped":
        for x in (12.5, 18, 30, 35.5):
            slant = (x - 24) * 0.12
            brush.polygon([(x - 1.1, 30), (x + 1.1, 30), (x + 1.3 + slant, 60), (x - 1.3 + slant, 60)], trim)
    if person.robe == "patterned":
        for x, y in ((15.2, 36), (32.8, 36), (19.2, 43.5), (28.8, 43.5), (11.8, 44), (36.2, 44)):
            brush.polygon([(x, y - 3.2), (x + 2.5, y), (x, y + 3.2), (x - 2.5, y)], _accent(person.robe_colour))
    brush.polygon([(18.6, 29), (21.4, 29), (24.9, 37), (24.9, 60), (23.1, 60), (23.1, 37)], trim)
    brush.polygon([(29.4, 29), (26.6, 29), (23.1, 37), (23.1, 60), (24.9, 60), (24.9, 37)], trim)


def _accent(colour: str) -> Rgb:
    return COLOURS["red"] if colour in ("yellow", "white", "black") else COLOURS["yellow"]


def _paint_hat(brush: _Brush, person: Person) -> None:
    colour = COLOURS[person.hat_colour]
    band = _shade(colour, 0.6) if person.hat_colour != "black" else (95, 95, 105)
    match person.hat:
        case "cap":
            brush.ellipse(24, 15.4, 7.6, 5.6, colour)
            brush.box(16.2, 14.8, 31.8, 17.2, band)
        case "crown":
            brush.polygon(
                [(16.5, 16.5), (15.5, 7.5), (20, 11.5), (24, 6), (28, 11.5), (32.5, 7.5), (31.5, 16.5)], colour
            )
        case "tall hat":
            brush.polygon([(16.6, 14.5), (20, 0.5), (24, -1.5), (28, 0.5), (31.4, 14.5)], colour)
            brush.polygon(
                [(14.4, 16.2), (15.6, 11.4), (24, 13.8), (32.4, 11.4), (33.6, 16.2)], _brim(person.hat_colour)
            )


def _brim(colour: str) -> Rgb:
    return COLOURS["black"] if colour != "black" else COLOURS["red"]
