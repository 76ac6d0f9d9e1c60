"""How far a prediction is from its target, number by number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from gesso.core.seams import Noise

Distance = Literal["l2", "l1", "smooth_l1", "huber", "log_cosh"]
"""
l2         d^2
l1         |d|
huber      2 c (sqrt(d^2 + c^2) - c): pseudo-Huber (Charbonnier et al. 1997), d^2 near 0 and 2 c |d| far away
smooth_l1  2 (sqrt(d^2 + c^2) - c): the same divided by c, as trainers of diffusion models mean it: 2 |d| far away
log_cosh   log cosh d: d^2 / 2 near 0 and |d| far away
"""

DeltaSchedule = Literal["constant", "exponential", "snr"]
"""
How c follows the noise, from 1 where there is none (Khrapov et al. 2024, arXiv:2403.16728, and so in sd-scripts):

constant     c
exponential  c^(t / T)
snr          (1 - c) / (1 + sigma)^2 + c, with sigma = 1 / sqrt(SNR)
"""


def distance(kind: Distance, difference: Tensor, delta: Tensor) -> Tensor:
    """The distance of each number, [B, ...]; delta [B] is what `huber` and `smooth_l1` call c."""
    match kind:
        case "l2":
            return difference.square()
        case "l1":
            return difference.abs()
        case "log_cosh":
            return _log_cosh(difference)
    c = delta.view(-1, *[1] * (difference.ndim - 1))
    # sqrt(d^2 + c^2) - c without the loss of digits that the difference has near 0.
    square = difference.square()
    bowl = square / ((square + c * c).sqrt() + c)
    return 2 * bowl * c if kind == "huber" else 2 * bowl


def delta_at(schedule: DeltaSchedule, delta: float, noise: Noise, t: Tensor) -> Tensor:
    """c at timesteps t, [B] float32."""
    match schedule:
        case "constant":
            return noise.level(t).new_full(t.shape, delta)
        case "exponential":
            return (math.log(delta) * noise.level(t)).exp()
        case "snr":
            return noise.by_snr(t, lambda snr: (1 - delta) * (snr.sqrt() / (1 + snr.sqrt())).square() + delta)


def _log_cosh(d: Tensor) -> Tensor:
    """Each form where it keeps its digits: cosh d = 1 + 2 sinh^2(d / 2) near 0, (e^|d| + e^-|d|) / 2 far from it."""
    import torch

    size = d.abs()
    near = torch.log1p(2 * torch.sinh(size.clamp(max=1) / 2).square())
    return torch.where(size < 1, near, size + torch.log1p(torch.exp(-2 * size)) - math.log(2))
