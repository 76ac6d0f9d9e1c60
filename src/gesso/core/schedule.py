"""The learning rate as a pure function of the optimiser step, so that no scheduler state exists to go wrong."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from gesso.core.seams import Spec


def whole_steps(length: int | float) -> int | float:
    """The length itself; raises `ValueError` unless it is a number of steps or a fraction of the run."""
    if length >= 1 and length != int(length):
        raise ValueError("must be a whole number of steps, or a fraction of the run below 1")
    return length


def steps_of(length: int | float, total: int) -> int:
    """A length in optimiser steps that is given as such, or as a fraction (below 1) of a run of `total`."""
    return round(length * total) if 0 < length < 1 else int(length)


class Schedule(Spec):
    """Warm-up, then a curve down to a floor. All counts are optimiser steps, whatever accumulation is."""

    type: Literal["constant", "linear", "cosine", "cosine_restarts", "polynomial"] = "constant"
    """Shape of the curve after the warm-up."""
    warmup: int | float = Field(default=0, ge=0)
    """Linear warm-up: a number of optimiser steps, or a fraction of the run if below 1."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Where the curve ends, as a fraction of the learning rate."""
    cycles: int = Field(default=1, ge=1)
    """Number of cosine cycles of `cosine_restarts`."""
    power: float = Field(default=1.0, gt=0)
    """Exponent of `polynomial`."""

    @field_validator("warmup")
    @classmethod
    def _whole_warmup(cls, value: int | float) -> int | float:
        return whole_steps(value)

    def warmup_steps(self, total: int) -> int:
        """Length of the warm-up in optimiser steps, for a run of `total`."""
        return steps_of(self.warmup, total)

    def factor(self, step: int, total: int) -> float:
        """What to multiply the learning rate with at optimiser step `step` (0-based) of `total`.

        The warm-up rises as (step + 1) / (warmup + 1), so that no step has a rate of 0. A decaying curve
        is at its top on the first step after the warm-up and at the floor on the last step of the run.
        """
        warmup = self.warmup_steps(total)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        span = max(total - 1 - warmup, 1)
        progress = min((step - warmup) / span, 1.0)
        return self.floor + (1 - self.floor) * self._curve(progress)

    def _curve(self, progress: float) -> float:
        match self.type:
            case "constant":
                return 1.0
            case "linear":
                return 1 - progress
            case "cosine":
                return 0.5 * (1 + math.cos(math.pi * progress))
            case "cosine_restarts":
                cycle = progress * self.cycles % 1.0 if progress < 1 else 1.0
                return 0.5 * (1 + math.cos(math.pi * cycle))
            case "polynomial":
                return float((1 - progress) ** self.power)
