"""Two threads, each with one half of every batch.

Networks this small gain little from threads inside an operation, and lose much wherever anything else runs on the
machine, since the threads wait for one another in every layer. Halves meet once a step. A batch is cut in two on any
machine, so the result does not depend on the number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LossOf = Callable[[slice], Tensor]
"""The mean loss of the given rows of a batch."""


class Halves:
    """Computes on two halves of a batch at once; made by `two_threads`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool

    def gradients(self, loss_of: LossOf, *, rows: int, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Gradients of the mean loss over a batch of `rows`; zeros for parameters that the loss does not reach.

        `loss_of` must draw no random numbers, as the two threads would race for them.
        """

        def half(part: slice) -> list[Tensor]:
            loss = loss_of(part) * ((part.stop - part.start) / rows)
            return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

        first, second = self._pool.map(half, _cut(rows))
        torch._foreach_add_(first, second)
        return first

    def mapped(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """A function of each row, without gradients."""

        def half(part: slice) -> Tensor:
            with torch.no_grad():
                return function(rows[part])

        return torch.cat(list(self._pool.map(half, _cut(len(rows)))))


@contextmanager
def two_threads() -> Iterator[Halves]:
    """Inside: two threads for halves, and one thread inside each operation of torch."""
    with one_thread_per_operation(), ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Halves(pool)


@contextmanager
def one_thread_per_operation() -> Iterator[None]:
    """Inside: torch does not split its operations, which is fastest for networks this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cut(rows: int) -> tuple[slice, slice]:
    return slice(0, rows // 2), slice(rows // 2, rows)
