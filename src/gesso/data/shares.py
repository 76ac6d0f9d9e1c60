"""How often each picture is seen in an epoch: repeats, shares of the sources, balance between concepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gesso.core.random import permutation
from gesso.data.rows import Role, Rows
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.config.run import Data


class Visits(NamedTuple):
    """The visits of an epoch before they are shuffled, sorted: sample and repeat, int32 each."""

    samples: NDArray[np.int32]
    repeats: NDArray[np.int32]


class _Group(NamedTuple):
    """Samples of which a part comes once more in each epoch."""

    members: NDArray[np.int32]
    """In the order in which they take turns."""
    extra: int


class Repeats:
    """The visits of each epoch, as many in every one.

    Of samples with 2.5 repeats each comes twice in every epoch, and half of them a third time: they take turns, in an
    order drawn once, so that over the epochs all are seen equally often. Whoever takes turns alone comes every time.
    """

    def __init__(self, repeats: NDArray[np.float64], groups: NDArray[np.int32], *, seed: int) -> None:
        """`repeats` [n] of each sample; samples of one group and one number of repeats take turns."""
        self._whole = np.floor(repeats + _ROUNDING).astype(np.int32)
        part = np.clip(repeats - self._whole, 0, 1)
        self._groups: list[_Group] = []
        for group in np.unique(groups[part > _ROUNDING]):
            for value in np.unique(part[(groups == group) & (part > _ROUNDING)]):
                members = np.flatnonzero((groups == group) & (part == value)).astype(np.int32)
                turns = permutation(len(members), seed, "turns", int(group), f"{value:.9f}")
                self._groups.append(_Group(members[turns], max(1, round(float(value) * len(members)))))
        self._count = int(self._whole.sum()) + sum(group.extra for group in self._groups)

    def __len__(self) -> int:
        """Visits in an epoch."""
        return self._count

    def of(self, epoch: int) -> Visits:
        """The visits of one epoch."""
        repeats = self._whole
        if self._groups:
            repeats = repeats.copy()
            for members, extra in self._groups:
                repeats[members[(epoch * extra + np.arange(extra)) % len(members)]] += 1
        samples = np.repeat(np.arange(len(repeats), dtype=np.int32), repeats)
        first = np.cumsum(repeats) - repeats
        return Visits(samples, (np.arange(len(samples)) - first[samples]).astype(np.int32))


_ROUNDING = 1e-9


def repeats_of(rows: Rows, samples: NDArray[np.int32], data: Data, *, role: Role, seed: int) -> Repeats:
    """The visits of those samples of `rows` that have a role (`samples` holds each one's row).

    Those of one source take turns. Shares are between sources of the role; only instances are balanced by concept.
    """
    sources = rows.numbers("source")[samples]
    if any(source.share is not None for source in data.sources if source.role == role):
        repeats = _by_share(sources, data, role)
    else:
        repeats = rows.numbers("repeats")[samples]
    if data.balance and role == "instance" and len(samples):
        repeats = _balanced(rows, samples, repeats)
    return Repeats(repeats, sources, seed=seed)


def _by_share(sources: NDArray[np.int32], data: Data, role: Role) -> NDArray[np.float64]:
    """Repeats in proportion to the shares, such that the source that needs fewest is seen exactly once."""
    counts = np.bincount(sources, minlength=len(data.sources))
    for i, source in enumerate(data.sources):
        if source.role == role and source.share is None:
            raise UserError(
                "other sources have a share, and this one has none", where=f"data.sources.{i}.share", fix="give it one"
            )
    shares = np.array([source.share or 1.0 for source in data.sources], np.float64)
    there = counts > 0
    scale = (counts[there] / shares[there]).max() if len(sources) else 1.0
    repeats: NDArray[np.float64] = (scale * shares / np.maximum(counts, 1))[sources]
    return repeats


def _balanced(rows: Rows, samples: NDArray[np.int32], repeats: NDArray[np.float64]) -> NDArray[np.float64]:
    """As many samples for each concept as the largest has."""
    numbers, names = rows.words("concept")
    concepts = numbers[samples]
    if (concepts == concepts[0]).all():
        what = f"all pictures have the same concept, '{names[int(concepts[0])]}', so there is nothing to balance"
        raise UserError(what, where="data.balance", fix="set data.sources[].concept of each source, or take it out")
    sums = np.bincount(concepts, weights=repeats)
    factors = np.divide(sums.max(), sums, out=np.ones_like(sums), where=sums > 0)
    balanced: NDArray[np.float64] = repeats * factors[concepts]
    return balanced
