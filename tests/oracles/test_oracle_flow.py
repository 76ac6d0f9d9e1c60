"""Rectified flow, and the way back to the picture from every kind of answer."""

from __future__ import annotations

import math

import formulas
import loss_formulas
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rig import PREDICTIONS, FunctionPolicy, ddpm, make_batch, normal

from gesso.core.noise import RectifiedFlow, flux_shift, shifted
from gesso.objectives import Denoise

LEVELS = np.concatenate([[1e-4], np.linspace(0.001, 0.999, 997), [0.9999, 1.0]])
FLOW_T = torch.from_numpy((LEVELS * 1000).astype(np.float32))
S = FLOW_T.double().numpy() / 1000


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(normal(seed, 1000, 4, 2, 3)), torch.from_numpy(normal(seed + 1, 1000, 4, 2, 3))


def tall(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_corrupt_and_target(dtype: torch.dtype) -> None:
    latents, draws = (x.to(dtype) for x in pair(1))
    noisy, target = (f(latents, draws, FLOW_T) for f in (RectifiedFlow().corrupt, RectifiedFlow().target))
    x, n = latents.double().numpy(), draws.double().numpy()
    assert noisy.dtype == target.dtype == torch.float32
    assert np.abs(noisy.double().numpy() - ((1 - tall(S)) * x + tall(S) * n)).max() < 1e-6
    assert np.abs(target.double().numpy() - (n - x)).max() < 1e-6


def test_both_ends_come_back() -> None:
    """x_s - s u = x0 and x_s + (1 - s) u = n, with s as the model is told it."""
    latents, draws = pair(3)
    noisy, u = RectifiedFlow().corrupt(latents, draws, FLOW_T), RectifiedFlow().target(latents, draws, FLOW_T)
    assert np.abs(noisy.double().numpy() - tall(S) * u.double().numpy() - latents.numpy()).max() < 2e-6
    assert np.abs(noisy.double().numpy() + (1 - tall(S)) * u.double().numpy() - draws.numpy()).max() < 2e-6


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_the_model_is_told_the_level_that_was_used(shift: float) -> None:
    """A spy sees t; x_s of zeros and ones reads s out of the input: they are the same number."""
    zeros, ones = np.zeros((64, 1, 1, 1)), np.ones((64, 1, 1, 1))
    batch = make_batch(zeros, ones, (np.arange(64) + 0.5) / 64)
    policy = FunctionPolicy(RectifiedFlow(shift=shift), lambda noisy, _t: noisy)  # type: ignore[arg-type]
    Denoise().loss(policy, batch)
    assert torch.equal(policy.noisy.flatten(), policy.t / 1000)
    wanted = loss_formulas.flow_shift((np.arange(64) + 0.5) / 64, shift)
    assert formulas.relative(policy.t.double().numpy() / 1000, wanted) < 1e-6


def test_snr_and_level() -> None:
    t = torch.from_numpy(LEVELS * 1000)
    assert formulas.relative(RectifiedFlow().snr(t).numpy()[:-1], loss_formulas.flow_snr(LEVELS[:-1])) < 1e-10
    assert RectifiedFlow().snr(t)[-1] == 0
    assert formulas.relative(RectifiedFlow().level(t).double().numpy(), LEVELS) < 1e-6


@pytest.mark.parametrize("k", [1.0, 3.0, math.exp(0.5), math.exp(1.15), 0.25])
def test_shift(k: float) -> None:
    s = torch.from_numpy(np.linspace(0.0005, 0.9995, 1000))
    found = shifted(s, k)
    assert formulas.relative(found.numpy(), loss_formulas.flow_shift(s.numpy(), k)) < 1e-12
    assert (shifted(found, 1 / k) - s).abs().max() < 1e-14
    assert (shifted(0.0, k), shifted(1.0, k)) == (0.0, pytest.approx(1.0, abs=1e-15))
    if k > 1:
        assert (found > s).all(), "above 1 is more noise"


def test_shift_of_sd3_is_that_of_its_sampler() -> None:
    sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = torch.from_numpy(np.linspace(1, 1000, 1000)[::-1].copy() / 1000)
    assert (shifted(plain, 3.0) - sampler.sigmas[:1000].double()).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [256, 1024, 2304, 4096])
