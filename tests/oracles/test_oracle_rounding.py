"""Weights in bf16: rounding that is right on average, and a norm that is not taken in eight bits."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
import torch
from rig import normal
from torch import nn

from gesso.training import optim
from gesso.training.optim import FlatGroup
from gesso.training.rounding import stochastic


def neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bf16 numbers on either side of float32 values, the one nearer to 0 first: 8 bits of mantissa, from frexp."""
    mantissa, exponent = np.frexp(values.astype(np.float64))
    steps = np.trunc(np.abs(mantissa) * 256)
    sides = (np.sign(values) * np.ldexp(k / 256, exponent) for k in (steps, steps + 1))
    inner, outer = sides
    return inner, outer


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e4])
def test_each_neighbour_as_often_as_the_value_is_near_to_it(scale: float) -> None:
    """P(outer) = (|x| - |inner|) / (|outer| - |inner|), over 4,000 draws of 200 values, to 5 standard deviations."""
    values, count = (scale * normal(200, 200)).astype(np.float32), 4000
    generator = torch.Generator().manual_seed(5)
    drawn = stochastic(torch.from_numpy(np.tile(values, (count, 1))), generator)
    assert drawn.dtype == torch.bfloat16
    found = drawn.double().numpy()
    inner, outer = neighbours(values)
    assert ((found == inner) | (found == outer)).all()
    chance = (np.abs(values) - np.abs(inner)) / (np.abs(outer) - np.abs(inner))
    often = (found == outer).mean(axis=0)
    assert (np.abs(often - chance) <= 5 * np.sqrt(chance * (1 - chance) / count) + 1e-9).all()
    middle = (chance > 0.05) & (chance < 0.95)
    gap = (found.mean(axis=0) - values)[middle] / (np.abs(outer) - np.abs(inner))[middle]
    assert abs(gap.mean()) < 5 * 0.5 / np.sqrt(count * middle.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_of_millions_of_gradients_is_that_of_float64(dtype: torch.dtype) -> None:
    """Two million numbers and four: added one after another in float32, they would be wrong by a thousandth."""
    parts = [nn.Parameter(torch.zeros(size).to(dtype)) for size in (2**21, 4)]
    groups = [FlatGroup.of(f"part{i}", {"w": p}, learning_rate=1e-3) for i, p in enumerate(parts)]
    for i, group in enumerate(groups):
        group.gradient.copy_(torch.from_numpy(0.1 + 1e-3 * normal(210 + i, group.gradient.numel())))
    exact = np.concatenate([group.gradient.double().numpy() for group in groups])
    norm = optim.gradient_norm(groups)
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(np.linalg.norm(exact)), rel=1e-6)
    optim.clip(groups, float(norm), 0.1)
    clipped = np.concatenate([group.gradient.double().numpy() for group in groups])
    wanted = exact * 0.1 / np.linalg.norm(exact)
    assert formulas.relative_l2(clipped, wanted) < (5e-3 if dtype == torch.bfloat16 else 1e-6)
