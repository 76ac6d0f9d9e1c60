"""The forward process, its targets and its weights against float64 formulas, at every one of the 1000 timesteps."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
import torch
from rig import PREDICTIONS, SDXL_SCHEDULER, FunctionPolicy, ddpm, make_batch, normal

from gesso.core.noise import DDPM, zero_terminal_snr
from gesso.core.weighting import MinSNR
from gesso.errors import UserError
from gesso.objectives import Denoise

T = torch.arange(1000)
ABAR = formulas.SDXL_ALPHA_BAR
ABAR_ZERO = formulas.zero_terminal(ABAR)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def test_table_of_sdxl() -> None:
    table = ddpm().alphas_cumprod
    assert table.dtype == torch.float64
    assert formulas.relative(table.numpy(), ABAR) < 1e-12


@pytest.mark.parametrize(
    ("name", "first", "last", "steps"), [("linear", 1e-4, 0.02, 1000), ("scaled_linear", 1e-3, 0.03, 50)]
)
def test_table_of_other_schedules(name: str, first: float, last: float, steps: int) -> None:
    config = {"beta_schedule": name, "beta_start": first, "beta_end": last, "num_train_timesteps": steps}
    noise = DDPM.from_config(config)
    assert noise.steps == steps
    assert (
        formulas.relative(noise.alphas_cumprod.numpy(), formulas.alpha_bar(formulas.betas(name, first, last, steps)))
        < 1e-12
    )


def test_table_of_given_betas() -> None:
    given = [0.001, 0.02, 0.3, 0.4]
    table = DDPM.from_config(
        {"trained_betas": given, "beta_schedule": "linear", "num_train_timesteps": 4}
    ).alphas_cumprod
    assert formulas.relative(table.numpy(), formulas.alpha_bar(np.array(given))) < 1e-12


def test_unknown_schedule_and_prediction_are_refused() -> None:
    with pytest.raises(UserError, match="squaredcos_cap_v2"):
        DDPM.from_config(SDXL_SCHEDULER | {"beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(UserError, match="sample"):
        DDPM.from_config(SDXL_SCHEDULER | {"prediction_type": "sample"})


def test_prediction_argument_overrules_the_config() -> None:
    assert DDPM.from_config(SDXL_SCHEDULER, prediction="v_prediction").prediction == "v_prediction"
    assert DDPM.from_config(SDXL_SCHEDULER).prediction == "epsilon"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_coefficients_at_every_timestep(dtype: torch.dtype, zero_snr: bool) -> None:
    """Feeding zeros and ones reads a and s out of `corrupt`; a low-precision latent must not coarsen them."""
    abar = ABAR_ZERO if zero_snr else ABAR
    noise = ddpm("v_prediction", zero_snr=zero_snr)
    zeros, ones = torch.zeros(1000, 1, 1, 1, dtype=dtype), torch.ones(1000, 1, 1, 1, dtype=dtype)
    sigma, signal = noise.corrupt(zeros, ones, T), noise.corrupt(ones, zeros, T)
    assert sigma.dtype == signal.dtype == torch.float32
    assert formulas.relative(sigma.flatten().double().numpy(), np.sqrt(1 - abar)) < 1e-6
    assert formulas.relative(signal.flatten().double().numpy(), np.sqrt(abar)) < 1e-6
    assert formulas.relative(noise.target(zeros, ones, T).flatten().double().numpy(), np.sqrt(abar)) < 1e-6
    assert formulas.relative(noise.target(ones, zeros, T).flatten().double().numpy(), -np.sqrt(1 - abar)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_corrupt_and_target_of_random_latents(prediction: str, dtype: torch.dtype) -> None:
    latents = torch.from_numpy(normal(1, 1000, 4, 3, 5)).to(dtype)
    draws = torch.from_numpy(normal(2, 1000, 4, 3, 5)).to(dtype)
    noise = ddpm(prediction)
    # bf16 and fp16 numbers are exact in float64, so the oracle sees the very same inputs.
    exact = latents.double().numpy(), draws.double().numpy(), T.numpy()
    noisy, target = noise.corrupt(latents, draws, T), noise.target(latents, draws, T)
    assert noisy.dtype == target.dtype == torch.float32
    for found, wanted in [
        (noisy, formulas.corrupt(ABAR, *exact)),
        (target, formulas.target(ABAR, *exact, prediction)),
    ]:
        errors = np.abs(found.double().numpy() - wanted)
        # Absolute rounding is bounded by the size of the terms, which is at most 5 here.
        assert errors.max() < 1e-6
        assert formulas.relative_l2(found.double().numpy(), wanted) < 1e-7


def test_velocity_and_noisy_latent_give_both_ends_back() -> None:
    """a x_t - s v = x0 and s x_t + a v = n."""
    noise = ddpm("v_prediction")
    latents, draws = torch.from_numpy(normal(3, 1000, 4, 2, 2)), torch.from_numpy(normal(4, 1000, 4, 2, 2))
    noisy, v = noise.corrupt(latents, draws, T).double(), noise.target(latents, draws, T).double()
    a, s = (torch.from_numpy(x) for x in formulas.coefficients(ABAR, T.numpy(), 4))
    assert (a * noisy - s * v - latents).abs().max() < 1e-6
    assert (s * noisy + a * v - draws).abs().max() < 1e-6


def test_timestep_order_is_per_sample() -> None:
    """Each row of a batch takes the coefficients of its own timestep, repeated and unsorted ones too."""
    t = torch.tensor([999, 0, 500, 500, 3])
    latents, draws = normal(5, 5, 2, 2, 2), normal(6, 5, 2, 2, 2)
    found = ddpm().corrupt(torch.from_numpy(latents), torch.from_numpy(draws), t).numpy()
    assert np.abs(found - formulas.corrupt(ABAR, latents, draws, t.numpy())).max() < 1e-6


@pytest.mark.parametrize("zero_snr", [False, True])
def test_snr(zero_snr: bool) -> None:
    abar = ABAR_ZERO if zero_snr else ABAR
    found = ddpm("v_prediction", zero_snr=zero_snr).snr(T)
    assert found.dtype == torch.float64
    # Near the end of the rescaled table sqrt(abar) is a difference of nearly equal numbers.
    assert formulas.relative(found.numpy(), formulas.snr(abar)) < (1e-10 if zero_snr else 1e-12)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 5.0, 20.0, 1e9])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights(prediction: str, gamma: float) -> None:
    found = ddpm(prediction).weight(T, MinSNR(gamma=gamma) if gamma else None)
    assert found.dtype == torch.float32
    assert formulas.relative(found.double().numpy(), formulas.min_snr_weight(ABAR, gamma, prediction)) < 1e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_no_gamma_is_plain_mse(prediction: str) -> None:
    assert torch.equal(ddpm(prediction).weight(T), torch.ones(1000))


def test_infinite_gamma_is_plain_mse_for_noise() -> None:
    assert torch.equal(ddpm().weight(T, MinSNR(gamma=1e9)), torch.ones(1000))


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_weighted_loss_does_not_depend_on_the_parameterisation(gamma: float) -> None:
    """One guess of x0, said as noise and as velocity, costs the same at all timesteps: min(SNR, g) |x0 error|^2."""
    latents, draws, guess = (normal(seed, 1000, 4, 2, 2) for seed in (10, 11, 12))
    batch = make_batch(latents, draws, (np.arange(1000) + 0.5) / 1000)
    t = np.arange(1000)
    x_t = formulas.corrupt(ABAR, latents, draws, t)
    losses = {}
    for prediction in PREDICTIONS:
        answer = torch.from_numpy(
            formulas.prediction_from_x0(ABAR, guess.astype(np.float64), x_t, t, prediction)
        ).float()
        policy = FunctionPolicy(ddpm(prediction), lambda _noisy, _t, answer=answer: answer)
        losses[prediction] = Denoise(min_snr_gamma=gamma).loss(policy, batch).double().numpy()
        assert torch.equal(policy.t, T)
    wanted = np.minimum(formulas.snr(ABAR), gamma) * formulas.per_sample("l2", guess, latents)
    # The float32 difference of two numbers near 1 keeps about five digits where SNR is 0.005.
    assert formulas.relative(losses["epsilon"], wanted) < 2e-5
    assert formulas.relative(losses["v_prediction"], wanted) < 2e-5
    assert formulas.relative(losses["epsilon"], losses["v_prediction"]) < 2e-5


def test_zero_terminal_table() -> None:
    table = ddpm("v_prediction", zero_snr=True).alphas_cumprod.numpy()
    assert table[-1] == 0.0
    assert abs(table[0] / ABAR[0] - 1) < 1e-12
    assert np.abs(table - ABAR_ZERO).max() < 1e-14
    assert (np.diff(table) < 0).all()
    assert np.abs(zero_terminal_snr(torch.from_numpy(ABAR.copy())).numpy() - ABAR_ZERO).max() < 1e-14


def test_zero_terminal_does_not_write_to_its_argument() -> None:
    given = torch.from_numpy(ABAR.copy())
    zero_terminal_snr(given)
    assert np.array_equal(given.numpy(), ABAR)


def test_zero_terminal_last_step_is_pure_noise() -> None:
    noise = ddpm("v_prediction", zero_snr=True)
    latents, draws, last = torch.from_numpy(normal(20, 1, 4, 2, 2)), torch.from_numpy(normal(21, 1, 4, 2, 2)), T[-1:]
    assert torch.equal(noise.corrupt(latents, draws, last), draws)
    assert torch.equal(noise.target(latents, draws, last), -latents)


@pytest.mark.parametrize("gamma", [None, 1.0, 5.0, 1e9])
def test_zero_terminal_weights_are_finite_and_of_the_rescaled_table(gamma: float | None) -> None:
    found = ddpm("v_prediction", zero_snr=True).weight(T, MinSNR(gamma=gamma) if gamma else None).double().numpy()
    assert np.isfinite(found).all()
    if gamma is not None:
        wanted = formulas.min_snr_weight(ABAR_ZERO, gamma, "v_prediction")
        assert formulas.relative(found[:-1], wanted[:-1]) < 1e-6
        assert found[-1] == 0.0


@pytest.mark.parametrize("asked", [None, "epsilon"])
def test_zero_terminal_with_noise_prediction_is_refused(asked: str | None) -> None:
    kind = "epsilon" if asked is None else "v_prediction"
    with pytest.raises(UserError, match="zero-terminal"):
        DDPM.from_config(
            SDXL_SCHEDULER | {"rescale_betas_zero_snr": True, "prediction_type": kind},
            prediction=asked,
        )
