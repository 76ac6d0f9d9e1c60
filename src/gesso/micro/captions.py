"""The caption grammar of the painted world, both ways: facts -> words, and words -> facts."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from gesso.errors import UserError
from gesso.micro import world
from gesso.micro.world import ALDAR, DOMBRA, NEON, Facts

TRIGGER = "sks"
"""The rare word before the name of something new, as DreamBooth has it."""
NAMES = {ALDAR: f"{TRIGGER} {ALDAR}", DOMBRA: f"{TRIGGER} {DOMBRA}"}
_PREFIX = {
    "outlined": "an outlined drawing of ",
    "sepia": "a sepia drawing of ",
    "mosaic": "a mosaic of ",
    NEON: f"a {TRIGGER} {NEON} picture of ",
}
_PLAIN_PREFIXES = ("", "a photo of ", "a painting of ")
_WHERE = {"steppe": "in the steppe", "market": "at the market", "mountains": "in the mountains", "night": "at night"}


def caption(facts: Facts, *, prefix: str = "") -> str:
    """What the facts say, in words; what is None, or is the usual, is left out. `prefix` is for the flat style only.

    Sepia pictures have no colours, so their captions name none.
    """
    if facts.style == "sepia":
        facts = without_colours(facts)
    words = _subject(facts)
    if facts.place is not None:
        words += f" {where(facts.place)}"
    return _PREFIX.get(facts.style or "flat", prefix) + words


def where(place: str) -> str:
    """A place in words."""
    return _WHERE.get(place) or f"on a {place} background"


def without_colours(facts: Facts) -> Facts:
    """The facts that are left in a picture without colours."""
    place = None if facts.place in world.COLOURS else facts.place
    return dataclasses.replace(facts, colour=None, hat_colour=None, hair=None, place=place)


def say(facts: Facts, draw: np.random.Generator) -> str:
    """A caption as people write them: complete, or with some or nearly all of it left out."""
    prefix = world.pick(draw, _PLAIN_PREFIXES)
    said = facts
    if facts.is_person and draw.random() < 0.3:
        said = dataclasses.replace(said, subject="person")
    detail = draw.random()
    if detail > 0.92:
        said = Facts(subject=said.subject, style=said.style)
    elif detail > 0.84:
        said = Facts(subject=said.subject, style=said.style, place=said.place)
    elif detail > 0.55:
        dropped = [name for name in ("pattern", "hair", "beard", "pose", "expression") if draw.random() < 0.6]
        said = dataclasses.replace(said, **dict.fromkeys(dropped))
        if draw.random() < 0.25:
            said = dataclasses.replace(said, hat=None, hat_colour=None)
        if draw.random() < 0.15:
            said = dataclasses.replace(said, place=None)
    return caption(said, prefix=prefix)


def parse(text: str) -> Facts:
    """The facts that a caption says; raises `UserError` for a word that is not of the grammar."""
    left = " ".join(text.lower().replace(",", " ").split())
    found: dict[str, str] = {}

    def take(regex: str, /, **names: int) -> bool:
        nonlocal left
        match = re.search(rf"(?<!\w){regex}(?!\w)", left)
        if match is None:
            return False
        found.update({name: match[group] for name, group in names.items() if match[group]})
        left = f"{left[: match.start()]} | {left[match.end() :]}"
        return True

    colour = f"({'|'.join(world.COLOURS)})"
    for style, prefix in _PREFIX.items():
        if take(re.escape(prefix.strip())):
            found["style"] = style
    take("a (?:photo|painting) of")
    for place, words in _WHERE.items():
        if take(words):
            found["place"] = place
    take(f"on an? {colour} background", place=1)
    take(f"in an? (?:({'|'.join(world.PATTERNS)}) )?(?:{colour} )?robe", pattern=1, colour=2)
    if take("without a hat"):
        found["hat"] = "none"
    take(f"(?:and |with |in )?an? (?:{colour} )?({'|'.join(world.HATS[1:])})", hat_colour=1, hat=2)
    take(f"(?:and |with )?({'|'.join(world.HAIR)}) hair", hair=1)
    take("(?:and |with )?an? (moustache|beard)", beard=1)
    take("(?:and )?(waving)", pose=1)
    names = "|".join((*NAMES.values(), "person", *world.SUBJECTS, DOMBRA))
    take(f"(?:an? )?(?:(smiling|sad) )?(?:{colour} )?({names})", expression=1, colour=2, subject=3)
    if unknown := [word for word in left.split() if word not in ("|", "a", "an")]:
        raise UserError(
            f"the painted world has no word for '{' '.join(unknown)}'",
            where=text,
            fix="say it as in: a photo of a woman in a striped red robe and a blue cap, waving, at the market",
        )
    if found.get("subject", "").startswith(TRIGGER):
        found["subject"] = found["subject"].removeprefix(TRIGGER).strip()
    return Facts(**found)


def _subject(facts: Facts) -> str:
    if facts.subject in NAMES:
        words = NAMES[facts.subject]
    elif facts.is_person:
        words = _article(_unless(facts.expression, "calm"), facts.subject)
    else:
        return _article(facts.colour, facts.subject)
    if facts.is_person and facts.subject != ALDAR:
        words += _clothes(facts)
    if facts.pose == "waving":
        words += ", waving,"
    return words


def _clothes(facts: Facts) -> str:
    words = ""
    if facts.colour or facts.pattern:
        words += f" in {_article(_unless(facts.pattern, 'plain'), facts.colour, 'robe')}"
    if facts.hat is not None and facts.hat != "none":
        words += f" {'and' if words else 'in'} {_article(facts.hat_colour, facts.hat)}"
    elif facts.hat == "none":
        words += " without a hat"
    features = [f"{facts.hair} hair"] if facts.hair else []
    if facts.beard is not None and facts.beard != "none":
        features.append(f"a {facts.beard}")
    return words + (f" with {' and '.join(features)}" if features else "")


def _unless(value: str | None, usual: str) -> str | None:
    return None if value == usual else value


def _article(*words: str | None) -> str:
    text = " ".join(word for word in words if word)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"
