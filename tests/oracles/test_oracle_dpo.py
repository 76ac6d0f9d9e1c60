"""Diffusion-DPO and IPO against the paper's formula in float64: values, gradients, the reference and the pairing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import formulas
import formulas_objectives as preference
import numpy as np
import pytest
import torch
from rig import PREDICTIONS, ddpm, make_batch, normal
from torch import Tensor

from gesso.core.batch import Batch
from gesso.core.noise import DDPM
from gesso.objectives import DPO

ABAR = formulas.SDXL_ALPHA_BAR
COUNT, SHAPE = 8, (4, 6, 5)


class Pairwise:
    """A policy that answers g * noisy + b per channel, and g0, b0 inside `reference`; it keeps what it was asked."""

    def __init__(self, noise: DDPM, trained: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor]) -> None:
        self.noise = noise
        self._trained, self._before = trained, before
        self._inside = False
        self.asked: list[tuple[bool, bool, Tensor, Tensor, Tensor]] = []

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        return {"caption": torch.arange(len(batch), dtype=torch.float32)}

    def predict(self, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert len(noisy) == len(t) == len(cond["caption"])
        self.asked.append((self._inside, torch.is_grad_enabled(), noisy.detach(), t, cond["caption"]))
        gain, shift = self._before if self._inside else self._trained
        return noisy.to(gain.dtype) * gain[:, None, None] + shift[:, None, None]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


def network(seed: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    gain = torch.from_numpy(1 + 0.02 * normal(seed, SHAPE[0])).to(dtype)
    return gain.requires_grad_(), torch.from_numpy(0.02 * normal(seed + 1, SHAPE[0])).to(dtype).requires_grad_()


def pairs(count: int = COUNT, *, weights: np.ndarray | None = None) -> Batch:
    u = (np.arange(count) + 0.5) / count
    batch = make_batch(normal(60, count, *SHAPE), normal(61, count, *SHAPE), u, weights=weights)
    return replace(batch, rejected=torch.from_numpy(normal(62, count, *SHAPE)))


def swapped(batch: Batch) -> Batch:
    assert batch.rejected is not None
    return replace(batch, latents=batch.rejected, rejected=batch.latents)


def errors(batch: Batch, prediction: str, answer: tuple[Tensor, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(Lw, Ll) of a network by the formulas: the same noise and timestep on both sides."""
    assert batch.rejected is not None
    t, noise = np.floor(batch.u.numpy() * 1000).astype(int), batch.noise.numpy()
    gain, shift = (v.detach().double().numpy()[:, None, None] for v in answer)
    found = []
    for side in (batch.latents.numpy(), batch.rejected.numpy()):
        truth = formulas.target(ABAR, side, noise, t, prediction)
        found.append(preference.latent_errors(formulas.corrupt(ABAR, side, noise, t) * gain + shift, truth))
    return found[0], found[1]


def logits(batch: Batch, prediction: str, beta: float, *networks: tuple[Tensor, Tensor]) -> np.ndarray:
    now, before = (errors(batch, prediction, n) for n in networks)
    return preference.dpo_logit(beta, *now, *before)


