"""Flat groups, clipping, the average and the optimiser give the numbers that per-tensor code gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gesso.config.optimizer import Optimizer
from gesso.config.run import EMA
from gesso.errors import ResourceError, UserError
from gesso.training import ema, optim
from gesso.training.ema import Average
from gesso.training.optim import FlatGroup


def tensors(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in [("a", (3, 4)), ("b", (5,)), ("c", (2, 2))]
    }


def loss(parameters: dict[str, nn.Parameter], step: int) -> torch.Tensor:
    return sum(((p * (i + 1 + step)).sin() ** 2).sum() for i, p in enumerate(parameters.values()))  # type: ignore[return-value]


def test_flat_adamw_and_clipping_equal_torch_on_separate_tensors() -> None:
    ours, theirs = tensors(), tensors()
    group = FlatGroup.of("part", ours, learning_rate=1e-2)
    spec = Optimizer(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
    optimizer = optim.build(spec, [group])
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(20):
        group.gradient.zero_()
        reference.zero_grad()
        loss(ours, step).backward()
        loss(theirs, step).backward()
        norm = float(optim.gradient_norm([group]))
        expected = float(nn.utils.clip_grad_norm_(theirs.values(), 1.5))
        assert abs(norm - expected) < 1e-5 * expected
        optim.clip([group], norm, 1.5)
        optim.set_rates(optimizer, [group], factor=1 / (step + 1))
        reference.param_groups[0]["lr"] = 1e-2 / (step + 1)
        optimizer.step()
        reference.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_parameters_stay_views_of_the_flat_vector() -> None:
    parameters = tensors()
    before = {k: v.detach().clone() for k, v in parameters.items()}
    group = FlatGroup.of("part", parameters, learning_rate=1.0)
    assert all(torch.equal(parameters[k], before[k]) for k in before)
    loss(parameters, 0).backward()
    assert all(
        p.grad is not None and p.grad.data_ptr() == group.views(group.gradient)[k].data_ptr()
        for k, p in parameters.items()
    )
    with torch.no_grad():
        group.flat.zero_()
    assert all(not p.any() for p in parameters.values())


def test_optimizer_state_survives_a_round_trip_bit_for_bit() -> None:
    ours, again = tensors(), tensors()
    group, other = FlatGroup.of("part", ours, learning_rate=1e-2), FlatGroup.of("part", again, learning_rate=1e-2)
    optimizer, second = optim.build(Optimizer(), [group]), optim.build(Optimizer(), [other])
    for step in range(3):
        group.gradient.zero_()
        loss(ours, step).backward()
        optimizer.step()
    with torch.no_grad():
        other.flat.copy_(group.flat)
    optim.restore(second, optim.state(optimizer))
    for a, b, o in ((ours, group, optimizer), (again, other, second)):
        b.gradient.zero_()
        loss(a, 7).backward()
        o.step()
    assert torch.equal(group.flat, other.flat)
    state = optim.state(optimizer)
    assert state.keys() == {"part.step", "part.exp_avg", "part.exp_avg_sq"}
    assert state["part.exp_avg"].data_ptr() != optim.state(second)["part.exp_avg"].data_ptr()


def test_the_average_follows_its_closed_form_and_leaves_the_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema, "_PIECE", 3)  # less than there are
    parameters = {"a": nn.Parameter(torch.ones(4))}
    group = FlatGroup.of("part", parameters, learning_rate=1.0)
    spec = EMA(enabled=True, decay=0.9999)
    average = Average(spec, [group])
    product = 1.0
    for step in range(1, 2001):
        with torch.no_grad():
            group.flat.fill_(0.0 if step == 1 else 1.0)
        average.update(step)
        product = 1.0 if step == 1 else product * min(0.9999, step / (9 + step))
    assert average.state()["a"].tolist() == pytest.approx([1 - product] * 4, abs=1e-6)
    with average.in_place():
        assert torch.equal(parameters["a"], average.state()["a"].float())
    assert torch.equal(parameters["a"], torch.ones(4))


def test_the_average_comes_back_after_an_error() -> None:
    parameters = tensors()
    group = FlatGroup.of("part", parameters, learning_rate=1.0)
    average = Average(EMA(enabled=True), [group])
    with torch.no_grad():
        group.flat.add_(1)
    before = group.flat.detach().clone()
    try:
        with average.in_place():
            assert not torch.equal(group.flat, before)
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(group.flat, before)


def test_ten_thousand_tiny_updates_move_every_weight() -> None:
    """Updates of 1e-6 on weights near 1 vanish in bf16; the trained weights are float32, so they add up."""
    parameters = {"a": nn.Parameter(torch.ones(64))}
    group = FlatGroup.of("part", parameters, learning_rate=1e-6)
    optimizer = optim.build(Optimizer(weight_decay=0.0), [group])
    for _ in range(10_000):
        group.gradient.fill_(1.0)
        optimizer.step()
    assert torch.all((parameters["a"] - (1 - 1e-2)).abs() < 1e-3)


def layers(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "norm.weight": (24,),
        "conv.weight": (32, 3, 3, 3),  # a matrix of [32, 27]
        "conv_out.weight": (4, 32, 3, 3),  # one side below 16
        "token_embedding.weight": (40, 24),
        "linear.weight": (16, 24),
        "linear.bias": (16,),
        "narrow.weight": (15, 24),
    }
    return {n: nn.Parameter(torch.randn(s, generator=generator) * 0.3) for n, s in shapes.items()}


MATRICES = {"conv.weight", "linear.weight"}


def test_flat_muon_equals_torch_on_separate_tensors() -> None:
    ours, theirs = layers(), layers()
    spec = Optimizer(type="muon", beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
    groups = [
        optim.flat_group(spec, "one", {k: p for k, p in ours.items() if k != "linear.weight"}, learning_rate=1e-2),
        optim.flat_group(spec, "two", {"linear.weight": ours["linear.weight"]}, learning_rate=3e-3),
    ]
    optimizer = optim.build(spec, groups)
    rest = [p for n, p in theirs.items() if n not in MATRICES]
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    flat = nn.Parameter(theirs["conv.weight"].detach().flatten(1).clone())
    muon = torch.optim.Muon(
        [{"params": [flat], "lr": 1e-2}, {"params": [theirs["linear.weight"]], "lr": 3e-3}],
        weight_decay=0.1,
        adjust_lr_fn="match_rms_adamw",
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(6):
        for group in groups:
            group.gradient.zero_()
        adamw.zero_grad()
        muon.zero_grad()
        theirs["conv.weight"].grad = None
        with torch.no_grad():
            theirs["conv.weight"].copy_(flat.view(32, 3, 3, 3))
        loss(ours, step).backward()
        loss(theirs, step).backward()
        assert theirs["conv.weight"].grad is not None
        flat.grad = theirs["conv.weight"].grad.flatten(1)
        factor = 1 / (step + 1)
        optim.set_rates(optimizer, groups, factor)
        for reference in (adamw, muon):
            for settings, rate in zip(reference.param_groups, (1e-2, 3e-3), strict=False):
                settings["lr"] = rate * factor
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        adamw.step()
        muon.step()
    with torch.no_grad():
        theirs["conv.weight"].copy_(flat.view(32, 3, 3, 3))
    before = layers()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
        assert not torch.equal(ours[name], before[name])


def test_muon_takes_hidden_matrices_only_and_copies_nothing() -> None:
    spec = Optimizer(type="muon")
    ours = layers()
    group = optim.flat_group(spec, "part", ours, learning_rate=1e-2)
    optimizer = optim.build(spec, [group])
    muon, adamw = optimizer.param_groups
    assert set(muon["names"]) == MATRICES
    assert adamw["names"] == ["part"]
    start, end = group.flat.data_ptr(), group.flat.data_ptr() + group.flat.nbytes
    for parameter in [*muon["params"], *adamw["params"]]:
        assert start <= parameter.data_ptr() < end
        assert group.gradient.data_ptr() <= parameter.grad.data_ptr() < group.gradient.data_ptr() + group.flat.nbytes
    assert sum(p.numel() for p in [*muon["params"], *adamw["params"]]) == group.flat.numel()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_of_several_parts_survives_a_round_trip_bit_for_bit(kind: str) -> None:
    spec = Optimizer.model_validate({"type": kind})

    def make() -> tuple[dict[str, nn.Parameter], list[FlatGroup], torch.optim.Optimizer]:
        parameters = layers()
        halves = [{"part.norm": parameters["norm.weight"]}, {k: p for k, p in parameters.items() if k != "norm.weight"}]
        groups = [optim.flat_group(spec, f"p{i}", half, learning_rate=1e-2) for i, half in enumerate(halves)]
        return parameters, groups, optim.build(spec, groups)

    def step(parameters: dict[str, nn.Parameter], groups: list[FlatGroup], optimizer: Any, at: int) -> None:
        for group in groups:
            group.gradient.zero_()
        loss(parameters, at).backward()
        optimizer.step()

    one, other = make(), make()
    for at in range(3):
        step(*one, at)
    saved = {k: v.clone() for k, v in optim.state(one[2]).items()}
    optim.restore(other[2], saved)
    with torch.no_grad():
        for a, b in zip(one[1], other[1], strict=True):
            b.flat.copy_(a.flat)
    step(*one, 3)
    step(*other, 3)
    assert all(torch.equal(a.flat, b.flat) for a, b in zip(one[1], other[1], strict=True))
    ours, theirs = optim.state(one[2]), optim.state(other[2])
    assert ours.keys() == theirs.keys() == saved.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any(not torch.equal(ours[k], saved[k]) for k in ours), "the saved tensors are copies"


def test_the_state_of_another_optimiser_is_refused() -> None:
    spec = Optimizer(type="muon")
    groups = [optim.flat_group(spec, "part", layers(), learning_rate=1e-2)]
    muon = optim.build(spec, groups)
    muon.step()
    adamw = optim.build(Optimizer(), groups)
    with pytest.raises(UserError, match="does not fit"):
        optim.restore(adamw, optim.state(muon))
    adamw.step()
    with pytest.raises(UserError, match="does not fit"):
        optim.restore(muon, optim.state(adamw))
    other = optim.state(muon) | {"conv.weight.momentum_buffer": torch.zeros(32, 26)}
    with pytest.raises(UserError, match=r"does not fit the trained weights of conv\.weight"):
        optim.restore(muon, other)


def test_an_older_torch_without_muon_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    spec = Optimizer(type="muon")
    with pytest.raises(ResourceError, match=r"needs torch 2\.9"):
        optim.build(spec, [optim.flat_group(spec, "part", layers(), learning_rate=1e-2)])
