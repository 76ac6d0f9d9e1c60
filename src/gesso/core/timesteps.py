"""Which noise levels are trained on: distributions over the range of timesteps, 0 = least noise, 1 = most.

A draw is an inverse distribution function applied to the batch's own uniform number, so that it stays keyed by its
sample, and a part of the range (or a bias towards one) is exactly that distribution cut down to it (or tilted).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from gesso.core.seams import Spec, chosen_by_type

if TYPE_CHECKING:
    from torch import Tensor

_KNOTS = 4097


class Distribution(Spec, ABC):
    """Base of the distributions on [0, 1]."""

    @abstractmethod
    def cdf(self, x: float) -> float:
        """Share of the draws below x."""

    @abstractmethod
    def quantile(self, p: Tensor) -> Tensor:
        """Where a share p [B] of the draws lies below; on p's device and in its dtype."""


class Uniform(Distribution):
    """All timesteps alike."""

    type: Literal["uniform"] = "uniform"

    def cdf(self, x: float) -> float:
        """x."""
        return x

    def quantile(self, p: Tensor) -> Tensor:
        """p."""
        return p


class LogitNormal(Distribution):
    """The logistic function of a normal number (Esser et al. 2024, SD 3, arXiv:2403.03206, section 3.1)."""

    type: Literal["logit_normal"] = "logit_normal"
    mean: float = 0.0
    """Above 0: more noise."""
    std: float = Field(default=1.0, gt=0)
    """Width; 1 is the paper's choice."""

    def cdf(self, x: float) -> float:
        """Phi((logit(x) - mean) / std)."""
        if not 0 < x < 1:
            return float(x >= 1)
        return 0.5 * math.erfc((self.mean - math.log(x) + math.log1p(-x)) / (self.std * math.sqrt(2)))

    def quantile(self, p: Tensor) -> Tensor:
        """sigmoid(mean + std Phi^-1(p))."""
        import torch

        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(p))


class Mode(Distribution):
    """Heavier in the middle, and nowhere empty (Esser et al. 2024, SD 3, equation 20)."""

    type: Literal["mode"] = "mode"
    scale: float = Field(default=1.29, ge=-1, le=2 / (math.pi - 2))
    """Above 0: the middle counts more; below: the ends. The paper tries 0.81 and 1.29."""

    def cdf(self, x: float) -> float:
        """The inverse of `quantile`, by bisection."""
        if not 0 < x < 1:
            return float(x >= 1)
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            value = (1 + self.scale) * middle - self.scale * math.sin(math.pi / 2 * middle) ** 2
            low, high = (middle, high) if value < x else (low, middle)
        return (low + high) / 2

    def quantile(self, p: Tensor) -> Tensor:
        """p - scale (sin^2(pi p / 2) - p): the paper's function of u = 1 - p."""
        return (1 + self.scale) * p - self.scale * (math.pi / 2 * p).sin().square()


class Beta(Distribution):
    """The beta distribution."""

    type: Literal["beta"] = "beta"
    alpha: float = Field(gt=0)
    """Above `beta`: more noise."""
    beta: float = Field(gt=0)
    """Above `alpha`: less noise. With both at 1 all timesteps are alike."""

    def cdf(self, x: float) -> float:
        """The regularised incomplete beta function."""
        if not 0 < x < 1:
            return float(x >= 1)
        return float(_incomplete_beta(self.alpha, self.beta, np.array([x]))[0])

    def quantile(self, p: Tensor) -> Tensor:
        """By interpolation between 4,097 exact points, dense towards both ends."""
        import torch

        at, below = (torch.from_numpy(knots).to(p) for knots in _beta_knots(self.alpha, self.beta))
        i = torch.searchsorted(below, p.contiguous(), right=True).clamp(1, len(below) - 1)
        width = (below[i] - below[i - 1]).clamp(min=torch.finfo(p.dtype).tiny)
        share = ((p - below[i - 1]) / width).clamp(0, 1)
        return at[i - 1] + share * (at[i] - at[i - 1])


