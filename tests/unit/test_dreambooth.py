"""The objective of DreamBooth: mean(instance) + weight x mean(prior), whatever shares a batch with what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from gesso.core.batch import Batch, Geometry
from gesso.core.noise import DDPM
from gesso.core.random import Draws, SampleKey
from gesso.objectives import Denoise, DreamBooth

NOISE = DDPM(torch.linspace(0.999, 0.01, 100, dtype=torch.float64))


class Scaled:
    """A policy that answers `scale` times the noisy latent; before training it answered half of it."""

    def __init__(self) -> None:
        self.noise = NOISE
        self.scale = torch.tensor(0.8, dtype=torch.float32, requires_grad=True)
        self.told: list[str] = []
        self.before = False

    def condition(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {}

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        self.told.append("before" if self.before else "live")
        return noisy * (0.5 if self.before else self.scale)

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.before = True
        yield
        self.before = False


def sample(roles: Sequence[str], seed: int = 0) -> Batch:
    """A step's samples in one batch; sample i is the same whatever its role is."""
    n, rng = len(roles), np.random.default_rng(seed)
    latents, noise = (torch.from_numpy(rng.standard_normal((n, 4, 3, 5), np.float32)) for _ in range(2))
    return Batch(
        latents=latents,
        noise=noise,
        u=torch.from_numpy(rng.random(n).astype(np.float32)),
        weights=torch.from_numpy(rng.uniform(0.5, 2, n).astype(np.float32)),
        geometry=(Geometry(8, 8, 0, 0, 8, 8),) * n,
        captions=("",) * n,
        text=None,
        files=tuple(map(str, range(n))),
        draws=Draws(0, 0, tuple(SampleKey(str(i)) for i in range(n))),
        roles=tuple(roles),
        counts=Counter(roles),
    )


def part(batch: Batch, chosen: Sequence[int]) -> Batch:
    """Some of a step's samples as a batch of their own; what the whole step holds stays told."""
    picked = {k: vars(batch)[k][list(chosen)] for k in ("latents", "noise", "u", "weights")}
    listed = {k: tuple(vars(batch)[k][i] for i in chosen) for k in ("geometry", "captions", "files", "roles")}
    return replace(batch, **picked, **listed, draws=replace(batch.draws, samples=tuple(map(_key, chosen))))


def _key(i: int) -> SampleKey:
    return SampleKey(str(i))


def step(objective: Denoise, batches: Sequence[Batch]) -> tuple[float, float]:
    """Loss and gradient of a step as the loop takes them: the sum over its batches through all its samples."""
    policy = Scaled()
    total = sum(sum(batch.counts.values()) for batch in batches[:1])
    loss = sum((objective.loss(policy, batch).sum() / total for batch in batches), torch.zeros(()))  # type: ignore[arg-type]
    loss.backward()
    assert policy.scale.grad is not None
    return float(loss.detach()), float(policy.scale.grad)


def per_sample(batch: Batch, scale: float) -> np.ndarray:
    """Weighted squared error of each sample in float64, with NumPy alone."""
    t = np.minimum((batch.u.numpy() * 100).astype(int), 99)
    a2 = NOISE.alphas_cumprod.numpy()[t][:, None, None, None]
    latents, noise = batch.latents.numpy().astype(np.float64), batch.noise.numpy().astype(np.float64)
    noisy = np.sqrt(a2) * latents + np.sqrt(1 - a2) * noise
    error: np.ndarray = ((scale * noisy - noise) ** 2).mean((1, 2, 3)) * batch.weights.numpy()
    return error


ROLES = {
    "as many of each": ["instance"] * 3 + ["prior"] * 3,
    "more of the class": ["instance", "prior", "prior", "prior", "instance", "prior", "prior"],
    "one prior sample": ["instance"] * 4 + ["prior"],
}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES)
def test_it_is_the_sum_of_two_means(roles: list[str], weight: float) -> None:
    batch = sample(roles)
    loss, _ = step(DreamBooth(prior_weight=weight), [batch])
    each, prior = per_sample(batch, 0.8), np.array([role == "prior" for role in roles])
    assert loss == pytest.approx(each[~prior].mean() + weight * each[prior].mean(), rel=1e-5)
    # What averages over the mix gives, as some trainers do, is another number.
    assert loss != pytest.approx(float((each * np.where(prior, weight, 1)).mean()), rel=1e-2)


