"""From what a caption file says to what is trained on: lines, choices, tags, trigger word, prefix and suffix. No torch.

Each random decision has a domain of its own, so that switching one option on changes no other option's draw.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gesso.config.run import Captions
from gesso.data import wildcards
from gesso.errors import UserError
from gesso.families.prompt_weights import parse_weights, plain

__all__ = ["Captions", "Draws", "contains", "parse_weights", "plain", "problems", "render", "tags", "varies"]

Draws = Callable[[str], np.random.Generator]
"""A fresh generator for the domain it is given, the same one for the same visit."""

_BRACKETS = re.compile(r"(?<![:;=>^'\\])(?<![:;=]-)(?:[(\[](?![:;])|[)\]])")


class _Tags(NamedTuple):
    """A caption's tags: those that stay at the front, those that vary, and those that stay at the end."""

    head: list[str]
    body: list[str]
    tail: list[str]


def render(text: str, options: Captions, *, trigger: str | None, draws: Draws | None) -> str:
    """The caption of one visit from the text as it was written; `UserError` where `problems` finds any.

    In this order: lines, wildcards, tags (kept, dropped, shuffled, joined by the separator), the trigger word in front
    unless it is anywhere in the caption, prefix and suffix. Text whose tags no option touches stays as it is written.
    A text without words stays empty, whatever is put around the others. Without `draws` nothing is random: first line,
    first choices, tags in their order, none dropped.

    `[trigger]` in a text stands for the trigger word. A second `keep_separator` begins tags that stay at the end, as in
    kohya's scripts, and a caption without one has `keep`. A tag that holds the trigger word is not dropped, and a
    trigger word of several tags stays in one piece.
    """
    if draws is not None and options.dropout and draws("caption dropout").random() < options.dropout:
        return ""
    line = _line(_lines(_named(text, trigger), options), draws)
    if not line:
        return ""
    if options.wildcards:
        line = wildcards.fill(_parsed(line), _first if draws is None else _picker(draws("wildcard"))).strip()
    leads = _leads(line, options, trigger)
    parts = _parts(line, options, trigger)
    if parts is not None:
        body = parts.body if draws is None else _varied(parts.body, options, trigger, draws)
        line = _glue(options).join([*parts.head, *body, *parts.tail])
    if trigger and leads:
        line = _glue(options).join([trigger, line]) if line else trigger
    return options.prefix + line + options.suffix


def varies(text: str, options: Captions, *, trigger: str | None) -> bool:
    """Whether `render` depends on its draws for this text; if not, it gives what it gives without draws."""
    lines = _lines(_named(text, trigger), options)
    if not lines:
        return False
    if options.dropout or len(set(lines)) > 1:
        return True
    line = lines[0]
    if options.wildcards:
        parsed = _parsed(line)
        if wildcards.is_open(parsed):
            return True
        line = wildcards.fill(parsed, _first).strip()
    parts = _parts(line, options, trigger)
    if parts is None:
        return False
    droppable = [tag for tag in parts.body if not contains(tag, trigger)]
    return bool((options.shuffle and len(set(parts.body)) > 1) or (options.tag_dropout and droppable))


def problems(text: str, options: Captions) -> list[str]:
    """What is wrong with a text as these options read it, in words; nothing is wrong with an empty one."""
    found = []
    for line in dict.fromkeys(_lines(text, options)):
        if options.wildcards:
            try:
                wildcards.parse(line)
            except wildcards.Malformed as error:
                found.append(str(error))
        if options.keep_separator and line.count(options.keep_separator) > 2:
            found.append(f"'{options.keep_separator}' is there more than twice: it ends the front and begins the end")
    return found


def tags(text: str, separator: str) -> list[str]:
    """What stands between separators, without blanks around it and without empty ones.

    Separators inside a pair of brackets, such as (red, blue:1.2), separate nothing.
    """
    groups = _groups(text) if "(" in text or "[" in text else []
    if not groups:
        return [tag for part in text.split(separator) if (tag := part.strip())]
    cuts = [m for m in re.finditer(re.escape(separator), text) if not any(a < m.start() < b for a, b in groups)]
    starts, ends = [0, *(m.end() for m in cuts)], [*(m.start() for m in cuts), len(text)]
    return [tag for a, b in zip(starts, ends, strict=True) if (tag := text[a:b].strip())]


def contains(text: str, trigger: str | None) -> bool:
    """Whether the trigger word is in a text: as a whole word, in any case and with any blanks between its parts."""
    return bool(trigger and _pattern(trigger).search(text))


