"""From what a caption file says to what is trained on: prefixes, trigger words and wildcards."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import pytest
from caption_helpers import OPTIONS, TEXTS, VISITS, all_drawn, draw, drawing, still
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.config.run import Captions
from gesso.data.captions import contains, parse_weights, plain, problems, render, tags, varies
from gesso.errors import UserError

# Nothing is touched that no option names


@pytest.mark.parametrize(
    "text",
    ["a  dog ,on a hill", "a {b|c} ||| d", "(a:1.2), [b], \\(c\\)", "x,y,,z,", "ein Bär, 熊, 🐻", "trailing, "],
)
def test_without_options_a_caption_is_what_was_written(text: str) -> None:
    assert still(text) == draw(text) == text.strip()


def test_lines_are_joined_unless_told_otherwise() -> None:
    text = "  one, two \n\n three\r\n\tfour\n"
    assert still(text) == draw(text) == "one, two three four"
    assert still(text, lines="first") == draw(text, lines="first") == "one, two"
    assert still(text, lines="choose") == "one, two"
    drawn = all_drawn(text, lines="choose")
    assert set(drawn) == {"one, two", "three", "four"}
    assert all(abs(count - VISITS / 3) < 45 for count in drawn.values()), drawn


def test_prefix_and_suffix_stand_as_they_are() -> None:
    assert still("a dog", prefix="photo of ", suffix=" (4k)") == "photo of a dog (4k)"
    assert still("b, a", prefix="x, ", suffix=", y", shuffle=True) == "x, b, a, y"
    assert {d[:3] + d[-3:] for d in all_drawn("b, a", 50, prefix="x, ", suffix=", y", shuffle=True)} == {"x, , y"}


@pytest.mark.parametrize("text", ["", "  \n \n"])
def test_an_empty_caption_stays_empty(text: str) -> None:
    assert still(text, trigger="sks", prefix="photo of ", shuffle=True) == ""
    assert draw(text, trigger="sks", prefix="photo of ", lines="choose") == ""


# Trigger word


@pytest.mark.parametrize(
    ("text", "trigger", "wanted"),
    [
        ("a dog", "sks", "sks, a dog"),
        ("a SKS dog", "sks", "a SKS dog"),
        ("sksy dog", "sks", "sks, sksy dog"),
        ("un_sks dog", "sks", "sks, un_sks dog"),
        ("photo of ohwx  woman", "ohwx woman", "photo of ohwx  woman"),
        ("ohwxwoman", "ohwx woman", "ohwx woman, ohwxwoman"),
        ("a <sks> dog", "<sks>", "a <sks> dog"),
        ("my_ word", "my_ word", "my_ word"),
        ("my_word", "my_ word", "my_ word, my_word"),
        ("c++ code", "c++", "c++ code"),
    ],
)
def test_the_trigger_comes_in_front_where_it_is_missing(text: str, trigger: str, wanted: str) -> None:
    assert still(text, trigger=trigger) == draw(text, trigger=trigger) == wanted


def test_a_trigger_in_prefix_or_suffix_is_there_already() -> None:
    assert still("a dog", trigger="sks", prefix="photo of sks, ") == "photo of sks, a dog"
    assert still("a dog", trigger="sks", suffix=" by sks") == "a dog by sks"


def test_the_trigger_stands_between_prefix_and_caption() -> None:
    assert still("a dog", trigger="sks", prefix="photo of ") == "photo of sks, a dog"
    assert still("a;b", trigger="sks", separator=";") == "sks;a;b"


@settings(max_examples=150)
@given(TEXTS, OPTIONS, st.sampled_from(["sks", "a, b", "dog", "ab cd"]), st.integers(0, 50))
def test_no_caption_loses_its_trigger(text: str, options: Captions, trigger: str, visit: int) -> None:
    options = options.model_copy(update={"dropout": 0.0})
    found = render(text, options, trigger=trigger, draws=drawing(visit))
    assert contains(found, trigger) is bool(text.strip())
    assert contains(render(text, options, trigger=trigger, draws=None), trigger) is bool(text.strip())


def test_a_tag_that_holds_the_trigger_is_not_dropped_and_not_doubled() -> None:
    for text in ("dog, photo of sks, grass", "dog ||| photo of sks, grass"):
        for drawn in all_drawn(text, 60, trigger="sks", shuffle=True, tag_dropout=0.9, keep_separator="|||"):
            assert tags(drawn, ",").count("photo of sks") == 1
            assert "sks" not in tags(drawn, ",")


def test_a_trigger_of_several_tags_stays_in_one_piece() -> None:
    for written in ("big,dog, a, b", "a, big , dog, b"):
        drawn = all_drawn(written, 60, trigger="big, dog", shuffle=True, tag_dropout=0.3)
        assert len(drawn) > 3
        assert all("big, dog" in text and text.count("dog") == 1 for text in drawn)


# Wildcards


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("a {red|blue} hat", {"a red hat", "a blue hat"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|{b|{c|d}} x}", {"a", "b x", "c x", "d x"}),
        ("{very |}big", {"very big", "big"}),
        ("{a}", {"a"}),
        (r"\{a\|b\} | {c\||d\}}", {"{a|b} | c|", "{a|b} | d}"}),
        ("{2::a|0::b| 3 :: c}", {"a", "c"}),
        ("{0::a|b}", {"b"}),
        ("{at 10:30|std::x}", {"at 10:30", "std::x"}),
        (r"{a \(b\)|a \(b\)}", {r"a \(b\)"}),
    ],
)
def test_wildcards_give_each_of_their_options(text: str, options: set[str]) -> None:
    drawn = all_drawn(text, 150, wildcards=True)
    assert set(drawn) == options
    assert problems(text, Captions(wildcards=True)) == []
    assert still(text, wildcards=True) in options
    assert varies(text, Captions(wildcards=True), trigger=None) is (len(options) > 1)


def test_without_draws_the_first_option_is_taken() -> None:
    assert still("{a|b} {{c|d}|e} {0::f|g|h}", wildcards=True) == "a c g"


def test_options_come_at_their_weights() -> None:
    drawn = all_drawn("{3::a|b|0.5::{c|d}}", 2000, wildcards=True)
    total = 4.5
    for text, share in {"a": 3 / total, "b": 1 / total, "c": 0.25 / total, "d": 0.25 / total}.items():
        assert drawn[text] / 2000 == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a {b|c", "character 3 is never closed"),
        ("{a|{b|c}", "character 1 is never closed"),
        ("a}, b", "character 2 has no opening one"),
        ("{1,5::a|b}", "'1,5' in {1,5::a|b} is no weight"),
        ("{-1::a|b}", "'-1' in {-1::a|b} is no weight"),
        ("{50%::a|b}", "'50%' in"),
        ("{0::a|0::b}", "weight 0"),
        ("{}", "no words"),
        ("{|}", "no words"),
        ("{" * 40 + "a" + "}" * 40, "nested more than 32 deep"),
    ],
)
def test_a_malformed_wildcard_is_told_and_never_trained(text: str, said: str) -> None:
    on, off = Captions(wildcards=True), Captions()
    assert [said in problem for problem in problems(text, on)] == [True]
    for draws in (None, drawing(0)):
        with pytest.raises(UserError, match="caption") as error:
            render(text, on, trigger=None, draws=draws)
        assert said in error.value.what
        assert error.value.fix
    assert problems(text, off) == []
    assert still(text) == text


def test_problems_are_those_of_the_lines_that_count() -> None:
    text = "fine\n{a\nb}"
    assert problems(text, Captions(wildcards=True, lines="join")) == []
    assert problems(text, Captions(wildcards=True, lines="first")) == []
    assert len(problems(text, Captions(wildcards=True, lines="choose"))) == 2


@settings(max_examples=200)
@given(st.text(alphabet="ab{}|\\:2. ", max_size=20), st.integers(0, 5))
def test_what_has_no_problem_renders_and_what_has_one_does_not(text: str, visit: int) -> None:
    options = Captions(wildcards=True)
    if problems(text, options):
        with pytest.raises(UserError):
            render(text, options, trigger=None, draws=None)
        return
    for found in (draw(text, visit, wildcards=True), still(text, wildcards=True)):
        unescaped = [c for c in text if c in "ab"]
        assert Counter(c for c in found if c in "ab") <= Counter(unescaped), "words come from the text alone"


# The module


def test_weight_notation_is_read_here_as_by_the_model() -> None:
    assert plain("a (b:1.2), [c]") == "a b, c"
    assert parse_weights("a (b:1.2)") == [("a ", 1.0), ("b", 1.2)]


def test_captions_answer_without_torch() -> None:
    heavy = ("torch", "diffusers", "transformers")
    code = f"import sys, gesso.data.captions; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_mark_in_the_caption_stands_for_the_trigger_word() -> None:
    text = "a photo of [trigger] in the rain"
    assert render(text, Captions(), trigger="sks", draws=None) == "a photo of sks in the rain"
    assert render(text, Captions(), trigger=None, draws=None) == text
    assert not varies(text, Captions(), trigger="sks")
