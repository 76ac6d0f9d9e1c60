"""The optimiser over flat groups: all trained tensors of a part are views of one vector, with one gradient vector.

Adam, clipping, averaging and zeroing are then one operation each instead of one per tensor, and give the same numbers
because all of them work element by element. What works by matrix, such as Muon, gets views into the same vectors.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gesso.config.optimizer import Optimizer
from gesso.core.schedule import steps_of
from gesso.errors import ResourceError, UserError
from gesso.training.members import Members

_SMALLEST = 16
_INSTALL = {
    "bitsandbytes": "pip install 'gesso[gpu]'",
    "pytorch_optimizer": "pip install 'gesso[optimizers]'",
    "torch": "pip install -U torch",
}


@dataclass(frozen=True)
class FlatGroup:
    """The parameters of one part, laid end to end in `flat` ([n], in their type), which also holds their gradient."""

    part: str
    learning_rate: float
    flat: nn.Parameter
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    parameters: tuple[nn.Parameter, ...] = ()
    stop: int | float | None = None
    """When it stands still: after so many optimiser steps, or after a fraction of the run if below 1."""

    @classmethod
    def of(
        cls,
        part: str,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        stop: int | float | None = None,
    ) -> FlatGroup:
        """Move the parameters' storage into one vector; the parameters stay usable where they are."""
        names, tensors = tuple(parameters), tuple(parameters.values())
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in tensors]))
        flat.grad = torch.zeros_like(flat)
        group = cls(part, learning_rate, flat, names, tuple(p.shape for p in tensors), tensors, stop)
        values, gradients = group.views(flat.detach()), group.views(flat.grad)
        for name, parameter in parameters.items():
            parameter.data, parameter.grad = values[name], gradients[name]
        return group

    def trains(self, step: int, total: int) -> bool:
        """Whether optimiser step `step` (0-based) of `total` moves it."""
        return self.learning_rate > 0 and (self.stop is None or step < steps_of(self.stop, total))

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
        own = {"part": self.part, "names": list(parameters), "still": self.learning_rate == 0}
        return {"params": list(parameters.values()), "lr": self.learning_rate, **own}


