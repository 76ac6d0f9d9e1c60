"""The training loop. It knows no model, objective or adapter by name.

Every step is a function of the weights, the optimiser's tensors and the step number alone: data, noise, timesteps
and the learning rate are looked up by step, never drawn from a state. That is why a resumed run equals an
uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from gesso.config.run import Training
from gesso.core.batch import Batch
from gesso.core.events import StepDone, Warned
from gesso.core.history import Measured
from gesso.core.runtime import Runtime
from gesso.core.seams import Emit, Stream
from gesso.errors import NumericError
from gesso.training import optim
from gesso.training.ema import Average
from gesso.training.members import Members
from gesso.training.optim import FlatGroup

_MAX_OVERFLOWS = 20

Loss = Callable[[Batch], torch.Tensor]
"""The loss of each sample of a batch, [B]: an objective joined to what it trains."""


@dataclass
class Learner:
    """What changes while training: the weights (through `groups`), the optimiser's tensors, the average, the scale."""

    groups: Sequence[FlatGroup]
    optimizer: Members
    average: Average | None
    scaler: torch.amp.GradScaler
    after_step: Callable[[], None]
    """Called after each optimiser step, such as to keep the weights within bounds."""
    at_once: bool = False
    """Whether all batches of a step share one backward pass, because weights are updated inside it."""
    step: int = 0
    """Finished optimiser steps."""
    history: list[Measured] = field(default_factory=list)
    """What validation measured so far."""


@dataclass(frozen=True)
class Action:
    """Something to do between steps: validate, save, preview."""

    every: int
    run: Callable[[int], None]

    def due(self, step: int, last: int) -> bool:
        """Whether it is time after `step` of `last` steps; always after the last one."""
        return step == last or step % self.every == 0


@dataclass(frozen=True)
class _Gradient:
    """One optimiser step's gradient, in the groups, and what was seen on the way."""

    loss: float
    norm: float
    samples: int
    files: tuple[str, ...]
    data_seconds: float


def fit(
    training: Training,
    *,
    name: str,
    seed: int,
    loss: Loss,
    learner: Learner,
    stream: Stream,
    runtime: Runtime,
    actions: Sequence[Action],
    emit: Emit,
    stopping: Callable[[], bool],
) -> None:
    """Train from `learner.step` to the end of the run, or until `stopping()` says so between two steps.

    Raises `NumericError` (which names the run) where a loss or gradient is not finite: before the update, or where
    weights are updated inside the backward pass, with the step torn (`Members.torn`).
    """
    total = training.total_steps(stream.steps_per_epoch)
    while learner.step < total and not stopping():
        started, step = time.monotonic(), learner.step
        still = optim.rest(learner.groups, step, total)
        factor = training.schedule.factor(step, total)
        optim.set_rates(learner.optimizer, learner.groups, factor, still=still)
        gradient = _finite_gradient(name, seed, step, loss, learner, stream, runtime, emit)
        if training.clip is not None:
            optim.clip(learner.groups, gradient.norm, training.clip)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.after_step()
        learner.step += 1
        if learner.average is not None:
            learner.average.update(learner.step)
        emit(
            StepDone(
                step=learner.step,
                loss=gradient.loss,
                learning_rate=optim.rate(learner.optimizer),
                gradient_norm=gradient.norm,
                samples=gradient.samples,
                seconds=time.monotonic() - started,
                data_seconds=gradient.data_seconds,
                memory=runtime.peak_memory(),
                epoch=learner.step / stream.steps_per_epoch,
            )
        )
        for action in actions:
            if action.due(learner.step, total):
                action.run(learner.step)


def _finite_gradient(
    name: str,
    seed: int,
    step: int,
    loss: Loss,
    learner: Learner,
    stream: Stream,
    runtime: Runtime,
    emit: Emit,
) -> _Gradient:
    """The step's gradient, unscaled. In fp16 an overflow lowers the scale and repeats the same step, draws included."""
    for _ in range(_MAX_OVERFLOWS):
        gradient = _accumulate(seed, step, loss, learner, stream, runtime)
        finite_loss = math.isfinite(gradient.loss)
        if finite_loss and math.isfinite(gradient.norm):
            return gradient
        if not (finite_loss and learner.scaler.is_enabled()):
            break
        learner.scaler.update()
        emit(Warned(step, f"fp16 overflow at step {step + 1}: scale lowered to {learner.scaler.get_scale():g}"))
    kind = "loss" if not finite_loss else "gradient"
    raise NumericError(
        f"the {kind} of step {step + 1} is not finite (loss {gradient.loss}, gradient norm {gradient.norm}); "
        f"images of the step: {', '.join(gradient.files)}",
        where=name,
        fix="look at these images and captions; lower training.learning_rate, or use bf16 or fp32. "
        "Nothing of this step was saved: --resume latest goes on from the last checkpoint",
    )


def _accumulate(
    seed: int,
    step: int,
    loss: Loss,
    learner: Learner,
    stream: Stream,
    runtime: Runtime,
) -> _Gradient:
    """Mean gradient over the samples of a step, however they are split into batches."""
    for group in learner.groups:
        group.clear()
    samples = stream.window_size(step)
    total = torch.zeros((), device=runtime.device)
    shares: list[torch.Tensor] = []
    files: list[str] = []
    data_seconds = 0.0
    batches = enumerate(_timed(stream, step))
    # A backward pass begins with what came last; so each gradient is added up in the order of several passes.
    for micro, (batch, waited) in reversed(list(batches)) if learner.at_once else batches:
        data_seconds += waited
        files += batch.files
        runtime.seed_model(seed, step, micro)
        share = loss(batch.to(runtime.device)).sum() / samples
        total += share.detach()
        if learner.at_once:
            shares.append(share)
        else:
            learner.scaler.scale(share).backward()
    if shares:
        torch.autograd.backward(shares)
    learner.scaler.unscale_(learner.optimizer)
    norm = optim.gradient_norm(learner.groups)
    # One transfer for both numbers: each costs a wait for the device.
    loss_value, norm_value = torch.stack([total, norm.to(total)]).tolist()
    return _Gradient(loss_value, norm_value, samples, tuple(files), data_seconds)


def _timed(stream: Stream, step: int) -> Iterator[tuple[Batch, float]]:
    """Each batch of a step with the seconds spent waiting for it."""
    asked = time.monotonic()
    for batch in stream.window(step):
        yield batch, time.monotonic() - asked
        asked = time.monotonic()
