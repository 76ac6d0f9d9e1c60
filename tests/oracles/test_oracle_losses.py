"""What an error costs and which noise is trained on: weights, distances, masks, timesteps and layered noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import formulas
import formulas_losses as losses
import numpy as np
import pytest
import torch
from rig import FunctionPolicy, ddpm, make_batch, normal
from torch import Tensor

from gesso.core.batch import Batch
from gesso.core.noise import DDPM, RectifiedFlow
from gesso.core.random import Draws, SampleKey
from gesso.errors import UserError
from gesso.objectives import DPO, Denoise

ABAR = {False: formulas.SDXL_ALPHA_BAR, True: formulas.zero_terminal(formulas.SDXL_ALPHA_BAR)}
RULES: list[dict[str, Any]] = [
    {"type": "min_snr", "gamma": 5.0},
    {"type": "min_snr", "gamma": 0.3},
    {"type": "soft_min_snr", "gamma": 4.0},
    {"type": "debiased"},
    {"type": "p2", "gamma": 1.0, "k": 1.0},
    {"type": "p2", "gamma": 0.5, "k": 0.25},
]
PROCESSES: dict[str, tuple[DDPM | RectifiedFlow, bool]] = {
    "epsilon": (ddpm("epsilon"), False),
    "v_prediction": (ddpm("v_prediction"), False),
    "v_prediction, zero terminal SNR": (ddpm("v_prediction", zero_snr=True), True),
    "flow": (RectifiedFlow(), False),
}


def every_timestep(count: int = 1000) -> np.ndarray:
    return (np.arange(count) + 0.5) / count


def snr_of(name: str, u: np.ndarray) -> np.ndarray:
    """The signal-to-noise ratio at each u, by the formulas."""
    if name == "flow":
        return losses.line_snr(u)
    return formulas.snr(ABAR[PROCESSES[name][1]][np.floor(u * 1000).astype(int)])


def numbers(rule: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in rule.items() if key != "type"}


def cost(process: DDPM | RectifiedFlow, batch: Batch, error: Tensor, **settings: Any) -> np.ndarray:
    """The loss of answers that miss their targets by `error`, float64."""
    noise, settings = batch.noise, {"type": "denoise", **settings}

    def answer(noisy: Tensor, t: Tensor) -> Tensor:
        return process.target(batch.latents, noise, t).double() + error

    policy = FunctionPolicy(process, answer)  # type: ignore[arg-type]
    return Denoise.model_validate(settings).loss(policy, batch).double().numpy()


# --------------------------------------------------------------------------- weights


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_weight_of_each_timestep(name: str, rule: dict[str, Any]) -> None:
    """What a unit error costs under the rule, by what it costs without one, at a thousand timesteps."""
    u, (process, _) = every_timestep(), PROCESSES[name]
    batch = make_batch(np.zeros((1000, 1, 2, 2)), np.zeros((1000, 1, 2, 2)), u)
    found = cost(process, batch, torch.ones(1000, 1, 2, 2), weighting=rule)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = losses.weight(rule["type"], name.partition(",")[0], snr_of(name, u), **numbers(rule))
    assert np.isfinite(found).all()
    at = np.isfinite(wanted)
    assert at.sum() >= 999
    assert formulas.relative(found[at], wanted[at]) < (2e-6 if name == "flow" else 1e-6)  # a flow's t is float32


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_the_rule_itself_in_float64(prediction: Any, rule: dict[str, Any]) -> None:
    snr = np.exp(np.linspace(-9, 9, 400))
    found = Denoise.model_validate({"weighting": rule}).rule.on_answer(torch.from_numpy(snr), prediction)
    assert found.dtype == torch.float64
    assert formulas.relative(found.numpy(), losses.weight(rule["type"], prediction, snr, **numbers(rule))) < 1e-12


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_one_guess_of_the_picture_costs_the_same_in_every_parameterisation(rule: dict[str, Any]) -> None:
    """As noise, as v and as flow, at the timesteps where the straight line has the same signal-to-noise ratio."""
    count = 300
    t = np.linspace(20, 980, count).astype(int)
    latents, draws, guess = (normal(seed, count, 4, 3, 3) for seed in (20, 21, 22))
    snr = formulas.snr(ABAR[False][t])
    wanted = losses.x0_weight(rule["type"], snr, **numbers(rule)) * formulas.per_sample("l2", guess, latents)
    a, s = formulas.coefficients(ABAR[False], t, 4)
    eps = (a * latents + s * draws - a * guess) / s
    share = 1 / (1 + np.sqrt(snr))
    direction = (losses.line(latents, draws, share) - guess) / share[:, None, None, None]
    answers = {"epsilon": eps, "v_prediction": a * eps - s * guess, "flow": direction}
    for name, answer in answers.items():
        u = share if name == "flow" else (t + 0.5) / 1000
        said = torch.from_numpy(answer)
        policy = FunctionPolicy(PROCESSES[name][0], lambda _n, _t, said=said: said)  # type: ignore[arg-type]
        found = Denoise.model_validate({"weighting": rule}).loss(policy, make_batch(latents, draws, u))
        assert formulas.relative(found.double().numpy(), wanted) < 3e-5


def test_peers_rules_for_v_bear_their_names_and_are_not_the_usual_one() -> None:
    snr = np.exp(np.linspace(-9, 6, 50))
    by_rule = {
        rule: Denoise.model_validate({"weighting": {"type": "debiased", "v_rule": rule}})
        .rule.on_answer(torch.from_numpy(snr), "v_prediction")
        .numpy()
        for rule in ("same", "kohya", "onetrainer")
    }
    assert formulas.relative(by_rule["kohya"], 1 / (snr + 1)) < 1e-12
    assert formulas.relative(by_rule["onetrainer"], 1 / np.sqrt(snr + 1)) < 1e-12
    assert formulas.relative(by_rule["same"], losses.weight("debiased", "v_prediction", snr)) < 1e-12


def test_weights_of_the_rescaled_table_and_not_of_the_one_before() -> None:
    """A peer reads the ratio before it rescales: 4.8 times too much at t = 900, 314 times at 990."""
    t = torch.tensor([900, 950, 990])
    batch = make_batch(np.zeros((3, 1, 1, 1)), np.zeros((3, 1, 1, 1)), (t.numpy() + 0.5) / 1000)
    plain, rescaled = (
        cost(ddpm("v_prediction", zero_snr=zero), batch, torch.ones(3, 1, 1, 1), min_snr_gamma=5.0)
        for zero in (False, True)
    )
    assert plain / rescaled == pytest.approx([4.8, 14, 314], rel=0.05)


# --------------------------------------------------------------------------- distances


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1", "log_cosh"])
@pytest.mark.parametrize("name", ["epsilon", "flow"])
def test_distances(name: str, kind: str, schedule: str) -> None:
    """Errors of all sizes at all timesteps, where the target is zero, so that float32 keeps their digits."""
    u, (process, _) = every_timestep(), PROCESSES[name]
    error = np.exp(np.random.default_rng(30).uniform(-4, 3, (1000, 2, 3, 3))) * np.sign(normal(31, 1000, 2, 3, 3))
    batch = make_batch(np.zeros(error.shape), np.zeros(error.shape), u)
    found = cost(process, batch, torch.from_numpy(error), loss_type=kind, huber_delta=0.2, huber_schedule=schedule)
    share = u if name == "flow" else np.floor(u * 1000) / 1000
    delta = losses.huber_delta(schedule, 0.2, share, snr_of(name, u))[:, None, None, None]
    wanted = losses.distance(kind, error.astype(np.float32).astype(np.float64), delta).mean(axis=(1, 2, 3))
    # sqrt(e^2 + c^2) - c of a small error is a difference of near numbers: its digits are those of c.
    assert (np.abs(found - wanted) <= 1e-6 * wanted + 5e-7 * delta.ravel() ** 2).all()


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1", "log_cosh"])
@pytest.mark.parametrize("unmasked", [0.0, 0.3])
def test_masks(kind: str, unmasked: float) -> None:
    """sum(m d) / sum(m), where the rest counts `unmasked`: a plain mean would make small masks count less."""
    draws = np.random.default_rng(32)
    error, mask = normal(33, 12, 3, 4, 5), draws.random((12, 1, 4, 5)).astype(np.float32)
    mask[:4] = mask[:4] > 0.85
    mask[:4, 0, 0, 0] = 1
    batch = make_batch(np.zeros(error.shape), np.zeros(error.shape), draws.random(12))
    masked = replace(batch, mask=torch.from_numpy(mask))
    settings = {"loss_type": kind, "huber_delta": 0.2, "unmasked_weight": unmasked}
    found = cost(ddpm(), masked, torch.from_numpy(error), **settings)
    counts = np.broadcast_to(unmasked + (1 - unmasked) * mask.astype(np.float64), error.shape)
    each = losses.distance(kind, error.astype(np.float64), 0.2)
    wanted = (each * counts).sum((1, 2, 3)) / counts.sum((1, 2, 3))
    assert found == pytest.approx(wanted, rel=2e-6)
    everywhere = cost(ddpm(), replace(batch, mask=torch.ones(12, 1, 4, 5)), torch.from_numpy(error), **settings)
    assert everywhere == pytest.approx(cost(ddpm(), batch, torch.from_numpy(error), **settings), rel=1e-6)


# --------------------------------------------------------------------------- timesteps

DISTRIBUTIONS: list[tuple[dict[str, Any], Any]] = [
    ({"type": "logit_normal", "mean": m, "std": 1.0}, losses.logit_normal_cdf(m, 1.0)) for m in (-1.0, 0.0, 1.0)
]
DISTRIBUTIONS += [
    ({"type": "logit_normal", "mean": 0.5, "std": 0.4}, losses.logit_normal_cdf(0.5, 0.4)),
    ({"type": "beta", "alpha": 2.0, "beta": 3.5}, losses.beta_cdf(2.0, 3.5)),
    ({"type": "beta", "alpha": 5.0, "beta": 1.0}, losses.beta_cdf(5.0, 1.0)),
    ({"type": "custom", "weights": [1.0, 0.0, 4.0, 2.0]}, losses.stretches_cdf([1.0, 0.0, 4.0, 2.0])),
    ({"type": "uniform"}, lambda s: s),
]


def drawn(process: DDPM | RectifiedFlow, u: np.ndarray, **settings: Any) -> np.ndarray:
    """Timesteps that a denoising objective asks its network about, as shares of the range."""
    batch = make_batch(np.zeros((len(u), 1, 1, 1)), np.zeros((len(u), 1, 1, 1)), u)
    policy = FunctionPolicy(process, lambda noisy, _t: torch.zeros_like(noisy))  # type: ignore[arg-type]
    Denoise.model_validate(settings).loss(policy, batch)
    t = policy.t.double().numpy()
    return t / 1000 if isinstance(process, RectifiedFlow) else (t + 0.5) / 1000


@pytest.mark.parametrize(("distribution", "cdf"), DISTRIBUTIONS, ids=[str(d) for d, _ in DISTRIBUTIONS])
def test_noise_levels_follow_their_distribution(distribution: dict[str, Any], cdf: Any) -> None:
    """100,000 keyed draws of a flow against the distribution function; those of a table, to the nearest entry."""
    u = np.random.default_rng(40).random(100_000)
    assert losses.ks(drawn(RectifiedFlow(), u, timesteps=distribution), cdf) < 1.95
    even = (np.arange(20_000) + 0.5) / 20_000
    table = np.bincount((drawn(ddpm(), even, timesteps=distribution) * 1000).astype(int), minlength=1000) / 20_000
    edges = cdf(np.arange(1001) / 1000)
    assert np.abs(table - np.diff(edges)).max() < 3e-4


def test_a_mean_above_0_is_more_noise() -> None:
    """Peers look a descending table up by an ascending number, and so train on the other end."""
    u = every_timestep()
    for process in (ddpm(), RectifiedFlow()):
        low, middle, high = (
            drawn(process, u, timesteps={"type": "logit_normal", "mean": m}).mean() for m in (-1.0, 0.0, 1.0)
        )
        assert low < 0.35 < 0.49 < middle < 0.51 < 0.65 < high


@pytest.mark.parametrize("scale", [0.81, 1.29, -0.8])
def test_the_mode_distribution_is_that_of_the_paper(scale: float) -> None:
    """Its sample from u, on which both directions of u agree as sets; and what the paper's figure shows."""
    u = every_timestep(4001)
    found = np.sort(drawn(RectifiedFlow(), u, timesteps={"type": "mode", "scale": scale}))
    assert np.abs(found - np.sort(losses.mode_inverse(scale)(u))).max() < 1e-6


