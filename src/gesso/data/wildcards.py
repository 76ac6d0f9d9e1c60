"""Choices in captions: `{a|b}`, `{2::a|b}` (a twice as often as b), nested as deep as one likes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_MARKS = re.compile(r"\\[{}|]|[{}|]")
_WEIGHT = re.compile(r"\s*([-+\d.,%][-+\d.,%eE]*)\s*::")
_DEEPEST = 32

Pick = Callable[[Sequence[float]], int]
"""Which of several options, from their weights."""


class Malformed(ValueError):
    """A choice that cannot be read, in words for the user."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One `{...}`: its options, and how often each is taken in proportion to the others."""

    options: tuple[Text, ...]
    weights: tuple[float, ...]


Text = tuple["str | Choice", ...]
"""What a caption is made of, from left to right."""


def parse(text: str) -> Text:
    r"""The choices in a text; `\{`, `\|` and `\}` are the characters themselves. Raises `Malformed`."""
    # Each open brace, where it is, and the options that have been read of it; the first entry is the text outside.
    frames: list[tuple[int, list[list[str | Choice]]]] = [(0, [[]])]
    end = 0
    for mark in _MARKS.finditer(text):
        start, options = frames[-1]
        options[-1].append(text[end : mark.start()])
        found, end = mark.group(), mark.end()
        if found[0] == "\\":
            options[-1].append(found[1])
        elif found == "{":
            if len(frames) > _DEEPEST:
                raise Malformed(f"choices are nested more than {_DEEPEST} deep")
            frames.append((mark.start(), [[]]))
        elif found == "|" and len(frames) > 1:
            options.append([])
        elif found == "|":
            options[-1].append(found)
        elif len(frames) == 1:
            raise Malformed(f"the closing brace at character {end} has no opening one")
        else:
            frames.pop()
            frames[-1][1][-1].append(_choice(options, text[start:end]))
    if len(frames) > 1:
        raise Malformed(f"the brace at character {frames[-1][0] + 1} is never closed")
    return (*frames[0][1][0], text[end:])


def fill(text: Text, pick: Pick) -> str:
    """The text with every choice made, from left to right and from the outside to the inside."""
    return "".join(part if isinstance(part, str) else fill(part.options[pick(part.weights)], pick) for part in text)


def is_open(text: Text) -> bool:
    """Whether anything is left to choose."""
    for choice in (part for part in text if isinstance(part, Choice)):
        taken = {option for option, weight in zip(choice.options, choice.weights, strict=True) if weight}
        if len(taken) > 1 or is_open(next(iter(taken))):
            return True
    return False


def _choice(options: list[list[str | Choice]], written: str) -> Choice:
    shown = written if len(written) <= 40 else written[:37] + "..."
    texts, weights = [], []
    for option in options:
        weight = 1.0
        # The text before the first mark or choice is the first part, though it may be empty.
        if isinstance(option[0], str) and (given := _WEIGHT.match(option[0])):
            weight = _number(given.group(1), shown)
            option = [option[0][given.end() :], *option[1:]]
        texts.append(tuple(part for part in option if part != ""))
        weights.append(weight)
    if not any(texts):
        raise Malformed(f"the choice {shown} has no words in it")
    if not any(weights):
        raise Malformed(f"all options of {shown} have the weight 0")
    return Choice(tuple(texts), tuple(weights))


def _number(text: str, shown: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise Malformed(f"'{text}' in {shown} is no weight; write a number such as 2 or 0.5")
    return number