def test_shift_of_flux_is_that_of_its_sampler_at_the_same_size(tokens: int) -> None:
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = tokens * slope + 0.5 - 256 * slope
    assert math.log(flux_shift(tokens)) == pytest.approx(mu, rel=1e-12)
    sampler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sigmas = np.linspace(1.0, 1 / 30, 30)
    sampler.set_timesteps(sigmas=sigmas.tolist(), mu=mu)
    found = shifted(torch.from_numpy(sigmas), flux_shift(tokens))
    assert (found - sampler.sigmas[:-1].double()).abs().max() < 1e-6


def test_shift_of_flux_follows_the_size_of_the_picture() -> None:
    """An objective tells the cells of its latents: 32 x 64 cells are 512 packed tokens."""
    u = (np.arange(50) + 0.5) / 50
    batch = make_batch(np.zeros((50, 1, 32, 64)), np.zeros((50, 1, 32, 64)), u)
    policy = FunctionPolicy(RectifiedFlow(shift="flux"), lambda noisy, _t: noisy)  # type: ignore[arg-type]
    Denoise().loss(policy, batch)
    wanted = loss_formulas.flow_shift(u, math.exp(0.5 + 0.65 * 256 / 3840))
    assert formulas.relative(policy.t.double().numpy() / 1000, wanted) < 1e-6


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.7), (0.0, 0.5), (0.9, 1.0)])
def test_a_range_of_a_flow_is_of_the_levels_that_are_trained(low: float, high: float) -> None:
    """Not of those before the shift; inside, draws are those of the whole range that fall there."""
    noise = RectifiedFlow(shift=3.0)
    u = torch.from_numpy((np.arange(4000) + 0.5) / 4000)
    part = noise.sample_t(u, low=low, high=high).double().numpy() / 1000
    whole = noise.sample_t(u).double().numpy() / 1000
    assert part.min() >= low - 1e-6
    assert part.max() <= high + 1e-6
    chosen = np.sort(whole[(whole > low) & (whole < high)])
    middle = np.quantile(part, np.linspace(0.05, 0.95, 19))
    assert np.abs(middle - np.quantile(chosen, np.linspace(0.05, 0.95, 19))).max() < 2e-3


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clean_of_the_true_answer_is_the_picture(prediction: str) -> None:
    t, noise = torch.arange(1000), ddpm(prediction)
    latents, draws = pair(5)
    noisy, answer = noise.corrupt(latents, draws, t), noise.target(latents, draws, t)
    errors = (noise.clean(noisy, answer, t) - latents).abs().amax((1, 2, 3)).numpy()
    a = np.sqrt(formulas.SDXL_ALPHA_BAR)
    assert (errors < 2e-6 / (a if prediction == "epsilon" else 1)).all()


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
def test_clean_of_any_answer_is_the_guess_that_it_says(prediction: str) -> None:
    latents, draws = pair(7)
    guess = normal(9, 1000, 4, 2, 3).astype(np.float64)
    if prediction == "flow":
        noise, t = RectifiedFlow(), FLOW_T
        noisy = noise.corrupt(latents, draws, t)
        answer = (noisy.double().numpy() - guess) / tall(S)
        tolerance = 3e-6
    else:
        noise, t = ddpm(prediction), torch.arange(1000)
        noisy = noise.corrupt(latents, draws, t)
        abar = formulas.SDXL_ALPHA_BAR
        answer = formulas.prediction_from_x0(abar, guess, noisy.double().numpy(), t.numpy(), prediction)
        tolerance = 5e-6 / float(np.sqrt(abar[-1]))
    found = noise.clean(noisy, torch.from_numpy(answer).float(), t)
    assert found.dtype == torch.float32
    assert np.abs(found.double().numpy() - guess).max() < tolerance


def test_clean_lets_gradients_through() -> None:
    answer = torch.zeros(1, 4, 2, 2, requires_grad=True)
    t = torch.tensor([300])
    ddpm().clean(torch.ones(1, 4, 2, 2), answer, t).sum().backward()
    a2 = formulas.SDXL_ALPHA_BAR[300]
    assert answer.grad is not None
    assert formulas.relative(answer.grad.double().numpy(), np.full((1, 4, 2, 2), -np.sqrt((1 - a2) / a2))) < 1e-6


def test_zero_terminal_clean_at_the_last_step_is_the_answer() -> None:
    """There x_t holds no picture, and v = -x0."""
    noise = ddpm("v_prediction", zero_snr=True)
    noisy, answer = pair(11)
    assert torch.equal(noise.clean(noisy[:1], answer[:1], torch.tensor([999])), -answer[:1])
