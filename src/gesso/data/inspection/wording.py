"""What captions are made of: their lengths, their most frequent tags or words, and which of these come together."""

from __future__ import annotations

import re
from collections import Counter as Tally
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gesso.data import captions
from gesso.data.tokens import Counter

_MOST = 200
"""Tags that are counted against each other."""
_COMMON = (
    "a an and are as at be by for from has have her his in into is it its of on or that the their them there these "
    "they this those to was were which while who with"
)
_FILLERS = frozenset(_COMMON.split())
_WORD = re.compile(r"[^\W_][\w'-]*")
_TAG_WORDS = 3.0


class Pair(NamedTuple):
    """Two terms that come together in so many captions."""

    one: str
    other: str
    captions: int


@dataclass(frozen=True)
class Wording:
    """The captions of a data set in figures; empty ones are counted nowhere but in `tokens`."""

    tokens: tuple[int, ...]
    """Of each caption, in the order of the pictures."""
    method: str
    """How they were counted."""
    exact: bool
    captions: int
    unit: Literal["tags", "words"]
    terms: tuple[tuple[str, int], ...]
    """The most frequent ones, and in how many captions each is."""
    distinct: int
    together: NDArray[np.int64]
    """[k, k]: in how many captions two of the first k terms come together; the diagonal is how many have each."""

    def pairs(self, most: int = 20) -> list[Pair]:
        """Terms that come together most often."""
        one, other = np.triu_indices(len(self.together), 1)
        counts = self.together[one, other]
        order = np.argsort(-counts, kind="stable")[:most]
        names = [term for term, _ in self.terms]
        return [Pair(names[one[i]], names[other[i]], int(counts[i])) for i in order if counts[i]]

    def everywhere(self) -> list[str]:
        """Terms that are in every caption."""
        return [term for term, count in self.terms if count == self.captions]

    def as_json(self) -> dict[str, Any]:
        """The figures, JSON-ready."""
        lengths = sorted(self.tokens)
        return {
            "captions": self.captions,
            "tokens": {
                "method": self.method,
                "exact": self.exact,
                "median": lengths[len(lengths) // 2] if lengths else 0,
                "longest": lengths[-1] if lengths else 0,
            },
            "unit": self.unit,
            "distinct": self.distinct,
            "terms": [{"term": term, "captions": count} for term, count in self.terms],
            "pairs": [pair._asdict() for pair in self.pairs()],
        }


def wording(texts: Sequence[str], *, tokens: Counter, separator: str) -> Wording:
    """Figures about captions. Those of few words between separators are read as tags, others as words."""
    counts = tuple(tokens.count(texts)) if texts else ()
    written = [text for text in texts if text.strip()]
    unit, listed = _terms(written, separator)
    tally = Tally(term for terms in listed for term in terms)
    top = sorted(tally.items(), key=lambda pair: (-pair[1], pair[0]))[:_MOST]
    places = {term: i for i, (term, _) in enumerate(top)}
    together = np.zeros((len(top), len(top)), np.int64)
    for terms in listed:
        there = [places[term] for term in terms if term in places]
        together[np.ix_(there, there)] += 1
    return Wording(counts, tokens.method, tokens.exact, len(written), unit, tuple(top), len(tally), together)


def _terms(texts: Sequence[str], separator: str) -> tuple[Literal["tags", "words"], list[list[str]]]:
    """The distinct terms of each text, in lower case."""
    tags = [captions.tags(text.lower(), separator) for text in texts]
    parts = [tag for listed in tags for tag in listed]
    words = sum(len(tag.split()) for tag in parts)
    # Prose has few separators and many words between them.
    if parts and len(parts) > 1.5 * len(texts) and words <= _TAG_WORDS * len(parts):
        return "tags", [list(dict.fromkeys(listed)) for listed in tags]
    found = [dict.fromkeys(word for word in _WORD.findall(text.lower()) if word not in _FILLERS) for text in texts]
    return "words", [list(terms) for terms in found]
