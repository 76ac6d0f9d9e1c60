"""The update itself: AdamW, clipping and the average against float64 arithmetic."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
import torch
from rig import normal
from torch import nn

from gesso.config.optimizer import Optimizer
from gesso.config.run import EMA
from gesso.training import optim
from gesso.training.ema import Average
from gesso.training.optim import FlatGroup

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}


def groups(*, rates: tuple[float, ...] = (1e-3, 5e-4)) -> tuple[list[FlatGroup], list[dict[str, nn.Parameter]]]:
    parameters = [
        {
            name: nn.Parameter(torch.from_numpy(normal(10 * g + i, *shape)))
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        for g in range(len(rates))
    ]
    made = [
        FlatGroup.of(f"part{g}", p, learning_rate=rate)
        for g, (p, rate) in enumerate(zip(parameters, rates, strict=True))
    ]
    return made, parameters


def flat(tensors: dict[str, nn.Parameter]) -> np.ndarray:
    return np.concatenate([p.detach().double().numpy().ravel() for p in tensors.values()])


def test_adamw_against_float64() -> None:
    """100 steps with a changing rate, through the parameters' own gradients; every part at its own rate."""
    made, parameters = groups()
    optimizer = optim.build(Optimizer(beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.02), made)
    exact = [formulas.AdamW(flat(p), beta1=0.9, beta2=0.99, eps=1e-8, decay=0.02) for p in parameters]
    for step in range(100):
        factor = 0.5 + 0.5 * np.cos(step / 30)
        for group in made:
            group.gradient.zero_()
        gradients = [normal(1000 + 2 * step + g, 25).astype(np.float64) for g in range(2)]
        loss = sum(
            (p.flatten() * torch.from_numpy(piece).float()).sum()
            for tensors, gradient in zip(parameters, gradients, strict=True)
            for p, piece in zip(tensors.values(), np.split(gradient, np.cumsum([12, 5])), strict=True)
        )
        loss.backward()
        optim.set_rates(optimizer, made, factor)
        optimizer.step()
        for oracle, gradient, group in zip(exact, gradients, made, strict=True):
            oracle.step(gradient, group.learning_rate * factor)
    for oracle, tensors in zip(exact, parameters, strict=True):
        assert formulas.relative_l2(flat(tensors), oracle.weights) < 1e-6


def test_lion_against_float64() -> None:
    """60 steps of two parts at rates of their own and a falling factor; what is remembered is the other mixture."""
    made, parameters = groups()
    optimizer = optim.build(Optimizer(type="lion", beta1=0.9, beta2=0.97, weight_decay=0.03), made)
    exact = [formulas.Lion(flat(p), beta1=0.9, beta2=0.97, decay=0.03) for p in parameters]
    for step in range(60):
        for i, (oracle, group) in enumerate(zip(exact, made, strict=True)):
            gradient = normal(3000 + 2 * step + i, 25)
            group.gradient.copy_(torch.from_numpy(gradient))
            oracle.step(gradient.astype(np.float64), group.learning_rate * (1 - step / 60))
        optim.set_rates(optimizer, made, 1 - step / 60)
        optimizer.step()
    for oracle, tensors in zip(exact, parameters, strict=True):
        assert formulas.relative_l2(flat(tensors), oracle.weights) < 1e-6


def test_a_rate_of_zero_moves_nothing() -> None:
    made, parameters = groups(rates=(0.0, 1e-3))
    before = [flat(p) for p in parameters]
    optimizer = optim.build(Optimizer(), made)
    for group in made:
        group.gradient.copy_(torch.ones_like(group.gradient))
    optim.set_rates(optimizer, made, 1.0)
    optimizer.step()
    assert np.array_equal(flat(parameters[0]), before[0])
    assert not np.any(flat(parameters[1]) == before[1])


def test_tiny_updates_move_every_weight() -> None:
    """200 steps at a rate of 1e-7: a bf16 weight would not move at all, a float32 one by what it should."""
    made, parameters = groups(rates=(1e-7,))
    before = flat(parameters[0])
    optimizer = optim.build(Optimizer(weight_decay=0.0), made)
    for _ in range(200):
        made[0].gradient.copy_(torch.ones(25))
        optim.set_rates(optimizer, made, 1.0)
        optimizer.step()
    assert made[0].flat.dtype == torch.float32
    moved = before - flat(parameters[0])
    assert (moved > 0.5 * 200 * 1e-7).all()


