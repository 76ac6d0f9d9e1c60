"""Tokenizer files of the micro models: byte-level BPE as CLIP's, with merges made here for a short word list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_LIST = """
a an the of on in with and at to by is are from for without above below left right two three
photo picture painting drawing portrait image style outlined sepia mosaic neon
red orange yellow green blue purple pink brown black white gray grey dark light
circle square triangle star heart cross diamond ring
person man woman boy girl face hair beard moustache smiling sad waving standing wearing
robe hat cap hood crown kalpak chapan plain striped patterned tall small large
horse sheep cat dog bird fish yurt tree pot carpet moon house flower boat sun cloud
steppe market mountain mountains sea sky sand night background
sks aldar dombra
"""
COMMON = _LIST.split()
"""Words that are one token each; everything else falls back to pieces and characters."""

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77
"""Longest prompt in tokens, both marks included."""


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes in CLIP's order, so that "!" has id 0 (Radford et al. 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """BPE merges under which each of `words` is one token.

    Each word is first split by the merges so far and its pieces are then joined from left to right. A merge
    added later has a lower priority, so it cannot break a word that was whole before.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = split(word, ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = split(word, ranks)
    return list(ranks)


def split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of one word: the pair with the lowest rank is joined until none is left."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]
        if not pairs:
            return pieces
        _, i = min(pairs)
        pieces[i : i + 2] = ["".join(pieces[i : i + 2])]


def vocabulary(words: Sequence[str]) -> dict[str, int]:
    """Token -> id in CLIP's layout: bytes, bytes that end a word, merges, then the two marks."""
    symbols = byte_symbols()
    joined = dict.fromkeys("".join(pair) for pair in merges(words))
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *joined, START, END]
    return {token: i for i, token in enumerate(tokens)}


def write(folder: Path, *, words: Sequence[str] = COMMON, pad: str = END) -> None:
    """Write a CLIP tokenizer's files. SDXL's first tokenizer pads with the end mark, its second with "!" (id 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "add_prefix_space": False,
        "bos_token": START,
        "do_lower_case": True,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": LENGTH,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": END,
    }
    marks = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    _json(folder / "vocab.json", vocabulary(words))
    _json(folder / "tokenizer_config.json", config)
    _json(folder / "special_tokens_map.json", marks)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges(words))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
