"""The optimiser over flat groups: all trained tensors of a part are views of one vector, with one gradient vector.

Adam, clipping, averaging and zeroing are then one operation each instead of one per tensor, and give the same numbers
because all of them work element by element. Muon, which works by matrix, gets views into the same vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gesso.config.run import Optimizer
from gesso.errors import ResourceError, UserError
from gesso.training.muon import MuonAdamW, is_matrix


@dataclass(frozen=True)
class FlatGroup:
    """The parameters of one part, laid end to end in `flat` ([n], in their type), which also holds their gradient."""

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

    def settings(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """A parameter group of a torch optimiser, with the names that its state is saved under."""
        rate = self.learning_rate
        return {"params": list(parameters.values()), "lr": rate, "part": self.part, "names": list(parameters)}


def flat_group(
    spec: Optimizer, part: str, parameters: Mapping[str, nn.Parameter], *, learning_rate: float
) -> FlatGroup:
    """The group of a part for this optimiser: for Muon the matrices come last, so that the rest is one piece."""
    if spec.type == "muon":
        parameters = dict(sorted(parameters.items(), key=lambda item: is_matrix(item[0], item[1].shape)))
    return FlatGroup.of(part, parameters, learning_rate=learning_rate)


def gradient_norm(groups: Sequence[FlatGroup]) -> Tensor:
    """The 2-norm over all groups, a float32 scalar on the device."""
    norms = [torch.linalg.vector_norm(group.gradient, dtype=torch.float32) for group in groups]
    return torch.stack(norms).norm()


def clip(groups: Sequence[FlatGroup], norm: float, limit: float) -> None:
    """Scale the gradients down so that their common norm is at most `limit`."""
    if norm > limit:
        for group in groups:
            group.gradient.mul_(limit / norm)


def build(spec: Optimizer, groups: Sequence[FlatGroup]) -> torch.optim.Optimizer:
    """The torch optimiser that the run file names; raises `ResourceError` if its package or device is missing."""
    if spec.type == "muon":
        return _muon(spec, groups)
    sets = [group.settings({group.part: group.flat}) for group in groups]
    if spec.type == "adamw8bit":
        return _adamw8bit(spec, sets, groups[0].flat.device.type)
    return _adamw(spec, sets)


def _adamw(spec: Optimizer, sets: list[dict[str, Any]]) -> torch.optim.AdamW:
    fused = sets[0]["params"][0].device.type in {"cpu", "cuda"}
    betas = (spec.beta1, spec.beta2)
    return torch.optim.AdamW(sets, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay, fused=fused)


def _adamw8bit(spec: Optimizer, sets: list[dict[str, Any]], device: str) -> torch.optim.Optimizer:
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
    betas = (spec.beta1, spec.beta2)
    optimizer: torch.optim.Optimizer = AdamW8bit(sets, betas=betas, eps=spec.eps, weight_decay=spec.weight_decay)
    return optimizer


def _muon(spec: Optimizer, groups: Sequence[FlatGroup]) -> torch.optim.Optimizer:
    """Muon over the matrices of each group, where they lie, and AdamW over the piece before them."""
    try:
        from torch.optim import Muon
    except ImportError as error:
        raise ResourceError(
            f"muon needs torch 2.9 or newer; this is {torch.__version__}",
            where="training.optimizer.type",
            fix="pip install -U torch, or set training.optimizer.type to adamw",
        ) from error
    matrices, rest = [], []
    for group in groups:
        values, gradients = group.views(group.flat.detach()), group.views(group.gradient)
        names = [name for name in group.names if is_matrix(name, values[name].shape)]
        border = group.flat.numel() - sum(values[name].numel() for name in names)
        assert list(group.names[len(group.names) - len(names) :]) == names, "make groups with flat_group"
        if names:
            views = {n: _view(values[n].flatten(1), gradients[n].flatten(1)) for n in names}
            matrices.append(group.settings(views))
        if border:
            rest.append(group.settings({group.part: _view(group.flat.detach()[:border], group.gradient[:border])}))
    # "match_rms_adamw" makes its updates as large as AdamW's, so that one learning rate serves both.
    muon = [Muon(matrices, weight_decay=spec.weight_decay, adjust_lr_fn="match_rms_adamw")] if matrices else []
    return MuonAdamW([*muon, *([_adamw(spec, rest)] if rest else [])])


def _view(values: Tensor, gradient: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(values)
    parameter.grad = gradient
    return parameter


def set_rates(optimizer: torch.optim.Optimizer, groups: Sequence[FlatGroup], factor: float) -> None:
    """Set each part's learning rate for the coming step."""
    rates = {group.part: group.learning_rate for group in groups}
    for settings in optimizer.param_groups:
        settings["lr"] = rates[settings["part"]] * factor


def state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor the optimiser keeps, named `<part or parameter>.<quantity>`."""
    kept: dict[str, Tensor] = {}
    for owner, parameter in _named(optimizer):
        for name, value in optimizer.state[parameter].items():
            kept[f"{owner}.{name}"] = value.detach() if isinstance(value, Tensor) else torch.tensor(value)
    return kept


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave; raises `UserError` if it is not of these parameters."""
    if not saved:
        return  # saved before the first step
    by_owner: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        owner, _, name = key.rpartition(".")
        by_owner.setdefault(owner, {})[name] = value
    own = dict(_named(optimizer))
    if unfit := sorted({*by_owner} ^ {*own} | {o for o in by_owner.keys() & own if not _fits(by_owner[o], own[o])}):
        raise UserError(f"the saved optimiser state does not fit the trained weights of {unfit[0]}")
    for owner, parameter in own.items():
        optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in by_owner[owner].items()}


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for settings in optimizer.param_groups:
        yield from zip(settings["names"], settings["params"], strict=True)


def _fits(saved: Mapping[str, Tensor], parameter: nn.Parameter) -> bool:
    return all(
        v.shape == parameter.shape for k, v in saved.items() if k in ("exp_avg", "exp_avg_sq", "momentum_buffer")
    )