def test_a_range_is_the_distribution_cut_down_to_it() -> None:
    cdf = losses.logit_normal_cdf(0.5, 1.0)
    low, high = cdf(np.array([0.2, 0.7]))
    u = np.random.default_rng(41).random(50_000)
    settings = {"timesteps": {"type": "logit_normal", "mean": 0.5}, "timestep_low": 0.2, "timestep_high": 0.7}
    found = drawn(RectifiedFlow(), u, **settings)
    assert found.min() >= 0.2
    assert found.max() <= 0.7
    assert losses.ks(found, lambda s: (cdf(s) - low) / (high - low)) < 1.95


def test_a_bias_multiplies_how_often_its_part_is_drawn() -> None:
    """Three times as often in the noisy quarter: 3 x 0.25 of 3 x 0.25 + 0.75, and evenly on either side."""
    u = every_timestep(10_000)
    found = drawn(RectifiedFlow(), u, timestep_bias={"begin": 0.75, "end": 1.0, "multiplier": 3.0})
    assert (found > 0.75).mean() == pytest.approx(0.5, abs=1e-3)
    assert losses.ks(found[found > 0.75], lambda s: (s - 0.75) / 0.25) < 0.1
    assert losses.ks(found[found < 0.75], lambda s: s / 0.75) < 0.1