def is_matrix(name: str, shape: torch.Size) -> bool:
    """Whether Muon takes this parameter: a hidden matrix, or a convolution seen as [out, in x k x k].

    Embeddings are tables, not maps; and a matrix with a side below 16 has hardly a spectrum to make even.
    """
    if len(shape) < 2 or "embed" in name:
        return False
    return min(shape[0], shape.numel() // shape[0]) >= _SMALLEST


def flat_group(
    spec: Optimizer,
    part: str,
    parameters: Mapping[str, nn.Parameter],
    *,
    learning_rate: float,
    stop: int | float | None = None,
) -> FlatGroup:
    """The group of a part for this optimiser: for Muon the matrices come last, so that the rest is one piece."""
    if spec.type == "muon":
        parameters = dict(sorted(parameters.items(), key=lambda item: is_matrix(item[0], item[1].shape)))
    return FlatGroup.of(part, parameters, learning_rate=learning_rate, stop=stop)


def gradient_norm(groups: Sequence[FlatGroup]) -> Tensor:
    """The 2-norm over all groups, a float32 scalar on the device."""
    # On the CPU torch adds the squares of a vector one after another: in float32 ten million are wrong by a percent.
    types = [torch.float64 if group.gradient.device.type == "cpu" else torch.float32 for group in groups]
    norms = [torch.linalg.vector_norm(g.gradient, dtype=kind) for g, kind in zip(groups, types, strict=True)]
    return torch.stack(norms).norm().float()


def clip(groups: Sequence[FlatGroup], norm: float, limit: float) -> None:
    """Scale the gradients down so that their common norm is at most `limit`."""
    if norm > limit:
        for group in groups:
            group.gradient.mul_(limit / norm)


def rest(groups: Sequence[FlatGroup], step: int, total: int) -> set[str]:
    """The parts that stand still in this step; their gradients are not computed while any other part moves."""
    still = {group.part for group in groups if not group.trains(step, total)}
    for group in groups:
        for parameter in group.parameters:
            parameter.requires_grad_(group.part not in still or len(still) == len(groups))
    return still


def set_rates(
    optimizer: torch.optim.Optimizer, groups: Sequence[FlatGroup], factor: float, *, still: Collection[str] = ()
) -> None:
    """Set each part's learning rate for the coming step, and which parts it leaves as they are."""
    rates = {group.part: group.learning_rate for group in groups}
    for settings in optimizer.param_groups:
        settings["lr"] = rates[settings["part"]] * factor
        settings["still"] = settings["part"] in still


def rate(optimizer: torch.optim.Optimizer) -> float:
    """The first part's learning rate, times what the optimiser found where it looks for it."""
    settings = optimizer.param_groups[0]
    return float(settings["lr"] * settings.get("d", 1.0))


def build(spec: Optimizer, groups: Sequence[FlatGroup]) -> Members:
    """The optimiser that the run file names, one for each part; `require` what it needs first."""
    made = require(spec, device=groups[0].flat.device.type)
    return Members([member for group in groups for member in members(spec, made, group)])


def require(spec: Optimizer, *, device: str) -> type[torch.optim.Optimizer]:
    """The optimiser's class. Raises `ResourceError` if its package is missing, and `UserError` for a class that cannot
    be used here, on this device or with these options."""
    kind, path = spec.kind, spec.path
    if kind is not None and not kind.runs_on(device):
        what = f"{spec.type} does not run on {device}"
        raise UserError(what, where="training.optimizer.type", fix="set it to adamw or adafactor")
    package, _, name = path.rpartition(".")
    try:
        found = vars(importlib.import_module(package)).get(name)
    except ImportError as error:
        fix = _INSTALL.get(package.partition(".")[0], f"install {package.partition('.')[0]}")
        raise ResourceError(
            f"{spec.type} needs {package.partition('.')[0]}, which does not import here ({error})",
            where="training.optimizer.type",
            fix=f"{fix}, or set it to adamw",
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        if spec.type == "muon":
            what, fix = f"muon needs torch 2.9 or newer; this is {torch.__version__}", f"{_INSTALL['torch']}"
            raise ResourceError(what, where="training.optimizer.type", fix=f"{fix}, or set it to adamw")
        raise UserError(f"there is no optimiser {path}", where="training.optimizer.type", fix="check the spelling")
    _check_options(spec, found)
    return found


def _check_options(spec: Optimizer, made: type[torch.optim.Optimizer]) -> None:
    takes = [n for n, p in inspect.signature(made).parameters.items() if p.kind != p.VAR_KEYWORD and n != "params"]
    if wrong := [name for name in spec.arguments() if name not in takes and name in spec.options]:
        what = f"{made.__name__} takes no {', '.join(wrong)}"
        raise UserError(what, where="training.optimizer.options", fix=f"it takes {', '.join(takes)}")
    if "lr" not in takes:
        raise UserError(f"{made.__name__} takes no learning rate", where="training.optimizer.type")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        what = f"{made.__name__} asks for the loss several times a step, which the loop computes once"
        raise UserError(what, where="training.optimizer.type", fix="choose another one")


def members(spec: Optimizer, made: type[torch.optim.Optimizer], group: FlatGroup) -> Iterator[torch.optim.Optimizer]:
    """The optimisers of one part."""
    if spec.type == "muon":
        yield from _muon(spec, made, group)
        return
    settings, arguments = group.settings({group.part: group.flat}), spec.arguments()
    if spec.kind is None or spec.kind.by_tensor:
        values, gradients = group.views(group.flat.detach()), group.views(group.gradient)
        flatten = spec.kind is not None  # the factored ones look at the last two sides of what is a matrix
        settings = group.settings({n: _view(values[n], gradients[n], flatten=flatten) for n in group.names})
    if spec.type == "adamw":
        arguments = {"fused": group.flat.device.type in {"cpu", "cuda"}} | arguments
    if spec.type == "adafactor":
        arguments["momentum_dtype"] = torch.float32
    try:
        yield made([settings], **arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        fix = "change training.optimizer.options"
        raise UserError(f"{made.__name__}: {error}", where="training.optimizer", fix=fix) from error


def _muon(spec: Optimizer, made: type[torch.optim.Optimizer], group: FlatGroup) -> Iterator[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) over the matrices of a part, where they lie,
    and AdamW over the piece before them."""
    values, gradients = group.views(group.flat.detach()), group.views(group.gradient)
    names = [name for name in group.names if is_matrix(name, values[name].shape)]
    border = group.flat.numel() - sum(values[name].numel() for name in names)
    assert list(group.names[len(group.names) - len(names) :]) == names, "make groups with flat_group"
    if names:
        views = {n: _view(values[n], gradients[n], flatten=True) for n in names}
        # Scaled as in Liu et al. 2025 (arXiv:2502.16982) its updates are as large as AdamW's: one rate serves both.
        own: dict[str, Any] = {"weight_decay": spec.decay, "adjust_lr_fn": "match_rms_adamw"}
        yield made([group.settings(views)], **(own | spec.options))
    if border:
        plain = Optimizer(beta1=spec.beta1, beta2=spec.beta2, eps=spec.eps, weight_decay=spec.weight_decay)
        settings = group.settings({group.part: _view(group.flat.detach()[:border], group.gradient[:border])})
        fused = group.flat.device.type in {"cpu", "cuda"}
        yield torch.optim.AdamW([settings], fused=fused, **plain.arguments())


def _view(values: Tensor, gradient: Tensor, *, flatten: bool = False) -> nn.Parameter:
    """A parameter over a piece of a group; `flatten` makes a convolution [out, in x k x k]."""
    whole = flatten and values.ndim > 2
    parameter = nn.Parameter(values.flatten(1) if whole else values)
    parameter.grad = gradient.flatten(1) if whole else gradient
    return parameter


def state(optimizer: Members) -> dict[str, Tensor]:
    """Every value the optimiser keeps, named `<part or parameter>.<quantity>` (see `optim_state`)."""
    return optimizer.saved()


def restore(optimizer: Members, saved: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave; raises `UserError` if it is not of these parameters."""
    optimizer.restore(saved)
