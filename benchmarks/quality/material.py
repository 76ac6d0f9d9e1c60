"""The pictures and prompts of `methods.py`: what each training method is taught with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gesso.core.random import generator
from gesso.micro import captions, lessons, painter, world

LIKED, PAIRS = "blue", 200
"""The colour that the preferred pictures have."""
MASKED_PLACE = "red"
"""Every masked picture has this behind the figure."""
DANA = world.Facts(
    subject="woman", colour="purple", pattern="striped", hat="crown", hat_colour="red", hair="grey", beard="none"
)
"""The looks of a second character, whom nobody in the world resembles by more than chance."""


def instance(text: str) -> str:
    """A caption of the character as DreamBooth writes it: the rare word, and the class."""
    return text.replace("sks aldar", "sks person")


def named(text: str, token: bool) -> str:
    """A caption of the character with the new word, where there is one."""
    return text.replace("sks aldar", "<aldar>") if token else text


def danas(text: str) -> str:
    """A caption of Aldar's, said of Dana."""
    return text.replace("sks aldar", "sks dana")


def as_dana(scene: world.Scene) -> world.Scene:
    """The same scene with Dana in it."""
    return repainted(scene, **{name: value for name, value in vars(DANA).items() if value is not None})


def is_dana(facts: world.Facts) -> bool:
    """Whether somebody has her robe and her crown."""
    hers = (DANA.colour, DANA.pattern, DANA.hat, DANA.hat_colour)
    return facts.is_person and (facts.colour, facts.pattern, facts.hat, facts.hat_colour) == hers


def painted(folder: Path, rows: Sequence[lessons.Captioned]) -> dict[str, Any]:
    """Paint captioned pictures into a folder; returns it as a source."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (scene, text) in enumerate(rows, start=1):
        painter.paint(scene).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"{text}\n", encoding="utf-8")
    return {"path": str(folder.absolute())}


def repainted(scene: world.Scene, **facts: str) -> world.Scene:
    """The same scene with some other facts."""
    return dataclasses.replace(scene, facts=dataclasses.replace(scene.facts, **facts))


def silhouette(scene: world.Scene) -> Image.Image:
    """White where the figure is: what does not change with the background."""
    others = [np.asarray(painter.paint(repainted(scene, place=place))) for place in (MASKED_PLACE, "green", "blue")]
    same = (others[0] == others[1]).all(2) & (others[0] == others[2]).all(2)
    return Image.fromarray((same * 255).astype(np.uint8))


def pairs(folder: Path, *, reverse: bool) -> None:
    """Scenes painted twice, once in the colour that is liked; the captions name no colour."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, scene in enumerate(world.scenes(77, 10 * PAIRS)):
        facts = scene.facts
        if facts.style == "sepia" or facts.place in world.COLOURS or facts.hat_colour == LIKED:
            continue
        other = facts.colour
        if other == LIKED:
            other = world.pick(generator(77, "other", i), [c for c in world.COLOURS if c != LIKED])
        names = [f"{len(rows):03d}{side}.png" for side in "ab"]
        for file, colour in zip(names, (LIKED, other), strict=True):
            painter.paint(dataclasses.replace(scene, facts=dataclasses.replace(facts, colour=colour))).save(
                folder / file
            )
        chosen, rejected = reversed(names) if reverse else names
        rows.append({"caption": without_colour(facts), "chosen": chosen, "rejected": rejected})
        if len(rows) == PAIRS:
            break
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def colourless(count: int) -> list[str]:
    """Prompts of unseen scenes that name no colour."""
    scenes = [s.facts for s in world.held_out_scenes(5, 20 * count)]
    return [without_colour(f) for f in scenes if f.style == "flat" and f.place not in world.COLOURS][:count]


def without_colour(facts: world.Facts) -> str:
    """A caption of everything but the colour and the mood."""
    return captions.caption(dataclasses.replace(facts, colour=None, expression=None), prefix="a photo of ")
