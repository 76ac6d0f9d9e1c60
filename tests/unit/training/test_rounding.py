"""bf16 weights under stochastic rounding learn as float32 ones do on average, and the same way every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gesso.config.optimizer import Optimizer
from gesso.training import optim, rounding
from gesso.training.members import Members
from gesso.training.optim import FlatGroup
from gesso.training.rounding import stochastic


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bf16_group(values: torch.Tensor, *, rate: float = 1e-3, part: str = "unet") -> FlatGroup:
    return FlatGroup.of(part, {"a": nn.Parameter(values.to(torch.bfloat16))}, learning_rate=rate)


def neighbours(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bf16 numbers on either side of float32 ones, towards 0 and away from it: the upper 16 bits, and one more."""
    towards = values.view(np.uint32) & 0xFFFF0000
    return towards.view(np.float32), (towards + 0x10000).view(np.float32)


def test_every_draw_is_a_neighbour_and_their_mean_is_the_value() -> None:
    exact = np.random.default_rng(3).standard_normal(200).astype(np.float32)
    exact *= 10.0 ** np.random.default_rng(4).integers(-6, 6, 200).astype(np.float32)
    draws = stochastic(torch.from_numpy(exact).repeat(20_000, 1), generator()).double().numpy()
    towards, away = (side.astype(np.float64) for side in neighbours(exact))
    assert np.all((draws == towards) | (draws == away))
    share = (exact.astype(np.float64) - towards) / (away - towards)
    error = (draws == away).mean(0) - share
    assert np.abs(error).max() < 5 * 0.5 / np.sqrt(20_000)
    assert abs(error.mean()) < 5 * 0.5 / np.sqrt(20_000 * 200)


def test_what_bf16_has_stays_and_so_does_what_is_no_number() -> None:
    exact = torch.randn(10_000, generator=generator()).to(torch.bfloat16)
    assert torch.equal(stochastic(exact.float(), generator()), exact)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")])
    found = stochastic(special.repeat(1000), generator()).float().view(1000, 5)
    assert torch.equal(found[:, :4], special[:4].expand(1000, 4))
    assert found[:, 4].isnan().all()


def train(group: FlatGroup, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        group.gradient.fill_(1.0)
        optimizer.step()


def test_ten_thousand_tiny_updates_add_up_where_plain_bf16_does_not_move() -> None:
    """1e-5 on weights of 0.5 to 1, where bf16 has steps of 4e-3: each update is 400 times too small for it."""
    start = (0.5 + 0.5 * torch.rand(512, generator=generator(1))).to(torch.bfloat16)
    spec = Optimizer(weight_decay=0.0)

    plain = nn.Parameter(start.clone())
    naive = torch.optim.AdamW([plain], lr=1e-5, weight_decay=0.0)
    for _ in range(300):
        plain.grad = torch.ones_like(plain)
        naive.step()
    assert torch.equal(plain, start), "this is what rounding to the nearest does"

    ours = bf16_group(start, rate=1e-5)
    train(ours, rounding.build(spec, [ours], seed=0), 10_000)
    exact = FlatGroup.of("unet", {"a": nn.Parameter(start.float())}, learning_rate=1e-5)
    train(exact, rounding.build(spec, [exact], seed=0), 10_000)
    moved, wanted = (group.flat.detach().float() - start.float() for group in (ours, exact))
    assert float(wanted.max()) < -0.09
    assert torch.all(moved < 0), "every weight moves"
    # A walk of 10,000 rounded steps of 1e-5 in units of 4e-3 or 2e-3 strays by some 0.02; the mean of 512 by 1e-3.
    assert float((moved - wanted).abs().mean() / 0.1) < 0.25
    assert abs(float((moved - wanted).double().mean())) < 0.003


def test_rounded_training_ends_where_float32_training_does() -> None:
    """A least-squares problem to its end: within the spacing of bf16, and on average exactly there."""
    truth = torch.randn(400, generator=generator(5))
    group = bf16_group(torch.zeros(400), rate=3e-3)
    optimizer = rounding.build(Optimizer(weight_decay=0.0), [group], seed=1)
    for step in range(4000):
        group.gradient.copy_(group.flat.detach().float() - truth)
        optim.set_rates(optimizer, [group], 1 - step / 4000)
        optimizer.step()
    error = group.flat.detach().float() - truth
    assert float((error.abs() / truth.abs().clamp(min=0.05)).mean()) < 0.01
    assert abs(float(error.double().mean())) < 1e-3


@pytest.mark.parametrize("piece", [optim.PIECE, 7])
def test_updates_are_those_of_float32_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """With the rounding left out, however the weights are cut, the numbers are torch's."""
    monkeypatch.setattr(optim, "PIECE", piece)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(rounding, "stochastic", lambda values, _: seen.append(values.clone()) or values)
    start, gradient = torch.randn(20, generator=generator()), torch.randn(20, generator=generator(1))
    start, gradient = start.to(torch.bfloat16), gradient.to(torch.bfloat16)
    group = bf16_group(start, rate=1e-2)
    optimizer = rounding.build(Optimizer(weight_decay=0.1), [group], seed=0)
    group.gradient.copy_(gradient)
    optimizer.step()
    exact = nn.Parameter(start.float())
    exact.grad = gradient.float()
    torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1).step()
    torch.testing.assert_close(torch.cat(seen), exact.detach(), rtol=1e-6, atol=0)
    assert len(seen) == -(-20 // piece)


def test_a_rate_of_zero_moves_nothing() -> None:
    group = bf16_group(torch.randn(1000, generator=generator()), rate=0.0)
    before = group.flat.detach().clone()
    train(group, rounding.build(Optimizer(weight_decay=0.5), [group], seed=0), 20)
    assert torch.equal(group.flat, before)


def test_draws_follow_seed_step_and_piece_and_resume_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "PIECE", 100)
    spec, start = Optimizer(), torch.randn(250, generator=generator())

    def fresh(seed: int = 0) -> tuple[FlatGroup, Members]:
        group = bf16_group(start)
        return group, rounding.build(spec, [group], seed=seed)

    whole, optimizer = fresh()
    train(whole, optimizer, 12)
    again, second = fresh()
    train(again, second, 5)
    saved, weights = {k: v.clone() for k, v in optim.state(second).items()}, again.flat.detach().clone()
    moments = {f"unet.{i}.{kind}" for i in range(3) for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert saved.keys() == moments | {f"@{i}.updates#int" for i in range(3)}
    assert {saved[name].dtype for name in moments} == {torch.float32}
    resumed, third = fresh()
    with torch.no_grad():
        resumed.flat.copy_(weights)
    optim.restore(third, saved)
    train(resumed, third, 7)
    assert torch.equal(resumed.flat, whole.flat)
    other, fourth = fresh(seed=1)
    train(other, fourth, 12)
    assert not torch.equal(other.flat, whole.flat)


def test_no_float32_copy_of_the_weights_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "PIECE", 1000)
    group = bf16_group(torch.randn(10_000, generator=generator()))
    optimizer = rounding.build(Optimizer(), [group], seed=0)
    train(group, optimizer, 1)
    seen = [p for settings in optimizer.param_groups for p in settings["params"]]
    assert len(seen) == 10
    assert all(p.untyped_storage().nbytes() == 4 and p.grad is None for p in seen)
    assert group.flat.dtype == group.gradient.dtype == torch.bfloat16
