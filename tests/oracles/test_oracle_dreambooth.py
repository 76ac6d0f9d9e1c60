"""Prior preservation against mean(instance) + weight x mean(prior), however a step is mixed and cut into batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import formulas
import formulas_objectives as preference
import numpy as np
import pytest
import torch
from rig import ddpm, make_batch, normal, rows
from torch import Tensor, nn

from gesso.config.run import Buckets, Data, Source
from gesso.core.batch import Batch
from gesso.core.noise import DDPM
from gesso.data.places import Place
from gesso.data.plan import Plan
from gesso.data.rows import Row
from gesso.objectives import Denoise, DreamBooth

ABAR = formulas.SDXL_ALPHA_BAR
MIXES = {
    "half and half": ["instance", "prior"] * 4,
    "few of the class": ["instance"] * 6 + ["prior"] * 2,
    "many of the class": ["prior"] * 5 + ["instance"] * 3,
    "none of the class": ["instance"] * 8,
}
CUTS = [
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[0, 4, 2, 6], [1, 5, 3, 7]],
    [[i] for i in range(8)],
    [[7], [0, 1, 2, 3, 4], [5, 6]],
]


class Two:
    """A policy of two networks, the second inside `reference`."""

    def __init__(self, noise: DDPM, trained: nn.Module, before: nn.Module) -> None:
        self.noise, self._trained, self._before = noise, trained, before
        self._inside = False
        self.asked: list[tuple[bool, bool]] = []

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        return {"position": torch.arange(len(batch))}

    def predict(self, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert len(noisy) == len(t) == len(cond["position"])
        self.asked.append((self._inside, torch.is_grad_enabled()))
        answer: Tensor = (self._before if self._inside else self._trained)(noisy)
        return answer

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False


def network(seed: int) -> nn.Module:
    made = nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(torch.from_numpy(0.3 * normal(seed + i, *p.shape)))
    return made


def mixed(roles: list[str], *, weights: np.ndarray | None = None) -> Batch:
    count = len(roles)
    u = np.random.default_rng(70).random(count)
    batch = make_batch(normal(71, count, 4, 5, 5), normal(72, count, 4, 5, 5), u, weights=weights)
    return replace(batch, roles=tuple(roles), counts=dict(Counter(roles)))


def part(batch: Batch, which: list[int]) -> Batch:
    """Some samples of a step; the counts stay those of the step."""
    return replace(rows(batch, which), roles=tuple(batch.roles[i] for i in which), counts=batch.counts)


def of_step(objective: Any, batch: Batch, cut: list[list[int]], net: nn.Module) -> tuple[float, np.ndarray]:
    """(loss, gradient) of an optimiser step as the loop has it: the sum over its samples, divided by their number."""
    net.zero_grad()
    total = 0.0
    for which in cut:
        share = objective.loss(Two(ddpm(), net, network(80)), part(batch, which)).sum() / len(batch)
        share.backward()
        total += float(share.detach())
    return total, np.concatenate([p.grad.double().numpy().ravel() for p in net.parameters() if p.grad is not None])


def errors(batch: Batch, net: nn.Module) -> np.ndarray:
    """The squared error of each sample, by the formulas, weighted by its picture."""
    t = np.floor(batch.u.numpy() * 1000).astype(int)
    noisy = formulas.corrupt(ABAR, batch.latents.numpy(), batch.noise.numpy(), t)
    with torch.no_grad():
        answer = net(torch.from_numpy(noisy).float()).double().numpy()
    return preference.latent_errors(answer, batch.noise.numpy()) * batch.weights.double().numpy()


@pytest.mark.parametrize("weight", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("mix", MIXES)
def test_the_loss_of_a_step(mix: str, weight: float) -> None:
    """One mean over the mix, as a peer has it, is half of this at equal numbers and something else at others."""
    batch = mixed(MIXES[mix], weights=np.random.default_rng(73).uniform(0.3, 2, 8).astype(np.float32))
    net = network(90)
    wanted = preference.prior_preservation(errors(batch, net), batch.roles, weight)
    for cut in CUTS:
        assert of_step(DreamBooth(prior_weight=weight), batch, cut, net)[0] == pytest.approx(wanted, rel=2e-6)


def test_two_concepts_with_a_class_each() -> None:
    """Sums over the samples of each source times its weight, divided by how many samples the role has, not by the sum
    of the weights."""
    sources = [("instance", 2.0), ("instance", 0.5), ("prior", 1.5), ("prior", 0.25)]
    of = [0, 1, 1, 3, 2, 3, 0, 3]
    weights = np.array([sources[i][1] for i in of], np.float32)
    batch, net = mixed([sources[i][0] for i in of], weights=weights), network(90)
    plain = errors(batch, net) / weights
    sums = [sum(weight * plain[k] for k in range(8) if of[k] == i) for i, (_, weight) in enumerate(sources)]
    wanted = (sums[0] + sums[1]) / 4 + 0.7 * (sums[2] + sums[3]) / 4
    for cut in CUTS:
        assert of_step(DreamBooth(prior_weight=0.7), batch, cut, net)[0] == pytest.approx(wanted, rel=2e-6)
    weighted_means = (sums[0] + sums[1]) / weights[[0, 1, 2, 6]].sum() + 0.7 * (sums[2] + sums[3]) / 2.25
    assert abs(weighted_means - wanted) > 0.01 * wanted, "the test would see the other rule"


@pytest.mark.parametrize("mix", MIXES)
def test_without_weight_it_is_denoising_of_the_instances(mix: str) -> None:
    batch, net = mixed(MIXES[mix]), network(90)
    chosen = [i for i, role in enumerate(batch.roles) if role == "instance"]
    alone = replace(part(batch, chosen), counts={"instance": len(chosen)})
    for cut in CUTS:
        found = of_step(DreamBooth(prior_weight=0.0), batch, cut, net)
        wanted = of_step(Denoise(), alone, [list(range(len(chosen)))], net)
        assert found[0] == pytest.approx(wanted[0], rel=2e-6)
        assert formulas.relative_l2(found[1], wanted[1]) < 1e-5


def test_seeing_the_class_images_twice_changes_nothing() -> None:
    batch, net = mixed(MIXES["half and half"]), network(90)
    again = [*range(8), *(i for i, role in enumerate(batch.roles) if role == "prior")]
    doubled = replace(part(batch, again), counts={"instance": 4, "prior": 8})
    once = of_step(DreamBooth(prior_weight=0.7), batch, CUTS[1], net)
    twice = of_step(DreamBooth(prior_weight=0.7), doubled, [list(range(12))], net)
    assert twice[0] == pytest.approx(once[0], rel=2e-6)
    assert formulas.relative_l2(twice[1], once[1]) < 1e-5


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_each_sample_has_the_weight_of_its_own_timestep(cut: list[list[int]]) -> None:
    """A peer lays the weights of both halves over the losses of one, which fails, or silently spreads."""
    batch, net = mixed(MIXES["few of the class"]), network(90)
    t = np.floor(batch.u.numpy() * 1000).astype(int)
    each = errors(batch, net) * formulas.min_snr_weight(ABAR, 5.0, "epsilon")[t]
    wanted = preference.prior_preservation(each, batch.roles, 1.0)
    assert of_step(DreamBooth(min_snr_gamma=5.0), batch, cut, net)[0] == pytest.approx(wanted, rel=2e-6)


def test_the_model_before_training_as_the_prior() -> None:
    """Instances aim at the noise and priors at the first model's answer, which costs nothing before the first step."""
    batch = mixed(MIXES["half and half"])
    objective = DreamBooth(prior="model", prior_weight=0.5, class_prompt="a photo of a person")
    prior = np.array([role == "prior" for role in batch.roles])
    t = np.floor(batch.u.numpy() * 1000).astype(int)
    noisy = torch.from_numpy(formulas.corrupt(ABAR, batch.latents.numpy(), batch.noise.numpy(), t)).float()
    for seed, still in ((80, True), (90, False)):
        net, before = network(seed), network(80)
        policy = Two(ddpm(), net, before)
        found = objective.loss(policy, batch)
        with torch.no_grad():
            live, first = net(noisy).double().numpy(), before(noisy).double().numpy()
        wanted = preference.latent_errors(live, np.where(prior[:, None, None, None], first, batch.noise.numpy()))
        assert float(found.detach().sum()) / 8 == pytest.approx(
            preference.prior_preservation(wanted, batch.roles, 0.5), rel=2e-6
        )
        assert bool((found[torch.from_numpy(prior)] == 0).all()) == still
        found.sum().backward()
        assert all(p.grad is None for p in before.parameters())
        assert [inside for inside, _ in policy.asked] == sorted((inside for inside, _ in policy.asked), reverse=True)
        assert not any(grad for inside, grad in policy.asked if inside)


