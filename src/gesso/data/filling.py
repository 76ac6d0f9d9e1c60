"""Who makes which entry: the missing ones found, the work shared between processes without a word between them.

Every process begins at its own share. Where it meets entries that another one is just making, it goes on somewhere
else; and it ends only when everything is there, so that a slow or dead process costs time and nothing more.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from gesso.core.events import Progress, Warned
from gesso.data.threads import ahead

if TYPE_CHECKING:
    from gesso.core.seams import Emit
    from gesso.data.store import Store

_THREADS = max(2, min(8, os.cpu_count() or 1))
T = TypeVar("T")
P = TypeVar("P")
R = TypeVar("R")


class Filled(NamedTuple):
    """What filling a cache did: entries made, found, and (among those made) found damaged."""

    encoded: int
    reused: int
    damaged: int


class Work(NamedTuple, Generic[T, P, R]):
    """How entries of one kind are made: how many at once, which together, in what order, and the three steps."""

    size: Callable[[T], int]
    shape: Callable[[T], Hashable]
    order: Callable[[T], tuple[object, ...]]
    load: Callable[[T], P]
    encode: Callable[[Sequence[T], Sequence[P]], Sequence[R]]
    save: Callable[[str, T, R], None]


class Filling(Generic[T, P, R]):
    """One `fill`: what is missing, who makes it, and what is told about it."""

    def __init__(
        self, store: Store, task: str, wanted: Mapping[str, T], work: Work[T, P, R], emit: Emit, step: int
    ) -> None:
        self._store, self._task, self._wanted, self._work = store, task, wanted, work
        self._emit, self._step = emit, step
        self._encoded = self._reused = self._damaged = 0

    def run(self, rank: int, world_size: int) -> Filled:
        """Make what is missing, this rank's share first; afterwards everything is there."""
        names = sorted(self._wanted, key=lambda name: self._work.order(self._wanted[name]))
        begin, end = (len(names) * r // world_size for r in (rank, rank + 1))
        anywhere = random.Random()
        for share in (names[begin:end], names[end:] + names[:begin]):
            todo = self._missing(share)
            while todo:
                todo = self._make(todo)
                if todo:
                    # Somebody else is at the same place: go on elsewhere. Who makes an entry changes nothing in it.
                    jump = anywhere.randrange(len(todo))
                    todo = self._left([*todo[jump:], *todo[:jump]])
        if self._damaged:
            self._emit(Warned(self._step, f"{self._damaged} damaged cache entries were made again"))
        return Filled(self._encoded, self._reused, self._damaged)

    def _missing(self, names: Sequence[str]) -> list[str]:
        """Those without a good entry. Only entries without a seal are read for that."""
        states = {name: self._store.glance(name) for name in names}
        unsure = [name for name, state in states.items() if state == "unsure"]
        for name, state in zip(unsure, ahead(self._store.check, unsure, threads=4, depth=16), strict=True):
            states[name] = state
            self._damaged += state == "damaged"
        self._found(sum(state == "good" for state in states.values()))
        return [name for name, state in states.items() if state != "good"]

    def _left(self, names: Sequence[str]) -> list[str]:
        left = [name for name in names if self._store.check(name) != "good"]
        self._found(len(names) - len(left))
        return left

    def _make(self, names: Sequence[str]) -> list[str]:
        """Encode in this order; returns what is left when it shows that another process is making the same."""
        todo = dict.fromkeys(names)
        with closing(self._batches(names)) as batches:
            for batch in batches:
                # Looked at again just before the costly part.
                fresh = [name for name in batch if self._store.check(name) != "good"]
                met = len(batch) - len(fresh)
                self._found(met)
                if fresh:
                    met += self._encode({name: batch[name] for name in fresh})
                for name in batch:
                    del todo[name]
                if met:
                    break
        return list(todo)

    def _encode(self, batch: Mapping[str, P]) -> int:
        """Make a batch of entries; returns how many of them appeared meanwhile."""
        met = 0
        made = self._work.encode([self._wanted[name] for name in batch], list(batch.values()))
        for name, one in zip(batch, made, strict=True):
            met += self._store.glance(name) == "good"
            self._work.save(name, self._wanted[name], one)
            self._encoded += 1
            self._report(1)
        return met

    def _batches(self, names: Sequence[str]) -> Generator[dict[str, P], None, None]:
        """Neighbours of one shape, loaded."""
        work, batch = self._work, dict[str, P]()
        shape: Hashable = None
        loaded = ahead(lambda name: work.load(self._wanted[name]), names, threads=_THREADS, depth=2 * _THREADS)
        for name, one in zip(names, loaded, strict=True):
            item = self._wanted[name]
            if batch and (len(batch) >= work.size(item) or work.shape(item) != shape):
                yield batch
                batch = {}
            shape = work.shape(item)
            batch[name] = one
        if batch:
            yield batch

    def _found(self, count: int) -> None:
        self._reused += count
        self._report(count)

    def _report(self, count: int) -> None:
        """At most about 200 events a task, the last one always."""
        done, total = self._encoded + self._reused, len(self._wanted)
        part = max(1, total // 200)
        if count and (done == total or done // part > (done - count) // part):
            self._emit(Progress(self._step, self._task, done, total))
