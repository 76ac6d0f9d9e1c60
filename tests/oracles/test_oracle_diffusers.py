"""The same draws fed to diffusers' own functions: two independent implementations must agree."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel, compute_snr
from rig import PREDICTIONS, SDXL_SCHEDULER, ddpm, normal
from torch import nn

from gesso.config.run import EMA
from gesso.core.noise import DDPM

T = torch.arange(1000)


def scheduler(prediction: str = "epsilon", *, zero_snr: bool = False) -> DDPMScheduler:
    return DDPMScheduler(
        **SDXL_SCHEDULER | {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr},
    )


CASES = [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]


@pytest.mark.parametrize(("prediction", "zero_snr"), CASES)
def test_add_noise_and_velocity(prediction: str, zero_snr: bool) -> None:
    """diffusers as it stands, each timestep by itself: what remains is the rounding of its float32 table."""
    theirs, ours = scheduler(prediction, zero_snr=zero_snr), ddpm(prediction, zero_snr=zero_snr)
    latents, noise = torch.from_numpy(normal(1, 1000, 4, 4, 4)), torch.from_numpy(normal(2, 1000, 4, 4, 4))
    wanted = noise if prediction == "epsilon" else theirs.get_velocity(latents, noise, T)
    pairs = [
        (ours.corrupt(latents, noise, T), theirs.add_noise(latents, noise, T)),
        (ours.target(latents, noise, T), wanted),
    ]
    for mine, other in pairs:
        errors = (mine - other).flatten(1).norm(dim=1) / other.flatten(1).norm(dim=1)
        # 1 - abar in float32 near t = 0, and the rescaled float32 table near t = 999, keep fewer digits.
        assert errors.max() < (1e-5 if zero_snr else 2e-6)
        assert errors.median() < 1e-6


@pytest.mark.parametrize(("prediction", "zero_snr"), CASES)
def test_add_noise_and_velocity_with_an_exact_table(prediction: str, zero_snr: bool) -> None:
    """The same functions in float64: now every element agrees to what float32 can hold."""
    theirs, ours = scheduler(prediction, zero_snr=zero_snr), ddpm(prediction, zero_snr=zero_snr)
    abar = formulas.zero_terminal(formulas.SDXL_ALPHA_BAR) if zero_snr else formulas.SDXL_ALPHA_BAR
    theirs.alphas_cumprod = torch.from_numpy(abar)
    latents, noise = torch.from_numpy(normal(1, 1000, 4, 4, 4)), torch.from_numpy(normal(2, 1000, 4, 4, 4))
    exact = latents.double(), noise.double(), T
    assert (ours.corrupt(latents, noise, T).double() - theirs.add_noise(*exact)).abs().max() < 1e-6
    wanted = noise.double() if prediction == "epsilon" else theirs.get_velocity(*exact)
    assert (ours.target(latents, noise, T).double() - wanted).abs().max() < 1e-6


def test_snr() -> None:
    theirs = scheduler()
    plain = formulas.relative(compute_snr(theirs, T).double().numpy(), ddpm().snr(T).numpy())
    assert plain < 5e-5  # 1 - abar of a float32 table has five digits at t = 0
    theirs.alphas_cumprod = torch.from_numpy(formulas.SDXL_ALPHA_BAR)
    assert formulas.relative(compute_snr(theirs, T).double().numpy(), ddpm().snr(T).numpy()) < 1e-6


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.9999])
def test_ema_decay(decay: float) -> None:
    """diffusers counts the update before it asks for the decay, so its counter is ours: 1 at the first."""
    theirs = EMAModel(nn.Linear(1, 1).parameters(), decay=decay)
    ours = EMA(decay=decay)
    assert [theirs.get_decay(n) for n in range(1, 400)] == pytest.approx(
        [ours.decay_at(n) for n in range(1, 400)], rel=1e-12
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_one_step_of_ddim_from_the_true_answer_returns_the_picture(prediction: str) -> None:
    """If the network answered our target exactly, the sampler would land on x0: training and sampling speak alike."""
    from diffusers import DDIMScheduler

    sampler = DDIMScheduler(
        **SDXL_SCHEDULER | {"prediction_type": prediction, "clip_sample": False, "set_alpha_to_one": False}
    )
    sampler.set_timesteps(1000)
    ours = DDPM.from_config(SDXL_SCHEDULER, prediction=prediction)
    latents, noise = torch.from_numpy(normal(3, 1, 4, 4, 4)), torch.from_numpy(normal(4, 1, 4, 4, 4))
    for step in (0, 1, 250, 500, 900, 999):
        t = torch.tensor([step])
        out = sampler.step(ours.target(latents, noise, t), step, ours.corrupt(latents, noise, t))
        tolerance = 3e-6 / np.sqrt(formulas.SDXL_ALPHA_BAR[step])
        assert (out.pred_original_sample - latents).abs().max() < tolerance
