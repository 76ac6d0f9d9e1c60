"""Preference training against formulas in float64, written from the paper (arXiv:2311.12908), and its symmetries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gesso.core.batch import Batch, Geometry
from gesso.core.noise import DDPM
from gesso.core.random import Draws, SampleKey
from gesso.objectives import DPO

SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))


def pairs(count: int = 3, *, side: int = 4, seed: int = 0) -> Batch:
    shape = (count, 4, side, side)
    return Batch(
        latents=normal(seed, *shape),
        noise=normal(seed + 1, *shape),
        u=torch.linspace(0.1005, 0.9005, count),
        weights=torch.ones(count),
        geometry=(Geometry(64, 64, 0, 0, 64, 64),) * count,
        captions=("",) * count,
        text=None,
        files=tuple(map(str, range(count))),
        draws=Draws(0, 0, tuple(SampleKey(str(i)) for i in range(count))),
        rejected=normal(seed + 2, *shape),
    )


class TinyPolicy:
    """A linear denoiser whose weight is that of the reference plus what was trained."""

    def __init__(self, prediction: str = "epsilon") -> None:
        self.noise = DDPM.from_config(SCHEDULE | {"prediction_type": prediction})
        self.base = normal(7, 4, 4) / 4
        self.delta = nn.Parameter(torch.zeros(4, 4))
        self.frozen = False
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        return {"shift": batch.u}

    def predict(self, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert len(cond["shift"]) == len(noisy)
        self.seen.append(("reference" if self.frozen else "live", noisy, t))
        weight = self.base if self.frozen else self.base + self.delta
        return torch.einsum("oc,bchw->bohw", weight, noisy) + cond["shift"][:, None, None, None]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.frozen = True
        try:
            yield
        finally:
            self.frozen = False


def moved(policy: TinyPolicy, seed: int = 9, size: float = 0.05) -> TinyPolicy:
    with torch.no_grad():
        policy.delta.copy_(size * normal(seed, 4, 4))
    return policy


def errors(policy: TinyPolicy, batch: Batch) -> dict[str, np.ndarray]:
    """Mean squared error over the latent of each side, under both models, in float64."""
    t = (batch.u.double() * 1000).floor().long().numpy()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)[t][:, None, None, None]
    noise = batch.noise.double().numpy()
    base = policy.base.double().numpy()
    found = {}
    for side, latents in (("chosen", batch.latents), ("rejected", batch.rejected)):
        x0 = latents.double().numpy()
        noisy = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
        target = noise if policy.noise.prediction == "epsilon" else np.sqrt(abar) * noise - np.sqrt(1 - abar) * x0
        for model, weight in (("ref", base), ("live", base + policy.delta.detach().double().numpy())):
            answer = np.einsum("oc,bchw->bohw", weight, noisy) + batch.u.double().numpy()[:, None, None, None]
            found[f"{side} {model}"] = ((answer - target) ** 2).mean((1, 2, 3))
    return found


def logits(policy: TinyPolicy, batch: Batch, beta: float) -> np.ndarray:
    e = errors(policy, batch)
    return -beta / 2 * ((e["chosen live"] - e["chosen ref"]) - (e["rejected live"] - e["rejected ref"]))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_the_papers(prediction: str) -> None:
    policy, batch = moved(TinyPolicy(prediction)), pairs()
    u = logits(policy, batch, 50.0)
    assert np.abs(u).max() > 0.5
    loss = DPO(beta=50).loss(policy, batch).detach().numpy()
    np.testing.assert_allclose(loss, np.log1p(np.exp(-u)), rtol=2e-5)


def test_ipo_is_the_square_of_the_distance_to_one_half() -> None:
    policy, batch = moved(TinyPolicy()), pairs()
    loss = DPO(beta=50, variant="ipo").loss(policy, batch).detach().numpy()
    np.testing.assert_allclose(loss, (logits(policy, batch, 50.0) - 0.5) ** 2, rtol=1e-4, atol=1e-6)


def test_smoothed_labels_and_the_winners_own_loss() -> None:
    policy, batch = moved(TinyPolicy()), pairs()
    u, won = logits(policy, batch, 50.0), errors(policy, batch)["chosen live"]
    expected = 0.9 * np.log1p(np.exp(-u)) + 0.1 * np.log1p(np.exp(u)) + 0.3 * won
    loss = DPO(beta=50, label_smoothing=0.1, sft_weight=0.3).loss(policy, batch).detach().numpy()
    np.testing.assert_allclose(loss, expected, rtol=2e-5)


def test_before_the_first_step() -> None:
    """Whatever the pairs are: loss ln 2, accuracy one half, margin 0, gradient (beta / 4) grad(L_w - L_l)."""
    policy, batch = TinyPolicy(), pairs()
    spec = DPO(beta=200)
    measured = spec.measure(policy, batch)
    assert measured["margin"].tolist() == [0, 0, 0]
    assert measured["accuracy"].tolist() == [0.5, 0.5, 0.5]
    loss = spec.loss(policy, batch)
    assert torch.allclose(loss, torch.full((3,), math.log(2)), rtol=1e-7)
    loss.sum().backward()
    step, grad = 1e-4, torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            sides = []
            for sign in (1, -1):
                with torch.no_grad():
                    policy.delta.zero_()[i, j] = sign * step
                e = errors(policy, batch)
                sides.append((e["chosen live"] - e["rejected live"]).sum())
            grad[i, j] = (sides[0] - sides[1]) / (2 * step)
    assert policy.delta.grad is not None
    np.testing.assert_allclose(policy.delta.grad.numpy(), (200 / 4 * grad).numpy(), rtol=1e-3, atol=1e-3)


def test_swapping_the_sides_negates() -> None:
    batch = pairs()
    swapped = dataclasses.replace(batch, latents=batch.rejected, rejected=batch.latents)
    gradients, margins = [], []
    for one in (batch, swapped):
        policy = TinyPolicy()
        DPO().loss(policy, one).sum().backward()
        assert policy.delta.grad is not None
        gradients.append(policy.delta.grad)
        margins.append(DPO().measure(moved(TinyPolicy()), one)["margin"])
    assert torch.allclose(gradients[0], -gradients[1], rtol=1e-5)
    assert gradients[0].abs().max() > 0
    assert torch.allclose(margins[0], -margins[1], rtol=1e-3)


def test_all_four_predictions_share_noise_and_timesteps_and_the_reference_comes_first() -> None:
    policy, batch = moved(TinyPolicy()), pairs()
    DPO().loss(policy, batch)
    (first, noisy, t), (second, again, t2) = policy.seen
    assert (first, second) == ("reference", "live")
    assert torch.equal(noisy, again)
    assert torch.equal(t, t2)
    assert torch.equal(t[:3], t[3:])
    signal = policy.noise.corrupt(batch.latents - batch.rejected, torch.zeros_like(batch.noise), t[:3])
    assert torch.allclose(noisy[:3] - noisy[3:], signal, atol=1e-6)  # the noise falls out


def test_beta_does_not_depend_on_the_size_of_the_pictures() -> None:
    """The error is a mean: the same picture twice as large in both directions gives the same loss."""
    policy, batch = moved(TinyPolicy()), pairs()

    def larger(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    assert batch.rejected is not None
    big = dataclasses.replace(
        batch, latents=larger(batch.latents), noise=larger(batch.noise), rejected=larger(batch.rejected)
    )
    assert torch.allclose(DPO().loss(policy, batch), DPO().loss(policy, big), rtol=1e-4)


def test_weights_count_and_a_better_winner_means_a_lower_loss() -> None:
    policy, batch = moved(TinyPolicy()), pairs()
    weighted = dataclasses.replace(batch, weights=torch.tensor([1.0, 2.0, 0.0]))
    plain, loss = DPO(beta=20).loss(policy, batch), DPO(beta=20).loss(policy, weighted)
    assert torch.allclose(loss, plain * torch.tensor([1.0, 2.0, 0.0]))
    measured = DPO(beta=20).measure(policy, batch)
    better = measured["margin"] > 0
    assert torch.equal(measured["accuracy"], better.float())
    assert torch.equal(measured["loss"] < math.log(2), better)


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0}, {"variant": "hinge"}, {"label_smoothing": 0.5}, {"variant": "ipo", "label_smoothing": 0.1}],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DPO.model_validate(settings)
