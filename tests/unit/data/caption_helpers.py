"""Captions drawn for a visit, and what hypothesis makes them of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st

from gesso.config.run import Captions
from gesso.core.random import generator
from gesso.data.captions import render

VISITS = 400


def drawing(visit: int, seed: int = 0) -> Callable[[str], np.random.Generator]:
    return lambda domain: generator(seed, domain, visit)


def draw(text: str, visit: int = 0, *, trigger: str | None = None, **options: object) -> str:
    return render(text, Captions.model_validate(options), trigger=trigger, draws=drawing(visit))


def still(text: str, *, trigger: str | None = None, **options: object) -> str:
    return render(text, Captions.model_validate(options), trigger=trigger, draws=None)


def all_drawn(text: str, visits: int = VISITS, *, trigger: str | None = None, **options: object) -> Counter[str]:
    return Counter(draw(text, visit, trigger=trigger, **options) for visit in range(visits))


WORD = st.text("abcdefg", min_size=1, max_size=4)
TAGS = st.lists(WORD, min_size=0, max_size=8)
OPTIONS = st.builds(
    Captions,
    prefix=st.sampled_from(["", "photo, "]),
    suffix=st.sampled_from(["", ", 4k"]),
    lines=st.sampled_from(["join", "first", "choose"]),
    wildcards=st.booleans(),
    shuffle=st.booleans(),
    keep=st.integers(0, 3),
    keep_separator=st.sampled_from([None, "|||"]),
    tag_dropout=st.sampled_from([0.0, 0.5, 0.9]),
    dropout=st.sampled_from([0.0, 0.3]),
)
TEXTS = st.one_of(
    TAGS.map(", ".join),
    st.sampled_from(
        [
            "",
            "a dog, {red|blue|{dark|light} green} hat, grass",
            "one, two\nthree\n\n four, five",
            "sks, dog ||| a, b, c",
            "dog ||| a, sks, c ||| best, 4k",
            "{sks|dog}, {a}, {1::b|0::c}",
            "same\nsame",
        ]
    ),
)
