"""Updates inside the backward pass: each weight once, after its last use, with as little of the gradient as can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gesso.config.optimizer import Optimizer
from gesso.training import in_backward, optim, rounding
from gesso.training.members import Members
from gesso.training.optim import FlatGroup

WIDTH = 16


class Network(nn.Module):
    """A stack of layers of which one is used three times, one is tied to the table of words, and one is not used."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(10, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.often = nn.Linear(WIDTH, WIDTH)
        self.idle = nn.Linear(WIDTH, WIDTH)
        self.answer = nn.Linear(WIDTH, 10, bias=False)
        self.answer.weight = self.words.weight
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for i, layer in enumerate(self.layers):
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)).tanh()
            if i % 2:
                x = self.often(x).tanh()
        return self.answer(x)


class Trained:
    """A network in training, in one way or the other."""

    def __init__(
        self, *, fused: bool, spec: Optimizer | None = None, dtype: torch.dtype = torch.float32, recompute: bool = False
    ) -> None:
        self.network = Network(recompute=recompute).to(dtype)
        parameters, chosen = dict(self.network.named_parameters()), spec or Optimizer()
        self.group = FlatGroup.of("part", parameters, learning_rate=1e-2, keep_gradient=not fused)
        build = in_backward.build if fused else rounding.build
        self.optimizer: Members = build(chosen, [self.group], seed=3)
        self.norm = 0.0

    def backward(self, number: int) -> None:
        still = optim.rest([self.group], number, 100)
        optim.set_rates(self.optimizer, [self.group], 1 / (1 + number), still=still)
        self.group.clear()
        ids = torch.arange(8).roll(number).view(2, 4)
        self.network(ids).float().square().mean().backward()
        self.norm = float(optim.gradient_norm([self.group]))

    def step(self, number: int) -> None:
        self.backward(number)
        self.optimizer.step()


WAYS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adafactor": {"spec": Optimizer(type="adafactor")},
    "bf16": {"dtype": torch.bfloat16},
    "checkpointing": {"recompute": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("piece", [optim.PIECE, 300, 7])
def test_weights_moments_and_norms_are_those_of_a_step_after_the_pass(
    monkeypatch: pytest.MonkeyPatch, way: str, piece: int
) -> None:
    monkeypatch.setattr(optim, "PIECE", piece)
    ours, theirs = Trained(fused=True, **WAYS[way]), Trained(fused=False, **WAYS[way])
    before = ours.group.flat.detach().clone()
    for number in range(6):
        ours.step(number)
        theirs.step(number)
        assert ours.norm == pytest.approx(theirs.norm, rel=1e-6)
    assert torch.equal(ours.group.flat, theirs.group.flat)
    mine, other = optim.state(ours.optimizer), optim.state(theirs.optimizer)
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in other)
    moved = {name for name, t in ours.group.views(ours.group.flat.detach() != before).items() if t.any()}
    # Weight decay moves what no gradient reaches; in bf16 a few small numbers may be rounded to where they were.
    assert moved >= set(ours.group.names) - {"idle.bias"}


def test_each_parameter_is_handed_over_once_a_pass() -> None:
    """Also the tied one and the one of three uses: their updates would be half an update else."""
    module = Trained(fused=True)
    seen: list[int] = []
    for parameter in module.group.parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: seen.append(id(p)))
    module.step(0)
    idle = {id(p) for p in module.network.idle.parameters()}
    assert sorted(seen) == sorted({id(p) for p in module.group.parameters} - idle)
    assert all(state["step"] == 1 for m in module.optimizer._members for state in m.state.values())


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_gradients_are_gone_once_they_are_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At most what lies between two updates is there at once: a few pieces of many, and no vector of all."""
    size = WIDTH * WIDTH + WIDTH
    monkeypatch.setattr(optim, "PIECE", size)
    module = Trained(fused=True, spec=Optimizer(type=name))
    held: list[int] = []

    def look(_: Tensor) -> None:
        waiting = [piece._gradient for piece in module.optimizer.waiting]  # type: ignore[attr-defined]
        views = [p for m in module.optimizer._members for p in m.param_groups[0]["params"]]
        gradients = [*waiting, *(p.grad for p in module.group.parameters), *(p.grad for p in views)]
        held.append(sum(gradient.numel() for gradient in gradients if gradient is not None))

    for parameter in module.group.parameters:
        parameter.register_post_accumulate_grad_hook(look)
    for number in range(2):
        module.step(number)
    assert module.group.flat.grad is None
    assert len(held) > 2 * len(module.network.layers)
    # The layer of three uses and the table of words come last, and wait in two pieces each.
    assert max(held) <= 4 * size < module.group.flat.numel() / 2
    look(module.group.flat)
    assert held[-1] == 0


def test_a_pass_without_its_step_is_torn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "PIECE", 300)
    module = Trained(fused=True)
    assert not module.optimizer.torn
    module.backward(0)
    assert module.optimizer.torn
    module.optimizer.step()
    assert not module.optimizer.torn
    plain = Trained(fused=False)
    plain.backward(0)
    assert not plain.optimizer.torn


def test_a_part_that_stands_still_gives_its_norm_and_no_more() -> None:
    """With every part still, gradients are computed for the log; nothing moves, weight decay included."""
    ours, theirs = Trained(fused=True), Trained(fused=False)
    for module in (ours, theirs):
        object.__setattr__(module.group, "stop", 2)
        for number in range(5):
            module.step(number)
            if number == 1:
                before = module.group.flat.detach().clone()
        assert torch.equal(module.group.flat, before)
        assert not module.optimizer.torn
    assert torch.equal(ours.group.flat, theirs.group.flat)
    assert ours.norm == pytest.approx(theirs.norm, rel=1e-6)
    assert ours.norm > 0


def test_the_norm_is_that_of_float64_on_the_cpu() -> None:
    """Two million numbers of one size: added one after another in float32 they would be wrong by a thousandth."""
    parameter = nn.Parameter(torch.zeros(2**21))
    group = FlatGroup.of("part", {"w": parameter}, learning_rate=0.0, keep_gradient=False)
    in_backward.build(Optimizer(), [group], seed=0)
    weights = torch.full((2**21,), 0.1)
    (parameter * weights).sum().backward()
    assert float(optim.gradient_norm([group])) == pytest.approx(float(weights.double().norm()), rel=1e-7)
    group.clear()
    assert float(optim.gradient_norm([group])) == 0
