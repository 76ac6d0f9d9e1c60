"""Weights that are updated inside the backward pass, each piece as soon as its gradient is whole.

The gradient is then freed, so that only what lies between two updates is ever in memory. No weight is needed any more
once its gradient is whole, however often the network used it: autograd adds up all uses, and hands over the gradient of
a leaf once a backward pass. The updates are bit for bit those that come after the pass otherwise, because no optimiser
that is let in here looks beyond its piece (`Optimizer.by_piece`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gesso.config.optimizer import Optimizer
from gesso.training import optim, rounding
from gesso.training.members import Members
from gesso.training.optim import FlatGroup, Piece


def build(spec: Optimizer, groups: Sequence[FlatGroup], *, seed: int) -> Members:
    """The optimiser of the run file over groups that keep no gradient; backward passes go ahead of its `step`."""
    made = optim.require(spec, device=groups[0].flat.device.type)
    members = [list(rounding.members(spec, made, group, seed=seed)) for group in groups]
    optimizer = _Ahead([member for own in members for member in own])
    for group, own in zip(groups, members, strict=True):
        places = optim.pieces(spec, group)
        waiting = [_Waiting(optimizer, group, *pair) for pair in zip(own, places, strict=True)]
        for parameter, tensor in zip(group.parameters, group.tensors(), strict=True):
            touched = [piece for piece in waiting if piece.expects(tensor)]
            parameter.register_post_accumulate_grad_hook(_hand_over(group, tensor.start, touched))
        optimizer.waiting += waiting
    return optimizer


def _hand_over(group: FlatGroup, start: int, pieces: Sequence[_Waiting]) -> Callable[[Tensor], None]:
    """What is done with the whole gradient of the parameter that begins at `start`."""

    @torch.no_grad()
    def hand_over(parameter: Tensor) -> None:
        assert parameter.grad is not None
        assert group.squares is not None
        gradient, parameter.grad = parameter.grad.reshape(-1), None
        # Nothing here waits for the device: the loop reads the norm once a step.
        group.squares.add_(optim.norm_of(gradient).square())
        for piece in pieces:
            piece.take(gradient, start)

    return hand_over


class _Ahead(Members):
    """Members that are updated one by one as gradients arrive; `step` ends what a backward pass began."""

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__(members)
        self.waiting: list[_Waiting] = []

    @property
    def torn(self) -> bool:
        """Whether some weights are a step ahead of others: from the first update in a backward pass to `step`."""
        return any(piece.updated for piece in self.waiting)

    def update_rest(self) -> None:
        """Update what no gradient, or only some, has reached; what is missing counts as zero."""
        for piece in self.waiting:
            if not piece.updated:
                piece.update()
            piece.begin()


class _Waiting:
    """A piece of a group between two updates: its gradient so far, and how many parameters are to bring the rest."""

    def __init__(self, optimizer: Members, group: FlatGroup, member: torch.optim.Optimizer, place: Piece) -> None:
        self._optimizer, self._member, self._place = optimizer, member, place
        self._weights = group.flat.detach()[place.start : place.stop]
        self._expected = 0
        self.begin()

    def begin(self) -> None:
        """Wait for the gradient of the next step."""
        self.updated, self._missing = False, self._expected
        self._gradient: Tensor | None = None

    def expects(self, tensor: Piece) -> bool:
        """Whether this parameter brings some of the gradient; then it is waited for."""
        touches = tensor.start < self._place.stop and self._place.start < tensor.stop
        self._expected += touches
        self.begin()
        return touches

    def take(self, gradient: Tensor, start: int) -> None:
        """Take what belongs here from a parameter's gradient, [n] from `start` on; after the last one, update."""
        if self._optimizer.is_still(self._member):
            return
        if self._gradient is None:
            self._gradient = torch.zeros_like(self._weights)
        low, high = max(start, self._place.start), min(start + len(gradient), self._place.stop)
        own = self._gradient[low - self._place.start : high - self._place.start]
        own.add_(gradient[low - start : high - start])
        self._missing -= 1
        if not self._missing:
            self.update()

    def update(self) -> None:
        """Update it with the gradient as it is, unless its part stands still."""
        if self._optimizer.is_still(self._member):
            return
        gradient = torch.zeros_like(self._weights) if self._gradient is None else self._gradient
        (parameter,) = self._member.param_groups[0]["params"]
        parameter.grad = gradient.view(parameter.shape).to(parameter.dtype)
        self.updated = True
        self._optimizer.update(self._member)
        parameter.grad = self._gradient = None
