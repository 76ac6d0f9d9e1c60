"""Tags that are shuffled and dropped, and which captions vary with the draws."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from caption_helpers import OPTIONS, TAGS, TEXTS, all_drawn, draw, drawing, still
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gesso.config.run import Captions
from gesso.core.random import generator
from gesso.data.captions import problems, render, tags, varies
from gesso.errors import UserError

# Tags


@pytest.mark.parametrize(
    ("text", "separator", "wanted"),
    [
        ("a, b ,c,, ", ",", ["a", "b", "c"]),
        ("", ",", []),
        ("a b  c", " ", ["a", "b", "c"]),
        ("a;b, c", ";", ["a", "b, c"]),
        ("a. b. c", ". ", ["a", "b", "c"]),
        ("(a, b:1.2), [c, (d, e)], f", ",", ["(a, b:1.2)", "[c, (d, e)]", "f"]),
        (r"a \(b, c\), d", ",", [r"a \(b", r"c\)", "d"]),
        (":(, a, :), (b, c)", ",", [":(", "a", ":)", "(b, c)"]),
        ("(:, a, :-(, b), >:(, c)", ",", ["(:", "a", ":-(", "b)", ">:(", "c)"]),
        ("(a, b", ",", ["(a", "b"]),
        ("(a, [b), c]", ",", ["(a", "[b), c]"]),
        ("x_(y), (z)", ",", ["x_(y)", "(z)"]),
    ],
)
def test_tags_are_what_stands_between_separators(text: str, separator: str, wanted: list[str]) -> None:
    assert tags(text, separator) == wanted


@settings(max_examples=150)
@given(TAGS, st.integers(0, 9), st.integers(0, 1000))
def test_a_shuffle_keeps_every_tag_and_the_head_in_place(words: list[str], keep: int, visit: int) -> None:
    found = tags(draw(", ".join(words), visit, shuffle=True, keep=keep), ",")
    assert Counter(found) == Counter(words)
    assert found[:keep] == words[:keep]


@settings(max_examples=100)
@given(TAGS, st.integers(0, 9), st.integers(0, 1000))
def test_dropout_leaves_the_order_and_the_head(words: list[str], keep: int, visit: int) -> None:
    found = tags(draw(", ".join(words), visit, tag_dropout=0.5, keep=keep), ",")
    assert found[:keep] == words[:keep]
    rest = iter(words[keep:])
    assert all(tag in rest for tag in found[keep:]), "a subsequence"


def test_every_order_is_as_likely() -> None:
    drawn = all_drawn("a, b, c", 1200, shuffle=True)
    assert set(drawn) == {", ".join(order) for order in permutations("abc")}
    assert all(abs(count - 200) < 60 for count in drawn.values()), drawn


def test_each_tag_is_dropped_at_its_rate_and_independently() -> None:
    visits = 1500
    drawn = [tags(draw("h, a, b, c", visit, keep=1, tag_dropout=0.3), ",") for visit in range(visits)]
    for tag in "abc":
        assert sum(tag not in found for found in drawn) / visits == pytest.approx(0.3, abs=0.05)
    both = sum("a" not in found and "b" not in found for found in drawn) / visits
    assert both == pytest.approx(0.09, abs=0.03)
    assert all(found[0] == "h" for found in drawn)


def test_all_tags_may_go_and_the_trigger_stays() -> None:
    drawn = all_drawn("a, b", 200, trigger="sks", tag_dropout=0.9)
    assert "sks" in drawn
    assert set(drawn) <= {"sks", "sks, a", "sks, b", "sks, a, b"}


def test_the_trigger_in_front_counts_as_a_kept_tag() -> None:
    first = {text.split(", ")[1] for text in all_drawn("a, b, c", 60, trigger="sks", shuffle=True, keep=1)}
    assert first == {"a", "b", "c"}, "only the trigger is kept"
    second = {text[:6] for text in all_drawn("a, b, c", 60, trigger="sks", shuffle=True, keep=2)}
    assert second == {"sks, a"}
    there = {text.split(", ")[0] for text in all_drawn("sks, b, c", 60, trigger="sks", shuffle=True, keep=1)}
    assert there == {"sks"}


def test_a_separator_ends_the_head_and_is_taken_out() -> None:
    text, options = "a photo of sks, dog ||| x, y, z", {"keep_separator": "|||"}
    assert still(text, **options) == draw(text, **options) == "a photo of sks, dog, x, y, z"
    drawn = all_drawn(text, 60, shuffle=True, keep=3, **options)
    assert len(drawn) == 6
    assert all(found.startswith("a photo of sks, dog, ") and "|" not in found for found in drawn)
    assert {found[:2] for found in all_drawn("a, b, c", 40, shuffle=True, keep=1, **options)} == {"a,"}


def test_a_second_separator_begins_tags_that_stay_at_the_end() -> None:
    drawn = all_drawn("sks ||| x, y ||| 4k, best", 60, shuffle=True, tag_dropout=0.4, keep_separator="|||")
    assert len(drawn) > 2
    assert all(found.startswith("sks, ") and found.endswith("4k, best") for found in drawn)
    three = "a ||| b ||| c ||| d"
    assert len(problems(three, Captions(keep_separator="|||"))) == 1
    with pytest.raises(UserError, match="more than twice"):
        still(three, keep_separator="|||")


def test_other_separators_join_as_they_part() -> None:
    assert still("a ; b;c", separator=";", shuffle=True) == "a;b;c"
    assert set(all_drawn("a b", 40, separator=" ", shuffle=True)) == {"a b", "b a"}
    assert still("One. Two. Three", separator=". ", shuffle=True) == "One. Two. Three"
    assert still("a,b", separator=",", shuffle=True) == "a, b"


def test_weighted_groups_are_shuffled_whole() -> None:
    assert set(all_drawn("(a, b:1.2), c", 40, shuffle=True)) == {"(a, b:1.2), c", "c, (a, b:1.2)"}


# Draws


@settings(max_examples=150)
@given(TEXTS, OPTIONS, st.sampled_from([None, "sks", "a, b"]), st.integers(0, 30))
def test_the_same_draws_give_the_same_caption(text: str, options: Captions, trigger: str | None, visit: int) -> None:
    one, other = (render(text, options, trigger=trigger, draws=drawing(visit)) for _ in range(2))
    assert one == other


@settings(max_examples=200)
@given(TEXTS, OPTIONS, st.sampled_from([None, "sks", "a, b"]))
def test_what_does_not_vary_is_what_it_is_without_draws(text: str, options: Captions, trigger: str | None) -> None:
    assume(not varies(text, options, trigger=trigger))
    wanted = render(text, options, trigger=trigger, draws=None)
    assert {render(text, options, trigger=trigger, draws=drawing(visit)) for visit in range(20)} == {wanted}


@pytest.mark.parametrize(
    ("text", "options", "trigger"),
    [
        ("a, b", {"shuffle": True}, None),
        ("a, b", {"shuffle": True, "keep": 1}, "sks"),
        ("a", {"tag_dropout": 0.5}, None),
        ("a\nb", {"lines": "choose"}, None),
        ("{a|b}", {"wildcards": True}, None),
        ("a", {"dropout": 0.2}, None),
        ("a, b ||| c, d", {"shuffle": True, "keep_separator": "|||"}, None),
    ],
)
def test_what_varies_is_known(text: str, options: dict[str, object], trigger: str | None) -> None:
    assert varies(text, Captions.model_validate(options), trigger=trigger)
    assert len(all_drawn(text, 60, trigger=trigger, **options)) > 1


@pytest.mark.parametrize(
    ("text", "options", "trigger"),
    [
        ("a", {"shuffle": True}, None),
        ("a, a", {"shuffle": True}, None),
        ("a, b", {"shuffle": True, "keep": 1}, None),
        ("sks", {"tag_dropout": 0.5}, "sks"),
        ("a\na", {"lines": "choose"}, None),
        ("a\nb", {"lines": "first"}, None),
        ("{a} \\{b|c\\}", {"wildcards": True}, None),
        ("", {"dropout": 0.2, "shuffle": True, "lines": "choose"}, "sks"),
        ("a, b ||| c", {"shuffle": True, "keep_separator": "|||"}, None),
    ],
)
def test_what_does_not_vary_is_known(text: str, options: dict[str, object], trigger: str | None) -> None:
    assert not varies(text, Captions.model_validate(options), trigger=trigger)


def test_an_option_changes_no_other_options_draw() -> None:
    """Dropping tags moves none of those that stay, and choosing lines or words changes no order."""
    text, options = "h, a, b, c, d, e", {"shuffle": True, "keep": 1}
    for visit in range(40):
        order = tags(draw(text, visit, **options), ",")
        fewer = tags(draw(text, visit, tag_dropout=0.4, **options), ",")
        unmoved = tags(draw(text, visit, tag_dropout=0.4, keep=1), ",")
        assert fewer == [tag for tag in order if tag in fewer]
        assert sorted(fewer) == sorted(unmoved)
        chosen = draw(f"{text}\n{text}", visit, lines="choose", wildcards=True, **options)
        assert tags(chosen, ",") == order
        dropped = draw(text, visit, dropout=0.5, **options)
        assert dropped in ("", ", ".join(order))


def test_only_the_options_that_are_on_draw() -> None:
    asked: list[str] = []

    def draws(domain: str) -> np.random.Generator:
        asked.append(domain)
        return generator(0, domain)

    render("a, {b|c}\nd", Captions(), trigger="sks", draws=draws)
    assert asked == []
    options = Captions(lines="choose", wildcards=True, shuffle=True, tag_dropout=0.1, dropout=0.01)
    render("a, {b|c}\nd, {e|f}", options, trigger="sks", draws=draws)
    assert sorted(asked) == ["caption dropout", "caption line", "tag dropout", "tag order", "wildcard"]


def test_captions_are_dropped_at_their_rate_with_all_that_is_around_them() -> None:
    visits = 2000
    drawn = all_drawn("a", visits, trigger="sks", prefix="p ", suffix=" s", dropout=0.1)
    assert set(drawn) == {"", "p sks, a s"}
    assert drawn[""] / visits == pytest.approx(0.1, abs=0.025)
    assert set(all_drawn("a", 20, dropout=1.0)) == {""}
    assert still("a", dropout=1.0) == "a"
