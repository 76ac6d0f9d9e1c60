"""A whole training run against arithmetic: loss, gradient, accumulation, clipping, rates, AdamW and the average.

The network is one gain and one shift per channel, so that the gradient can be written down by hand and the run
repeated in numpy, without automatic differentiation and without the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import formulas
import numpy as np
import pytest
import torch
from rig import FunctionPolicy, ddpm, make_batch, normal, rows
from torch import Tensor, nn

from gesso.config.optimizer import Optimizer
from gesso.config.run import EMA, Training
from gesso.core.batch import Batch
from gesso.core.events import Event, StepDone
from gesso.core.runtime import Runtime
from gesso.core.schedule import Schedule
from gesso.objectives import Denoise
from gesso.training import optim
from gesso.training.ema import Average
from gesso.training.loop import Learner, fit
from gesso.training.optim import FlatGroup

CHANNELS = 4
EPOCH = [[[3, 7, 11, 2], [5]], [[0, 8], [1, 9, 4]], [[6]]]
"""Samples of each batch of each step of an epoch: steps of 5, 5 and 1 samples, batches of 4, 1, 2, 3 and 1."""


class Windows:
    """A stream of the same twelve samples in the same windows, epoch after epoch."""

    def __init__(self, batch: Batch, epoch: Sequence[Sequence[list[int]]]) -> None:
        self._batch, self._epoch = batch, epoch

    @property
    def steps_per_epoch(self) -> int:
        return len(self._epoch)

    def window(self, step: int) -> Iterator[Batch]:
        return (rows(self._batch, part) for part in self._epoch[step % len(self._epoch)])

    def window_size(self, step: int) -> int:
        return sum(len(part) for part in self._epoch[step % len(self._epoch)])


class GainAndShift(nn.Module):
    """noisy * gain + shift, per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.from_numpy(0.5 + 0.1 * normal(90, CHANNELS)))
        self.shift = nn.Parameter(torch.from_numpy(0.3 * normal(91, CHANNELS)))

    def forward(self, noisy: Tensor, _t: Tensor) -> Tensor:
        return noisy * self.gain[:, None, None] + self.shift[:, None, None]


def samples() -> Batch:
    draws = np.random.default_rng(92)
    return make_batch(
        normal(93, 12, CHANNELS, 6, 6),
        normal(94, 12, CHANNELS, 6, 6),
        draws.random(12),
        weights=draws.uniform(0.3, 2, 12).astype(np.float32),
    )


def learner_of(network: GainAndShift, rates: tuple[float, float], optimizer: Optimizer, ema: EMA | None) -> Learner:
    groups = [
        FlatGroup.of("unet", {"gain": network.gain}, learning_rate=rates[0]),
        FlatGroup.of("text_encoder", {"shift": network.shift}, learning_rate=rates[1]),
    ]
    runtime = Runtime.detect("fp32", "cpu")
    average = None if ema is None else Average(ema, groups)
    return Learner(groups, optim.build(optimizer, groups), average, runtime.scaler(), after_step=lambda: None)


def train(training: Training, learner: Learner, stream: Windows, network: GainAndShift) -> list[StepDone]:
    heard: list[Event] = []
    fit(
        training,
        name="oracle",
        seed=1,
        loss=partial(Denoise(min_snr_gamma=5.0).loss, FunctionPolicy(ddpm(), network)),
        learner=learner,
        stream=stream,
        runtime=Runtime.detect("fp32", "cpu"),
        actions=(),
        emit=heard.append,
        stopping=lambda: False,
    )
    return [event for event in heard if isinstance(event, StepDone)]


