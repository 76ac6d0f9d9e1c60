"""Plan and cache -> batches. Threads only prepare windows ahead of time; they decide nothing."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import TYPE_CHECKING, overload

import torch

from gesso.core.batch import Batch
from gesso.core.random import Draws, SampleKey
from gesso.data.pairs import sides
from gesso.errors import ResourceError

if TYPE_CHECKING:
    from types import TracebackType

    from gesso.core.seams import Family
    from gesso.data.cache import LatentCache, LiveLatents, LiveText, TextCache
    from gesso.data.plan import Plan, Visit


class Loader:
    """The training data as optimiser steps; a `core.seams.Stream`.

    `text` is None where text encoders train. Of each step the loader gives the share of process `rank`. `stop` is the
    first step that is never asked for, so that nothing is prepared beyond the run. `patience` is how many seconds one
    window may take before its threads are given up.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        latents: LatentCache | LiveLatents,
        text: TextCache | LiveText | None,
        family: Family,
        rank: int = 0,
        workers: int = 0,
        stop: int | None = None,
        patience: float = 120.0,
    ) -> None:
        self._plan, self._latents, self._text, self._family, self._rank = plan, latents, text, family, rank
        self._ahead = _Ahead(self._prepare, workers, stop, patience) if workers else None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return self._plan.steps_per_epoch

    def window_size(self, step: int) -> int:
        """Samples in optimiser step `step`, of all processes together."""
        return self._plan.window_size(step)

    def window(self, step: int) -> Iterator[Batch]:
        """The batches of optimiser step `step`, the same for any number of workers."""
        return iter(self._ahead.take(step) if self._ahead is not None else self._prepare(step))

    def validation_batches(self, timesteps: int) -> HeldOut:
        """The held-out pictures at `timesteps` fixed, evenly spread u; the same batches every time."""
        groups = [(visits, k) for visits in self._plan.microbatches(self._plan.validation) for k in range(timesteps)]

        def batch(i: int) -> Batch:
            visits, k = groups[i]
            made = self._batch(
                visits,
                samples=tuple(SampleKey(f"validation:{v.id}", k) for v in visits),
                epoch=0,
                u=torch.full((len(visits),), (k + 0.5) / timesteps),
                weights=torch.ones(len(visits)),
                counts=Counter[str](v.role for v in visits),
            )
            return replace(made, held_out=True)

        return HeldOut(batch, len(groups))

    def close(self) -> None:
        """End the threads."""
        if self._ahead is not None:
            self._ahead.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, step: int) -> list[Batch]:
        window = self._plan.window(step)
        counts = Counter[str](visit.role for visit in window)
        return [
            self._batch(
                visits,
                samples=tuple(v.key for v in visits),
                epoch=visits[0].epoch,
                u=None,
                weights=torch.tensor([v.row.weight for v in visits], dtype=torch.float32),
                counts=counts,
            )
            for visits in self._plan.microbatches(self._plan.share(window, self._rank))
        ]

    def _batch(
        self,
        visits: Sequence[Visit],
        *,
        samples: tuple[SampleKey, ...],
        epoch: int,
        u: torch.Tensor | None,
        weights: torch.Tensor,
        counts: Mapping[str, int],
    ) -> Batch:
        draws = Draws(self._plan.seed, epoch, samples)
        encoded = [[self._latents.read(side) for side in sides(v)] for v in visits]
        moments = torch.stack([one.moments for one, *_ in encoded])
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        # One draw for both pictures of a pair, so that they differ in nothing but what they show.
        posterior = torch.from_numpy(draws.normal("vae posterior", shape))
        rivals = [one.moments for _, *others in encoded for one in others]
        captions = tuple(v.caption for v in visits)
        text = None
        if self._text is not None:
            entries = [self._text.read(caption) for caption in captions]
            text = {name: torch.stack([entry[name] for entry in entries]) for name in entries[0]}
        return Batch(
            latents=self._family.latents(moments, posterior),
            noise=torch.from_numpy(draws.normal("noise", shape)),
            u=torch.from_numpy(draws.uniform("timestep")).float() if u is None else u,
            weights=weights,
            geometry=tuple(v.geometry for v in visits),
            captions=captions,
            text=text,
            mask=_masks([one.mask for one, *_ in encoded], moments),
            rejected=self._family.latents(torch.stack(rivals), posterior) if rivals else None,
            files=tuple(" and ".join(str(side.row.place) for side in sides(v)) for v in visits),
            draws=draws,
            roles=tuple(v.role for v in visits),
            counts=counts,
        )


def _masks(masks: Sequence[torch.Tensor | None], moments: torch.Tensor) -> torch.Tensor | None:
    """Masks as a batch; pictures without one count everywhere."""
    if all(mask is None for mask in masks):
        return None
    everywhere = torch.ones(1, *moments.shape[2:])
    return torch.stack([everywhere if mask is None else mask for mask in masks])


class HeldOut(Sequence[Batch]):
    """The validation batches, each read when it is asked for: thousands of held-out pictures are not kept in memory."""

    def __init__(self, make: Callable[[int], Batch], count: int) -> None:
        self._make, self._count = make, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        return self._make(index % self._count)


class _Ahead:
    """Threads that prepare the next windows while the current one is used."""

    def __init__(self, prepare: Callable[[int], list[Batch]], workers: int, stop: int | None, patience: float) -> None:
        self._prepare, self._depth, self._stop, self._patience = prepare, workers + 1, stop, patience
        self._jobs: queue.SimpleQueue[tuple[int, Future[list[Batch]]] | None] = queue.SimpleQueue()
        self._begun: dict[int, Future[list[Batch]]] = {}
        # Daemons: a thread stuck in a dead network disk must not keep the process alive.
        self._threads = [
            threading.Thread(target=self._work, name=f"gesso-loader-{i}", daemon=True) for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def take(self, step: int) -> list[Batch]:
        """The window of `step`, which is then forgotten; the next ones are begun."""
        last = step + self._depth
        for other in [s for s in self._begun if not step <= s <= last]:
            self._begun.pop(other).cancel()
        for coming in range(step, last + 1):
            if coming not in self._begun and (coming == step or self._stop is None or coming < self._stop):
                future: Future[list[Batch]] = Future()
                self._begun[coming] = future
                self._jobs.put((coming, future))
        return self._result(step, self._begun.pop(step))

    def close(self) -> None:
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(timeout=5)

    def _result(self, step: int, future: Future[list[Batch]]) -> list[Batch]:
        deadline = time.monotonic() + self._patience
        while not wait([future], timeout=0.5).done:
            dead = [thread.name for thread in self._threads if not thread.is_alive()]
            if dead or time.monotonic() > deadline:
                state = f"has died ({dead[0]})" if dead else f"gave nothing for {self._patience:.0f} seconds"
                raise ResourceError(
                    f"a thread that prepares data {state}",
                    where=f"step {step}",
                    fix="check the disk that holds data.cache; data.workers: 0 prepares data in the loop",
                )
        return future.result()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            step, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._prepare(step))
            except BaseException as error:
                # Whatever it was, the loop that waits for this window must see it.
                future.set_exception(error)
