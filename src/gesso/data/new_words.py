"""New words that are to be trained, held against the captions that are to teach them. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gesso.core.tokens import NewToken
from gesso.data.captions import contains
from gesso.data.plan import Plan
from gesso.data.sources import some
from gesso.errors import Problems, UserError

Count = Callable[[Sequence[str]], list[int]]
"""How many tokens texts have."""


def require(plan: Plan, tokens: Sequence[NewToken]) -> None:
    """Raise `Problems` for words that no caption has: nothing would ever train them."""
    texts = [*plan.texts().items()]
    # A word may stand in one of several lines or choices, which only the text as it was written has all of.
    idle = [
        UserError(
            f"no caption has the new word {token.token}, so it would never be trained",
            where=f"adapter.tokens.{i}.token",
            fix="write it into the captions, or set data.sources[].trigger to it",
        )
        for i, token in enumerate(tokens)
        if not any(contains(text, token.token) or contains(row.caption, token.token) for text, row in texts)
    ]
    if idle:
        raise Problems(idle)


def notices(plan: Plan, tokens: Sequence[NewToken], count: Count, *, alone: bool) -> Iterator[str]:
    """What is worth knowing: initial words that are no single tokens and, where words train `alone`, idle captions."""
    for token in tokens:
        words = token.initial.split()
        for word, pieces in zip(words, count(words), strict=True):
            if pieces > 1:
                what = f"'{word}', which {token.token} starts from, is no single token of the model's"
                yield f"{what}: its {pieces} pieces are taken one by one. A more common word gives a better start"
    own = {text: row for text, row in plan.texts().items() if row.role == "instance"}
    without = [row.place for text, row in own.items() if not any(contains(text, t.token) for t in tokens)]
    if alone and without:
        yield f"{len(without)} of {len(own)} captions have no new word, and teach nothing: {some(map(str, without))}"
