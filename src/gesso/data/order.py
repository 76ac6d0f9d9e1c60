"""Which sample comes when: epochs cut into windows of one shape where there are enough, shuffled by key."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gesso.core.random import permutation
from gesso.data.buckets import Size
from gesso.data.shares import Repeats


class Turns(NamedTuple):
    """The visits of an epoch in the order of training; window k is the k-th stretch of `step_size`."""

    samples: NDArray[np.int32]
    repeats: NDArray[np.int32]


class Order:
    """The order of some of the samples, `members`; `repeats` and `buckets` [n, 2] hold one entry for each of these.

    Within a bucket visits are shuffled and cut into windows; the rest of all buckets share mixed windows. It depends on
    nothing but its members: other samples beside them change no turn. `stream` keeps two orders of a run apart.
    """

    def __init__(
        self,
        members: NDArray[np.int32],
        *,
        repeats: Repeats,
        buckets: NDArray[np.int32],
        step_size: int,
        seed: int,
        stream: str = "",
    ) -> None:
        self._members, self._repeats, self._size, self._seed, self._stream = members, repeats, step_size, seed, stream
        self._bucket, self._bucket_sizes = codes(buckets)
        self.epoch = functools.lru_cache(maxsize=2)(self._build)

    def __len__(self) -> int:
        """Visits in an epoch."""
        return len(self._repeats)

    def stretch(self, start: int, count: int) -> Iterator[tuple[int, int, int]]:
        """`count` visits from position `start` on, epoch after epoch without end: epoch, sample and repeat of each.

        There are none of an order without members.
        """
        for position in range(start, start + count) if len(self) else ():
            epoch, place = divmod(position, len(self))
            turns = self.epoch(epoch)
            yield epoch, int(turns.samples[place]), int(turns.repeats[place])

    def _build(self, epoch: int) -> Turns:
        visits = self._repeats.of(epoch)
        bucket, size = self._bucket[visits.samples], self._size
        members = np.split(np.argsort(bucket, kind="stable"), np.cumsum(np.bincount(bucket))[:-1])
        whole, rests = [], []
        for code in sorted(range(len(members)), key=lambda code: self._bucket_sizes[code]):
            name = "x".join(map(str, self._bucket_sizes[code]))
            shuffled = members[code][self._shuffled(len(members[code]), "order", epoch, name)]
            cut = len(shuffled) // size * size
            whole.append(shuffled[:cut])
            rests.append(shuffled[cut:])
        # The rests stay together by bucket, so that mixed windows fall into as few shapes as possible.
        order = np.concatenate([*whole, *(rests[i] for i in self._shuffled(len(rests), "remainder", epoch))])
        full = len(order) // size
        windows = order[: full * size].reshape(full, size)[self._shuffled(full, "windows", epoch)]
        order = np.concatenate([windows.ravel(), order[full * size :]])
        return Turns(self._members[visits.samples[order]], visits.repeats[order])

    def _shuffled(self, count: int, domain: str, *parts: int | str) -> NDArray[np.int64]:
        return permutation(count, self._seed, self._stream + domain, *parts)


def codes(buckets: NDArray[np.int32]) -> tuple[NDArray[np.int64], list[Size]]:
    """Each bucket's number, and the buckets."""
    sizes, numbers = np.unique(buckets, axis=0, return_inverse=True)
    return numbers.ravel(), [(int(wide), int(high)) for wide, high in sizes]
