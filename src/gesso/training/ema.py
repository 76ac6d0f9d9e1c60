"""Exponential moving average of the trained weights.

The shadow is float64: at a decay of 0.9999 a float32 one loses every change below 1e-4 of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gesso.config.run import EMA
from gesso.errors import UserError
from gesso.training.optim import FlatGroup

_PIECE = 2**24


class Average:
    """The running average of some flat groups."""

    def __init__(self, spec: EMA, groups: Sequence[FlatGroup]) -> None:
        self._spec, self._groups = spec, list(groups)
        # Metal has no float64; there the shadow lives on the CPU.
        self._shadows = [
            g.flat.detach().to("cpu" if g.flat.device.type == "mps" else g.flat.device, torch.float64) for g in groups
        ]

    @torch.no_grad()
    def update(self, finished_steps: int) -> None:
        """Move towards the weights after optimiser step number `finished_steps` (1-based)."""
        decay = self._spec.decay_at(finished_steps)
        for shadow, group in zip(self._shadows, self._groups, strict=True):
            # In pieces: float64 copies of all weights at once would be as large as the shadow itself.
            for average, weights in zip(shadow.split(_PIECE), group.flat.detach().split(_PIECE), strict=True):
                average.lerp_(weights.to(average), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights; after it, bit for bit the trained ones."""
        trained = [group.flat.detach().clone() for group in self._groups]
        self._load(self._shadows)
        try:
            yield
        finally:
            self._load(trained)

    def state(self) -> dict[str, Tensor]:
        """The averaged tensors by name, float64."""
        return {k: v for s, group in zip(self._shadows, self._groups, strict=True) for k, v in group.views(s).items()}

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; raises `UserError` when a tensor is missing."""
        own = self.state()
        if missing := own.keys() ^ saved.keys():
            raise UserError(f"the saved average does not fit this run (first difference: {min(missing)})")
        for name, value in own.items():
            value.copy_(saved[name])

    @torch.no_grad()
    def _load(self, vectors: Sequence[Tensor]) -> None:
        for group, vector in zip(self._groups, vectors, strict=True):
            group.flat.copy_(vector)