@pytest.mark.parametrize("roles", ROLES.values(), ids=ROLES)
def test_weight_0_is_denoise_on_the_instances(roles: list[str]) -> None:
    batch = sample(roles)
    taught = [i for i, role in enumerate(roles) if role == "instance"]
    alone = replace(part(batch, taught), counts=Counter(roles[i] for i in taught))
    found, wanted = step(DreamBooth(prior_weight=0), [batch]), step(Denoise(), [alone])
    assert found == pytest.approx(wanted, rel=1e-6)


def test_no_split_of_a_step_changes_it() -> None:
    roles = ROLES["more of the class"]
    batch = sample(roles)
    whole = step(DreamBooth(prior_weight=0.7), [batch])
    for split in (
        [[i] for i in range(7)],
        [[0, 4], [1, 2], [3, 5, 6]],
        [[0, 1, 2], [3, 4, 5], [6]],
        [[6, 3], [4, 1, 0, 2, 5]],
    ):
        assert step(DreamBooth(prior_weight=0.7), [part(batch, one) for one in split]) == pytest.approx(whole, rel=1e-5)


def test_the_class_half_twice_changes_nothing() -> None:
    roles = ["instance", "instance", "prior", "prior", "prior"]
    batch = sample(roles)
    twice = replace(part(batch, [0, 1, 2, 3, 4, 2, 3, 4]), counts=Counter(instance=2, prior=6))
    assert step(DreamBooth(), [twice]) == pytest.approx(step(DreamBooth(), [batch]), rel=1e-5)


def test_other_weightings_of_denoise_count_for_both_halves() -> None:
    roles = ROLES["as many of each"]
    batch = sample(roles)
    options = {"min_snr_gamma": 5.0, "loss_type": "l1", "timestep_high": 0.5}
    loss, _ = step(DreamBooth(prior_weight=0.5, **options), [batch])  # type: ignore[arg-type]
    policy = Scaled()
    each = Denoise(**options).loss(policy, batch).detach().numpy()  # type: ignore[arg-type]
    assert loss == pytest.approx(each[:3].mean() + 0.5 * each[3:].mean(), rel=1e-5)


class TestModelAsPrior:
    objective = DreamBooth(prior="model", class_prompt="a thing")

    def test_the_target_is_what_the_model_said_before(self) -> None:
        batch = sample(ROLES["as many of each"])
        loss, gradient = step(self.objective, [batch])
        t = np.minimum((batch.u.numpy() * 100).astype(int), 99)
        a2 = NOISE.alphas_cumprod.numpy()[t][:, None, None, None]
        noisy = np.sqrt(a2) * batch.latents.numpy() + np.sqrt(1 - a2) * batch.noise.numpy()
        apart = (((0.8 - 0.5) * noisy) ** 2).mean((1, 2, 3)) * batch.weights.numpy()
        assert loss == pytest.approx(per_sample(batch, 0.8)[:3].mean() + apart[3:].mean(), rel=1e-5)
        slope = (2 * (0.8 - 0.5) * noisy**2).mean((1, 2, 3)) * batch.weights.numpy()
        taught = step(Denoise(), [replace(part(batch, [0, 1, 2]), counts=Counter(instance=3))])[1]
        assert gradient == pytest.approx(taught + slope[3:].mean(), rel=1e-4)

    def test_it_is_asked_before_the_model_in_training_and_not_for_instances(self) -> None:
        policy = Scaled()
        self.objective.loss(policy, sample(["prior", "instance"]))
        assert policy.told == ["before", "live"]
        policy = Scaled()
        self.objective.loss(policy, replace(sample(["instance"] * 2), counts=Counter(instance=2, prior=2)))
        assert policy.told == ["live"]

    def test_no_split_changes_it(self) -> None:
        batch = sample(ROLES["more of the class"])
        whole = step(self.objective, [batch])
        split = [part(batch, one) for one in ([0, 1, 2], [3, 4, 5], [6])]
        assert step(self.objective, split) == pytest.approx(whole, rel=1e-5)

    def test_what_it_asks_for_is_told(self) -> None:
        assert self.objective.reference
        assert not self.objective.needs
        assert not DreamBooth().reference
        assert DreamBooth().needs == {"prior"}


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"prior": "model", "class_prompt": "a dog", "class_images": 5}, "takes no class images"),
        ({"class_prompt": " "}, "blank"),
        ({"prior_weight": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_without_a_meaning_are_refused(fields: dict[str, object], what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        DreamBooth.model_validate(fields)
