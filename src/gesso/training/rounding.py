"""bf16 weights that learn.

An update below 1/256 of a weight is lost when the sum is rounded to the nearest bf16. Here every update is computed in
float32 and then rounded up or down at random, up the more often the closer it is: right on average, so that small
updates add up (stochastic rounding; Zamirai et al. 2020, arXiv:2010.06192). The draws are keyed by (seed, step), so a
resumed run makes the same ones. Only one piece of the weights is in float32 at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gesso.config.optimizer import Optimizer
from gesso.core.random import key
from gesso.training import optim
from gesso.training.members import Members, Paging
from gesso.training.optim import FlatGroup, Piece


def build(spec: Optimizer, groups: Sequence[FlatGroup], *, seed: int) -> Members:
    """The optimiser of the run file over these groups, with stochastic rounding where their weights are bf16."""
    made = optim.require(spec, device=groups[0].flat.device.type)
    return Members([member for group in groups for member in members(spec, made, group, seed=seed)])


def members(
    spec: Optimizer, made: type[torch.optim.Optimizer], group: FlatGroup, *, seed: int
) -> Iterator[torch.optim.Optimizer]:
    """As `optim.members`, with stochastic rounding where the group's weights are bf16."""
    if group.flat.dtype == torch.float32:
        yield from optim.members(spec, made, group)
    else:
        yield from (_Rounded(spec, made, _Piece(group, piece), seed=seed) for piece in group.cut())


def stochastic(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bf16, one of the two neighbours, drawn so that the mean of many draws is the value.

    A value that bf16 has stays as it is. The 16 bits that are cut off are the chance of the neighbour away from 0.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


class _Rounded(torch.optim.Optimizer):
    """An optimiser that works number by number over one piece of bf16 weights; what it remembers is float32.

    The group counts its `updates`, which key the draws.
    """

    def __init__(self, spec: Optimizer, made: type[torch.optim.Optimizer], piece: _Piece, *, seed: int) -> None:
        self._inner = optim.member(spec, made, piece.settings | {"updates": 0})
        super().__init__(self._inner.param_groups, {})
        # The group and the state themselves and not copies: rates are set here, and state is saved from here.
        self.param_groups, self.state = self._inner.param_groups, self._inner.state
        self._piece, self._seed = piece, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update."""
        loss = None if closure is None else closure()
        settings, piece = self.param_groups[0], self._piece
        generator = torch.Generator(piece.weights.device)
        generator.manual_seed(key(self._seed, "rounding", settings["updates"], piece.name) & 0xFFFFFFFF)
        piece.update(self._inner.step, generator)
        settings["updates"] += 1
        return loss

    def get_state_buffer(self, p: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """Where the optimiser inside keeps a large tensor (see `Paging`)."""
        if isinstance(self._inner, Paging):
            return self._inner.get_state_buffer(p, dtype)
        return torch.empty(p.shape, dtype=dtype, device=p.device)


class _Piece:
    """Some consecutive weights of a group, and the parameter that an optimiser sees in their place."""

    def __init__(self, group: FlatGroup, place: Piece) -> None:
        self.name, self._group, self._place = place.name, group, slice(place.start, place.stop)
        self.weights = group.flat.detach()[self._place]
        # It has the weights' shape and device at any time, and memory only during an update.
        self._empty = torch.empty(1, device=self.weights.device).expand(place.shape)
        self._values = nn.Parameter(self._empty)
        self.settings = group.settings({place.name: self._values})

    def update(self, step: Callable[[], Any], generator: torch.Generator) -> None:
        self._values.data = self.weights.float()
        if self._group.squares is None:  # else whoever asks for the update has put the gradient there
            self._values.grad = self._group.gradient[self._place].float()
        step()
        self.weights.copy_(stochastic(self._values.data, generator))
        self._values.data, self._values.grad = self._empty, None
