"""Pyramid noise: what it is made of, how large it is, and that it is each sample's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rig import PREDICTIONS, FunctionPolicy, ddpm, make_batch, normal, rows
from torch import Tensor

from gesso.core.batch import Batch
from gesso.core.random import Draws, SampleKey
from gesso.objectives import Denoise
from gesso.objectives.noising import _coarse_layers, _enlarge


def a_batch(count: int, height: int, width: int) -> Batch:
    draws = Draws(3, 0, tuple(SampleKey(f"image-{i}") for i in range(count)))
    noise = draws.normal("noise", (4, height, width))
    return make_batch(np.zeros_like(noise), noise, np.full(count, 0.5), seed=3)


def asked(batch: Batch, **settings: float) -> np.ndarray:
    return Denoise.model_validate(settings).draw_noise(batch)[0].double().numpy()


@pytest.mark.parametrize(("small", "large"), [(1, 5), (3, 8), (5, 64), (16, 16), (21, 64)])
def test_enlarging_is_bilinear_interpolation_of_areas(small: int, large: int) -> None:
    values = normal(1, 1, 2, small, small)
    wanted = torch.nn.functional.interpolate(
        torch.from_numpy(values).double(), size=(large, large + 3), mode="bilinear", align_corners=False
    )
    found = _enlarge(small, large) @ values[0].astype(np.float64) @ _enlarge(small, large + 3).T
    assert np.abs(found - wanted[0].numpy()).max() < 1e-12


@pytest.mark.parametrize("discount", [0.3, 0.9])
@pytest.mark.parametrize("iterations", [1, 4, 10])
def test_variance_is_1_whatever_the_layers(iterations: int, discount: float) -> None:
    found = asked(a_batch(600, 12, 20), pyramid_noise_iterations=iterations, pyramid_noise_discount=discount)
    of_samples = np.square(found).mean((1, 2, 3))
    error = of_samples.std() / np.sqrt(len(of_samples))
    assert abs(of_samples.mean() - 1) < 5 * error
    assert abs(found.mean()) < 5 * found.mean((1, 2, 3)).std() / np.sqrt(len(found))


def test_neighbours_are_alike_and_more_so_with_a_larger_discount() -> None:
    batch = a_batch(200, 16, 16)

    def likeness(noise: np.ndarray) -> float:
        return float((noise[..., 1:] * noise[..., :-1]).mean())

    plain = likeness(asked(batch))
    weak, strong = (likeness(asked(batch, pyramid_noise_iterations=6, pyramid_noise_discount=d)) for d in (0.3, 0.9))
    assert abs(plain) < 0.01
    assert 0.02 < weak < strong
    assert strong > 0.15


def test_layers_are_as_described() -> None:
    """Layer i is ratio^i coarser than layer i - 1, counts discount^i, and a single row ends the pyramid."""
    layers = [normal(i, 1, 27, 54) for i in range(5)]
    found, variance = _coarse_layers(layers, [2.5, 3.0, 3.0, 2.0, 2.0], 0.5)
    sizes = [(27, 54), (9, 18), (1, 2)]
    wanted, wanted_variance = np.zeros((1, 27, 54)), 0.0
    for i, (height, width) in enumerate(sizes):
        part = torch.from_numpy(layers[i][:, :height, :width].astype(np.float64))[None]
        wanted += 0.5**i * torch.nn.functional.interpolate(part, size=(27, 54), mode="bilinear")[0].numpy()
        basis = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
        spread = torch.nn.functional.interpolate(basis, size=(27, 54), mode="bilinear").numpy()
        wanted_variance += 0.25**i * float(np.square(spread).sum(0).mean())
    assert np.abs(found - wanted).max() < 1e-12
    assert variance == pytest.approx(wanted_variance, rel=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_is_in_the_input_and_in_the_target(prediction: str) -> None:
    batch = a_batch(40, 8, 8)
    kept: list[Tensor] = []

    def network(noisy: Tensor, _t: Tensor) -> Tensor:
        kept.append(torch.zeros_like(noisy, requires_grad=True))
        return kept[0]

    noise = ddpm(prediction)
    policy = FunctionPolicy(noise, network)
    one = Denoise(pyramid_noise_iterations=5, pyramid_noise_discount=0.6, noise_offset=0.1)
    one.loss(policy, batch).sum().backward()
    assert kept[0].grad is not None
    target = -kept[0].grad * kept[0][0].numel() / 2
    used, same = one.draw_noise(batch)
    assert used is same
    assert (policy.noisy - noise.corrupt(batch.latents, used, policy.t)).abs().max() < 1e-6
    assert (target - noise.target(batch.latents, used, policy.t)).abs().max() < 1e-5


def test_offset_comes_on_top_unscaled() -> None:
    """noise_offset keeps its deviation, whatever the pyramid is."""
    batch = a_batch(50, 6, 6)
    settings = {"pyramid_noise_iterations": 6, "pyramid_noise_discount": 0.9}
    difference = asked(batch, **settings, noise_offset=0.5) - asked(batch, **settings)
    plain = asked(batch, noise_offset=0.5) - asked(batch)
    assert np.abs(difference - plain).max() < 1e-5


def test_draws_do_not_depend_on_the_batch() -> None:
    batch = a_batch(6, 9, 7)
    one = Denoise(pyramid_noise_iterations=6, pyramid_noise_discount=0.5, noise_offset=0.1, input_perturbation=0.1)
    whole = one.draw_noise(batch)
    for part in ([0], [4, 1], [5, 3, 2]):
        for mine, all_of_it in zip(one.draw_noise(rows(batch, part)), whole, strict=True):
            assert torch.equal(mine, all_of_it[part])
    samples = whole[0].flatten(1)
    correlation = np.corrcoef(samples.numpy())[np.triu_indices(6, 1)]
    assert np.abs(correlation).max() < 0.6, "each sample has layers of its own"


def test_layers_are_not_the_noise_itself() -> None:
    batch = a_batch(300, 1, 1)
    found = asked(batch, pyramid_noise_iterations=1, pyramid_noise_discount=1.0).ravel()
    extra = found * np.sqrt(2) - batch.noise.double().numpy().ravel()
    assert abs(np.corrcoef(extra, batch.noise.numpy().ravel())[0, 1]) < 5 / np.sqrt(extra.size)
    assert extra.std() == pytest.approx(1, rel=0.1)
