"""New words in a run file: what is one, what their parts are called, and what is told about the others."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from gesso.adapters import Embedding, LoRA
from gesso.core.tokens import NewToken
from run_helpers import MakeRun


def test_parts_and_files_are_called_as_diffusers_calls_them() -> None:
    token = NewToken(token="<aldar>", initial="man", vectors=3)
    assert token.names == ("<aldar>", "<aldar>_1", "<aldar>_2")
    assert token.stem == "aldar"
    assert token.file == "embeddings/aldar/learned_embeds.safetensors"
    assert NewToken(token="<my-hat>").stem == "my_hat"


@pytest.mark.parametrize("word", ["", "two words", "<>", "a.b", "(x)", "a,b", "x|y", "[x]", "{x}", "a:b", "a/b", "\\x"])
def test_what_is_no_word_is_refused(word: str) -> None:
    with pytest.raises(ValidationError, match="is no word"):
        NewToken(token=word)


def test_capitals_are_refused_with_the_word_to_write() -> None:
    with pytest.raises(ValidationError, match="write <aldar>"):
        NewToken(token="<Aldar>")


@pytest.mark.parametrize("vectors", [0, -1, 76])
def test_numbers_of_vectors(vectors: int) -> None:
    with pytest.raises(ValidationError, match="vectors"):
        NewToken(token="<aldar>", vectors=vectors)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["<a>", "<a>"], "<a> is twice there"),
        (["sks", "sksx"], "sks is a part of sksx"),
        (["<a>_1", "<a>"], "<a> is a part of <a>_1"),
        (["<hat>", "*hat*"], "files of one name, hat"),
    ],
)
def test_words_that_readers_would_confuse_are_refused(words: list[str], told: str) -> None:
    tokens = [{"token": word} for word in words]
    for kind in (LoRA, Embedding):
        with pytest.raises(ValidationError, match=re.escape(told)):
            kind.model_validate({"tokens": tokens})


def test_an_embedding_without_words_is_refused() -> None:
    with pytest.raises(ValidationError, match="tokens"):
        Embedding.model_validate({})
    with pytest.raises(ValidationError, match="at least 1"):
        Embedding.model_validate({"tokens": []})


WORD = {"tokens": [{"token": "<it>"}]}


@pytest.mark.parametrize(
    ("changes", "key", "level"),
    [
        ({"training__token_learning_rate": 1e-3}, "training.token_learning_rate", "error"),
        ({"adapter": {"type": "embedding", **WORD}, "training__learning_rate": 0}, "training.learning_rate", "error"),
        ({"adapter": WORD, "training__token_learning_rate": 0}, "training.token_learning_rate", "warning"),
        ({"adapter": WORD, "training__token_learning_rate": 1.0}, "training.token_learning_rate", "warning"),
        ({"adapter": WORD, "preview": {"prompts": ["a photo"]}}, "preview.prompts", "warning"),
    ],
)
def test_advice(make_run: MakeRun, changes: dict[str, Any], key: str, level: str) -> None:
    from gesso.config import advice

    found = [f for f in advice.check(make_run("run", **changes)).findings if f.key == key]
    assert [f.level for f in found] == [level], found


def test_advice_has_nothing_against_a_usual_run(make_run: MakeRun) -> None:
    from gesso.config import advice

    tokens = [{"token": "<it>", "initial": "thing", "vectors": 2}]
    for adapter in ({"type": "embedding", "tokens": tokens}, {"rank": 4, "tokens": tokens}):
        run = make_run("run", adapter=adapter, training__token_learning_rate=5e-3, training__learning_rate=1e-4)
        assert not [f for f in advice.check(run).findings if f.level != "hint"]
    assert run.tokens[0].vectors == 2
    assert make_run("plain").tokens == ()
