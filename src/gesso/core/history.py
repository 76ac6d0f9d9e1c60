"""What validation measured over a run, and what follows from it: the best step, and whether going on is of use.

Everything here is a function of the measurements alone. A checkpoint holds those up to its step, so a resumed run
decides as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Measured:
    """The means of one validation by name; `step` counts finished optimiser steps."""

    step: int
    values: Mapping[str, float]


def better(metric: str) -> Mode:
    """Which way is better: a loss is best when lowest, any other measure when highest."""
    return "min" if metric == "loss" or metric.endswith("_loss") else "max"


def best(
    history: Sequence[Measured], metric: str, *, mode: Mode | None = None, among: Collection[int] | None = None
) -> Measured | None:
    """The best measurement, the earlier one of equals; with `among`, of these steps only."""
    sign = 1 if (mode or better(metric)) == "min" else -1
    known = [
        one
        for one in history
        if metric in one.values and not isnan(one.values[metric]) and (among is None or one.step in among)
    ]
    return min(known, key=lambda one: (sign * one.values[metric], one.step), default=None)


def stalled(
    history: Sequence[Measured], metric: str, *, patience: int, min_delta: float, mode: Mode | None = None
) -> Measured | None:
    """The last measurement that was better than the ones before it by more than `min_delta`, if `patience` others have
    followed it; None while there is hope. What is no number is never better."""
    sign = 1 if (mode or better(metric)) == "min" else -1
    lead: Measured | None = None
    since = 0
    for one in history:
        value = sign * one.values[metric]
        if not isnan(value) and (lead is None or value < sign * lead.values[metric] - min_delta):
            lead, since = one, 0
        else:
            since += 1
        if since >= patience:
            return lead or one
    return None


def as_json(history: Sequence[Measured]) -> list[dict[str, Any]]:
    """For a checkpoint's position."""
    return [{"step": one.step, "values": dict(one.values)} for one in history]


def from_json(rows: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """What `as_json` gave."""
    return [Measured(row["step"], row["values"]) for row in rows]
