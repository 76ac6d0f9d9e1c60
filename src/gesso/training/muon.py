"""Muon and AdamW as one optimiser.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes the update of a matrix orthogonal; scaled as
in Liu et al. 2025 (arXiv:2502.16982) it shares AdamW's learning rate and weight decay. What is no matrix goes to AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_SMALLEST = 16


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Whether Muon takes this parameter: a hidden matrix, or a convolution seen as [out, in x k x k].

    Embeddings are tables, not maps; and a matrix with a side below 16 has hardly a spectrum to make even.
    """
    if len(shape) < 2 or "embed" in name:
        return False
    return min(shape[0], shape.numel() // shape[0]) >= _SMALLEST


class MuonAdamW(torch.optim.Optimizer):
    """Several optimisers that are stepped together, seen from outside as one with all their groups and tensors."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for member in members for group in member.param_groups]
        super().__init__(groups, {})
        self._members = list(members)
        # The groups themselves and not copies, so that a learning rate set here is theirs.
        self.param_groups = groups
        for member in members:
            member.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of everything."""
        loss = None if closure is None else closure()
        for member in self._members:
            member.step()
        return loss
