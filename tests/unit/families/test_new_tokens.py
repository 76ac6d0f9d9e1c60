"""New tokens in tokenizers and text encoders, held against diffusers' reading and against tables made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from family_helpers import copy, load, reconfigure

from gesso.core.seams import Parts
from gesso.core.tokens import NewToken
from gesso.errors import UserError
from gesso.families.new_tokens import NewVectors
from gesso.families.sdxl import SDXL

THREE = NewToken(token="<aldar>", initial="man", vectors=3)
ONE = NewToken(token="<hat>", initial="red hat")
PROMPTS = [
    "a photo of <aldar>, red",
    "<aldar>",
    "<hat> and <aldar> and <aldar>.",
    "a <hat>",
    "nothing new, (here)",
    "",
    "tail <aldar>" + " sea" * 80,
    " ".join(["sea"] * 74) + " <aldar> cut in its middle",
]


def table(encoder: Any) -> torch.Tensor:
    """The embeddings as an ordinary model would hold them: known ones, then the new ones."""
    vectors = encoder.get_input_embeddings()
    assert isinstance(vectors, NewVectors)
    assert vectors.first == vectors.known.num_embeddings
    return torch.cat([vectors.known.weight, *(v.to(vectors.known.weight) for v in vectors.vectors)]).detach()


def scattered(vectors: dict[str, NewVectors], seed: int = 1) -> None:
    """Values that no two rows share."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in vectors.values():
            for parameter in one.vectors:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture
def family(tiny_base: Path) -> SDXL:
    return SDXL(base=str(tiny_base))


def with_new(family: SDXL, dtype: torch.dtype = torch.float32) -> tuple[Parts, dict[str, NewVectors]]:
    parts = load(family, ("text",), dtype)
    vectors = family.add_tokens(parts, [THREE, ONE], seed=3)
    scattered(vectors)
    return parts, vectors