# --------------------------------------------------------------------------- layered noise


def layered(count: int, side: int, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """(noise in the input, noise in the target), of latents that are zero, at one timestep."""
    draws = Draws(3, 0, tuple(SampleKey(f"image-{i}") for i in range(count)))
    noise = draws.normal("noise", (4, side, side))
    batch = make_batch(np.zeros_like(noise), noise, np.full(count, 0.5), seed=3)
    asked: list[Tensor] = []

    def network(noisy: Tensor, _t: Tensor) -> Tensor:
        asked.append(torch.zeros_like(noisy, requires_grad=True))
        return asked[0]

    policy = FunctionPolicy(ddpm(), network)
    Denoise.model_validate(settings).loss(policy, batch).sum().backward()
    assert asked[0].grad is not None
    sigma = np.sqrt(1 - ABAR[False][500])
    return policy.noisy.double().numpy() / sigma, -asked[0].grad.double().numpy() * noise[0].size / 2


def test_pyramid_noise_has_variance_one_and_reaches_far() -> None:
    """Input and target share it, its mean square is 1 over many samples, and neighbours are alike."""
    inside, target = layered(1500, 16, pyramid_noise_iterations=6, pyramid_noise_discount=0.9)
    assert np.abs(inside - target).max() < 1e-5
    square = (target**2).mean(axis=(1, 2, 3))
    assert square.mean() == pytest.approx(1, abs=5 * square.std() / np.sqrt(len(square)))
    assert abs(target.mean()) < 5 * target.mean(axis=(2, 3)).std() / np.sqrt(len(target) * 4)
    beside = (target[..., :-1] * target[..., 1:]).mean()
    far = (target[..., :, :4] * target[..., :, -4:]).mean()
    plain, _ = layered(1500, 16)
    assert beside > 0.2
    assert 0.1 < far < beside
    assert abs((plain[..., :-1] * plain[..., 1:]).mean()) < 0.01
    assert (target.reshape(len(target), -1).mean(axis=1).var()) > 5 / target[0].size


def test_pyramid_noise_is_of_its_own_sample_and_channel() -> None:
    inside, _ = layered(400, 8, pyramid_noise_iterations=6, pyramid_noise_discount=0.9)
    means = inside.mean(axis=(2, 3))
    assert np.abs(np.corrcoef(means.T)[np.triu_indices(4, 1)]).max() < 5 / np.sqrt(len(means))
    again, _ = layered(100, 8, pyramid_noise_iterations=6, pyramid_noise_discount=0.9)
    assert np.array_equal(again, inside[:100])


# --------------------------------------------------------------------------- straight lines


def test_the_line_its_direction_and_both_ends() -> None:
    """x_s = (1 - s) x0 + s n, target n - x0; x_s - s v = x0 and x_s + (1 - s) v = n, and the model is told 1000 s."""
    latents, noise, u = normal(50, 500, 4, 3, 3), normal(51, 500, 4, 3, 3), every_timestep(500)
    process = RectifiedFlow()
    t = process.sample_t(torch.from_numpy(u), low=0.0, high=1.0)
    s = t.double().numpy() / 1000
    assert np.abs(s - u).max() < 1e-7
    pair = torch.from_numpy(latents), torch.from_numpy(noise)
    noisy, direction = process.corrupt(*pair, t).double().numpy(), process.target(*pair, t).double().numpy()
    assert np.abs(noisy - losses.line(latents, noise, s)).max() < 1e-6
    assert np.abs(direction - (noise.astype(np.float64) - latents)).max() < 1e-6
    wide = s[:, None, None, None]
    assert np.abs(noisy - wide * direction - latents).max() < 2e-6
    assert np.abs(noisy + (1 - wide) * direction - noise).max() < 2e-6
    found = process.clean(torch.from_numpy(noisy).float(), torch.from_numpy(direction).float(), t)
    assert np.abs(found.double().numpy() - latents).max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_noise_levels_stay_a_thousand(dtype: torch.dtype) -> None:
    """In bf16 there are 507 of them: neither the level nor what the model is told may have the latent's type."""
    process, u = RectifiedFlow(), torch.from_numpy(every_timestep())
    t = process.sample_t(u, low=0.0, high=1.0)
    zeros, ones = torch.zeros(1000, 1, 1, 1, dtype=dtype), torch.ones(1000, 1, 1, 1, dtype=dtype)
    assert t.unique().numel() == process.corrupt(zeros, ones, t).unique().numel() == 1000
    assert np.abs(process.corrupt(zeros, ones, t).double().numpy().ravel() - u.numpy()).max() < 1e-7


@pytest.mark.parametrize("k", [3.0, 1.0, 1 / 3, 0.4])
def test_the_shift(k: float) -> None:
    u = every_timestep()
    found = RectifiedFlow(shift=k).sample_t(torch.from_numpy(u), low=0.0, high=1.0).double().numpy() / 1000
    assert np.abs(found - losses.shifted(u, k)).max() < 1e-6
    assert np.abs(losses.shifted(found, 1 / k) - u).max() < 1e-6


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 48), (128, 128)])
def test_the_shift_of_flux_is_that_of_its_sampler(height: int, width: int) -> None:
    """diffusers' sampler, told the mu of this size, has the noise levels that training has at even u."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    mu = calculate_shift((height // 2) * (width // 2))
    assert np.exp(mu) == pytest.approx(losses.flux_shift((height // 2) * (width // 2)), rel=1e-12)
    sampler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    levels = np.linspace(0.99, 0.01, 99)
    sampler.set_timesteps(sigmas=levels, mu=mu)
    process = RectifiedFlow(shift="flux")
    t = process.sample_t(torch.from_numpy(levels), low=0.0, high=1.0, cells=height * width)
    assert np.abs(t.double().numpy() / 1000 - sampler.sigmas[:-1].double().numpy()).max() < 1e-6


def test_preferences_of_a_flow() -> None:
    """The loss of pairs is that of their errors in n - x0 on the line; before the first step, ln 2."""
    latents, rejected, noise = (normal(seed, 6, 4, 3, 3) for seed in (60, 61, 62))
    u = every_timestep(6)
    batch = replace(make_batch(latents, noise, u), rejected=torch.from_numpy(rejected))
    policy = FunctionPolicy(RectifiedFlow(), lambda noisy, _t: 0.9 * noisy)  # type: ignore[arg-type]
    assert DPO().loss(policy, batch).tolist() == pytest.approx([np.log(2)] * 6, rel=1e-6)


def test_zero_terminal_snr_of_a_model_of_noise_is_refused() -> None:
    with pytest.raises(UserError, match="zero-terminal"):
        ddpm("epsilon", zero_snr=True)
