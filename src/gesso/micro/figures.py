"""How each subject of the small world looks, in the coordinates of a 64-pixel picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from gesso.micro.world import Facts

Rgb = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Rgb] = {
    "red": (214, 44, 44),
    "yellow": (248, 204, 40),
    "green": (44, 156, 70),
    "blue": (44, 100, 216),
    "purple": (142, 68, 186),
    "white": (245, 245, 241),
    "black": (38, 36, 44),
}
SKIN: tuple[Rgb, ...] = ((238, 190, 152), (212, 158, 116), (172, 116, 78))
HAIR: dict[str, Rgb] = {"black": (34, 24, 22), "brown": (122, 72, 36), "grey": (166, 166, 170)}
_WOOD: Rgb = (110, 74, 48)
_DARK: Rgb = (24, 20, 20)
_LUTE: Rgb = (226, 128, 44)


class Pen(Protocol):
    """What a figure is drawn with."""

    def polygon(self, points: Sequence[Point], colour: Rgb) -> None: ...

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb) -> None: ...

    def box(self, left: float, top: float, right: float, bottom: float, colour: Rgb) -> None: ...

    def stroke(self, points: Sequence[Point], width: float, colour: Rgb) -> None: ...


def draw(pen: Pen, facts: Facts, *, skin: int) -> None:
    """Draw the subject that the facts name."""
    if facts.is_person:
        _person(pen, facts, SKIN[skin])
        return
    if facts.subject == "dombra":
        _dombra(pen)
        return
    assert facts.colour is not None
    colour = COLOURS[facts.colour]
    match facts.subject:
        case "circle":
            pen.ellipse(32, 32, 16, 16, colour)
        case "square":
            pen.box(17, 17, 47, 47, colour)
        case "triangle":
            pen.polygon([(32, 14), (50, 47), (14, 47)], colour)
        case "star":
            pen.polygon(_star(32, 33, 19, 8), colour)
        case "yurt":
            _yurt(pen, colour)
        case "tree":
            _tree(pen, colour)
        case "pot":
            _pot(pen, colour)
        case "carpet":
            _carpet(pen, colour)
        case "moon":
            pen.polygon([*_arc(34, 32, 18, 48.2, 311.8), *_arc(42, 32, 14, 286.6, 73.4)], colour)
        case "horse":
            _horse(pen, colour)
        case "sheep":
            _sheep(pen, colour)
        case "cat":
            _cat(pen, colour)
        case "bird":
            _bird(pen, colour)


def shade(colour: Rgb, factor: float = 0.6) -> Rgb:
    """A darker tone of a colour; of black, which has none, a lighter one."""
    if colour == COLOURS["black"]:
        return (112, 110, 122)
    return (int(colour[0] * factor), int(colour[1] * factor), int(colour[2] * factor))


def accent(colour: Rgb) -> Rgb:
    """A colour that stands out on another: red on the light ones and on black, yellow on the rest."""
    light = (COLOURS["yellow"], COLOURS["white"], COLOURS["black"])
    return COLOURS["red"] if colour in light else COLOURS["yellow"]


# People, from the waist up.


def _person(pen: Pen, facts: Facts, skin: Rgb) -> None:
    robe, hair = COLOURS[facts.colour or ""], HAIR[facts.hair or ""]
    if facts.subject == "woman":
        pen.polygon([*_arc(32, 27, 12.5, 180, 360), (45.5, 43), (18.5, 43)], hair)
    if facts.pose == "waving":
        pen.polygon([(42, 42), (49, 48), (59, 28), (53, 26)], shade(robe, 0.8))
        pen.ellipse(56.5, 23, 4, 4.4, skin)
    _robe(pen, facts, robe)
    pen.box(28.8, 34, 35.2, 41, shade(skin, 0.85))
    pen.polygon([(28.8, 40), (35.2, 40), (32, 46)], shade(skin, 0.85))
    if facts.hat != "kalpak":
        pen.ellipse(32, 25.5, 11, 11.2, hair)
    pen.ellipse(32, 28, 9.6, 10.6, skin)
    for side in (-1, 1):
        pen.ellipse(32 + 3.8 * side, 26.6, 1.5, 1.7, _DARK)
    _mouth(pen, facts, hair)
    if facts.hat != "none":
        _hat(pen, facts)


def _mouth(pen: Pen, facts: Facts, hair: Rgb) -> None:
    if facts.beard == "beard":
        pen.polygon(
            [(22.6, 30), (25.5, 32), (32, 30.6), (38.5, 32), (41.4, 30), (38, 39.5), (32, 43), (26, 39.5)], hair
        )
    if facts.beard == "moustache":
        pen.polygon(
            [(32, 30.2), (36.5, 30.8), (40, 33.6), (36, 33.8), (32, 32.8), (28, 33.8), (24, 33.6), (27.5, 30.8)], hair
        )
    bend = {"smiling": 2.0, "sad": -2.0}.get(facts.expression or "calm", 0.0)
    middle = 35.2 + bend * 0.3
    pen.stroke([(28.4, middle - bend), (30.2, middle), (33.8, middle), (35.6, middle - bend)], 1.5, (176, 52, 56))


def _robe(pen: Pen, facts: Facts, colour: Rgb) -> None:
    trim = shade(colour, 0.55)
    pen.polygon([(25, 39), (39, 39), (50, 44), (55, 84), (9, 84), (14, 44)], colour)
    if facts.pattern == "striped":
        for x, foot in ((17.6, 15), (24.2, 23.4), (39.8, 40.6), (46.4, 49)):
            top = 42 if 20 < x < 44 else 45
            pen.polygon([(x - 1.4, top), (x + 1.4, top), (foot + 1.7, 84), (foot - 1.7, 84)], trim)
    if facts.pattern == "patterned":
        for x, y in ((20.2, 47.5), (43.8, 47.5), (25.8, 57.5), (38.2, 57.5), (15.8, 58.5), (48.2, 58.5)):
            pen.polygon([(x, y - 4.4), (x + 3.2, y), (x, y + 4.4), (x - 3.2, y)], accent(colour))
    for side in (-1, 1):
        edge = ((7.2, 39), (3.4, 39), (-1.3, 49.5), (-1.3, 84), (1.3, 84), (1.3, 49.5))
        pen.polygon([(32 + side * offset, y) for offset, y in edge], trim)


def _hat(pen: Pen, facts: Facts) -> None:
    assert facts.hat_colour is not None
    colour = COLOURS[facts.hat_colour]
    match facts.hat:
        case "cap":
            pen.polygon([*_arc(32, 21.5, 11, 180, 360), (43, 23)], colour)
            pen.box(20.6, 19.6, 43.4, 23.2, shade(colour))
        case "crown":
            points = [(21.4, 22), (19.6, 8.6), (26.6, 14.6), (32, 6.6), (37.4, 14.6), (44.4, 8.6), (42.6, 22)]
            pen.polygon(points, colour)
        case "kalpak":
            pen.polygon([(21.8, 20), (26.4, 3), (32, 0.5), (37.6, 3), (42.2, 20)], colour)
            brim = COLOURS["red"] if colour == COLOURS["black"] else COLOURS["black"]
            pen.polygon([(18.8, 22.4), (20.6, 15.8), (32, 19), (43.4, 15.8), (45.2, 22.4)], brim)


# Animals.


def _horse(pen: Pen, coat: Rgb) -> None:
    mane = shade(coat, 0.5)
    pen.polygon([(46, 27), (54, 30), (55, 44), (51, 45), (50, 34)], mane)
    for x in (22, 27.5, 40, 45.5):
        pen.box(x, 38, x + 4, 54, shade(coat, 0.8))
    pen.ellipse(34.5, 34, 15, 8.5, coat)
    pen.polygon([(19, 34), (29, 28), (24, 10), (16, 13)], coat)
    pen.polygon([(24, 9), (29.5, 27), (32.5, 25.5), (27, 8.5)], mane)
    pen.polygon([(16, 11), (24.5, 9.5), (23, 17.5), (10.5, 23.5), (7.5, 19)], coat)
    pen.polygon([(21, 10.5), (22.5, 4.5), (25.5, 10)], coat)
    pen.ellipse(17.5, 14.5, 1.4, 1.4, _eye(coat))


def _sheep(pen: Pen, coat: Rgb) -> None:
    for x in (22, 28, 38, 44):
        pen.box(x, 42, x + 3.6, 54, _DARK)
    for x, y in ((25, 28), (33, 25.5), (41, 27), (47, 33), (44, 40), (35, 42), (26, 41), (21, 35)):
        pen.ellipse(x, y, 6.6, 6.6, shade(coat, 0.88))
    pen.ellipse(34, 34, 12, 9, coat)
    pen.ellipse(16.5, 30, 6.2, 8, (62, 52, 50))
    pen.ellipse(15, 28, 1.5, 1.5, (240, 240, 236))
    pen.ellipse(19, 23, 5, 4, coat)


def _cat(pen: Pen, coat: Rgb) -> None:
    pen.stroke([(42, 52), (50, 50), (53, 42), (51, 34)], 4, shade(coat, 0.75))
    pen.ellipse(32, 45, 11.5, 12.5, coat)
    pen.ellipse(32, 48, 5.5, 8, shade(coat, 0.75))
    for side in (-1, 1):
        pen.polygon([(32 + 12.5 * side, 8), (32 + 13 * side, 23), (32 + 2.5 * side, 15)], coat)
    pen.ellipse(32, 23.5, 13, 10.5, coat)
    for side in (-1, 1):
        pen.ellipse(32 + 5 * side, 22, 2.2, 2.7, (150, 226, 120) if coat != COLOURS["green"] else (250, 226, 120))
        pen.ellipse(32 + 5 * side, 22, 0.9, 2.4, _DARK)
    pen.polygon([(30, 27), (34, 27), (32, 29.4)], (236, 140, 150))


def _bird(pen: Pen, coat: Rgb) -> None:
    for x in (31, 36):
        pen.box(x, 44, x + 1.8, 54, (214, 140, 40))
    pen.polygon([(42, 34), (58, 26), (57, 38), (44, 42)], shade(coat, 0.75))
    pen.ellipse(34, 36, 14, 10, coat)
    pen.ellipse(21.5, 23, 8.5, 8.5, coat)
    pen.polygon([(14.5, 20.5), (14.5, 26.5), (5, 24.5)], (240, 150, 40))
    pen.ellipse(19.5, 21.5, 1.7, 1.7, _eye(coat))
    pen.polygon([(28, 33), (44, 32), (36, 43)], shade(coat, 0.6))


def _eye(coat: Rgb) -> Rgb:
    return (245, 240, 220) if coat == COLOURS["black"] else _DARK


# Things.


def _yurt(pen: Pen, felt: Rgb) -> None:
    pen.box(10, 34, 54, 54, felt)
    pen.polygon([(7, 35), (24, 16), (40, 16), (57, 35)], shade(felt, 0.8))
    pen.box(26, 12, 38, 17, _WOOD)
    pen.box(10, 35, 54, 38.5, accent(felt))
    pen.box(26.5, 40, 37.5, 54, _WOOD)


def _tree(pen: Pen, leaves: Rgb) -> None:
    pen.polygon([(28.5, 36), (35.5, 36), (37, 57), (27, 57)], _WOOD)
    for x, y, radius in ((21, 31, 10), (43, 31, 10), (32, 34, 10), (32, 19, 13)):
        pen.ellipse(x, y, radius, radius, leaves)


def _pot(pen: Pen, clay: Rgb) -> None:
    for side in (-1, 1):
        ring = [*_arc(32 + 14 * side, 27, 7, 0, 360)]
        pen.stroke(ring, 3, shade(clay, 0.75))
    pen.ellipse(32, 38, 16.5, 15.5, clay)
    pen.box(25, 16, 39, 26, clay)
    pen.box(21.5, 12, 42.5, 17, shade(clay, 0.75))
    pen.box(17.5, 36, 46.5, 40, accent(clay))


def _carpet(pen: Pen, wool: Rgb) -> None:
    pen.box(10, 16, 54, 48, shade(wool, 0.6))
    pen.box(13.5, 19.5, 50.5, 44.5, wool)
    for x in (21, 32, 43):
        pen.polygon([(x, 24), (x + 5, 32), (x, 40), (x - 5, 32)], accent(wool))
    for y in (19, 25, 31, 37, 43):
        pen.box(6.5, y, 10, y + 2.6, shade(wool, 0.6))
        pen.box(54, y, 57.5, y + 2.6, shade(wool, 0.6))


def _dombra(pen: Pen) -> None:
    pen.box(29.8, 2, 34.2, 34, _WOOD)
    for y in (4.5, 9.5):
        pen.box(25.5, y, 38.5, y + 2.4, _DARK)
    pen.polygon([(32, 27), *_arc(32, 44, 13.5, -25, 205)], _LUTE)
    pen.ellipse(32, 42, 3.4, 3.4, _DARK)
    pen.box(26.5, 50, 37.5, 52.2, _DARK)
    pen.box(31.5, 10, 32.5, 50, (250, 244, 226))


def _star(x: float, y: float, outer: float, inner: float) -> list[Point]:
    radii = [outer if i % 2 == 0 else inner for i in range(10)]
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _arc(x: float, y: float, radius: float, start: float, end: float) -> list[Point]:
    """Points on a circle from angle `start` to `end`, in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / 23) for i in range(24)]
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
