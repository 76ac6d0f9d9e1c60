"""Prompts of any length, and numbers that a half-precision denoiser must not round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_helpers import GEOMETRY, copy, load, reconfigure
from torch import Tensor

from gesso.core.seams import Parts
from gesso.families.sdxl import SDXL

WORDS = ["red", "blue", "circle", "star", "sea"]
TEXT = {"prompt_embeds": 0, "pooled": 1}


def words(count: int, start: int = 0) -> str:
    """A prompt of `count` tokens."""
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(count))


@pytest.fixture(scope="module")
def parts(tiny_base: Path) -> Parts:
    return load(SDXL(base=str(tiny_base)), ("text", "denoiser"))


@pytest.fixture(scope="module")
def whole(tiny_base: Path) -> SDXL:
    return SDXL(base=str(tiny_base))


def chunked(base: Path, max_chunks: int = 3) -> SDXL:
    return SDXL(base=str(base), long_prompts="chunk", max_chunks=max_chunks)


def encode(family: SDXL, parts: Parts, *captions: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        found = family.encode_text(parts, captions)
    return found["prompt_embeds"], found["pooled"]


def test_one_word_is_one_token(parts: Parts) -> None:
    for tokenizer in parts.tokenizers:
        assert len(tokenizer(words(200)).input_ids) == 202


@pytest.mark.parametrize("max_chunks", [1, 2, 3])
def test_shapes_are_the_same_for_every_prompt(tiny_base: Path, parts: Parts, max_chunks: int) -> None:
    family = chunked(tiny_base, max_chunks)
    for captions in (["", "a"], [words(75), words(76)], [words(150), ""], [words(1000), words(3)]):
        hidden, pooled = encode(family, parts, *captions)
        assert hidden.shape == (2, 77 * max_chunks, 16 + 24)
        assert pooled.shape == (2, 24)


def test_short_prompts_begin_as_when_truncated(tiny_base: Path, parts: Parts, whole: SDXL) -> None:
    captions = ["", "a red circle", words(74), words(75)]
    hidden, pooled = encode(chunked(tiny_base), parts, *captions)
    plain, plain_pooled = encode(whole, parts, *captions)
    assert torch.allclose(hidden[:, :77], plain, atol=1e-6)
    assert torch.allclose(pooled, plain_pooled, atol=1e-6)
    empty = encode(whole, parts, "")[0]
    for chunk in (1, 2):
        rows = hidden[:, 77 * chunk : 77 * (chunk + 1)]
        assert torch.allclose(rows, empty.expand_as(rows), atol=1e-6)


def test_the_pooled_embedding_is_that_of_the_first_chunk(tiny_base: Path, parts: Parts, whole: SDXL) -> None:
    captions = [words(75) + " " + words(40, start=2), words(75) + " " + words(60, start=3)]
    hidden, pooled = encode(chunked(tiny_base), parts, *captions)
    wanted = encode(whole, parts, words(75))[1]
    assert torch.allclose(pooled, wanted.expand_as(pooled), atol=1e-6)
    assert not torch.allclose(pooled, encode(whole, parts, words(40, start=2))[1].expand_as(pooled), atol=1e-3)
    assert not torch.allclose(hidden[0, 77:154], hidden[1, 77:154], atol=1e-3), "what follows is read as well"


def test_padding_is_each_tokenizers_own(tiny_base: Path, parts: Parts) -> None:
    """SDXL's first tokenizer pads with the end mark, its second with "!" (token 0)."""
    family = chunked(tiny_base, 2)
    pads = [tokenizer.pad_token_id for tokenizer in parts.tokenizers]
    assert pads[0] != pads[1]
    assert [tokenizer.pad_token for tokenizer in parts.tokenizers] == [parts.tokenizers[0].eos_token, "!"]
    seen: list[Tensor] = []
    encoders = parts.text_encoders
    handles = [e.register_forward_pre_hook(lambda _m, args: seen.append(args[0].clone())) for e in encoders]
    encode(family, parts, words(80))
    for handle in handles:
        handle.remove()
    for ids, pad, tokenizer in zip(seen, pads, parts.tokenizers, strict=True):
        assert ids.shape == (2, 77)
        raw = tokenizer(words(80)).input_ids
        assert ids[0].tolist() == [raw[0], *raw[1:76], raw[-1]]
        assert ids[1].tolist() == [raw[0], *raw[76:81], raw[-1], *[pad] * 70]


