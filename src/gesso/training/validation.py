"""The held-out loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gesso.core.batch import Batch
from gesso.core.runtime import Runtime
from gesso.core.seams import Objective
from gesso.training.policy import LivePolicy


@torch.no_grad()
def measure(objective: Objective, policy: LivePolicy, batches: Sequence[Batch], runtime: Runtime) -> float:
    """Mean loss over batches whose noise and timesteps never change, dropout off; leaves training untouched."""
    with policy.evaluating():
        losses = [objective.loss(policy, batch.to(runtime.device)).float().cpu() for batch in batches]
    return float(torch.cat(losses).double().mean())
