"""Weights of words in prompts, `(x:1.2)`: how they are written, and what they do to a text encoder's hidden states.

Notation and arithmetic are those of AUTOMATIC1111's webui ("attention/emphasis"), from whose pictures users copy their
prompts. Brackets without a partner are ordinary text, where the webui lets an open one run to the end of the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gesso.core.tokens import expanded

if TYPE_CHECKING:
    from torch import Tensor

Weighted = list[tuple[str, float]]
"""Stretches of text with their weights."""

_STEP = 1.1
_MARKS = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]")
_CLOSES = {")": "(", "]": "["}


def parse_weights(text: str) -> Weighted:
    r"""The text without its weight notation, in stretches of one weight; neighbours differ in weight.

    `(x)` weighs 1.1 and `[x]` 1 / 1.1 times as much, `(x:1.2)` 1.2 times; what is nested multiplies. `\(` and `\\` are
    the characters themselves, and so is a bracket without its partner. There is always one stretch at least.
    """
    # Each open bracket, and what has been read since; the first entry is the text outside of all.
    frames: list[tuple[str, Weighted]] = [("", [])]
    end = 0
    for mark in _MARKS.finditer(text):
        frames[-1][1].append((text[end : mark.start()], 1.0))
        end = mark.end()
        found = mark.group()
        if found[0] == "\\":
            frames[-1][1].append((found[1], 1.0))
        elif found in "([":
            frames.append((found, []))
        elif frames[-1][0] == _CLOSES[found[-1]]:
            opened, inside = frames.pop()
            given = mark.group(1)
            factor = float(given) if given is not None else _STEP if opened == "(" else 1 / _STEP
            frames[-1][1].extend((part, weight * factor) for part, weight in inside)
        else:
            frames[-1][1].append((found, 1.0))
    stretches = [(text[end:], 1.0)]
    for opened, inside in reversed(frames):
        stretches = [(opened, 1.0), *inside, *stretches]
    return _joined(stretches)


def plain(text: str) -> str:
    """The words alone, as they are tokenised."""
    return "".join(part for part, _ in parse_weights(text))


def token_weights(tokenizer: Any, captions: Sequence[str]) -> list[list[tuple[int, float]]]:
    """Every caption's token ids with their weights, of any number, without start and end marks."""
    parsed = [parse_weights(caption) for caption in captions]
    texts = [part for parts in parsed for part, _ in parts]
    found = tokenizer(texts, truncation=False).input_ids if texts else []
    encoded = iter(expanded(tokenizer, ids[1:-1]) for ids in found)
    return [[(token, weight) for _, weight in parts for token in next(encoded)] for parts in parsed]


def emphasise(states: Tensor, weights: Tensor) -> Tensor:
    """Hidden states [N, T, D] times their tokens' weights [N, T], then scaled so that the mean of each [T, D] stays.

    Where all weights of a row are 1 it comes back bit for bit. The webui takes the mean over all prompts of a batch;
    here each row has its own, so that no prompt depends on its company. Computed in float32, returned in their dtype.
    """
    if bool((weights == 1).all()):
        return states
    exact = states.float()
    scaled = exact * weights.to(exact.device, exact.dtype)[..., None]
    means = exact.mean((1, 2), keepdim=True), scaled.mean((1, 2), keepdim=True)
    return (scaled * (means[0] / means[1])).to(states.dtype)


def _joined(stretches: Weighted) -> Weighted:
    """Without empty stretches, and neighbours of one weight as one; rounding makes [(x)] weigh exactly 1."""
    joined: Weighted = []
    for part, raw in stretches:
        weight = round(raw, 12)
        if part and joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + part, weight)
        elif part:
            joined.append((part, weight))
    return joined or [("", 1.0)]
