"""The rules about new words."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gesso.config.findings import Finding, error, warning
from gesso.config.run import RunConfig


def rates(run: RunConfig) -> dict[str, float]:
    """The rate of the vectors of new words by the key that it comes from; empty where none train."""
    own, common = run.training.token_learning_rate, run.training.learning_rate
    rate = {"training.token_learning_rate": own} if own is not None else {"training.learning_rate": common}
    return rate if run.tokens else {}


def words(run: RunConfig) -> Iterator[Finding]:
    """Their learning rate, which is of another order than that of matrices."""
    key, usual = "training.token_learning_rate", "5e-4 to 5e-3 is usual"
    if run.training.token_learning_rate is not None and not run.tokens:
        yield error(key, "a rate is given, but no new words are trained", "list them in adapter.tokens")
    finds = run.training.optimizer.kind is not None and run.training.optimizer.kind.finds_rate
    for name, rate in rates(run).items():
        if rate > 5e-2 and not finds:
            yield warning(name, f"{rate:g} is very high for vectors of words", usual)
        elif 0 < rate < 1e-5:
            yield warning(name, f"{rate:g} is so low that a word will hardly be learnt", usual)
        elif not rate and name == key:
            yield warning(name, "the new words stay what they start from", usual)


RULES: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (words,)
