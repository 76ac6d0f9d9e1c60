"""The held-out measures: the loss, and what else the objective tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gesso.core.batch import Batch
from gesso.core.runtime import Runtime
from gesso.core.seams import Objective
from gesso.training.policy import LivePolicy


@torch.no_grad()
def measure(objective: Objective, policy: LivePolicy, batches: Sequence[Batch], runtime: Runtime) -> dict[str, float]:
    """Means over batches whose noise and timesteps never change, dropout off; leaves training untouched.

    Always has `loss`; the other names are the objective's.
    """
    found: dict[str, list[Tensor]] = {}
    with policy.evaluating():
        for batch in batches:
            for name, values in objective.measure(policy, batch.to(runtime.device)).items():
                found.setdefault(name, []).append(values.float().cpu())
    return {name: float(torch.cat(values).double().mean()) for name, values in found.items()}