class ByHand:
    """The same run in float64: the gradient of each sample from the derivative of its squared error."""

    def __init__(self, batch: Batch) -> None:
        t = np.floor(batch.u.numpy() * 1000).astype(int)
        x0, self._noise = batch.latents.double().numpy(), batch.noise.double().numpy()
        self._noisy = formulas.corrupt(formulas.SDXL_ALPHA_BAR, x0, self._noise, t)
        weight = formulas.min_snr_weight(formulas.SDXL_ALPHA_BAR, 5.0, "epsilon")[t]
        self._weight = weight * batch.weights.double().numpy()

    def step(self, chosen: list[int], gain: np.ndarray, shift: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """(mean loss, gradient of gain, gradient of shift) over the samples of one optimiser step."""
        noisy, weight = self._noisy[chosen], self._weight[chosen][:, None, None, None]
        error = noisy * gain[:, None, None] + shift[:, None, None] - self._noise[chosen]
        cells = error[0].size
        loss = float((weight * error**2).sum() / cells / len(chosen))
        slope = 2 * weight * error / cells / len(chosen)
        return loss, (slope * noisy).sum(axis=(0, 2, 3)), slope.sum(axis=(0, 2, 3))


@pytest.mark.parametrize("clip", [None, 0.05, 100.0])
def test_a_run_of_forty_steps_is_the_arithmetic_of_its_formulas(clip: float | None) -> None:
    """Uneven windows, a short last one, two parts at rates of their own, warm-up, cosine, clipping and EMA."""
    steps, rates = 40, (3e-2, 1e-2)
    schedule = Schedule(type="cosine", warmup=5, floor=0.1)
    optimizer = Optimizer(beta1=0.9, beta2=0.98, eps=1e-7, weight_decay=0.05)
    training = Training(steps=steps, schedule=schedule, optimizer=optimizer, clip=clip, precision="fp32")
    network, batch = GainAndShift(), samples()
    start = [p.detach().double().numpy() for p in (network.gain, network.shift)]
    learner = learner_of(network, rates, optimizer, EMA(enabled=True, decay=0.8))
    heard = train(training, learner, Windows(batch, EPOCH), network)

    exact = [formulas.AdamW(w, beta1=0.9, beta2=0.98, eps=1e-7, decay=0.05) for w in start]
    by_hand, decays = ByHand(batch), formulas.ema_decays(steps, 0.8, power=None)
    shadow = np.zeros(2 * CHANNELS)
    assert len(heard) == steps
    for step, event in enumerate(heard):
        chosen = [i for part in EPOCH[step % 3] for i in part]
        loss, *gradients = by_hand.step(chosen, exact[0].weights, exact[1].weights)
        norm = float(np.linalg.norm(np.concatenate(gradients)))
        factor = formulas.learning_rate("cosine", step, steps, warmup=5, floor=0.1)
        assert event.step == step + 1
        assert event.samples == len(chosen)
        assert event.loss == pytest.approx(loss, rel=1e-5)
        assert event.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert event.learning_rate == pytest.approx(rates[0] * factor, rel=1e-12)
        shrink = 1.0 if clip is None else min(1.0, clip / norm)
        for oracle, gradient, rate in zip(exact, gradients, rates, strict=True):
            oracle.step(gradient * shrink, rate * factor)
        now = np.concatenate([oracle.weights for oracle in exact])
        shadow = decays[step] * shadow + (1 - decays[step]) * now
    found = np.concatenate([p.detach().double().numpy() for p in (network.gain, network.shift)])
    assert formulas.relative_l2(found, now) < 3e-6
    assert formulas.relative_l2(np.concatenate(start), now) > 0.1
    assert learner.average is not None
    averages = np.concatenate([v.double().numpy().ravel() for v in learner.average.state().values()])
    assert formulas.relative_l2(averages, shadow) < 3e-6
    assert formulas.relative_l2(shadow, now) > 1e-4


SPLITS = {1: [[[i] for i in range(k, k + 4)] for k in (0, 4, 8)], 2: [[[0, 1], [2, 3]]], 4: [[[0, 1, 2, 3]]]}
KINDS = ["constant", "linear", "cosine", "cosine_restarts", "polynomial"]


@pytest.mark.parametrize("warmup", [0, 4, 0.25])
@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_is_that_of_the_optimiser_step_however_the_step_is_split(kind: str, warmup: float) -> None:
    """Peers stretch the warm-up by the accumulation, or let the rate climb back when processes step it twice."""
    steps, base = 20, 2e-3
    whole = warmup if isinstance(warmup, int) else round(warmup * steps)
    wanted = [base * formulas.learning_rate(kind, k, steps, warmup=whole, floor=0.0) for k in range(steps)]
    for epoch in SPLITS.values():
        network = GainAndShift()
        optimizer = Optimizer()
        training = Training(
            steps=steps,
            learning_rate=base,
            batch_size=len(epoch[0][0]),
            accumulation=len(epoch[0]),
            schedule=Schedule(type=kind, warmup=warmup),
            precision="fp32",
        )
        learner = learner_of(network, (base, base), optimizer, None)
        heard = train(training, learner, Windows(samples(), epoch), network)
        assert [event.learning_rate for event in heard] == pytest.approx(wanted, rel=1e-12)
        assert [group["lr"] for group in learner.optimizer.param_groups] == pytest.approx([wanted[-1]] * 2, rel=1e-12)


def test_the_length_of_a_run_in_epochs_counts_optimiser_steps() -> None:
    """Two epochs of three steps: six steps, the last of them at the end of the schedule."""
    training = Training(epochs=2, learning_rate=1e-3, schedule=Schedule(type="linear"), precision="fp32")
    network = GainAndShift()
    heard = train(training, learner_of(network, (1e-3, 1e-3), Optimizer(), None), Windows(samples(), EPOCH), network)
    assert [event.learning_rate for event in heard] == pytest.approx([1e-3 * (5 - k) / 5 for k in range(6)], abs=1e-15)
    assert [event.epoch for event in heard] == pytest.approx([(k + 1) / 3 for k in range(6)])


def test_a_step_does_not_remember_the_gradient_of_the_last_one() -> None:
    """With a rate of zero the same windows give the same gradient norms for ever."""
    network = GainAndShift()
    training = Training(steps=9, learning_rate=0.0, precision="fp32")
    heard = train(training, learner_of(network, (0.0, 0.0), Optimizer(), None), Windows(samples(), EPOCH), network)
    norms = [event.gradient_norm for event in heard]
    assert norms[3:6] == norms[6:9] == norms[:3]
    assert len(set(norms)) == 3
