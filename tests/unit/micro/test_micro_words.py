"""The micro models' tokenizers behave like SDXL's two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPTokenizer

from gesso.micro import words


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    words.write(folder / "one")
    words.write(folder / "two", pad="!")
    return CLIPTokenizer.from_pretrained(folder / "one"), CLIPTokenizer.from_pretrained(folder / "two")


def test_each_common_word_is_one_token(pair: tuple[Any, Any]) -> None:
    for tokenizer in pair:
        broken = [word for word in words.COMMON if tokenizer.tokenize(word) != [word + "</w>"]]
        assert broken == []


def test_our_own_splitting_agrees_with_the_library(pair: tuple[Any, Any]) -> None:
    ranks = {merge: i for i, merge in enumerate(words.merges(words.COMMON))}
    for word in ("photographer", "redder", "kalpak", "starfish", "chapan", "x"):
        assert words.split(word, ranks) == pair[0].tokenize(word)


def test_a_prompt_is_marked_and_padded_as_in_sdxl(pair: tuple[Any, Any]) -> None:
    vocabulary = words.vocabulary(words.COMMON)
    start, end = vocabulary[words.START], vocabulary[words.END]
    for tokenizer, pad in zip(pair, (end, 0), strict=True):
        ids = tokenizer("a photo of sks aldar", padding="max_length", max_length=77, truncation=True).input_ids
        text = [vocabulary[w + "</w>"] for w in ("a", "photo", "of", "sks", "aldar")]
        assert ids == [start, *text, end, *[pad] * 70]
        assert tokenizer.model_max_length == 77
        assert tokenizer.pad_token_id == pad
    assert vocabulary["!"] == 0
    assert max(vocabulary.values()) == end == len(vocabulary) - 1


def test_a_long_prompt_is_cut_to_77_with_its_end_mark(pair: tuple[Any, Any]) -> None:
    ids = pair[0]("red " * 200, padding="max_length", max_length=77, truncation=True).input_ids
    assert len(ids) == 77
    assert ids[-1] == pair[0].eos_token_id
    assert ids[1] == ids[75] != ids[-1]


@pytest.mark.parametrize("text", ["Алдар Көсе", "aldar köse", "雪の中", "zzyzx", "a red-hat, 3 x 4!"])
def test_any_text_survives(pair: tuple[Any, Any], text: str) -> None:
    tokenizer = pair[0]
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids[1:-1]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.lower().replace(" ", "")


def test_writing_is_deterministic(tmp_path: Path) -> None:
    words.write(tmp_path / "a")
    words.write(tmp_path / "b")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
