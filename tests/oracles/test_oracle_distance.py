"""Distances and their delta schedules, at every timestep and near and far from zero."""

from __future__ import annotations

from typing import Any

import formulas
import loss_formulas
import numpy as np
import pytest
import torch
from rig import FunctionPolicy, ddpm, make_batch, normal

from gesso.core.noise import RectifiedFlow
from gesso.objectives import Denoise
from gesso.objectives.distance import delta_at, distance

KINDS = ["l2", "l1", "huber", "smooth_l1", "log_cosh"]
SCHEDULES = ["constant", "exponential", "snr"]
ABAR = formulas.SDXL_ALPHA_BAR
T = torch.arange(1000)
ERRORS = np.concatenate([[0.0], *(sign * np.logspace(-5, 2, 120) for sign in (1, -1))])


def exact(kind: str, c: float) -> np.ndarray:
    return np.array([loss_formulas.distance(kind, e, c) for e in ERRORS.tolist()])


@pytest.mark.parametrize("c", [0.01, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_distance(kind: Any, c: float) -> None:
    """Errors from 1e-5 to 100: near 0 the naive forms lose all their digits in float32."""
    delta = torch.full((len(ERRORS),), c, dtype=torch.float64)
    found = distance(kind, torch.from_numpy(ERRORS), delta)
    assert formulas.relative(found.numpy(), exact(kind, c)) < (1e-9 if kind == "log_cosh" else 1e-12)
    narrow = torch.from_numpy(ERRORS).float()
    rounded = np.array([loss_formulas.distance(kind, e, float(np.float32(c))) for e in narrow.double().tolist()])
    single = distance(kind, narrow, delta.float())
    assert single.dtype == torch.float32
    assert formulas.relative(single.double().numpy(), rounded) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gradient(kind: Any) -> None:
    """Central differences in float64, and a finite 0 where the error is 0."""
    at = torch.from_numpy(ERRORS[np.abs(ERRORS) > 1e-3]).requires_grad_()
    delta = torch.full((len(at),), 0.1, dtype=torch.float64)
    distance(kind, at, delta).sum().backward()
    step = 1e-6
    with torch.no_grad():
        wanted = (distance(kind, at + step, delta) - distance(kind, at - step, delta)) / (2 * step)
    assert at.grad is not None
    assert ((at.grad - wanted).abs() / (wanted.abs() + 1e-3)).max() < 1e-5
    zero = torch.zeros(1, requires_grad=True)
    distance(kind, zero, torch.ones(1)).backward()
    assert zero.grad is not None
    assert float(zero.grad) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_the_curves(kind: Any) -> None:
    """What the documentation says of them: near 0 quadratic (but l1), far away linear (but l2)."""
    c = 0.1
    near, far = (
        float(distance(kind, torch.tensor([e], dtype=torch.float64), torch.tensor([c], dtype=torch.float64)))
        for e in (1e-4, 1e4)
    )
    small = {"l2": 1e-8, "l1": 1e-4, "huber": 1e-8, "smooth_l1": 1e-7, "log_cosh": 0.5e-8}[kind]
    large = {"l2": 1e8, "l1": 1e4, "huber": 2 * c * 1e4, "smooth_l1": 2e4, "log_cosh": 1e4}[kind]
    assert near == pytest.approx(small, rel=1e-5)
    assert far == pytest.approx(large, rel=1e-4)


@pytest.mark.parametrize("c", [0.05, 0.3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_delta_of_ddpm(schedule: Any, c: float) -> None:
    found = delta_at(schedule, c, ddpm(), T)
    wanted = loss_formulas.scheduled_delta(schedule, c, progress=np.arange(1000) / 1000, snr=formulas.snr(ABAR))
    assert found.dtype == torch.float32
    assert formulas.relative(found.double().numpy(), wanted) < 1e-6
    if schedule != "constant":
        assert wanted[0] > 0.9
        assert (np.diff(wanted) < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_delta_of_a_flow_and_of_a_zero_terminal_schedule(schedule: Any) -> None:
    s = np.linspace(0.001, 0.999, 999)
    found = delta_at(schedule, 0.1, RectifiedFlow(), torch.from_numpy(s * 1000).float())
    wanted = loss_formulas.scheduled_delta(schedule, 0.1, progress=s, snr=loss_formulas.flow_snr(s))
    assert formulas.relative(found.double().numpy(), wanted) < 1e-6
    last = delta_at(schedule, 0.1, ddpm("v_prediction", zero_snr=True), T)[-1]
    assert float(last) == pytest.approx(0.1 if schedule != "exponential" else 0.1**0.999, rel=1e-6)
    ends = delta_at(schedule, 0.1, RectifiedFlow(), torch.tensor([0.0, 1000.0]))
    assert torch.isfinite(ends).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_loss_value_with_a_schedule(kind: str, schedule: str) -> None:
    """Each row of a batch has the delta of its own timestep."""
    latents, noise, answer = (normal(seed, 1000, 2, 2, 3) for seed in (1, 2, 3))
    batch = make_batch(latents, noise, (np.arange(1000) + 0.5) / 1000)
    policy = FunctionPolicy(ddpm(), lambda _noisy, _t: torch.from_numpy(answer))
    one = Denoise.model_validate({"loss_type": kind, "huber_schedule": schedule, "huber_delta": 0.2})
    found = one.loss(policy, batch)
    c = loss_formulas.scheduled_delta(schedule, 0.2, progress=np.arange(1000) / 1000, snr=formulas.snr(ABAR))
    errors = (answer.astype(np.float64) - noise).reshape(1000, -1)
    each = [
        [loss_formulas.distance(kind, e, d) for e in row] for row, d in zip(errors.tolist(), c.tolist(), strict=True)
    ]
    assert formulas.relative(found.double().numpy(), np.array(each).mean(1)) < 1e-6


def test_log_cosh_loss_value() -> None:
    latents, noise, answer = (normal(seed, 100, 2, 2, 3) for seed in (4, 5, 6))
    policy = FunctionPolicy(ddpm(), lambda _noisy, _t: torch.from_numpy(answer))
    found = Denoise(loss_type="log_cosh").loss(policy, make_batch(latents, noise, np.full(100, 0.4)))
    wanted = np.log(np.cosh(answer.astype(np.float64) - noise)).reshape(100, -1).mean(1)
    assert formulas.relative(found.double().numpy(), wanted) < 1e-6