def test_another_padding_in_the_model_is_followed(tiny_base: Path, tmp_path: Path, whole: SDXL, parts: Parts) -> None:
    model = copy(tiny_base, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        reconfigure(model / "tokenizer_2" / name, pad_token=parts.tokenizers[0].eos_token)
    family = SDXL(base=str(model))
    other = load(family, ("text",))
    assert other.tokenizers[1].pad_token_id == other.tokenizers[0].pad_token_id
    changed, plain = encode(family, other, "a star")[0], encode(whole, parts, "a star")[0]
    assert torch.equal(changed[..., :16], plain[..., :16])
    assert not torch.equal(changed[..., 16:], plain[..., 16:])
    assert family.fingerprint("text") != whole.fingerprint("text")


@pytest.mark.parametrize(("max_chunks", "limit"), [(None, 75), (1, 75), (2, 150), (3, 225)])
def test_overlong_is_exactly_what_is_cut(tiny_base: Path, parts: Parts, max_chunks: int | None, limit: int) -> None:
    family = SDXL(base=str(tiny_base)) if max_chunks is None else chunked(tiny_base, max_chunks)
    fits, over = words(limit), words(limit + 1)
    assert family.overlong(parts.tokenizers, ["", "a", fits, over]) == [over]
    same = encode(family, parts, fits, over)
    assert all(torch.equal(value[0], value[1]) for value in same), "the surplus word was read after all"
    fewer = encode(family, parts, fits, words(limit - 1))
    assert not torch.equal(fewer[0][0], fewer[0][1]), "the last word that fits was cut"


def test_the_prompt_policy_is_part_of_what_embeddings_depend_on(tiny_base: Path) -> None:
    prints = [
        family.fingerprint("text")
        for family in (SDXL(base=str(tiny_base)), *(chunked(tiny_base, n) for n in (1, 2, 3)))
    ]
    assert len(set(prints)) == 4


def test_a_bfloat16_denoiser_gets_its_numbers_unrounded(whole: SDXL) -> None:
    """Inside the UNet, where sizes and timesteps become sines: bf16 would turn 1023 into 1024 and 999 into 1000."""
    parts = load(whole, ("text", "denoiser"), torch.bfloat16)
    unet = parts.denoiser
    seen: dict[str, Tensor] = {}
    handles = [
        getattr(unet, name).register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
        for name in ("time_proj", "add_time_proj", "conv_in")
    ]
    cond = whole.condition(dict(zip(TEXT, encode(whole, parts, "a", "b"), strict=True)), GEOMETRY)
    with torch.no_grad():
        whole.predict(unet, torch.full((2, 4, 8, 8), 0.5), torch.tensor([999, 257]), cond)
    for handle in handles:
        handle.remove()
    assert seen["add_time_proj"].dtype == torch.float32
    assert seen["add_time_proj"].tolist() == [float(number) for row in GEOMETRY for number in row]
    assert seen["time_proj"].dtype in (torch.int64, torch.float32)
    assert seen["time_proj"].tolist() == [999, 257]
    assert seen["conv_in"].dtype == torch.bfloat16
    assert cond["time_ids"].dtype == torch.float32


def test_the_pipeline_follows_the_prompt_policy(tiny_base: Path, parts: Parts) -> None:
    family = chunked(tiny_base, 2)
    loaded = load(family)
    pipeline = family.pipeline(loaded)
    prompt, negative = words(120), words(90, start=1)
    with torch.no_grad():
        embeds, negative_embeds, pooled, negative_pooled = pipeline.encode_prompt(prompt, negative_prompt=negative)
    for found, pool, text in ((embeds, pooled, prompt), (negative_embeds, negative_pooled, negative)):
        wanted = encode(family, parts, text)
        assert torch.equal(found, wanted[0])
        assert torch.equal(pool, wanted[1])


def test_model_index_without_zeroing_encodes_the_empty_negative(tiny_base: Path, tmp_path: Path) -> None:
    model = copy(tiny_base, tmp_path / "model")
    reconfigure(model / "model_index.json", force_zeros_for_empty_prompt=False)
    for base, zero in ((tiny_base, True), (model, False)):
        family = chunked(base, 2)
        negative = family.pipeline(load(family)).encode_prompt("a star")[1]
        assert (float(negative.abs().max()) == 0) is zero
    assert json.loads((tiny_base / "model_index.json").read_text())["force_zeros_for_empty_prompt"]
