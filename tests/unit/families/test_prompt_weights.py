"""Weights of words in prompts: how they are read, and what they do to the embeddings."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from family_helpers import load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gesso.core.seams import Parts
from gesso.families.prompt_weights import emphasise, parse_weights, plain
from gesso.families.sdxl import SDXL

WORDS = ["red", "blue", "circle", "star", "sea"]


@pytest.fixture(scope="module")
def parts(tiny_base: Path) -> Parts:
    return load(SDXL(base=str(tiny_base)), ("text",))


def weighing(base: Path, *, chunks: int = 0) -> SDXL:
    if not chunks:
        return SDXL(base=str(base), prompt_weights=True)
    return SDXL(base=str(base), prompt_weights=True, long_prompts="chunk", max_chunks=chunks)


def encode(family: SDXL, parts: Parts, *captions: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = family.encode_text(parts, captions)
    return found["prompt_embeds"], found["pooled"]


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


# Notation


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", [("", 1.0)]),
        ("a cat", [("a cat", 1.0)]),
        ("(cat)", [("cat", 1.1)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("(cat:1.25)", [("cat", 1.25)]),
        ("( cat : .5 )", [(" cat ", 0.5)]),
        ("(cat:-1)", [("cat", -1.0)]),
        ("(cat:0)", [("cat", 0.0)]),
        ("a ((cat)) b", [("a ", 1.0), ("cat", 1.21), (" b", 1.0)]),
        ("(a (b:1.5) c:1.2)", [("a ", 1.2), ("b", 1.8), (" c", 1.2)]),
        ("((a:2):3)", [("a", 6.0)]),
        ("[(a)] b", [("a b", 1.0)]),
        ("(a:1.3)(b:1.3)", [("ab", 1.3)]),
        (r"miku \(vocaloid\) \[x\] \\", [(r"miku (vocaloid) [x] " + "\\", 1.0)]),
        (r"(miku \(vocaloid\):1.4)", [("miku (vocaloid)", 1.4)]),
        (r"a\b", [(r"a\b", 1.0)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("(a [b", [("(a [b", 1.0)]),
        ("(a [b) c]", [("(a ", 1.0), ("b) c", 1 / 1.1)]),
        ("[a:1.2]", [("a:1.2", 1 / 1.1)]),
        ("a:1.2) b", [("a:1.2) b", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("()", [("", 1.0)]),
    ],
)
def test_the_notation_is_that_of_the_webui(text: str, wanted: list[tuple[str, float]]) -> None:
    found = parse_weights(text)
    assert [part for part, _ in found] == [part for part, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted], abs=1e-9)
    assert plain(text) == "".join(part for part, _ in wanted)


def test_weights_that_cancel_are_exactly_one() -> None:
    assert 1.1**3 * (1 / 1.1) ** 3 != 1
    assert parse_weights("a [[[(((b)))]]] c") == [("a b c", 1.0)]


@settings(max_examples=150)
@given(st.text(alphabet="ab ()[]\\:1.", max_size=24))
def test_any_text_can_be_read(text: str) -> None:
    found = parse_weights(text)
    assert len(found) > 0
    assert all(one[1] != other[1] for one, other in pairwise(found)), "neighbours differ"
    assert "".join(c for c in plain(text) if c in "ab ").replace(" ", "") == "".join(c for c in text if c in "ab")


@given(st.text(max_size=40))
def test_escaped_text_is_what_it_was(text: str) -> None:
    escaped = "".join("\\" + c if c in "()[]\\" else c for c in text)
    assert parse_weights(escaped) == [(text, 1.0)]


# Arithmetic


def test_states_are_multiplied_and_keep_their_mean() -> None:
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    weights = torch.tensor([[1, 2.0, 0, 1, 1], [1, 1, 1, 1, 1]])
    found = emphasise(states, weights)
    assert torch.equal(found[1], states[1]), "a row without weights comes back bit for bit"
    wanted = states[0] * weights[0][:, None]
    wanted = wanted * (states[0].mean() / wanted.mean())
    assert torch.allclose(found[0], wanted, atol=1e-6)
    assert torch.equal(found[0, 2], torch.zeros(3))
    assert float(found[0].mean()) == pytest.approx(float(states[0].mean()), rel=1e-5)


def test_half_precision_comes_back_as_it_was_and_without_needless_rounding() -> None:
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights = torch.tensor([[1, 1.3, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = emphasise(states, weights)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[1], states[1])
    assert torch.equal(found[0], emphasise(states.float(), weights)[0].bfloat16())


def by_hand(parts: Parts, text: str, weights: dict[int, float]) -> Tensor:
    """One text of less than 76 tokens; `weights` by the position of a token after the start mark."""
    hidden = []
    for encoder, tokenizer in zip(parts.text_encoders, parts.tokenizers, strict=True):
        ids = tokenizer([text], padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            states = encoder(ids, output_hidden_states=True).hidden_states[-2]
        factors = torch.ones(77)
        for position, weight in weights.items():
            factors[1 + position] = weight
        scaled = states * factors[None, :, None]
        hidden.append(scaled * states.mean() / scaled.mean())
    return torch.cat(hidden, dim=-1)


def test_the_weight_of_a_word_acts_on_its_own_tokens_in_both_encoders(tiny_base: Path, parts: Parts) -> None:
    found, pooled = encode(weighing(tiny_base), parts, "a (red star:1.5) on [blue] sea")
    text = "a red star on blue sea"
    assert torch.allclose(found, by_hand(parts, text, {1: 1.5, 2: 1.5, 4: 1 / 1.1}), atol=1e-5)
    plainly, plain_pooled = encode(SDXL(base=str(tiny_base)), parts, text)
    assert not torch.allclose(found, plainly, atol=1e-3)
    assert torch.equal(pooled, plain_pooled), "the pooled embedding is unweighted"


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_weights_of_one_are_the_plain_encoding_bit_for_bit(tiny_base: Path, parts: Parts, chunks: int) -> None:
    off = weighing(tiny_base, chunks=chunks).model_copy(update={"prompt_weights": False})
    written = ["", "a red circle", "(a red:1.0) [(star)]", words(100)]
    texts = ["", "a red circle", "a red star", words(100)]
    for one, other in zip(
        encode(weighing(tiny_base, chunks=chunks), parts, *written), encode(off, parts, *texts), strict=True
    ):
        assert torch.equal(one, other)


def test_off_brackets_are_ordinary_text(tiny_base: Path, parts: Parts) -> None:
    off = SDXL(base=str(tiny_base))
    assert off.prompt_weights is False
    assert not torch.allclose(encode(off, parts, "(star:1.5)")[0], encode(off, parts, "star")[0], atol=1e-3)
    escaped = encode(weighing(tiny_base), parts, r"a \(star\)")[0]
    assert torch.equal(escaped, encode(off, parts, "a (star)")[0])


def test_a_prompt_does_not_depend_on_its_company(tiny_base: Path, parts: Parts) -> None:
    family = weighing(tiny_base)
    prompts = ["a (star:1.4)", "a star", "((sea)) [red]"]
    together = encode(family, parts, *prompts)[0]
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.allclose(row, encode(family, parts, prompt)[0][0], atol=1e-6)
    assert torch.equal(together[1], encode(SDXL(base=str(tiny_base)), parts, *["a star"] * 3)[0][1])


def test_weights_reach_beyond_the_first_chunk(tiny_base: Path, parts: Parts) -> None:
    """Each chunk is scaled by itself: what is emphasised in the second leaves the first as it was."""
    head, tail = words(75), "blue (star:1.6) sea"
    found = encode(weighing(tiny_base, chunks=2), parts, f"{head} {tail}")[0]
    off = SDXL(base=str(tiny_base), long_prompts="chunk", max_chunks=2)
    plainly = encode(off, parts, f"{head} blue star sea")[0]
    assert torch.equal(found[:, :77], plainly[:, :77])
    assert torch.allclose(found[:, 77:], by_hand(parts, "blue star sea", {1: 1.6}), atol=1e-5)


def test_a_weighted_stretch_may_lie_across_the_seam_of_two_chunks(tiny_base: Path, parts: Parts) -> None:
    found = encode(weighing(tiny_base, chunks=2), parts, f"{words(74)} (red blue:1.5) sea")[0]
    first, second = f"{words(74)} red", "blue sea"
    assert torch.allclose(found[:, :77], by_hand(parts, first, {74: 1.5}), atol=1e-5)
    assert torch.allclose(found[:, 77:], by_hand(parts, second, {0: 1.5}), atol=1e-5)


def test_truncation_counts_words_and_not_their_notation(tiny_base: Path, parts: Parts) -> None:
    family = weighing(tiny_base)
    fits, over = f"{words(74)} (red:1.2)", f"{words(75)} (red:1.2)"
    assert family.token_counts(parts.tokenizers, ["", fits, over]) == [0, 75, 76]
    assert family.overlong(parts.tokenizers, [fits, over]) == [over]
    assert torch.equal(encode(family, parts, over)[0], encode(SDXL(base=str(tiny_base)), parts, words(75))[0])
    assert torch.allclose(encode(family, parts, fits)[0], by_hand(parts, f"{words(74)} red", {74: 1.2}), atol=1e-5)


# Counts


def test_the_tokenizer_that_makes_most_of_a_caption_counts(tiny_base: Path, parts: Parts) -> None:
    class Doubling:
        """Makes two tokens of each."""

        model_max_length = 77
        added_tokens_encoder = parts.tokenizers[0].added_tokens_encoder

        def __call__(self, texts: list[str], truncation: bool) -> object:
            found = parts.tokenizers[0](texts, truncation=truncation)
            found["input_ids"] = [
                [ids[0], *[i for i in ids[1:-1] for _ in range(2)], ids[-1]] for ids in found["input_ids"]
            ]
            return found

    family = SDXL(base=str(tiny_base))
    captions = ["", "a red star", words(40)]
    assert family.token_counts(parts.tokenizers, captions) == [0, 3, 40]
    assert family.token_counts([parts.tokenizers[0], Doubling()], captions) == [0, 6, 80]
    assert family.overlong([parts.tokenizers[0], Doubling()], captions) == [captions[2]]
    assert family.token_counts(parts.tokenizers, []) == []


@pytest.mark.parametrize(("chunks", "limit"), [(0, 75), (1, 75), (3, 225)])
def test_the_limit_is_what_the_policy_reads(tiny_base: Path, parts: Parts, chunks: int, limit: int) -> None:
    assert weighing(tiny_base, chunks=chunks).token_limit(parts.tokenizers) == limit


# The rest of the family


def test_weights_are_part_of_what_embeddings_depend_on(tiny_base: Path) -> None:
    families = [weighing(tiny_base), weighing(tiny_base, chunks=3)]
    families += [family.model_copy(update={"prompt_weights": False}) for family in families]
    assert len({family.fingerprint("text") for family in families}) == 4
    assert len({family.fingerprint("denoiser") for family in families}) == 1


@pytest.mark.parametrize("chunks", [0, 2])
def test_the_pipeline_reads_weights_as_training_does(tiny_base: Path, parts: Parts, chunks: int) -> None:
    family = weighing(tiny_base, chunks=chunks)
    prompt, negative = "a (red star:1.5) " + words(80), "[sea] (blue)"
    pipeline = family.pipeline(load(family))
    with torch.no_grad():
        embeds, negatives, pooled, negative_pooled = pipeline.encode_prompt(prompt, negative_prompt=negative)
    for found, pool, text in ((embeds, pooled, prompt), (negatives, negative_pooled, negative)):
        wanted = encode(family, parts, text)
        assert torch.equal(found, wanted[0])
        assert torch.equal(pool, wanted[1])


def test_trained_text_encoders_feel_the_weights(tiny_base: Path) -> None:
    """The gradient flows through the weighted states and is finite."""
    loaded = load(weighing(tiny_base), ("text",))
    encoder = loaded.text_encoders[0].requires_grad_(True)
    gradients = []
    for text in ("a (star:1.5)", "a star"):
        encoder.zero_grad()
        weighing(tiny_base).encode_text(loaded, [text])["prompt_embeds"].square().sum().backward()
        gradients.append(encoder.get_input_embeddings().weight.grad.clone())
    assert all(bool(g.isfinite().all()) and float(g.abs().max()) > 0 for g in gradients)
    assert not torch.allclose(*gradients)
