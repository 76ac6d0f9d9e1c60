"""What training noises pictures with, and how much: what all objectives have in common."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from gesso.core.seams import Noise, Spec
from gesso.core.timesteps import AnyDistribution, TimestepBias, Uniform, place

if TYPE_CHECKING:
    from torch import Tensor

    from gesso.core.batch import Batch


class Noising(Spec):
    """Which timesteps are trained on, and what the noise is like."""

    type: str
    noise_offset: float = Field(default=0.0, ge=0)
    """Deviation of a constant added to the noise of each sample and channel; helps very dark or bright pictures."""
    pyramid_noise_iterations: int = Field(default=0, ge=0, le=16)
    """Layers of coarser and coarser noise that are laid over the noise (Whitaker 2023, "multi-resolution noise"); 6 to
    10 are usual. 0: none. The sum has variance 1, whatever the layers; `noise_offset` comes on top."""
    pyramid_noise_discount: float = Field(default=0.3, gt=0, le=1)
    """What each layer of pyramid noise counts, compared with the one before; 0.1 to 0.3 are usual, 0.8 is strong."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Extra noise in the input only, not in the target (Ning et al. 2023); 0.1 is usual."""
    timesteps: AnyDistribution = Uniform()
    """How often each noise level is trained on. Validation measures at an even grid whatever this is, so that its
    losses can be compared between runs."""
    timestep_bias: TimestepBias = TimestepBias()
    timestep_low: float = Field(default=0.0, ge=0, lt=1)
    """Train only on timesteps above this fraction of the range (0 = least noise)."""
    timestep_high: float = Field(default=1.0, gt=0, le=1)
    """Train only on timesteps below this fraction of the range (1 = most noise)."""

    @model_validator(mode="after")
    def _range(self) -> Noising:
        if self.timestep_low >= self.timestep_high:
            raise ValueError("timestep_low must be below timestep_high")
        if self.timesteps.cdf(self.timestep_high) - self.timesteps.cdf(self.timestep_low) < 1e-6:
            raise ValueError("timesteps draws nothing between timestep_low and timestep_high")
        return self

    def draw_t(self, noise: Noise, batch: Batch) -> Tensor:
        """Timesteps [B], a function of the batch's `u`; held-out pictures keep their even grid inside the range."""
        spread = None if batch.held_out else partial(_spread, self)
        cells = batch.latents.shape[-2] * batch.latents.shape[-1]
        return noise.sample_t(batch.u, low=self.timestep_low, high=self.timestep_high, place=spread, cells=cells)

    def draw_noise(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The noise that is asked for and the noise that goes into the input, each [B, C, h, w].

        They are one but for the input perturbation. Each sample's numbers are its own, whatever batch it is in.
        """
        asked = batch.noise
        if self.pyramid_noise_iterations:
            asked = _pyramid(batch, self.pyramid_noise_iterations, self.pyramid_noise_discount)
        if self.noise_offset:
            asked = asked + self.noise_offset * _normal(batch, "noise offset", (asked.shape[1], 1, 1))
        if not self.input_perturbation:
            return asked, asked
        return asked, asked + self.input_perturbation * _normal(batch, "input perturbation", asked.shape[1:])


def _spread(self: Noising, u: Tensor, low: float, high: float) -> Tensor:
    return place(u, self.timesteps, self.timestep_bias, low=low, high=high)


def _normal(batch: Batch, domain: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.from_numpy(batch.draws.normal(domain, shape)).to(batch.noise.device)


def _pyramid(batch: Batch, iterations: int, discount: float) -> Tensor:
    """Layer i is noise of a coarser grid, enlarged bilinearly and multiplied by discount^i; the sum is scaled.

    Layer 0 is as fine as the noise itself; each grid is r^i times coarser than the one before, r drawn between 2 and 4,
    down to a single row or column (Whitaker 2023, and so in sd-scripts). The scale is what makes the mean variance
    over the cells 1, reckoned from the grids; sd-scripts divides by the deviation of what it happened to draw, of the
    whole batch.
    """
    import torch

    layers = [batch.draws.normal(f"pyramid noise {i}", batch.noise.shape[1:]) for i in range(iterations)]
    ratios = [2 + 2 * batch.draws.uniform(f"pyramid ratio {i}") for i in range(iterations)]
    added, scales = [], []
    for n in range(len(batch)):
        drawn, drawn_ratios = [layer[n] for layer in layers], [float(ratio[n]) for ratio in ratios]
        one, variance = _coarse_layers(drawn, drawn_ratios, discount)
        added.append(one)
        scales.append(1 / np.sqrt(1 + variance))
    device = batch.noise.device
    extra = torch.from_numpy(np.stack(added).astype(np.float32)).to(device)
    scale = torch.tensor(np.array(scales), dtype=torch.float32, device=device).view(-1, 1, 1, 1)
    return (batch.noise + extra) * scale


def _coarse_layers(
    layers: list[NDArray[np.float32]], ratios: list[float], discount: float
) -> tuple[NDArray[np.float64], float]:
    """The sum of one sample's layers [C, h, w] and its variance, averaged over the cells."""
    _, height, width = layers[0].shape
    total, variance = np.zeros(layers[0].shape), 0.0
    rows, columns = height, width
    for i, (layer, ratio) in enumerate(zip(layers, ratios, strict=True)):
        rows, columns = max(1, int(rows / ratio**i)), max(1, int(columns / ratio**i))
        down, across = _enlarge(rows, height), _enlarge(columns, width)
        total += discount**i * (down @ layer[:, :rows, :columns] @ across.T)
        variance += discount ** (2 * i) * float((down**2).sum(1).mean() * (across**2).sum(1).mean())
        if min(rows, columns) == 1:
            break
    return total, variance


def _enlarge(small: int, large: int) -> NDArray[np.float64]:
    """Linear interpolation from `small` cells to `large` as a matrix; cells are areas, and the ends are held."""
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    left = np.minimum(at.astype(int), max(small - 2, 0))
    matrix = np.zeros((large, small))
    matrix[np.arange(large), left] = 1 - (at - left)
    if small > 1:
        matrix[np.arange(large), left + 1] += at - left
    return matrix
