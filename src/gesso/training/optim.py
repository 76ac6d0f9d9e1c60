"""The optimiser over flat groups: all trained tensors of a part are views of one vector, with one gradient vector.

Adam, clipping, averaging and zeroing are then one operation each instead of one per tensor, and give the same numbers
because all of them work element by element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gesso.config.run import Optimizer
from gesso.errors import ResourceError, UserError


@dataclass(frozen=True)
class FlatGroup:
    """The parameters of one part, laid end to end in `flat` ([n] float32), which also holds their gradient."""

    part: str
    learning_rate: float
    flat: nn.Parameter
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, part: str, parameters: Mapping[str, nn.Parameter], *, learning_rate: float) -> FlatGroup:
        """Move the parameters' storage into one vector; the parameters stay usable where they are."""
        names = tuple(parameters)
        tensors = [parameters[name] for name in names]
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in tensors]))
        flat.grad = torch.zeros_like(flat)
        group = cls(part, learning_rate, flat, names, tuple(p.shape for p in tensors))
        values, gradients = group.views(flat.detach()), group.views(flat.grad)
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = values[name], gradients[name]
        return group

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Cut a vector laid out like this group into the named tensors, without copying."""
        pieces = vector.split([shape.numel() for shape in self.shapes])
        return {n: p.view(s) for n, p, s in zip(self.names, pieces, self.shapes, strict=True)}

    @property
    def gradient(self) -> Tensor:
        """The gradient vector, [n]."""
        assert self.flat.grad is not None
        return self.flat.grad


def gradient_norm(groups: Sequence[FlatGroup]) -> Tensor:
    """The 2-norm over all groups, a float32 scalar on the device."""
    return torch.stack([group.gradient.norm() for group in groups]).norm()


def clip(groups: Sequence[FlatGroup], norm: float, limit: float) -> None:
    """Scale the gradients down so that their common norm is at most `limit`."""
    if norm > limit:
        for group in groups:
            group.gradient.mul_(limit / norm)


def build(spec: Optimizer, groups: Sequence[FlatGroup]) -> torch.optim.Optimizer:
    """The torch optimiser that the run file names; raises `ResourceError` if its package or device is missing."""
    sets = [{"params": [group.flat], "lr": group.learning_rate} for group in groups]
    betas, device = (spec.beta1, spec.beta2), groups[0].flat.device.type
    if spec.type == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ResourceError(
                "adamw8bit needs bitsandbytes",
                where="training.optimizer.type",
                fix="pip install 'gesso[gpu]', or set training.optimizer.type to adamw",
            ) from error
        if device != "cuda":
            raise UserError(
                f"adamw8bit runs on CUDA only, this run is on {device}",
                where="training.optimizer.type",
                fix="set it to adamw",
            )
        optimizer: torch.optim.Optimizer = AdamW8bit(sets, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay)
        return optimizer
    fused = device in {"cpu", "cuda"}
    return torch.optim.AdamW(sets, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, groups: Sequence[FlatGroup], factor: float) -> None:
    """Set each group's learning rate for the coming step."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        settings["lr"] = group.learning_rate * factor


def state(optimizer: torch.optim.Optimizer, groups: Sequence[FlatGroup]) -> dict[str, Tensor]:
    """Every tensor the optimiser keeps, named `<part>.<quantity>`."""
    kept: dict[str, Tensor] = {}
    for group in groups:
        for name, value in optimizer.state[group.flat].items():
            kept[f"{group.part}.{name}"] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    return kept


def restore(optimizer: torch.optim.Optimizer, groups: Sequence[FlatGroup], saved: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave; raises `UserError` if it is not of these parameters."""
    for group in groups:
        prefix = f"{group.part}."
        own: dict[str, Any] = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        if not own or any(v.ndim == 1 and v.numel() != group.flat.numel() for k, v in own.items() if "exp_avg" in k):
            raise UserError(f"the saved optimiser state does not fit the trained weights of {group.part}")
        optimizer.state[group.flat] = {k: v.to(group.flat.device, copy=True) for k, v in own.items()}
