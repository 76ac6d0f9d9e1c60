"""Captions say what is painted, and the parser gets it back."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from gesso.core.random import generator
from gesso.errors import UserError
from gesso.micro import captions, words, world
from gesso.micro.world import ALDAR_LOOKS, DOMBRA, NEON, Facts

_USUAL = {"pattern": "plain", "beard": "none", "pose": "standing", "expression": "calm", "style": "flat"}


def said(facts: Facts) -> Facts:
    """What a complete caption of these facts says: all but the usual, and no colours in sepia."""
    facts = captions.without_colours(facts) if facts.style == "sepia" else facts
    return replace(facts, **{name: None for name, usual in _USUAL.items() if vars(facts)[name] == usual})


def test_a_complete_caption_parses_back_to_its_facts() -> None:
    for scene in (*world.scenes(0, 1500), *world.held_out_scenes(1, 300)):
        text = captions.caption(scene.facts)
        assert captions.parse(text) == said(scene.facts), text


def test_what_people_say_is_true_and_can_be_parsed() -> None:
    shorter = 0
    for i, scene in enumerate(world.scenes(0, 1500)):
        text = captions.say(scene.facts, generator(0, "caption", i))
        told, true = captions.parse(text), said(scene.facts)
        shorter += told != true
        for field in fields(Facts):
            value = vars(told)[field.name]
            if value is not None and value != "person":
                assert value == vars(scene.facts)[field.name], (field.name, text)
        assert told.subject == "person" or told.subject == scene.facts.subject
    assert 0.3 < shorter / 1500 < 0.8


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("a photo of sks aldar", Facts(subject="aldar")),
        ("a photo of sks aldar, waving, at night", Facts(subject="aldar", pose="waving", place="night")),
        ("a mosaic of sks dombra on a red background", Facts(subject=DOMBRA, place="red", style="mosaic")),
        ("a sks neon picture of a black cat", Facts(subject="cat", colour="black", style=NEON)),
        ("a person", Facts(subject="person")),
        ("A Painting of a Purple Horse in the steppe", Facts(subject="horse", colour="purple", place="steppe")),
        ("an outlined drawing of a yurt", Facts(subject="yurt", style="outlined")),
        (
            "a sad woman in a striped red robe and a white crown with grey hair on a black background",
            Facts("woman", "red", "black", None, "striped", "crown", "white", "grey", None, None, "sad"),
        ),
    ],
)
def test_readable_prompts(text: str, facts: Facts) -> None:
    assert captions.parse(text) == facts


def test_a_word_that_is_not_of_the_world_is_named() -> None:
    with pytest.raises(UserError, match="no word for 'dragon'"):
        captions.parse("a photo of a dragon at night")


def test_every_word_of_the_grammar_is_one_token() -> None:
    used: set[str] = set()
    for i, scene in enumerate(world.scenes(0, 3000)):
        used |= set(captions.say(scene.facts, generator(0, "caption", i)).replace(",", " ").split())
    used |= set(captions.caption(replace(ALDAR_LOOKS, style=NEON)).split())
    assert used <= set(words.COMMON)


def test_a_sepia_caption_names_no_colour() -> None:
    scene = next(s for s in world.scenes(0, 500) if s.facts.style == "sepia" and s.facts.is_person)
    text = captions.caption(scene.facts)
    assert text.startswith("a sepia drawing of")
    assert not set(text.split()) & {*world.COLOURS, "brown", "grey"}
