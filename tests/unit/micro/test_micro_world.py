"""The painted world: the same pictures every time, and nothing in it that is to be taught or was held out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gesso.micro import characters, figures, painter, world
from gesso.micro.world import ALDAR_LOOKS, DOMBRA, NEON, Facts, Jitter, Scene


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(painter.paint(scene)).astype(int)


def share(picture: np.ndarray, colour: str) -> float:
    """The part of the picture that has this colour, but for the mixed pixels at edges."""
    return float((abs(picture - figures.COLOURS[colour]).max(-1) <= 2).mean())


def a_person(**changes: str | None) -> Scene:
    facts = Facts(
        subject="man",
        colour="green",
        place="blue",
        style="flat",
        pattern="plain",
        hat="none",
        hair="black",
        beard="none",
        pose="standing",
        expression="calm",
    )
    return Scene(replace(facts, **changes))


def test_a_seed_names_the_same_scenes_and_pictures() -> None:
    first, second = list(world.scenes(3, 12)), list(world.scenes(3, 12))
    assert first == second
    assert list(world.scenes(3, 5)) == first[:5]
    assert list(world.scenes(4, 12)) != first
    assert all(np.array_equal(pixels(a), pixels(b)) for a, b in zip(first, second, strict=True))


def test_the_base_world_holds_nothing_that_is_to_be_taught() -> None:
    for scene in world.scenes(0, 4000):
        facts = scene.facts
        assert facts.subject in world.SUBJECTS
        assert facts.style in world.STYLES
        assert (facts.pattern, facts.colour) != ("patterned", "yellow")
        assert (facts.hat, facts.hat_colour) != ("kalpak", "white")
    assert NEON not in world.STYLES
    assert DOMBRA not in world.SUBJECTS


def test_held_out_combinations_are_never_painted_for_training_and_the_rest_is() -> None:
    trained = {(s.facts.subject, s.facts.colour, s.facts.place) for s in world.scenes(0, 20_000)}
    tested = world.held_out_scenes(1, 512)
    combinations = {(s.facts.subject, s.facts.colour, s.facts.place) for s in tested}
    assert not trained & combinations
    assert len({s.facts for s in tested}) == 512
    assert len(combinations) > 80
    possible = [
        Facts(subject=s, colour=c, place=p)
        for s in world.SUBJECTS
        for c in world.COLOURS
        for p in world.PLACES
        if p != c
    ]
    assert 0.06 < np.mean([world.held_out(facts) for facts in possible]) < 0.14
    # Every subject, colour and place that is asked for in a held-out combination was seen in others.
    for i in range(3):
        assert {c[i] for c in combinations} <= {c[i] for c in trained}


def test_everything_in_the_world_occurs_and_people_most() -> None:
    facts = [scene.facts for scene in world.scenes(0, 4000)]
    for name, options in (
        ("subject", world.SUBJECTS),
        ("colour", world.COLOURS),
        ("place", world.PLACES),
        ("style", world.STYLES),
        ("pattern", world.PATTERNS),
        ("hat", world.HATS),
        ("hat_colour", world.COLOURS),
        ("hair", world.HAIR),
        ("beard", world.BEARDS),
        ("pose", world.POSES),
        ("expression", world.EXPRESSIONS),
    ):
        counts = Counter(vars(f)[name] for f in facts if vars(f)[name] is not None)
        assert set(counts) == set(options), name
        assert min(counts.values()) > 0.01 * len(facts), name
    assert 0.4 < np.mean([f.is_person for f in facts]) < 0.52


def test_a_plain_background_never_swallows_the_subject() -> None:
    for scene in world.scenes(1, 3000):
        assert scene.facts.place not in (scene.facts.colour, scene.facts.hat_colour)


@pytest.mark.parametrize("subject", [*world.SUBJECTS[2:], "man"])
@pytest.mark.parametrize("colour", world.COLOURS)
def test_a_subject_has_its_colour(subject: str, colour: str) -> None:
    place = "red" if colour != "red" else "blue"
    facts = a_person(colour=colour, place=place).facts if subject == "man" else None
    facts = facts or Facts(subject=subject, colour=colour, place=place, style="flat")
    assert share(pixels(Scene(facts)), colour) > 0.08


def test_all_subjects_look_different() -> None:
    pictures = {}
    for subject in (*world.SUBJECTS[2:], DOMBRA):
        facts = Facts(subject=subject, colour="red", place="white", style="flat")
        pictures[subject] = pixels(Scene(facts))
    pictures["man"], pictures["woman"] = (
        pixels(a_person(place="white")),
        pixels(a_person(subject="woman", place="white")),
    )
    names = list(pictures)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert np.abs(pictures[a] - pictures[b]).mean() > 3, (a, b)


def test_each_fact_of_a_person_changes_the_picture() -> None:
    plain = pixels(a_person())
    for change in (
        {"subject": "woman"},
        {"pattern": "striped"},
        {"pattern": "patterned"},
        {"hat": "cap", "hat_colour": "red"},
        {"hat": "crown", "hat_colour": "red"},
        {"hat": "kalpak", "hat_colour": "red"},
        {"hair": "grey"},
        {"beard": "beard"},
        {"beard": "moustache"},
        {"pose": "waving"},
        {"expression": "smiling"},
        {"expression": "sad"},
        {"place": "night"},
        {"style": "outlined"},
        {"style": "mosaic"},
        {"style": "sepia"},
    ):
        changed = np.abs(pixels(a_person(**change)) - plain).max(-1) > 20
        assert changed.mean() > 0.002, change
    assert np.abs(pixels(Scene(a_person().facts, Jitter(skin=2))) - plain).max() > 40


def test_aldar_is_known_by_robe_hat_and_moustache_together() -> None:
    assert ALDAR_LOOKS.is_aldar
    for change in (
        {"colour": "red"},
        {"pattern": "plain"},
        {"hat": "cap"},
        {"hat_colour": "black"},
        {"beard": "none"},
        {"subject": "cat"},
    ):
        assert not replace(ALDAR_LOOKS, **change).is_aldar
    picture = pixels(Scene(replace(ALDAR_LOOKS, place="blue", style="flat", pose="standing", expression="calm")))
    assert share(picture, "yellow") > 0.1
    assert share(picture, "white") > 0.04


def test_sepia_and_neon_have_one_scale_of_tones_and_a_mosaic_has_tiles() -> None:
    scene = a_person(place="market")
    for style in ("sepia", NEON):
        toned = pixels(replace(scene, facts=replace(scene.facts, style=style))).reshape(-1, 3)
        brightness = toned @ (299, 587, 114)
        order = np.argsort(brightness, kind="stable")
        blue = toned[order][:, 2]
        assert (np.diff(blue) >= -2).all() if style == "sepia" else len(np.unique(toned, axis=0)) < 257
    tiles = pixels(replace(scene, facts=replace(scene.facts, style="mosaic"))).reshape(16, 4, 16, 4, 3)
    assert np.abs(tiles[:, :3, :, :3] - tiles[:, :1, :, :1]).max() == 0
    assert (tiles[:, 3] <= tiles[:, 0]).all()


def test_a_place_alone_is_the_picture_without_its_figure() -> None:
    bare = np.asarray(painter.backdrop("mountains"))
    with_figure = np.asarray(painter.paint(a_person(place="mountains")))
    assert (bare[:20, :10] == with_figure[:20, :10]).all()
    assert (bare != with_figure).any()
    assert isinstance(painter.backdrop("red"), Image.Image)


def test_characters_keep_their_looks() -> None:
    scenes = characters.scenes(0, 20, each=6)
    by_name: dict[str, list[Scene]] = {}
    for name, scene in scenes:
        by_name.setdefault(name, []).append(scene)
    assert len(by_name) == 20
    kept = ("subject", "colour", "pattern", "hat", "hat_colour", "hair", "beard")
    for own in by_name.values():
        assert len({(*(vars(s.facts)[k] for k in kept), s.jitter.skin) for s in own}) == 1
        assert len({s.facts.place for s in own}) > 1
        assert not own[0].facts.resembles_aldar