class Custom(Distribution):
    """Weights of your own over equal stretches of the range."""

    type: Literal["custom"] = "custom"
    weights: tuple[float, ...] = Field(min_length=1)
    """How often timesteps of each stretch are drawn, from the least noise to the most; they need not sum to 1."""

    @field_validator("weights", mode="before")
    @classmethod
    def _tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("weights")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(weight < 0 for weight in value) or not sum(value) > 0:
            raise ValueError("weights must be 0 or more, and one of them above 0")
        return value

    def cdf(self, x: float) -> float:
        """Linear inside each stretch."""
        return float(np.interp(x, np.linspace(0, 1, len(self.weights) + 1), self._below()))

    def quantile(self, p: Tensor) -> Tensor:
        """The inverse; draws of a stretch are even inside it."""
        import torch

        below = torch.from_numpy(self._below()).to(p)
        count = len(self.weights)
        # Of several points with the same share below, the last one is meant: a stretch of weight 0 is jumped over.
        last = max(n for n, weight in enumerate(self.weights) if weight > 0)
        i = (torch.searchsorted(below, p.contiguous(), right=True) - 1).clamp(0, last)
        share = ((p - below[i]) / (below[i + 1] - below[i])).clamp(0, 1)
        return (i + share) / count

    def _below(self) -> NDArray[np.float64]:
        return np.concatenate([[0.0], np.cumsum(self.weights)]) / sum(self.weights)


class TimestepBias(Spec):
    """A part of the range that is drawn more or less often; begin 0.75 and end 1 is the noisy quarter."""

    begin: float = Field(default=0.0, ge=0, lt=1)
    """Where the part begins, as a fraction of the range (0 = least noise)."""
    end: float = Field(default=1.0, gt=0, le=1)
    """Where it ends."""
    multiplier: float = Field(default=1.0, gt=0)
    """How many times more often its timesteps are drawn; below 1 less often, 1 changes nothing."""

    @model_validator(mode="after")
    def _part(self) -> TimestepBias:
        if self.begin >= self.end:
            raise ValueError("begin must be below end")
        if self.multiplier != 1 and (self.begin, self.end) == (0, 1):
            raise ValueError("a multiplier of the whole range changes nothing: say which part, with begin and end")
        return self


AnyDistribution = Annotated[
    Annotated[Uniform, Tag("uniform")]
    | Annotated[LogitNormal, Tag("logit_normal")]
    | Annotated[Mode, Tag("mode")]
    | Annotated[Beta, Tag("beta")]
    | Annotated[Custom, Tag("custom")],
    Discriminator(chosen_by_type("uniform")),
]


def place(u: Tensor, distribution: Distribution, bias: TimestepBias, *, low: float, high: float) -> Tensor:
    """Uniforms u [B] -> positions in [low, high] as shares of that stretch: 0 at low, 1 at high.

    Their distribution is the given one, tilted by `bias`, on condition that it falls between low and high.
    """
    if isinstance(distribution, Uniform) and bias.multiplier == 1:
        return u
    first, last = distribution.cdf(low), distribution.cdf(high)
    begin, end = (min(max(distribution.cdf(x), first), last) for x in (bias.begin, bias.end))
    before, inside = begin - first, (end - begin) * bias.multiplier
    drawn = u * (before + inside + last - end)
    p = first + drawn.clamp(max=before)
    p = p + (drawn - before).clamp(0, inside) / bias.multiplier + (drawn - before - inside).clamp(min=0)
    return ((distribution.quantile(p.clamp(0, 1)) - low) / (high - low)).clamp(0, 1)


@cache
def _beta_knots(alpha: float, beta: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points x and the share of draws below each."""
    x = np.sin(np.linspace(0, math.pi / 2, _KNOTS)) ** 2
    below = np.concatenate([[0.0], _incomplete_beta(alpha, beta, x[1:-1]), [1.0]])
    return x, np.maximum.accumulate(below)


def _incomplete_beta(a: float, b: float, x: NDArray[np.float64]) -> NDArray[np.float64]:
    """I_x(a, b) for x in (0, 1), by its continued fraction (DLMF 8.17.22), taken where that converges fast."""
    swap = x > (a + 1) / (a + b + 2)
    p, q, y = np.where(swap, b, a), np.where(swap, a, b), np.where(swap, 1 - x, x)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = np.exp(scale + p * np.log(y) + q * np.log1p(-y)) / p
    # Lentz's method: the fraction is the product of c d over all its terms.
    c, d = np.ones_like(y), 1 / _away_from_0(1 - (p + q) * y / (p + 1))
    value = d.copy()
    for m in range(1, 500):
        even = m * (q - m) * y / ((p + 2 * m - 1) * (p + 2 * m))
        odd = -(p + m) * (p + q + m) * y / ((p + 2 * m) * (p + 2 * m + 1))
        for term in (even, odd):
            d, c = 1 / _away_from_0(1 + term * d), _away_from_0(1 + term / c)
            value *= c * d
        if np.abs(c * d - 1).max() < 1e-15:
            break
    share: NDArray[np.float64] = np.where(swap, 1 - front * value, front * value)
    return share


def _away_from_0(x: NDArray[np.float64]) -> NDArray[np.float64]:
    far: NDArray[np.float64] = np.where(np.abs(x) < 1e-300, 1e-300, x)
    return far
