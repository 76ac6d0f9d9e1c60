"""Which timesteps are drawn: every distribution, range and bias against its analytic distribution function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import loss_formulas
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rig import FunctionPolicy, ddpm, make_batch, rows
from scipy import stats

from gesso.core.noise import RectifiedFlow
from gesso.core.random import Draws, SampleKey
from gesso.core.timesteps import Beta, Custom, Distribution, LogitNormal, Mode, TimestepBias, Uniform, place
from gesso.objectives import Denoise

DISTRIBUTIONS: dict[str, tuple[Distribution, loss_formulas.Cdf]] = {
    "uniform": (Uniform(), loss_formulas.uniform_cdf),
    "logit-normal -1": (LogitNormal(mean=-1), loss_formulas.logit_normal_cdf(-1, 1)),
    "logit-normal 0": (LogitNormal(), loss_formulas.logit_normal_cdf(0, 1)),
    "logit-normal 1": (LogitNormal(mean=1, std=0.6), loss_formulas.logit_normal_cdf(1, 0.6)),
    "mode 1.29": (Mode(), loss_formulas.mode_cdf(1.29)),
    "mode -0.7": (Mode(scale=-0.7), loss_formulas.mode_cdf(-0.7)),
    "beta 2 3": (Beta(alpha=2, beta=3), loss_formulas.beta_cdf(2, 3)),
    "beta 1/2 1/2": (Beta(alpha=0.5, beta=0.5), loss_formulas.beta_cdf(0.5, 0.5)),
    "beta 4 1": (Beta(alpha=4, beta=1), loss_formulas.beta_cdf(4, 1)),
    "custom": (Custom(weights=(1, 0, 3, 2)), loss_formulas.steps_cdf((1, 0, 3, 2))),
}
RANGES = [(0.0, 1.0), (0.3, 0.9)]
TILTS = [(0.0, 1.0, 1.0), (0.75, 1.0, 4.0), (0.2, 0.5, 0.25)]


def drawn(name: str, low: float, high: float, tilt: tuple[float, float, float], u: np.ndarray) -> np.ndarray:
    begin, end, multiplier = tilt
    bias = TimestepBias(begin=begin, end=end, multiplier=multiplier)
    found = place(torch.from_numpy(u), DISTRIBUTIONS[name][0], bias, low=low, high=high)
    return low + found.numpy() * (high - low)


@pytest.mark.parametrize("tilt", TILTS)
@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_have_the_distribution(name: str, low: float, high: float, tilt: tuple[float, float, float]) -> None:
    """1e5 keyed-like uniforms; Kolmogorov-Smirnov against the analytic distribution function."""
    u = np.random.default_rng(5).random(100_000)
    begin, end, multiplier = tilt
    cdf = loss_formulas.tilted(DISTRIBUTIONS[name][1], begin=begin, end=end, multiplier=multiplier)
    found = drawn(name, low, high, tilt, u)
    assert found.min() >= low
    assert found.max() <= high
    assert loss_formulas.ks(found, loss_formulas.between(cdf, low, high)) < 1.95


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_quantile_inverts_the_analytic_distribution_function(name: str) -> None:
    distribution, cdf = DISTRIBUTIONS[name]
    p = np.linspace(0.001, 0.999, 501)
    x = distribution.quantile(torch.from_numpy(p)).numpy()
    assert (np.diff(x) >= 0).all(), "more u, more noise"
    assert np.abs(cdf(x) - p).max() < 3e-6
    grid = np.linspace(0, 1, 101).tolist()
    assert [distribution.cdf(one) for one in grid] == pytest.approx(cdf(np.array(grid)), abs=1e-12)
    assert (distribution.cdf(0), distribution.cdf(1)) == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_ends_of_u_stay_inside(name: str, dtype: torch.dtype) -> None:
    u = torch.tensor([0.0, 1e-30, 0.5, 1 - 2**-24, 1.0], dtype=dtype)
    found = place(u, DISTRIBUTIONS[name][0], TimestepBias(), low=0.1, high=0.9)
    assert found.dtype == dtype
    assert torch.isfinite(found).all()
    assert ((found >= 0) & (found <= 1)).all()
    t = ddpm().sample_t(
        u,
        low=0.1,
        high=0.9,
        place=lambda u, low, high: place(u, DISTRIBUTIONS[name][0], TimestepBias(), low=low, high=high),
    )
    assert int(t.min()) >= 100
    assert int(t.max()) <= 899


@pytest.mark.parametrize(("alpha", "beta"), [(0.3, 0.7), (1, 1), (1, 1 / 3), (2, 5), (40, 3), (300, 500)])
def test_incomplete_beta_function(alpha: float, beta: float) -> None:
    x = np.linspace(0, 1, 201)
    found = [Beta(alpha=alpha, beta=beta).cdf(one) for one in x.tolist()]
    assert np.abs(found - stats.beta(alpha, beta).cdf(x)).max() < 1e-12


def test_a_stretch_of_weight_0_is_never_drawn() -> None:
    u = torch.from_numpy(np.linspace(0, 1, 10_001))
    x = Custom(weights=(0, 1, 0, 0, 1, 0)).quantile(u).numpy()
    assert (((x >= 1 / 6) & (x <= 2 / 6)) | ((x >= 4 / 6) & (x <= 5 / 6))).all()


def objective(**settings: Any) -> Denoise:
    return Denoise.model_validate(settings)


SETTINGS: list[dict[str, Any]] = [
    {"timesteps": {"type": "logit_normal", "mean": 1}},
    {"timesteps": {"type": "mode"}, "timestep_low": 0.25},
    {"timesteps": {"type": "beta", "alpha": 1, "beta": 0.4}},
    {"timesteps": {"type": "custom", "weights": [3, 1, 1, 3]}},
    {"timestep_bias": {"begin": 0.75, "end": 1, "multiplier": 3}, "timestep_high": 0.9},
]


def chosen(settings: dict[str, Any], u: np.ndarray, *, held_out: bool = False) -> np.ndarray:
    zeros = np.zeros((len(u), 1, 1, 1))
    policy = FunctionPolicy(ddpm(), lambda noisy, _t: noisy)
    objective(**settings).loss(policy, replace(make_batch(zeros, zeros, u), held_out=held_out))
    return policy.t.numpy()


@pytest.mark.parametrize("settings", SETTINGS)
def test_timesteps_of_a_run(settings: dict[str, Any]) -> None:
    """Each integer timestep is drawn as often as the density between t / T and (t + 1) / T says, from keyed draws."""
    draws = Draws(11, 0, tuple(SampleKey(f"image-{i}") for i in range(20_000)))
    t = chosen(settings, draws.uniform("timestep"))
    low, high = settings.get("timestep_low", 0.0), settings.get("timestep_high", 1.0)
    kind = settings.get("timesteps", {"type": "uniform"})
    cdf = {
        "uniform": loss_formulas.uniform_cdf,
        "logit_normal": loss_formulas.logit_normal_cdf(1, 1),
        "mode": loss_formulas.mode_cdf(1.29),
        "beta": loss_formulas.beta_cdf(1, 0.4),
        "custom": loss_formulas.steps_cdf((3, 1, 1, 3)),
    }[kind["type"]]
    if bias := settings.get("timestep_bias"):
        cdf = loss_formulas.tilted(cdf, **bias)
    cdf = loss_formulas.between(cdf, low, high)
    edges = np.arange(round(low * 1000), round(high * 1000) + 1, 10) / 1000
    expected = np.diff(cdf(edges)) * len(t)
    counts = np.histogram(t / 1000, edges - 1e-9)[0]
    assert counts.sum() == len(t)
    enough = expected > 5
    value = float(((counts - expected)[enough] ** 2 / expected[enough]).sum())
    assert (value - enough.sum()) / np.sqrt(2 * enough.sum()) < 5


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_timestep_is_its_samples_own(settings: dict[str, Any]) -> None:
    u = np.random.default_rng(3).random(12)
    whole = chosen(settings, u)
    assert np.concatenate([chosen(settings, u[i : i + 1]) for i in range(12)]).tolist() == whole.tolist()


@pytest.mark.parametrize("settings", SETTINGS)
def test_held_out_pictures_keep_an_even_grid(settings: dict[str, Any]) -> None:
    """Or losses of runs with other distributions could not be compared; the range counts for them too."""
    u = (np.arange(8) + 0.5) / 8
    low, high = round(1000 * settings.get("timestep_low", 0.0)), round(1000 * settings.get("timestep_high", 1.0))
    assert chosen(settings, u, held_out=True).tolist() == (low + np.floor(u * (high - low))).astype(int).tolist()
    assert chosen(settings, u).tolist() != chosen(settings, u, held_out=True).tolist()


@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.0])
def test_sd3_draws_are_the_right_way_round(mean: float) -> None:
    """A mean above 0 is more noise, before and after a shift; s = sigmoid(m + z), then s' = k s / (1 + (k-1) s)."""
    u = torch.from_numpy(np.random.default_rng(7).random(100_000))

    def spread(u: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return place(u, LogitNormal(mean=mean), TimestepBias(), low=low, high=high)

    plain = loss_formulas.logit_normal_cdf(mean, 1)

    def unshifted(x: np.ndarray) -> np.ndarray:
        return plain(loss_formulas.flow_shift(x, 1 / 3))

    s = RectifiedFlow().sample_t(u, place=spread).double().numpy() / 1000
    assert loss_formulas.ks(s, plain) < 1.95
    moved = RectifiedFlow(shift=3.0).sample_t(u, place=spread).double().numpy() / 1000
    assert loss_formulas.ks(moved, unshifted) < 1.95
    part = RectifiedFlow(shift=3.0).sample_t(u, place=spread, low=0.5, high=0.8).double().numpy() / 1000
    inside = loss_formulas.between(unshifted, 0.5, 0.8)
    assert loss_formulas.ks(part, inside) < 1.95
    assert (np.median(s) > 0.5) == (mean > 0) or mean == 0


def test_a_batch_split_does_not_move_a_timestep() -> None:
    u = np.random.default_rng(1).random(6)
    zeros = np.zeros((6, 1, 2, 2))
    batch = make_batch(zeros, zeros, u)
    one = objective(**SETTINGS[0])
    whole = one.draw_t(ddpm(), batch)
    assert torch.equal(torch.cat([one.draw_t(ddpm(), rows(batch, part)) for part in ([0, 1, 2], [3], [4, 5])]), whole)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"timestep_bias": {"multiplier": 2}}, "say which part"),
        ({"timestep_bias": {"begin": 0.5, "end": 0.5}}, "begin must be below end"),
        ({"timesteps": {"type": "custom", "weights": [0, 0]}}, "one of them above 0"),
        ({"timesteps": {"type": "custom", "weights": [1, -1]}}, "0 or more"),
        ({"timesteps": {"type": "mode", "scale": 1.8}}, "less than or equal to"),
        ({"timesteps": {"type": "custom", "weights": [1, 0]}, "timestep_low": 0.6}, "draws nothing between"),
        ({"timesteps": {"type": "logit_normal", "std": 0.05}, "timestep_low": 0.9}, "draws nothing between"),
        ({"timesteps": {"type": "beta"}}, "alpha"),
    ],
)
def test_what_timesteps_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        objective(**settings)
