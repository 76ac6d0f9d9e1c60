"""Weights, distances, flows and timestep distributions from their papers, in numpy and scipy, float64.

Like `formulas`, this imports nothing of the product. Sources are named at each formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import special, stats

# --------------------------------------------------------------------------- weights


def weight_on_epsilon(rule: str, snr: np.ndarray, *, gamma: float = 5.0, k: float = 1.0) -> np.ndarray:
    """Weight on ||eps error||^2, as the papers (all of which speak of epsilon) have it."""
    if rule == "none":
        return np.ones_like(snr)
    if rule == "min_snr":  # Hang et al. 2023, section 3.3
        return np.minimum(snr, gamma) / snr
    if rule == "soft_min_snr":  # Crowson et al. 2024, section 3.2: x0 weight SNR g / (SNR + g)
        return gamma / (snr + gamma)
    if rule == "debiased":  # Yu et al. 2023, equation 12, with the cap of the implementations
        return np.array([1.0 / math.sqrt(min(one, 1000.0)) for one in snr.tolist()])
    if rule == "p2":  # Choi et al. 2022, equation 8
        return np.array([(k + one) ** -gamma for one in snr.tolist()])
    if rule == "epsilon":
        return np.ones_like(snr)
    raise ValueError(rule)


def weight_on(answer: str, rule: str, snr: np.ndarray, *, gamma: float = 5.0, k: float = 1.0) -> np.ndarray:
    """The same statement about v or flow.

    x0 = x/a - (s/a) eps, so |eps error|^2 = SNR |x0 error|^2. x0 = a x - s v, so |v error|^2 = |x0 error|^2 / s^2 with
    1 / s^2 = SNR + 1 where a^2 + s^2 = 1. x0 = x - s u, so |flow error|^2 = |x0 error|^2 / s^2 with 1 / s = 1 + a / s
    where a + s = 1.
    """
    if rule == "none":
        return np.ones_like(snr)
    on_x0 = weight_on_epsilon(rule, snr, gamma=gamma, k=k) * snr
    if answer == "epsilon":
        return on_x0 / snr
    return on_x0 / (snr + 1.0) if answer == "v_prediction" else on_x0 / (1.0 + np.sqrt(snr)) ** 2


def tool_debiased_v(tool: str, snr: np.ndarray) -> np.ndarray:
    """What two trainers do for v with debiased estimation."""
    capped = np.minimum(snr, 1000.0)
    return 1.0 / (capped + 1.0) if tool == "kohya" else 1.0 / np.sqrt(capped + 1.0)


# --------------------------------------------------------------------------- distances


def distance(kind: str, error: float, c: float) -> float:
    """Distance of one number; huber and smooth_l1 are the pseudo-Huber forms of the trainers (c is their huber_c)."""
    if kind == "l2":
        return error * error
    if kind == "l1":
        return abs(error)
    if kind == "log_cosh":
        size = abs(error)
        return math.log(math.cosh(error)) if 1e-3 < size < 300 else size - math.log(2) if size >= 300 else _small(error)
    root = math.hypot(error, c)
    exact = error * error / (root + c)
    return 2 * c * exact if kind == "huber" else 2 * exact


def _small(error: float) -> float:
    """log cosh by its series: d^2/2 - d^4/12."""
    return error**2 / 2 - error**4 / 12


def scheduled_delta(schedule: str, c: float, *, progress: np.ndarray, snr: np.ndarray) -> np.ndarray:
    """Khrapov et al. 2024: exponential exp(log(c) t / T); snr (1 - c) / (1 + sigma)^2 + c with sigma^2 = 1 / SNR."""
    if schedule == "constant":
        return np.full_like(progress, c)
    if schedule == "exponential":
        return np.exp(math.log(c) * progress)
    sigma = np.sqrt(1.0 / snr)
    return (1.0 - c) / (1.0 + sigma) ** 2 + c


# --------------------------------------------------------------------------- flow


def flow_snr(s: np.ndarray) -> np.ndarray:
    """((1 - s) / s)^2."""
    return ((1.0 - s) / s) ** 2


def flow_shift(s: np.ndarray, k: float) -> np.ndarray:
    """Esser et al. 2024, equation 23, as odds: s' / (1 - s') = k s / (1 - s)."""
    odds = k * s / (1.0 - s)
    return odds / (1.0 + odds)


# --------------------------------------------------------------------------- timesteps

Cdf = Callable[[np.ndarray], np.ndarray]
"""Share of the draws below each x."""


def uniform_cdf(x: np.ndarray) -> np.ndarray:
    """x."""
    return np.asarray(x, np.float64)


def logit_normal_cdf(mean: float, std: float) -> Cdf:
    """P(sigmoid(mean + std z) < x) (Esser et al. 2024, section 3.1)."""
    return lambda x: stats.norm.cdf(special.logit(x), loc=mean, scale=std)


def mode_cdf(scale: float) -> Cdf:
    """P(f(u) < x), f(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u) falling (Esser et al. 2024, equation 20)."""

    def cdf(x: np.ndarray) -> np.ndarray:
        low, high = np.zeros(np.shape(x)), np.ones(np.shape(x))
        for _ in range(60):
            u = (low + high) / 2
            above = 1 - u - scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u) > x
            low, high = np.where(above, u, low), np.where(above, high, u)
        return 1 - low

    return cdf


def beta_cdf(alpha: float, beta: float) -> Cdf:
    """The regularised incomplete beta function."""
    return lambda x: stats.beta.cdf(x, alpha, beta)


def steps_cdf(weights: tuple[float, ...]) -> Cdf:
    """Weights over equal stretches."""
    edges = np.linspace(0, 1, len(weights) + 1)
    return lambda x: np.interp(x, edges, np.concatenate([[0.0], np.cumsum(weights)]) / sum(weights))


def tilted(cdf: Cdf, *, begin: float, end: float, multiplier: float) -> Cdf:
    """The distribution whose density is `multiplier` times as large between begin and end."""

    def mass(x: np.ndarray) -> np.ndarray:
        inside = cdf(np.clip(x, begin, end)) - cdf(np.float64(begin))
        return cdf(x) + (multiplier - 1) * inside

    return lambda x: mass(x) / mass(np.float64(1))


def between(cdf: Cdf, low: float, high: float) -> Cdf:
    """The distribution on condition that it lies between low and high."""
    first, last = cdf(np.float64(low)), cdf(np.float64(high))
    return lambda x: np.clip((cdf(x) - first) / (last - first), 0, 1)


def ks(values: np.ndarray, cdf: Cdf) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance; above 1.95 has p < 0.001."""
    ordered = np.sort(values.astype(np.float64))
    exact, grid = cdf(ordered), np.arange(ordered.size + 1) / ordered.size
    return max(float((grid[1:] - exact).max()), float((exact - grid[:-1]).max())) * math.sqrt(ordered.size)
