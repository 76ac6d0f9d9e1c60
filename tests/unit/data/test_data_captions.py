"""From what a caption file says to what is trained on."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gesso.config.run import Captions
from gesso.core.random import generator
from gesso.data.captions import contains, parse_weights, plain, problems, render, tags, varies
from gesso.errors import UserError

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
