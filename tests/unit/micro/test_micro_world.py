"""The painted world: the same pictures every time, true captions, and no hero in it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gesso.micro import world
from gesso.micro.world import Person, Placement, Shape


def pixels(scene: world.Scene, *, side: int = world.SIDE) -> np.ndarray:
    return np.asarray(world.paint(scene, side=side)).astype(int)


def share(picture: np.ndarray, colour: str) -> float:
    """The part of the picture that has exactly this colour."""
    return float((picture == world.COLOURS[colour]).all(-1).mean())


def a_person(**changes: object) -> Person:
    person = Person("man", "plain", "green", "none", "red", False, "blue")
    return replace(person, **changes)  # type: ignore[arg-type]


def test_a_seed_names_the_same_scenes_and_pictures() -> None:
    first, second = list(world.scenes(3, 12)), list(world.scenes(3, 12))
    assert first == second
    assert list(world.scenes(3, 5)) == first[:5]
    assert list(world.scenes(4, 12)) != first
    assert all(np.array_equal(pixels(a), pixels(b)) for (a, _), (b, _) in zip(first, second, strict=True))


def test_the_base_world_never_shows_or_names_the_hero() -> None:
    for scene, caption in world.scenes(0, 3000):
        assert not (isinstance(scene, Person) and scene.is_hero)
        assert "sks" not in caption
        assert "aldar" not in caption
        assert "white tall hat" not in caption
        assert "patterned yellow robe" not in caption


def test_the_hero_is_the_hero_on_any_background() -> None:
    for i in range(12):
        man, caption = world.hero(0, i)
        assert man.is_hero
        assert caption.startswith(f"a photo of {world.HERO}")
        assert man.moustache
        assert share(pixels(man), "yellow") > 0.07
        assert share(pixels(man), "white") > 0.03
    assert world.hero(0, 4) == world.hero(0, 4)
    assert len({world.hero(0, i)[0].background for i in range(9)}) == 9
    assert world.hero(0, 0, background="snow")[1] == "a photo of sks aldar in the snow"


def test_everything_in_the_world_occurs() -> None:
    scenes = [scene for scene, _ in world.scenes(0, 1500)]
    people = [scene for scene in scenes if isinstance(scene, Person)]
    shapes = [scene for scene in scenes if isinstance(scene, Shape)]
    assert len(people) == 1000
    assert {p.hat for p in people} == set(world.HATS)
    assert {p.robe for p in people} == set(world.ROBES)
    assert {p.kind for p in people} == set(world.KINDS)
    assert {p.robe_colour for p in people} == set(world.COLOURS)
    assert {p.background for p in people} == {*world.COLOURS, *world.PLACES}
    assert {s.shape for s in shapes} == set(world.SHAPES)
    assert not any(p.robe_colour == p.background for p in people)
    assert not any(s.colour == s.background for s in shapes)


def test_captions_say_what_is_painted() -> None:
    assert Shape("star", "red", "blue").caption() == "a red star on a blue background"
    person = a_person(robe="striped", hat="tall hat", hat_colour="black", moustache=True, background="night")
    assert person.caption() == "a man in a striped green robe and a black tall hat with a moustache at night"
    assert a_person().caption() == "a man in a green robe on a blue background"
    for scene, caption in world.scenes(1, 300):
        body = caption.removeprefix("a photo of ").removeprefix("a painting of ")
        wanted = set(scene.caption().split())
        assert set(body.split()) <= wanted, (caption, scene)


@pytest.mark.parametrize("colour", world.COLOURS)
def test_colours_in_the_caption_are_in_the_picture(colour: str) -> None:
    other = "red" if colour != "red" else "green"
    shape = pixels(Shape("circle", colour, other))
    assert 0.1 < share(shape, colour) < 0.4
    assert share(shape, other) > 0.5
    robe = pixels(a_person(robe_colour=colour, background=other))
    assert share(robe, colour) > 0.15


@pytest.mark.parametrize(
    "changes",
    [{"hat": name} for name in world.HATS[1:]]
    + [{"robe": name} for name in world.ROBES[1:]]
    + [{"moustache": True}, {"kind": "woman"}, {"skin": 2}, {"background": "night"}]
    + [{"placement": Placement(3, 0, 1)}],
)
def test_every_attribute_shows(changes: dict[str, object]) -> None:
    difference = np.abs(pixels(a_person()) - pixels(a_person(**changes))).max(-1)
    assert (difference > 40).mean() > 0.005


def test_a_larger_picture_shows_the_same_scene() -> None:
    scene = world.hero(0, 0)[0]
    small, large = pixels(scene), pixels(scene, side=96)
    assert large.shape == (96, 96, 3)
    shrunk = large.reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(shrunk - small).mean() < 3
