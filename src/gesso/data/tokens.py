"""How many tokens captions have, without torch: counted by the model's own vocabulary where it is on this machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gesso.config.run import RunConfig
from gesso.core import resolve
from gesso.core.tokens import NewToken

MOST = 75
"""Tokens that CLIP's text encoders read in one go, without the two marks around them."""

_FILES = ("tokenizer/vocab.json", "tokenizer/merges.txt")
_PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_ROUGHLY = re.compile(r"[^\W\d_]+|\d|[^\s\w]+|_+")
_EASY, _MORE = 8, 5


@dataclass(frozen=True)
class Counter:
    """Counts the tokens of texts, and says how; `ids` are the tokens themselves where the vocabulary is there."""

    count: Callable[[Sequence[str]], list[int]]
    method: str
    ids: Callable[[Sequence[str]], list[list[int]]] | None = None

    @property
    def exact(self) -> bool:
        """Whether the count is the model's own."""
        return self.ids is not None


def counter(base: str | None, *, revision: str | None = None) -> Counter:
    """The best counter that there is without a download: by the vocabulary of `base`, else by an estimate."""
    files = None if base is None else _vocabulary(base, revision)
    if files is None:
        return Counter(estimate, "estimated from words, as the model's vocabulary is not on this machine")
    ids = _clip(*files)
    return Counter(lambda texts: [len(one) for one in ids(texts)], f"counted with the vocabulary of {base}", ids)


def counter_for(run: RunConfig) -> tuple[Counter, int]:
    """How tokens are counted for this run's model, and how many of them it reads."""
    model = run.model
    chunks = model.max_chunks if model.long_prompts == "chunk" else 1
    return _with_words(counter(model.base, revision=model.revision), run.tokens), MOST * chunks


def _with_words(known: Counter, tokens: Sequence[NewToken]) -> Counter:
    """The same, and each new word counts as many tokens as it has vectors."""
    if not tokens:
        return known
    sizes = {token.token: token.vectors for token in tokens}
    words = re.compile("|".join(map(re.escape, sizes)), re.IGNORECASE)

    def count(texts: Sequence[str]) -> list[int]:
        own = [sum(sizes[word.lower()] for word in words.findall(text)) for text in texts]
        others = known.count([words.sub(" ", text) for text in texts])
        return [a + b for a, b in zip(own, others, strict=True)]

    return replace(known, count=count)


def estimate(texts: Sequence[str]) -> list[int]:
    """About how many tokens CLIP makes of each text.

    A word of up to 8 letters is one and every 5 letters more are another; letters other than Latin ones, digits and
    runs of signs are one each. Meant to be right within a tenth or so for English captions.
    """
    return [sum(map(_tokens_of, _ROUGHLY.findall(text))) for text in texts]


def _tokens_of(piece: str) -> int:
    if not piece[0].isalpha():
        return 1
    return len(piece) if not piece.isascii() else 1 + math.ceil(max(0, len(piece) - _EASY) / _MORE)


def _vocabulary(base: str, revision: str | None) -> tuple[Path, Path] | None:
    local = Path(base).expanduser()
    if base.startswith(resolve.PACKAGED) or local.is_dir():
        folder = resolve.locate(base)
        found = [folder / name for name in _FILES]
        return (found[0], found[1]) if all(path.is_file() for path in found) else None
    if local.exists() or base.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = [try_to_load_from_cache(base, name, revision=revision) for name in _FILES]
    paths = [Path(path) for path in cached if isinstance(path, str)]
    return (paths[0], paths[1]) if len(paths) == len(_FILES) else None


def _clip(vocabulary: Path, merges: Path) -> Callable[[Sequence[str]], list[list[int]]]:
    """CLIP's byte-pair encoding as its tokenizer has it: NFC, single blanks, lower case, words that end in </w>."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    pairs = [tuple(line.split()) for line in merges.read_text("utf-8").split("\n") if not line.startswith("#version")]
    encoding = models.BPE(
        vocab=json.loads(vocabulary.read_text("utf-8")),
        merges=[(pair[0], pair[1]) for pair in pairs if len(pair) == 2],
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        unk_token="<|endoftext|>",
    )
    tokenizer = Tokenizer(encoding)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )

    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    return ids
