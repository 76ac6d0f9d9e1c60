"""The optimiser over flat groups: all trained tensors of a part are views of one vector, with one gradient vector.

Adam, clipping, averaging and zeroing are then a few operations instead of one per tensor, and give the same numbers
because all of them work element by element. What works by matrix, such as Muon, gets views into the same vectors.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gesso.config.optimizer import Optimizer
from gesso.core.schedule import steps_of
from gesso.errors import ResourceError, UserError
from gesso.training.members import Members

PIECE = 2**24
"""Weights that are updated at once, where each is updated by itself: 64 MiB in float32."""

_SMALLEST = 16
_INSTALL = {
    "bitsandbytes": "pip install 'gesso[gpu]'",
    "pytorch_optimizer": "pip install 'gesso[optimizers]'",
    "torch": "pip install -U torch",
}


class Piece(NamedTuple):
    """Consecutive numbers of a group, from `start` to before `stop`, and the shape they have together."""

    name: str
    start: int
    stop: int
    shape: torch.Size


@dataclass(frozen=True)
class FlatGroup:
    """The parameters of one part, laid end to end in `flat` ([n], in their type), which also holds their gradient.

    Of a group that is updated inside the backward pass, no gradient is kept but for the sum of its `squares`.
    """

    part: str
    learning_rate: float
    flat: nn.Parameter
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    parameters: tuple[nn.Parameter, ...] = ()
    stop: int | float | None = None
    """When it stands still: after so many optimiser steps, or after a fraction of the run if below 1."""
    squares: Tensor | None = None

    @classmethod
    def of(
        cls,
        part: str,
        parameters: Mapping[str, nn.Parameter],
        *,
        learning_rate: float,
        stop: int | float | None = None,
        keep_gradient: bool = True,
    ) -> FlatGroup:
        """Move the parameters' storage into one vector; the parameters stay usable where they are."""
        names, tensors = tuple(parameters), tuple(parameters.values())
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in tensors]))
        squares = None if keep_gradient else torch.zeros((), dtype=_sum_type(flat.device), device=flat.device)
        group = cls(part, learning_rate, flat, names, tuple(p.shape for p in tensors), tensors, stop, squares)
        for parameter, value in zip(tensors, group.views(flat.detach()).values(), strict=True):
            parameter.data = value
        if keep_gradient:
            flat.grad = torch.zeros_like(flat)
            for parameter, gradient in zip(tensors, group.views(flat.grad).values(), strict=True):
                parameter.grad = gradient
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

    def clear(self) -> None:
        """Forget the gradient of the step before."""
        (self.gradient if self.squares is None else self.squares).zero_()

    def norm(self) -> Tensor:
        """The 2-norm of the gradient, a scalar on the device."""
        return norm_of(self.gradient) if self.squares is None else self.squares.sqrt()

    def view(self, piece: Piece, *, flatten: bool = False) -> nn.Parameter:
        """A parameter over a piece, and its gradient if that is kept; `flatten` makes a convolution [out, in x k^2]."""
        values = self.flat.detach()[piece.start : piece.stop].view(piece.shape)
        whole = flatten and values.ndim > 2
        parameter = nn.Parameter(values.flatten(1) if whole else values)
        if self.squares is None:
            parameter.grad = self.gradient[piece.start : piece.stop].view(parameter.shape)
        return parameter

    def tensors(self) -> list[Piece]:
        """The parameters' places in the vector."""
        ends = accumulate(shape.numel() for shape in self.shapes)
        return [Piece(n, end - s.numel(), end, s) for n, s, end in zip(self.names, self.shapes, ends, strict=True)]

    def cut(self) -> list[Piece]:
        """The vector in pieces of `PIECE` numbers."""
        count = self.flat.numel()
        starts = [(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
        return [Piece(f"{self.part}.{i}", a, b, torch.Size([b - a])) for i, (a, b) in enumerate(starts)]

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
    keep_gradient: bool = True,
) -> FlatGroup:
    """The group of a part for this optimiser: for Muon the matrices come last, so that the rest is one piece."""
    if spec.type == "muon":
        parameters = dict(sorted(parameters.items(), key=lambda item: is_matrix(item[0], item[1].shape)))
    return FlatGroup.of(part, parameters, learning_rate=learning_rate, stop=stop, keep_gradient=keep_gradient)


def _sum_type(device: torch.device) -> torch.dtype:
    # On the CPU torch adds the squares of a vector one after another: in float32 ten million are wrong by a percent.
    return torch.float64 if device.type == "cpu" else torch.float32


def norm_of(vector: Tensor) -> Tensor:
    """The 2-norm of a vector [n], a scalar on the device, wider than float32 where that matters."""
    # Piece by piece, because the CPU makes a copy in the wider type.
    kind = _sum_type(vector.device)
    return torch.stack([torch.linalg.vector_norm(piece, dtype=kind) for piece in vector.split(PIECE)]).norm()


def gradient_norm(groups: Sequence[FlatGroup]) -> Tensor:
    """The 2-norm over all groups, a float32 scalar on the device."""
    norms = [group.norm() for group in groups]
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
    """The optimisers of one part: one for each of `pieces`, or one for all tensors where the gradient is kept."""
    if spec.type == "muon":
        yield from _muon(spec, made, group)
        return
    places, by_tensor = pieces(spec, group), spec.kind is None or spec.kind.by_tensor
    # The factored ones look at the last two sides of what is a matrix.
    views = {place.name: group.view(place, flatten=by_tensor and spec.kind is not None) for place in places}
    if by_tensor:
        for own in [views] if group.squares is None else [{name: view} for name, view in views.items()]:
            yield member(spec, made, group.settings(own) | {"bundle": group.part})
    else:
        names = list(views) if len(views) > 1 else [group.part]
        for name, view in zip(names, views.values(), strict=True):
            yield member(spec, made, group.settings({name: view}))


def member(spec: Optimizer, made: type[torch.optim.Optimizer], settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """One optimiser over one parameter group."""
    arguments = spec.arguments()
    if spec.type == "adamw":
        arguments = {"fused": settings["params"][0].device.type in {"cpu", "cuda"}} | arguments
    if spec.type == "adafactor":
        arguments["momentum_dtype"] = torch.float32
    try:
        return made([dict(settings)], **arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        fix = "change training.optimizer.options"
        raise UserError(f"{made.__name__}: {error}", where="training.optimizer", fix=fix) from error


def pieces(spec: Optimizer, group: FlatGroup) -> list[Piece]:
    """What is updated at once: a tensor, some of the numbers, or all of them."""
    if spec.kind is None or spec.kind.by_tensor:
        return group.tensors()
    return group.cut() if spec.kind.by_number else [Piece(group.part, 0, group.flat.numel(), group.flat.shape)]


def _muon(spec: Optimizer, made: type[torch.optim.Optimizer], group: FlatGroup) -> Iterator[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) over the matrices of a part, where they lie,
    and AdamW over the piece before them."""
    tensors = group.tensors()
    matrices = [piece for piece in tensors if is_matrix(piece.name, piece.shape)]
    border = matrices[0].start if matrices else group.flat.numel()
    assert tensors[len(tensors) - len(matrices) :] == matrices, "make groups with flat_group"
    if matrices:
        views = {piece.name: group.view(piece, flatten=True) for piece in matrices}
        # Scaled as in Liu et al. 2025 (arXiv:2502.16982) its updates are as large as AdamW's: one rate serves both.
        own: dict[str, Any] = {"weight_decay": spec.decay, "adjust_lr_fn": "match_rms_adamw"}
        yield made([group.settings(views)], **(own | spec.options))
    if border:
        plain = Optimizer(beta1=spec.beta1, beta2=spec.beta2, eps=spec.eps, weight_decay=spec.weight_decay)
        rest = group.view(Piece(group.part, 0, border, torch.Size([border])))
        fused = group.flat.device.type in {"cpu", "cuda"}
        yield torch.optim.AdamW([group.settings({group.part: rest})], fused=fused, **plain.arguments())


def state(optimizer: Members) -> dict[str, Tensor]:
    """Every value the optimiser keeps, named `<part or parameter>.<quantity>` (see `optim_state`)."""
    return optimizer.saved()


def restore(optimizer: Members, saved: Mapping[str, Tensor]) -> None:
    """Put back what `state` gave; raises `UserError` if it is not of these parameters."""
    optimizer.restore(saved)