def plain(family: SDXL, trained: Parts) -> StableDiffusionXLPipeline:
    """An ordinary pipeline with ordinary tables: tokens added and rows set by hand."""
    parts = load(family)
    for encoder, source, tokenizer in zip(parts.text_encoders, trained.text_encoders, parts.tokenizers, strict=True):
        tokenizer.add_tokens(["<aldar>", "<aldar>_1", "<aldar>_2", "<hat>"])
        rows = table(source)
        encoder.resize_token_embeddings(len(rows), mean_resizing=False)
        encoder.get_input_embeddings().weight.data.copy_(rows)
    return StableDiffusionXLPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoders[0],
        text_encoder_2=parts.text_encoders[1],
        tokenizer=parts.tokenizers[0],
        tokenizer_2=parts.tokenizers[1],
        unet=parts.denoiser,
        scheduler=family.pipeline(parts).scheduler,
        add_watermarker=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_are_read_as_diffusers_reads_them(family: SDXL, dtype: torch.dtype) -> None:
    parts, _ = with_new(family, dtype)
    pipe = plain(family, parts)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.to(dtype)
    with torch.no_grad():
        ours = family.encode_text(parts, PROMPTS)
        theirs = pipe.encode_prompt(prompt=PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(ours["prompt_embeds"], theirs[0])
    assert torch.equal(ours["pooled"], theirs[2])


def test_capitals_mean_the_same_word(family: SDXL) -> None:
    """diffusers looks for the word as it is written and would read one vector of three."""
    parts, _ = with_new(family)
    with torch.no_grad():
        one, other = (family.encode_text(parts, [text]) for text in ("A Photo of <ALDAR>", "a photo of <aldar>"))
        shown = family.pipeline(parts).encode_prompt("A Photo of <ALDAR>", do_classifier_free_guidance=False)
    assert torch.equal(one["prompt_embeds"], other["prompt_embeds"])
    assert torch.equal(shown[0], other["prompt_embeds"])


def test_every_vector_of_a_weighted_word_has_its_weight(family: SDXL) -> None:
    weighted = family.model_copy(update={"prompt_weights": True})
    parts, _ = with_new(family)
    ((tokens,)) = weighted._tokens(parts.tokenizers[0], ["a (<aldar>:1.3) man"])
    assert [weight for _, weight in tokens] == [1.0, 1.3, 1.3, 1.3, 1.0]
    assert weighted.token_counts(parts.tokenizers, ["a <aldar> man"]) == [5]


def test_long_prompts_in_chunks(family: SDXL) -> None:
    chunked = family.model_copy(update={"long_prompts": "chunk", "max_chunks": 2})
    parts, _ = with_new(family)
    captions = [" ".join(["sea"] * 74) + " <aldar> sky", "sky"]
    assert chunked.overlong(parts.tokenizers, captions) == []
    with torch.no_grad():
        whole = chunked.encode_text(parts, captions)["prompt_embeds"]
        tail = family.encode_text(parts, ["<aldar>_1 <aldar>_2 sky"])["prompt_embeds"]
    assert whole.shape[1] == 154
    assert torch.allclose(whole[0, 77:], tail[0], atol=1e-6)


def test_the_rows_are_looked_up_and_alone_have_a_gradient(family: SDXL) -> None:
    parts, vectors = with_new(family)
    for key, encoder, tokenizer in zip(vectors, parts.text_encoders, parts.tokenizers, strict=True):
        rows = table(encoder).numpy()
        ids = np.array([family._chunks(tokenizer, PROMPTS)[0].squeeze(1).numpy()])[0]
        found = vectors[key](torch.from_numpy(ids))
        assert np.array_equal(found.detach().numpy(), rows[ids])
        weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
        (found * weights).sum().backward()
        expected = np.zeros(rows.shape)
        np.add.at(expected, ids, weights.numpy().astype(np.float64))
        got = torch.cat([v.grad for v in vectors[key].vectors]).numpy()  # type: ignore[misc]
        assert np.allclose(got, expected[-4:], atol=1e-5)
        assert vectors[key].known.weight.grad is None
        assert [n for n, p in encoder.named_parameters() if p.requires_grad] == [
            n for n, _ in encoder.named_parameters() if ".tables." in n
        ]


def test_vectors_stay_float32_and_the_encoder_its_type(family: SDXL) -> None:
    parts, vectors = with_new(family, torch.bfloat16)
    assert {p.dtype for one in vectors.values() for p in one.vectors} == {torch.float32}
    assert {encoder.dtype for encoder in parts.text_encoders} == {torch.bfloat16}
    assert family.encode_text(parts, ["<aldar>"])["prompt_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("initial", "vectors", "words"),
    [
        ("man", 1, [["man"]]),
        ("red hat", 1, [["red", "hat"]]),
        ("man", 3, [["man"], ["man"], ["man"]]),
        ("red hat", 3, [["red"], ["hat"], ["red"]]),
        ("red blue green", 2, [["red", "blue"], ["green"]]),
    ],
)
def test_initial_words(family: SDXL, initial: str, vectors: int, words: list[list[str]]) -> None:
    parts = load(family, ("text",))
    token = NewToken(token="<aldar>", initial=initial, vectors=vectors)
    known = [encoder.get_input_embeddings().weight.detach().double().numpy() for encoder in parts.text_encoders]
    found = family.add_tokens(parts, [token], seed=0)
    for rows, (one,), tokenizer in zip(known, (v.vectors for v in found.values()), parts.tokenizers, strict=True):
        ids = [[tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in share] for share in words]
        expected = np.stack([rows[share].mean(0) for share in ids])
        assert np.abs(one.detach().numpy() - expected).max() < 1e-7
        if all(len(share) == 1 for share in ids):
            assert np.array_equal(one.detach().numpy(), expected.astype(np.float32))


def test_without_initial_words_vectors_are_like_words_and_keyed(family: SDXL) -> None:
    def drawn(seed: int, *tokens: str) -> dict[str, torch.Tensor]:
        new = [NewToken(token=t, vectors=64) for t in tokens]
        found = family.add_tokens(load(family, ("text",)), new, seed=seed)
        return {f"{k} {t}": v.detach() for k, one in found.items() for t, v in zip(tokens, one.vectors, strict=True)}

    one, again, other, both = drawn(0, "<a>"), drawn(0, "<a>"), drawn(1, "<a>"), drawn(0, "<b>", "<a>")
    assert all(torch.equal(one[k], again[k]) and torch.equal(one[k], both[k]) for k in one)
    assert not any(torch.equal(one[k], other[k]) for k in one)
    assert not torch.equal(both["clip_l <a>"], both["clip_l <b>"])
    for key, encoder in zip(("clip_l", "clip_g"), load(family, ("text",)).text_encoders, strict=True):
        words = encoder.get_input_embeddings().weight
        assert 0.9 < float(one[f"{key} <a>"].std() / words.std()) < 1.1


@pytest.mark.parametrize("word", ["man", "sks", "z"])
def test_a_word_that_the_model_knows_is_refused(family: SDXL, word: str) -> None:
    parts = load(family, ("text",))
    with pytest.raises(UserError, match=f"has a token {word} already") as refused:
        family.add_tokens(parts, [ONE, NewToken(token=word)], seed=0)
    assert refused.value.where == "adapter.tokens.1.token"


def test_tokenizers_are_taught_as_copies(family: SDXL) -> None:
    parts = load(family, ("text",))
    sizes = [len(tokenizer) for tokenizer in parts.tokenizers]
    taught = family.taught(parts.tokenizers, [THREE])
    assert [len(tokenizer) for tokenizer in parts.tokenizers] == sizes
    assert [len(tokenizer) for tokenizer in taught] == [size + 3 for size in sizes]
    assert family.token_counts(taught, ["a <aldar>"]) == [4]


def test_the_pooled_embedding_is_that_of_the_end_mark(family: SDXL, tiny_base: Path, tmp_path: Path) -> None:
    """SDXL's configs have 2 for the end mark, and transformers then pools at the highest id: a new token's."""
    old = copy(tiny_base, tmp_path / "old")
    for part in ("text_encoder", "text_encoder_2"):
        reconfigure(old / part / "config.json", eos_token_id=2)
    dated = SDXL(base=str(old))
    (parts, _), (right, _) = with_new(dated), with_new(family)
    assert parts.text_encoders[1].config.eos_token_id == 2
    with torch.no_grad():
        found, expected = (f.encode_text(p, PROMPTS) for f, p in ((dated, parts), (family, right)))
        wrong = StableDiffusionXLPipeline.from_pretrained(old).encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(found["pooled"], expected["pooled"])
    assert torch.equal(found["prompt_embeds"], expected["prompt_embeds"])
    old_way = [i for i, prompt in enumerate(PROMPTS) if "<" not in prompt]
    assert torch.equal(wrong[2][old_way], found["pooled"][old_way])
    place = torch.tensor([family._chunks(p, PROMPTS[:1])[0][0, 0].argmax() for p in parts.tokenizers[1:]])
    assert family._chunks(parts.tokenizers[1], PROMPTS[:1])[0][0, 0][place] != parts.tokenizers[1].eos_token_id
