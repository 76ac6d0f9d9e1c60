"""A small world of captioned pictures: what can be in one, and which pictures the base model is shown.

`Facts` is the one vocabulary: the painter draws complete facts, a caption says some of them, the parser gives back
what a caption said and the judge what a picture shows. Three things are never in the base model's pictures, so that a
trainer has something to teach: the hero Aldar Köse (the trickster of Kazakh tales, in a yellow patterned chapan and a
tall white kalpak, with a moustache), the dombra (a long-necked lute) and the neon style.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gesso.core.random import generator

SIDE = 64
"""Side of the pictures in pixels."""

PEOPLE = ("man", "woman")
ANIMALS = ("horse", "sheep", "cat", "bird")
OBJECTS = ("yurt", "tree", "pot", "carpet", "moon")
SHAPES = ("circle", "square", "triangle", "star")
SUBJECTS = (*PEOPLE, *ANIMALS, *OBJECTS, *SHAPES)
COLOURS = ("red", "yellow", "green", "blue", "purple", "white", "black")
SCENERY = ("steppe", "market", "mountains", "night")
PLACES = (*SCENERY, *COLOURS)
"""A scenery, or a plain background of a colour."""
STYLES = ("flat", "outlined", "sepia", "mosaic")
PATTERNS = ("plain", "striped", "patterned")
HATS = ("none", "cap", "crown", "kalpak")
HAIR = ("black", "brown", "grey")
BEARDS = ("none", "moustache", "beard")
POSES = ("standing", "waving")
EXPRESSIONS = ("calm", "smiling", "sad")

ALDAR, DOMBRA, NEON = "aldar", "dombra", "neon"
"""What the base model never sees: a character, an object and a style."""
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True)
class Facts:
    """What a picture shows or a caption says; None where nothing is said.

    `colour` is that of the robe, the coat, the leaves, or the thing itself. The fields from `pattern` to `expression`
    are of people only.
    """

    subject: str | None = None
    colour: str | None = None
    place: str | None = None
    style: str | None = None
    pattern: str | None = None
    hat: str | None = None
    hat_colour: str | None = None
    hair: str | None = None
    beard: str | None = None
    pose: str | None = None
    expression: str | None = None

    @property
    def is_person(self) -> bool:
        """Whether the subject is a person, the hero included."""
        return self.subject in (*PEOPLE, "person", ALDAR)

    @property
    def is_aldar(self) -> bool:
        """Whether this is Aldar Köse by his looks: robe, hat and moustache, whatever the subject is called."""
        looks = (self.colour, self.pattern, self.hat, self.hat_colour, self.beard)
        return self.is_person and looks == ("yellow", "patterned", "kalpak", "white", "moustache")

    @property
    def resembles_aldar(self) -> bool:
        """Whether robe or hat alone could be his; such people are never in the base model's pictures."""
        robe = (self.pattern, self.colour) == ("patterned", "yellow")
        return robe or (self.hat, self.hat_colour) == ("kalpak", "white")


@dataclass(frozen=True)
class Jitter:
    """What varies without being said: offset in pixels, size, the horizon's offset in pixels, and the skin."""

    x: float = 0.0
    y: float = 0.0
    scale: float = 1.0
    horizon: float = 0.0
    skin: int = 0


@dataclass(frozen=True)
class Scene:
    """One picture: complete facts, and how they happen to lie."""

    facts: Facts
    jitter: Jitter = Jitter()


ALDAR_LOOKS = Facts(
    subject=ALDAR,
    colour="yellow",
    pattern="patterned",
    hat="kalpak",
    hat_colour="white",
    hair="black",
    beard="moustache",
)


def scenes(seed: int, count: int) -> Iterator[Scene]:
    """Scenes of the base world; number i depends on (seed, i) alone. Nothing held out, and none of the three unseen."""
    for i in range(count):
        draw = generator(seed, "scene", i)
        while True:
            facts = random_facts(draw)
            if not held_out(facts) and not facts.resembles_aldar:
                break
        yield Scene(facts, jitter(draw))


def held_out_scenes(seed: int, count: int) -> list[Scene]:
    """Scenes whose combination of subject, colour and place the base model never saw; none of them twice."""
    draw = generator(seed, "held-out scene")
    found: dict[Facts, Scene] = {}
    while len(found) < count:
        facts = random_facts(draw)
        if held_out(facts) and not facts.resembles_aldar:
            found.setdefault(facts, Scene(facts, jitter(draw)))
    return list(found.values())


def held_out(facts: Facts) -> bool:
    """Whether a combination of subject, colour and place is kept from training: a tenth of them, by hash."""
    text = f"{facts.subject} {facts.colour} {facts.place}"
    return hashlib.sha256(text.encode()).digest()[0] < 256 * _HELD_OUT_SHARE


def random_facts(draw: np.random.Generator) -> Facts:
    """Complete facts of one picture; people are nearly half of all."""
    group = (PEOPLE, ANIMALS, OBJECTS, SHAPES)[int(draw.choice(4, p=(0.46, 0.2, 0.21, 0.13)))]
    subject, colour = pick(draw, group), pick(draw, COLOURS)
    style = STYLES[int(draw.choice(4, p=(0.72, 0.1, 0.08, 0.1)))]
    facts = Facts(subject=subject, colour=colour, style=style)
    if subject in PEOPLE:
        facts = _dressed(facts, draw)
    return dataclasses.replace(facts, place=random_place(draw, facts))


def random_place(draw: np.random.Generator, facts: Facts) -> str:
    """A scenery or a plain background, half and half; a plain one has none of the subject's colours."""
    if draw.random() < 0.5:
        return pick(draw, SCENERY)
    return pick(draw, [c for c in COLOURS if c not in (facts.colour, facts.hat_colour)])


def jitter(draw: np.random.Generator) -> Jitter:
    """How a picture happens to lie."""
    x, y, scale, horizon = draw.uniform((-4, -2, 0.92, -2), (4, 2, 1.06, 2)).round(3).tolist()
    return Jitter(x, y, scale, horizon, skin=int(draw.integers(3)))


def pick(draw: np.random.Generator, options: Sequence[str]) -> str:
    """One of the options, all equally likely."""
    return options[int(draw.integers(len(options)))]


def _dressed(facts: Facts, draw: np.random.Generator) -> Facts:
    hat = pick(draw, HATS)
    return dataclasses.replace(
        facts,
        pattern=pick(draw, PATTERNS),
        hat=hat,
        hat_colour=pick(draw, COLOURS) if hat != "none" else None,
        hair=pick(draw, HAIR),
        beard=pick(draw, BEARDS) if facts.subject == "man" else "none",
        pose="waving" if draw.random() < 0.25 else "standing",
        expression=pick(draw, EXPRESSIONS),
    )
