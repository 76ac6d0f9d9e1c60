"""The masked loss: only what the mask shows counts, and a mask of ones is no mask."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from gesso.core.batch import Batch, Geometry
from gesso.core.noise import DDPM
from gesso.core.random import Draws, SampleKey
from gesso.objectives import Denoise


class Fixed:
    """A policy whose prediction is a parameter."""

    def __init__(self, prediction: torch.Tensor) -> None:
        self.prediction = prediction
        self.noise = DDPM(torch.linspace(0.999, 0.01, 100, dtype=torch.float64))

    def condition(self, _batch: Batch) -> dict[str, torch.Tensor]:
        return {}

    def predict(self, *_args: object) -> torch.Tensor:
        return self.prediction

    def reference(self) -> nullcontext[None]:
        return nullcontext()


def a_batch(mask: torch.Tensor | None) -> Batch:
    draw = torch.Generator().manual_seed(1)
    return Batch(
        latents=torch.randn(2, 4, 6, 6, generator=draw),
        noise=torch.randn(2, 4, 6, 6, generator=draw),
        u=torch.tensor([0.3, 0.7]),
        weights=torch.tensor([1.0, 0.5]),
        geometry=(Geometry(48, 48, 0, 0, 48, 48),) * 2,
        captions=("", ""),
        text=None,
        files=("a", "b"),
        draws=Draws(0, 0, (SampleKey("a"), SampleKey("b"))),
        mask=mask,
    )


def loss_of(mask: torch.Tensor | None, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    prediction = torch.zeros(2, 4, 6, 6, requires_grad=True)
    loss = Denoise.model_validate(options).loss(Fixed(prediction), a_batch(mask))  # type: ignore[arg-type]
    loss.sum().backward()
    assert prediction.grad is not None
    return loss.detach(), prediction.grad


@pytest.mark.parametrize("loss_type", ["l2", "l1", "huber"])
def test_a_mask_of_ones_is_no_mask(loss_type: str) -> None:
    plain, masked = loss_of(None, loss_type=loss_type), loss_of(torch.ones(2, 1, 6, 6), loss_type=loss_type)
    assert torch.equal(plain[0], masked[0])
    assert torch.allclose(plain[1], masked[1], rtol=1e-6, atol=0)


def test_it_is_the_weighted_mean_of_the_squared_error() -> None:
    mask = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(2))
    loss, gradient = loss_of(mask)
    batch = a_batch(mask)
    error = batch.noise.double().square()
    wide = mask.double().expand_as(error)
    wanted = (error * wide).sum((1, 2, 3)) / wide.sum((1, 2, 3)) * batch.weights
    assert torch.allclose(loss.double(), wanted, rtol=1e-6)
    assert torch.equal(gradient == 0, (mask == 0).expand_as(gradient))


def test_what_is_outside_gives_no_gradient_and_a_small_mask_counts_no_less() -> None:
    mask = torch.zeros(2, 1, 6, 6)
    mask[:, :, :2, :3] = 1
    loss, gradient = loss_of(mask)
    inside = a_batch(None).noise[:, :, :2, :3].square().mean((1, 2, 3)) * torch.tensor([1.0, 0.5])
    assert torch.allclose(loss, inside, rtol=1e-5)
    assert gradient[:, :, 2:].abs().max() == 0


def test_unmasked_weight_lets_the_rest_count_a_little() -> None:
    mask = torch.zeros(2, 1, 6, 6)
    mask[:, :, :3] = 1
    some, _ = loss_of(mask, unmasked_weight=0.25)
    weights = 0.25 + 0.75 * mask
    error = a_batch(None).noise.square()
    wanted = (error * weights).mean((1, 2, 3)) / weights.mean((1, 2, 3)) * torch.tensor([1.0, 0.5])
    assert torch.allclose(some, wanted, rtol=1e-5)
    assert torch.allclose(loss_of(mask, unmasked_weight=1.0)[0], loss_of(None)[0], rtol=1e-6)


def test_an_empty_mask_is_a_loss_of_zero_and_not_nan() -> None:
    loss, gradient = loss_of(torch.zeros(2, 1, 6, 6))
    assert torch.equal(loss, torch.zeros(2))
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_mask_moves_with_its_batch() -> None:
    batch = a_batch(torch.ones(2, 1, 6, 6)).to("cpu")
    assert batch.mask is not None
    assert replace(batch, mask=None).to("cpu").mask is None