@pytest.mark.parametrize("beta", [1.0, 40.0, 5000.0])
@pytest.mark.parametrize("variant", ["sigmoid", "smoothed", "ipo"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_each_pair(prediction: str, variant: str, beta: float) -> None:
    weights = np.random.default_rng(63).uniform(0.2, 2, COUNT).astype(np.float32)
    batch, now, before = pairs(weights=weights), network(64), network(66)
    smoothing = 0.2 if variant == "smoothed" else 0.0
    objective = DPO(beta=beta, variant="ipo" if variant == "ipo" else "sigmoid", label_smoothing=smoothing)
    found = objective.loss(Pairwise(ddpm(prediction), now, before), batch)
    u = logits(batch, prediction, beta, now, before)
    assert np.abs(u).max() > 0.005 * beta
    assert found.shape == (COUNT,)
    assert found.dtype == torch.float32
    if variant == "ipo":
        wanted, slope = preference.ipo_loss(u, beta), 2 * np.abs(u - 0.5)
    else:
        wanted, slope = (
            preference.dpo_loss(u, smoothing=smoothing),
            np.abs(preference.dpo_slope(u, smoothing=smoothing)),
        )
    # u is a difference of float32 errors near 1, so it is known to 1e-6 of beta; the loss follows u by its slope.
    known = 1e-6 * beta * slope + 1e-6 * np.abs(wanted) + (1e-12 * beta**2 if variant == "ipo" else 1e-9)
    assert (np.abs(found.detach().double().numpy() - wanted * weights) <= 2 * known).all()


def test_with_beta_of_the_paper_and_not_twice_or_half_of_it() -> None:
    """u itself, from the reported margin: -(beta/2) of the gap. A script that leaves out the half shows twice this."""
    batch, now, before = pairs(), network(64), network(66)
    with torch.no_grad():
        measured = DPO(beta=10.0).measure(Pairwise(ddpm(), now, before), batch)
    wanted = logits(batch, "epsilon", 10.0, now, before)
    assert np.abs(measured["margin"].double().numpy() - wanted).max() < 1e-5
    assert measured["accuracy"].tolist() == [1.0 if u > 0 else 0.0 for u in wanted]
    assert 0 < float(measured["accuracy"].mean()) < 1
    assert measured["loss"].double().numpy() == pytest.approx(preference.dpo_loss(wanted), rel=1e-5)
    assert DPO().beta == 5000.0


def test_beta_does_not_depend_on_the_size_of_the_latent() -> None:
    """L is a mean: tiling the latents leaves every loss as it is. With sums it would grow with the area."""
    batch, now, before = pairs(), network(64), network(66)
    assert batch.rejected is not None
    tile = (1, 1, 2, 3)
    large = replace(batch, **{k: vars(batch)[k].repeat(tile) for k in ("latents", "noise", "rejected")})
    small, wide = (DPO(beta=100.0).loss(Pairwise(ddpm(), now, before), b) for b in (batch, large))
    assert small.detach().numpy() == pytest.approx(wide.detach().numpy(), rel=1e-4)


def test_before_the_first_step_the_loss_is_ln_2_and_the_margin_nothing() -> None:
    batch, now = pairs(), network(64)
    policy = Pairwise(ddpm(), now, network(64))
    assert DPO().loss(policy, batch).tolist() == pytest.approx([np.log(2)] * COUNT, rel=1e-6)
    assert DPO(variant="ipo").loss(policy, batch).tolist() == pytest.approx([0.25] * COUNT, rel=1e-6)
    with torch.no_grad():
        measured = DPO().measure(policy, batch)
    assert measured["margin"].tolist() == [0.0] * COUNT
    assert measured["accuracy"].tolist() == [0.5] * COUNT


def gradient(objective: DPO, batch: Batch, seed: int, before: tuple[Tensor, Tensor]) -> np.ndarray:
    answer = network(seed)
    objective.loss(Pairwise(ddpm(), answer, before), batch).sum().backward()
    assert all(p.grad is None for p in before)
    return np.concatenate([p.grad.double().numpy() for p in answer if p.grad is not None])


def gap_gradient(batch: Batch, seed: int, factor: np.ndarray) -> np.ndarray:
    """sum_i factor_i grad (Lw_i - Ll_i), by hand: d/dg mean((g x + b - n)^2) = 2 mean(x (g x + b - n))."""
    assert batch.rejected is not None
    t, noise = np.floor(batch.u.numpy() * 1000).astype(int), batch.noise.double().numpy()
    gain, shift = (v.detach().double().numpy()[:, None, None] for v in network(seed))
    total = np.zeros(2 * SHAPE[0])
    for sign, side in ((1.0, batch.latents.numpy()), (-1.0, batch.rejected.numpy())):
        noisy = formulas.corrupt(ABAR, side, noise, t)
        slope = 2 * (noisy * gain + shift - noise) / np.prod(SHAPE) * factor[:, None, None, None]
        total += sign * np.concatenate([(slope * noisy).sum((0, 2, 3)), slope.sum((0, 2, 3))])
    return total


def test_the_first_gradient_is_a_quarter_of_beta_times_that_of_the_gap() -> None:
    batch, beta = pairs(), 5000.0
    found = gradient(DPO(beta=beta), batch, 64, network(64))
    wanted = gap_gradient(batch, 64, np.full(COUNT, beta / 4))
    assert formulas.relative_l2(found, wanted) < 1e-5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_a_trained_model(smoothing: float) -> None:
    """-(beta/2) times the slope of the loss at u, pair by pair; the reference gives none."""
    batch, beta, before = pairs(), 20.0, network(66)
    u = logits(batch, "epsilon", beta, network(64), before)
    found = gradient(DPO(beta=beta, label_smoothing=smoothing), batch, 64, before)
    wanted = gap_gradient(batch, 64, -0.5 * beta * preference.dpo_slope(u, smoothing=smoothing))
    assert formulas.relative_l2(found, wanted) < 1e-5


def test_the_gradient_of_ipo() -> None:
    batch, beta, before = pairs(), 3.0, network(66)
    u = logits(batch, "epsilon", beta, network(64), before)
    found = gradient(DPO(beta=beta, variant="ipo"), batch, 64, before)
    assert formulas.relative_l2(found, gap_gradient(batch, 64, -0.5 * beta * 2 * (u - 0.5))) < 1e-5


def test_the_gradient_against_finite_differences() -> None:
    """Central differences of the float64 formula, parameter by parameter."""
    batch, beta, before = pairs(), 20.0, network(66)
    found = gradient(DPO(beta=beta), batch, 64, before)
    point = [v.detach().double() for v in network(64)]

    def total(values: np.ndarray) -> float:
        now = torch.from_numpy(values[: SHAPE[0]]), torch.from_numpy(values[SHAPE[0] :])
        return float(preference.dpo_loss(logits(batch, "epsilon", beta, now, before)).sum())

    here, step, wanted = np.concatenate([v.numpy() for v in point]), 1e-6, []
    for i in range(2 * SHAPE[0]):
        ahead, behind = here.copy(), here.copy()
        ahead[i] += step
        behind[i] -= step
        wanted.append((total(ahead) - total(behind)) / (2 * step))
    assert formulas.relative_l2(found, np.array(wanted)) < 1e-5


def test_swapping_the_pictures_negates_the_first_gradient_and_mirrors_the_loss() -> None:
    batch, before = pairs(), network(66)
    there, back = (gradient(DPO(beta=50.0), b, 64, network(64)) for b in (batch, swapped(batch)))
    assert formulas.relative_l2(there, -back) < 1e-5
    u = logits(batch, "epsilon", 50.0, network(64), before)
    found = DPO(beta=50.0).loss(Pairwise(ddpm(), network(64), before), swapped(batch))
    assert found.detach().double().numpy() == pytest.approx(preference.dpo_loss(-u), rel=1e-4)


def test_both_pictures_and_both_models_see_one_noise_one_timestep_and_one_caption() -> None:
    """Each noisy latent minus its own picture's part is the same noise; peers crop, flip or draw the sides apart."""
    batch = pairs()
    assert batch.rejected is not None
    policy = Pairwise(ddpm(), network(64), network(66))
    DPO().loss(policy, batch)
    t = np.floor(batch.u.numpy() * 1000).astype(int)
    a, s = formulas.coefficients(ABAR, t, 4)
    wanted = {
        side: a * latents.numpy() + s * batch.noise.numpy()
        for side, latents in (("chosen", batch.latents), ("rejected", batch.rejected))
    }
    for inside in (False, True):
        calls = [call for call in policy.asked if call[0] == inside]
        noisy, asked, captions = (torch.cat([call[k] for call in calls]) for k in (2, 3, 4))
        assert len(noisy) == 2 * COUNT
        rows = {(i, side) for i in range(COUNT) for side in wanted}
        for latent, at, caption in zip(noisy.double().numpy(), asked.tolist(), captions.int().tolist(), strict=True):
            found = [k for k in rows if np.abs(wanted[k[1]][k[0]] - latent).max() < 1e-5]
            assert len(found) == 1
            assert at == t[found[0][0]]
            assert caption == found[0][0]
            rows -= set(found)
        assert not rows
    assert [grad for inside, grad, *_ in policy.asked if inside] == [False] * sum(c[0] for c in policy.asked)


def test_the_reference_comes_before_the_live_model() -> None:
    """Weights that are put back after a live forward would break its backward."""
    policy = Pairwise(ddpm(), network(64), network(66))
    DPO().loss(policy, pairs())
    order = [call[0] for call in policy.asked]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_share_of_the_ordinary_loss(weight: float) -> None:
    """sft_weight adds that much of the preferred picture's mean squared error, and nothing of the other's."""
    batch, now, before = pairs(), network(64), network(66)
    plain, more = (DPO(beta=10.0, sft_weight=w).loss(Pairwise(ddpm(), now, before), batch) for w in (0.0, weight))
    wanted = weight * errors(batch, "epsilon", now)[0]
    assert (more - plain).detach().double().numpy() == pytest.approx(wanted, rel=1e-4)


def test_a_pair_does_not_depend_on_the_pairs_beside_it() -> None:
    batch, now, before = pairs(), network(64), network(66)
    assert batch.rejected is not None
    whole = DPO(beta=30.0).loss(Pairwise(ddpm(), now, before), batch)
    for i in range(COUNT):
        one = replace(
            batch,
            **{k: vars(batch)[k][i : i + 1] for k in ("latents", "noise", "u", "weights", "rejected")},
            **{k: vars(batch)[k][i : i + 1] for k in ("geometry", "captions", "files")},
            draws=replace(batch.draws, samples=batch.draws.samples[i : i + 1]),
        )
        assert torch.equal(DPO(beta=30.0).loss(Pairwise(ddpm(), now, before), one), whole[i : i + 1])
