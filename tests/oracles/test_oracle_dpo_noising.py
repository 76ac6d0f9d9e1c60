"""Preference training draws noise and timesteps as every objective does, and works alike for a flow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from rig import FunctionPolicy, ddpm, make_batch, normal
from torch import Tensor

from gesso.core.batch import Batch
from gesso.core.noise import RectifiedFlow
from gesso.objectives import DPO, Denoise

SETTINGS = {
    "pyramid_noise_iterations": 3,
    "noise_offset": 0.2,
    "input_perturbation": 0.1,
    "timesteps": {"type": "logit_normal", "mean": 1},
    "timestep_low": 0.2,
}


class Shifted(FunctionPolicy):
    """Answers 0, and something else inside `reference` or not."""

    def __init__(self, noise: object, *, before: float, now: float) -> None:
        super().__init__(noise, lambda noisy, _t: torch.full_like(noisy, self.answer))  # type: ignore[arg-type]
        self._before, self._now = before, now
        self.answer = now

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.answer = self._before
        yield
        self.answer = self._now


def pairs() -> Batch:
    batch = make_batch(normal(1, 6, 4, 6, 6), normal(2, 6, 4, 6, 6), (np.arange(6) + 0.5) / 6)
    return replace(batch, rejected=torch.from_numpy(normal(3, 6, 4, 6, 6)))


@pytest.mark.parametrize("noise", [ddpm(), ddpm("v_prediction"), RectifiedFlow(shift=3.0), RectifiedFlow("flux")])
def test_both_pictures_have_the_noise_and_timestep_that_denoise_would_give(noise: object) -> None:
    batch = pairs()
    policy, alone = Shifted(noise, before=0, now=0), Shifted(noise, before=0, now=0)
    loss = DPO.model_validate({"type": "dpo", **SETTINGS}).loss(policy, batch)
    assert loss.tolist() == pytest.approx([math.log(2)] * 6, rel=1e-6)
    Denoise.model_validate(SETTINGS).loss(alone, replace(batch, rejected=None))
    assert torch.equal(policy.t, torch.cat([alone.t, alone.t]))
    assert torch.equal(policy.noisy[:6], alone.noisy)
    assert batch.rejected is not None
    Denoise.model_validate(SETTINGS).loss(alone, replace(batch, latents=batch.rejected, rejected=None))
    assert torch.equal(policy.noisy[6:], alone.noisy)
    assert float(policy.t.min()) >= 200


def test_value_for_a_flow() -> None:
    """u = -(b/2) [(Lw - Lw_ref) - (Ll - Ll_ref)] with L the mean of (answer - (n - x0))^2."""
    batch = pairs()
    policy = Shifted(RectifiedFlow(), before=0.5, now=0.1)
    found = DPO(beta=7.0).loss(policy, batch).double().numpy()
    n = batch.noise.double().numpy()
    assert batch.rejected is not None

    def error(answer: float, x0: Tensor) -> np.ndarray:
        return np.square(answer - (n - x0.double().numpy())).mean((1, 2, 3))

    gained = [error(0.1, x0) - error(0.5, x0) for x0 in (batch.latents, batch.rejected)]
    wanted = np.log1p(np.exp(7.0 / 2 * (gained[0] - gained[1])))
    assert np.abs(found / wanted - 1).max() < 1e-6
    assert found.std() > 0.01