def test_class_images_have_sizes_and_crops_of_their_own() -> None:
    """A peer tells the model the instance's; and every step has as many of the class as instances, from an endless
    stream that sees each once a pass."""

    def row(number: int, size: tuple[int, int], role: Any) -> Row:
        name = f"{number:032x}"
        place = Place(f"/nowhere/{number}.png")
        return Row(id=name, image=name, place=place, width=size[0], height=size[1], caption="", role=role)

    mine = [row(i, (96 + i, 64), "instance") for i in range(5)]
    others = [row(100 + i, (64, 80 + i), "prior") for i in range(7)]
    sources = (Source(path="x"), Source(path="y", role="prior"))
    data = Data.model_validate({"sources": sources, "resolution": 64, "buckets": Buckets(enabled=False)})
    plan = Plan([*mine, *others], data=data, batch_size=2, accumulation=1, seed=3)
    sizes = {r.id: (r.height, r.width) for r in (*mine, *others)}
    seen: list[str] = []
    for step in range(3 * plan.steps_per_epoch):
        window = plan.window(step)
        assert len(window) == plan.window_size(step)
        roles = Counter(v.row.role for v in window)
        assert roles["prior"] == roles["instance"]
        seen += [v.row.id for v in window if v.row.role == "prior"]
        for visit in window:
            high, wide = sizes[visit.row.id]
            assert visit.geometry == (high, wide, (high - 64) // 2, (wide - 64) // 2, 64, 64)
    assert len(seen) == 15
    for first in (0, 7):
        assert len(set(seen[first : first + 7])) == 7
    assert len({(v.row.id, v.epoch, v.repeat) for s in range(9) for v in plan.window(s) if v.row.role == "prior"}) == 15