@functools.lru_cache(maxsize=256)
def _pattern(trigger: str) -> re.Pattern[str]:
    parts = re.findall(r"\w+|[^\w\s]", trigger)
    words = "".join(
        re.escape(part) + (r"\s+" if re.match(r"\w", part) and re.match(r"\w", after) else r"\s*" if after else "")
        for part, after in zip(parts, [*parts[1:], ""], strict=True)
    )
    return re.compile(rf"(?<!\w){words}(?!\w)", re.IGNORECASE)


def _named(text: str, trigger: str | None) -> str:
    return text.replace("[trigger]", trigger) if trigger else text


def _lines(text: str, options: Captions) -> list[str]:
    """The lines to choose from, blank ones left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if options.lines == "join":
        return [" ".join(lines)] if lines else []
    return lines[:1] if options.lines == "first" else lines


def _line(lines: Sequence[str], draws: Draws | None) -> str:
    if draws is None or len(lines) < 2:
        return lines[0] if lines else ""
    return lines[int(draws("caption line").integers(len(lines)))]


@functools.lru_cache(maxsize=4096)
def _parsed(line: str) -> wildcards.Text:
    try:
        return wildcards.parse(line)
    except wildcards.Malformed as error:
        raise UserError(
            f"{error}, in the caption '{line}'",
            where="captions.wildcards",
            fix=r"mend the caption (\{, \| and \} are the characters themselves), or set wildcards to false",
        ) from error


def _first(weights: Sequence[float]) -> int:
    """The first option that is ever taken."""
    return next(i for i, weight in enumerate(weights) if weight)


def _picker(generator: np.random.Generator) -> wildcards.Pick:
    def pick(weights: Sequence[float]) -> int:
        # One number for each choice, whatever its weights are; side="right" never takes an option of weight 0.
        edges = np.cumsum(weights)
        return int(np.searchsorted(edges, generator.random() * edges[-1], side="right"))

    return pick


def _glue(options: Captions) -> str:
    return ", " if options.separator.strip() == "," else options.separator


def _leads(line: str, options: Captions, trigger: str | None) -> bool:
    """Whether the trigger word has to be put in front."""
    return bool(trigger) and not any(contains(part, trigger) for part in (options.prefix, line, options.suffix))


def _parts(line: str, options: Captions, trigger: str | None) -> _Tags | None:
    """The line's tags, or None where no option touches them."""
    marker = options.keep_separator
    marked = bool(marker and marker in line)
    if not (options.shuffle or options.tag_dropout or marked):
        return None
    pieces = line.split(marker) if marked else [line]
    if len(pieces) > 3:
        raise UserError(
            f"'{marker}' is there more than twice in the caption '{line}'",
            where="captions.keep_separator",
            fix="leave one at the end of the front, and one at most where the end begins",
        )
    listed = [_in_one_piece(tags(piece, options.separator), options, trigger) for piece in pieces]
    if marked:
        return _Tags(listed[0], listed[1], listed[2] if len(listed) == 3 else [])
    keep = max(0, options.keep - _leads(line, options, trigger))
    return _Tags(listed[0][:keep], listed[0][keep:], [])


def _in_one_piece(found: list[str], options: Captions, trigger: str | None) -> list[str]:
    """The tags, those which only together are the trigger word as one."""
    count = len(tags(trigger, options.separator)) if trigger else 0
    for i in range(len(found) - count + 1 if count > 1 else 0):
        joined = _glue(options).join(found[i : i + count])
        if contains(joined, trigger):
            return [*found[:i], joined, *found[i + count :]]
    return found


def _varied(body: list[str], options: Captions, trigger: str | None, draws: Draws) -> list[str]:
    """The tags of one visit. The order is drawn for all of them, so that dropping some moves no other."""
    kept = np.ones(len(body), bool)
    if options.tag_dropout:
        kept = draws("tag dropout").random(len(body)) >= options.tag_dropout
    order = draws("tag order").permutation(len(body)) if options.shuffle else np.arange(len(body))
    return [body[i] for i in order if kept[i] or contains(body[i], trigger)]


def _groups(text: str) -> list[tuple[int, int]]:
    """Where pairs of brackets begin and end; those of smileys such as :( and (: are no brackets."""
    groups, opened = [], []
    for mark in _BRACKETS.finditer(text):
        found, i = mark.group(), mark.start()
        if found in "([":
            opened.append(i)
        elif opened and text[opened[-1]] + found in ("()", "[]"):
            groups.append((opened.pop(), i))
    return groups