@pytest.mark.parametrize("limit", [0.1, 1.0, 1e6])
def test_clipping_against_float64(limit: float) -> None:
    """One norm over all parts; the direction is kept; nothing changes below the limit."""
    made, parameters = groups()
    for g, group in enumerate(made):
        group.gradient.copy_(torch.from_numpy(normal(70 + g, 25)))
    exact = np.concatenate([group.gradient.double().numpy() for group in made])
    norm = float(optim.gradient_norm(made))
    assert norm == pytest.approx(float(np.linalg.norm(exact)), rel=1e-6)
    optim.clip(made, norm, limit)
    wanted = exact * min(1.0, limit / np.linalg.norm(exact))
    found = np.concatenate([p.grad.double().numpy().ravel() for tensors in parameters for p in tensors.values()])
    assert formulas.relative_l2(found, wanted) < 1e-6


def averaged(first: np.ndarray, second: np.ndarray, *, warmup: bool) -> tuple[np.ndarray, np.ndarray]:
    """(the average, the closed form) after one update with `first` and 9,999 with `second`, each [25]."""
    made, _ = groups(rates=(1e-3,))
    average = Average(EMA(decay=0.9999, warmup=warmup), made)
    made[0].flat.data.copy_(torch.from_numpy(first))
    average.update(1)
    made[0].flat.data.copy_(torch.from_numpy(second))
    for update in range(2, 10_001):
        average.update(update)
    decays = formulas.ema_decays(10_000, 0.9999, power=None) if warmup else [0.0] + [0.9999] * 9_999
    start, end = (x.astype(np.float32).astype(np.float64) for x in (first, second))
    wanted = end + (start - end) * formulas.ema_of_step(decays[1:], 1.0, 0.0)
    found = np.concatenate([v.double().numpy().ravel() for v in average.state().values()])
    return found, wanted


@pytest.mark.parametrize("warmup", [True, False])
def test_average_after_10_000_updates(warmup: bool) -> None:
    """From 0.9 to 1 and the like: a bf16 shadow ends at 0.8984 where 0.9632 is right."""
    first = np.linspace(-0.9, 0.9, 25)
    found, wanted = averaged(first, first + 0.1, warmup=warmup)
    assert np.abs(found - wanted).max() < 1e-6


@pytest.mark.parametrize("warmup", [True, False])
def test_average_of_weights_that_hardly_move(warmup: bool) -> None:
    """Near 1, a change of 2e-4 times 1e-4 is below float32's last digit: it must add up all the same."""
    first = np.linspace(0.5, 2.0, 25)
    found, wanted = averaged(first, first + 2e-4, warmup=warmup)
    assert np.abs(found - wanted).max() < 1e-6


def test_average_of_a_random_walk() -> None:
    made, parameters = groups(rates=(1e-3,))
    average = Average(EMA(decay=0.999, warmup=True), made)
    decays = formulas.ema_decays(500, 0.999, power=None)
    wanted = np.zeros(25)
    for update in range(1, 501):
        made[0].flat.data.add_(torch.from_numpy(0.01 * normal(2000 + update, 25)))
        average.update(update)
        wanted = decays[update - 1] * wanted + (1 - decays[update - 1]) * flat(parameters[0])
    found = np.concatenate([v.double().numpy().ravel() for v in average.state().values()])
    assert np.abs(found - wanted).max() < 1e-6


def test_average_in_place_and_back_bit_for_bit() -> None:
    made, parameters = groups()
    average = Average(EMA(decay=0.9), made)
    average.update(1)
    for group in made:
        group.flat.data.mul_(1.7)
    for update in (2, 3):
        average.update(update)
    trained = [flat(p) for p in parameters]
    shadow = {k: v.clone() for k, v in average.state().items()}
    with average.in_place():
        inside = {k: p.detach() for tensors in parameters[:1] for k, p in tensors.items()}
        assert not np.array_equal(flat(parameters[0]), trained[0])
        assert np.array_equal(np.concatenate([v.numpy().ravel() for v in inside.values()]), flat(parameters[0]))
    assert all(np.array_equal(flat(p), t) for p, t in zip(parameters, trained, strict=True))
    assert all(torch.equal(v, shadow[k]) for k, v in average.state().items())
