"""What the oracle tests share: batches with known contents, and policies that are plain functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from gesso.core.batch import Batch, Geometry
from gesso.core.noise import DDPM
from gesso.core.random import Draws, SampleKey

SDXL_SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
PREDICTIONS = ("epsilon", "v_prediction")


def ddpm(prediction: str = "epsilon", *, zero_snr: bool = False) -> DDPM:
    """SDXL's forward process."""
    return DDPM.from_config(
        SDXL_SCHEDULER | {"prediction_type": prediction, "rescale_betas_zero_snr": zero_snr},
    )


def normal(seed: int, *shape: int) -> np.ndarray:
    """float32 standard normal numbers that owe nothing to the product's generator."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_batch(
    latents: np.ndarray,
    noise: np.ndarray,
    u: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 7,
) -> Batch:
    """A batch whose sample i has the id `image-i`."""
    count = len(latents)
    return Batch(
        latents=torch.from_numpy(latents.astype(np.float32)).to(dtype),
        noise=torch.from_numpy(noise.astype(np.float32)).to(dtype),
        u=torch.from_numpy(u.astype(np.float64)),
        weights=torch.from_numpy(np.ones(count) if weights is None else weights).float(),
        geometry=(Geometry(512, 512, 0, 0, 512, 512),) * count,
        captions=("",) * count,
        text=None,
        files=tuple(f"image-{i}.png" for i in range(count)),
        draws=Draws(seed, 0, tuple(SampleKey(f"image-{i}") for i in range(count))),
    )


def rows(batch: Batch, which: list[int]) -> Batch:
    """Some samples of a batch, as a batch of its own."""
    return Batch(
        latents=batch.latents[which],
        noise=batch.noise[which],
        u=batch.u[which],
        weights=batch.weights[which],
        geometry=tuple(batch.geometry[i] for i in which),
        captions=tuple(batch.captions[i] for i in which),
        text=None,
        files=tuple(batch.files[i] for i in which),
        draws=Draws(batch.draws.seed, batch.draws.epoch, tuple(batch.draws.samples[i] for i in which)),
    )


class FunctionPolicy:
    """A policy whose network is a function; it keeps what it was fed."""

    def __init__(self, noise: DDPM, network: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.noise = noise
        self._network = network
        self.noisy: Tensor
        self.t: Tensor

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        return {"position": torch.arange(len(batch))}

    def predict(self, noisy: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert len(cond["position"]) == len(noisy) == len(t)
        self.noisy, self.t = noisy, t
        return self._network(noisy, t)

    @contextmanager
    def reference(self) -> Iterator[None]:
        yield
