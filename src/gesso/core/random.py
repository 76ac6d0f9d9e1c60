"""Counter-based random draws: every number is a pure function of (seed, domain, epoch, sample, repeat).

No generator state exists, so none has to be saved, and the world size, batch split, worker count and
previews cannot change what a sample sees. Generator: Philox (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3") keyed by a 128-bit BLAKE2b hash. Drawn with numpy on the CPU because
torch's CPU generator keeps only 32 bits of its seed, and so that every device sees the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def key(seed: int, domain: str, *parts: int | str) -> int:
    """A 128-bit key for one stream of draws; `domain` names what the draw is for."""
    text = "\x1f".join([str(seed), domain, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, domain: str, *parts: int | str) -> np.random.Generator:
    """A fresh numpy generator at the start of the stream that the arguments name."""
    return np.random.Generator(np.random.Philox(key=key(seed, domain, *parts)))


def permutation(count: int, seed: int, domain: str, *parts: int | str) -> NDArray[np.int64]:
    """A keyed shuffle of range(count)."""
    return generator(seed, domain, *parts).permutation(count)


@dataclass(frozen=True)
class SampleKey:
    """One visit of one image: its content hash, and which of its repeats in the epoch this is."""

    id: str
    repeat: int = 0


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch, each keyed by its own sample: row i depends on samples[i] alone."""

    seed: int
    epoch: int
    samples: tuple[SampleKey, ...]

    def normal(self, domain: str, shape: Sequence[int]) -> NDArray[np.float32]:
        """Standard normal float32 numbers, [batch, *shape]."""
        rows = [self._generator(domain, s).standard_normal(tuple(shape), np.float32) for s in self.samples]
        return np.stack(rows)

    def uniform(self, domain: str) -> NDArray[np.float64]:
        """One float64 number in [0, 1) per sample, [batch]."""
        return np.array([self._generator(domain, s).random() for s in self.samples])

    def _generator(self, domain: str, sample: SampleKey) -> np.random.Generator:
        return generator(self.seed, domain, self.epoch, sample.id, sample.repeat)
