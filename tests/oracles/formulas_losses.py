"""Loss weights, distances, timestep distributions and straight-line flows, written from the papers in float64.

Like `formulas`, nothing here imports the product, torch or diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

# --------------------------------------------------------------------------- weights


def x0_weight(rule: str, snr: np.ndarray, **number: float) -> np.ndarray:
    """What one unit of squared error in x0 costs at each signal-to-noise ratio."""
    if rule == "min_snr":  # Hang et al. 2023
        return np.minimum(snr, number["gamma"])
    if rule == "soft_min_snr":  # Crowson et al. 2024, section 2.2
        return snr * number["gamma"] / (snr + number["gamma"])
    if rule == "debiased":  # Yu et al. 2024: 1 / sqrt(SNR) on the noise, the ratio capped at 1000
        return snr / np.sqrt(np.minimum(snr, 1000.0))
    if rule == "p2":  # Choi et al. 2022: 1 / (k + SNR)^gamma on the noise
        return snr / (number["k"] + snr) ** number["gamma"]
    raise ValueError(rule)


def error_ratio(prediction: str, snr: np.ndarray) -> np.ndarray:
    """Squared error of the prediction for one unit of squared error in the x0 that it means.

    From x_t = a x0 + s n: n errs by a/s, v = a n - s x0 by a^2/s + s = 1/s (with a^2 + s^2 = 1), and n - x0 on the
    straight line x_s = (1 - s) x0 + s n by (1 - s)/s + 1 = 1/s.
    """
    if prediction == "epsilon":
        return snr
    if prediction == "v_prediction":
        return snr + 1.0
    if prediction == "flow":
        return (np.sqrt(snr) + 1.0) ** 2
    raise ValueError(prediction)


def weight(rule: str, prediction: str, snr: np.ndarray, **number: float) -> np.ndarray:
    """The weight on the prediction's squared error that gives `x0_weight`."""
    return x0_weight(rule, snr, **number) / error_ratio(prediction, snr)


# --------------------------------------------------------------------------- distances


def distance(kind: str, error: np.ndarray, delta: np.ndarray | float = 1.0) -> np.ndarray:
    """Elementwise distance; the two of Huber's family are Charbonnier's smooth form, as in published trainers."""
    if kind == "l2":
        return error**2
    if kind == "l1":
        return np.abs(error)
    if kind == "huber":  # ~ error^2 near zero, ~ 2 delta |error| far away
        return 2 * delta * (np.sqrt(error**2 + np.square(delta)) - delta)
    if kind == "smooth_l1":  # ~ error^2 / delta near zero, ~ 2 |error| far away
        return 2 * (np.sqrt(error**2 + np.square(delta)) - delta)
    if kind == "log_cosh":  # log cosh e = |e| + log(1 + exp(-2 |e|)) - log 2
        size = np.abs(error)
        return size + np.log1p(np.exp(-2 * size)) - math.log(2)
    raise ValueError(kind)


def huber_delta(schedule: str, delta: float, share: np.ndarray, snr: np.ndarray) -> np.ndarray:
    """Khrapov et al. 2024 and sd-scripts: delta of a timestep at `share` of the range with this SNR.

    exponential: 1 at no noise down to `delta` at the end; snr: delta + (1 - delta) / (1 + sigma)^2, sigma = SNR^-1/2.
    """
    if schedule == "constant":
        return np.full_like(share, delta)
    if schedule == "exponential":
        return np.exp(math.log(delta) * share)
    if schedule == "snr":
        return (1 - delta) / (1 + 1 / np.sqrt(snr)) ** 2 + delta
    raise ValueError(schedule)


# --------------------------------------------------------------------------- timesteps


def logit_normal_cdf(mean: float, std: float) -> Callable[[np.ndarray], np.ndarray]:
    """Share of draws below s, where logit(s) ~ N(mean, std^2): Esser et al. 2024, equation 19; s = 1 is noise."""
    normal = NormalDist(mean, std)
    return lambda s: np.array([normal.cdf(math.log(x / (1 - x))) if 0 < x < 1 else float(x >= 1) for x in s.tolist()])


def mode_inverse(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """s(u) = 1 - u - scale (cos^2(pi u / 2) - 1 + u): Esser et al. 2024, equation 20, falling from 1 to 0 in u."""
    return lambda u: 1 - u - scale * (np.cos(math.pi / 2 * u) ** 2 - 1 + u)


def beta_cdf(alpha: float, beta: float, *, cells: int = 200_000) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function of Beta(alpha, beta) by the midpoint rule, for alpha, beta >= 1."""
    middle = (np.arange(cells) + 0.5) / cells
    density = middle ** (alpha - 1) * (1 - middle) ** (beta - 1)
    table = np.concatenate([[0.0], np.cumsum(density)]) / density.sum()
    return lambda s: np.interp(s, np.arange(cells + 1) / cells, table)


def stretches_cdf(weights: list[float]) -> Callable[[np.ndarray], np.ndarray]:
    """The distribution function that is uniform in each of equal stretches, with these chances."""
    table = np.concatenate([[0.0], np.cumsum(weights)]) / sum(weights)
    return lambda s: np.interp(s, np.arange(len(weights) + 1) / len(weights), table)


def ks(values: np.ndarray, cdf: Callable[[np.ndarray], np.ndarray]) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of values [n] from `cdf`; above 1.95 has p < 0.001."""
    ordered = np.sort(values.astype(np.float64).ravel())
    exact, grid = cdf(ordered), np.arange(ordered.size + 1) / ordered.size
    return float(max((grid[1:] - exact).max(), (exact - grid[:-1]).max())) * math.sqrt(ordered.size)


# --------------------------------------------------------------------------- straight lines


def line(x0: np.ndarray, noise: np.ndarray, s: np.ndarray) -> np.ndarray:
    """x_s = (1 - s) x0 + s n (Liu et al. 2023; Lipman et al. 2023), s [B]."""
    share = s.reshape(-1, *([1] * (x0.ndim - 1)))
    return (1 - share) * x0.astype(np.float64) + share * noise.astype(np.float64)


def shifted(s: np.ndarray, k: float) -> np.ndarray:
    """Esser et al. 2024, equation 23: s' = k s / (1 + (k - 1) s)."""
    return k * s / (1 + (k - 1) * s)


def flux_shift(tokens: int) -> float:
    """FLUX.1: k = e^mu, mu linear in the number of packed tokens from 0.5 at 256 to 1.15 at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def line_snr(s: np.ndarray) -> np.ndarray:
    """((1 - s) / s)^2."""
    return ((1 - s) / s) ** 2
