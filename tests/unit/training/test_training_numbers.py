"""Flat groups, clipping, the average and the optimiser give the numbers that per-tensor code gives."""

from __future__ import annotations

import torch
from torch import nn

from gesso.config.run import EMA, Optimizer
from gesso.training import optim
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
    optim.restore(second, [other], optim.state(optimizer, [group]))
    for a, b, o in ((ours, group, optimizer), (again, other, second)):
        b.gradient.zero_()
        loss(a, 7).backward()
        o.step()
    assert torch.equal(group.flat, other.flat)
    state = optim.state(optimizer, [group])
    assert state.keys() == {"part.step", "part.exp_avg", "part.exp_avg_sq"}
    assert state["part.exp_avg"].data_ptr() != optim.state(second, [other])["part.exp_avg"].data_ptr()


def test_the_average_follows_its_closed_form_and_leaves_the_weights_alone() -> None:
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
    value = average.state()["a"][0].double().item()
    assert abs(value - (1 - product)) < 1e-6
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
