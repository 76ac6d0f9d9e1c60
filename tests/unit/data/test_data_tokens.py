from __future__ import annotations

from pathlib import Path

import pytest

from gesso.core import resolve
from gesso.data import tokens

TEXTS = [
    "a photo of sks aldar, 3 blue hats!!",
    "café  Naïve it's\ndon't 1234 :)",
    "日本",
    "",
    "MASTERPIECE, best quality, 1girl, solo, extraordinarily detailed background <|endoftext|>",
]


def test_the_vocabulary_counts_as_the_models_own_tokenizer() -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(resolve.locate("micro:sdxl") / "tokenizer")
    counter = tokens.counter("micro:sdxl")
    assert counter.exact
    assert "micro:sdxl" in counter.method
    assert counter.count(TEXTS) == [len(ids) - 2 for ids in tokenizer(TEXTS).input_ids]


def test_without_a_vocabulary_here_it_is_estimated_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("socket.socket", None)
    for base in (None, "nobody/nothing-of-that-name", str(tmp_path), str(tmp_path / "model.safetensors")):
        counter = tokens.counter(base)
        assert not counter.exact
        assert "estimated" in counter.method


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("a photo of a dog", 5),
        ("blue hat, 1girl", 5),
        ("extraordinarily", 3),
        ("1234", 4),
        ("日本", 2),
        ("!!! :)", 2),
        ("long_hair", 3),
    ],
)
def test_the_estimate(text: str, count: int) -> None:
    assert tokens.estimate([text]) == [count]
