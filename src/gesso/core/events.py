"""What a run says while it runs. Trackers, the progress bar and the studio all read these, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Event:
    """Base of all run events; `step` is the number of finished optimiser steps."""

    step: int

    def as_json(self) -> dict[str, Any]:
        """A JSON-ready mapping with the event's name under `event`."""
        return {"event": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class RunStarted(Event):
    """The loop is about to take its first step; `step` is above 0 for a resumed run."""

    total_steps: int
    samples: int
    folder: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress(Event):
    """A long preparation (scanning, caching) moved on by some items."""

    task: str
    done: int
    total: int


@dataclass(frozen=True)
class StepDone(Event):
    """One optimiser step. Times in seconds, memory in bytes; `loss` is the mean over the step's samples."""

    loss: float
    learning_rate: float
    gradient_norm: float
    samples: int
    seconds: float
    data_seconds: float
    memory: int
    epoch: float


@dataclass(frozen=True)
class Validated(Event):
    """The held-out loss, on noise and timesteps that never change, and the objective's other measures by name."""

    loss: float
    samples: int
    measures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, step: int, values: Mapping[str, float], *, samples: int) -> Validated:
        """From means by name, `loss` among them."""
        return cls(step, values["loss"], samples, {k: v for k, v in values.items() if k != "loss"})

    @property
    def values(self) -> dict[str, float]:
        """All means by name, the loss among them."""
        return {"loss": self.loss, **self.measures}


@dataclass(frozen=True)
class PreviewReady(Event):
    """Preview pictures were written."""

    files: tuple[str, ...]
    prompts: tuple[str, ...]


@dataclass(frozen=True)
class Saved(Event):
    """A checkpoint is durable on disk."""

    path: str
    seconds: float


@dataclass(frozen=True)
class Warned(Event):
    """Something the user should know that does not stop the run."""

    message: str


@dataclass(frozen=True)
class Component:
    """A part of the model at the end of a run: what of it trained, how fast, and how far it went.

    `change` is |trained - start| / |start| over the trained weights (2-norms); exactly 0 where nothing trained, and
    None where what training started from is no longer there.
    """

    part: str
    parameters: int
    learning_rates: tuple[float, ...]
    """From the lowest to the highest; empty where it is frozen."""
    change: float | None


@dataclass(frozen=True)
class Finished(Event):
    """The last step is done and everything is written; `reason` says why before its length was up, if it was."""

    seconds: float
    peak_memory: int
    outputs: dict[str, str]
    reason: str = ""
    components: tuple[Component, ...] = ()


@dataclass(frozen=True)
class Failed(Event):
    """The run ended early; `resumable` says whether a checkpoint can take it up again."""

    message: str
    exit_code: int
    resumable: bool
