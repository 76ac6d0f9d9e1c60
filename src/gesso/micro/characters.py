"""Characters of the painted world: people who keep their looks from picture to picture."""

from __future__ import annotations

import dataclasses

import numpy as np

from gesso.core.random import generator
from gesso.micro import world
from gesso.micro.world import Facts, Scene


def scenes(seed: int, count: int, *, each: int) -> list[tuple[str, Scene]]:
    """`each` pictures of every one of `count` people, with a name for each person; Aldar is not among them."""
    found = []
    for i in range(count):
        draw = generator(seed, "character", i)
        looks, skin = person(draw), int(draw.integers(3))
        found += [(f"character {i}", picture(looks, skin, draw)) for _ in range(each)]
    return found


def person(draw: np.random.Generator) -> Facts:
    """The looks of somebody who could not be taken for Aldar."""
    while True:
        facts = world.random_facts(draw)
        if facts.is_person and not facts.resembles_aldar:
            return dataclasses.replace(facts, style="flat")


def picture(looks: Facts, skin: int, draw: np.random.Generator) -> Scene:
    """The same person elsewhere, in another pose and mood."""
    facts = dataclasses.replace(
        looks,
        place=world.random_place(draw, looks),
        pose=world.pick(draw, world.POSES),
        expression=world.pick(draw, world.EXPRESSIONS),
    )
    return Scene(facts, dataclasses.replace(world.jitter(draw), skin=skin))
