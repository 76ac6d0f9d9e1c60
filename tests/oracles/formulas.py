"""The mathematics that training must obey, written from the papers in float64.

Nothing here imports the product, torch or diffusers: numpy and plain Python only, so that a mistake in the code
cannot also be a mistake in the check. Sources are named at each formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# --------------------------------------------------------------------------- forward process


def betas(schedule: str, first: float, last: float, count: int) -> np.ndarray:
    """Variance schedule [T]: `linear` (Ho et al. 2020) or `scaled_linear` (Rombach et al. 2022: in sqrt beta)."""
    ramp = np.arange(count, dtype=np.float64) / (count - 1)
    if schedule == "linear":
        return first + (last - first) * ramp
    if schedule == "scaled_linear":
        return (math.sqrt(first) + (math.sqrt(last) - math.sqrt(first)) * ramp) ** 2
    if schedule == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, equation 17, cap 0.999

        def bar(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        return np.array([min(1 - bar((i + 1) / count) / bar(i / count), 0.999) for i in range(count)])
    raise ValueError(schedule)


def alpha_bar(beta: np.ndarray) -> np.ndarray:
    """abar_t = prod_{s <= t} (1 - beta_s), by a running product in plain Python floats."""
    out, product = [], 1.0
    for value in beta.tolist():
        product *= 1.0 - value
        out.append(product)
    return np.array(out)


SDXL_ALPHA_BAR = alpha_bar(betas("scaled_linear", 0.00085, 0.012, 1000))


def zero_terminal(abar: np.ndarray) -> np.ndarray:
    """Lin et al. 2023, algorithm 1: shift sqrt(abar) so that the last is 0, scale so that the first is kept."""
    root = np.sqrt(abar)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def snr(abar: np.ndarray) -> np.ndarray:
    """Signal-to-noise ratio abar / (1 - abar)."""
    return abar / (1.0 - abar)


def corrupt(abar: np.ndarray, x0: np.ndarray, noise: np.ndarray, t: np.ndarray) -> np.ndarray:
    """x_t = sqrt(abar) x0 + sqrt(1 - abar) n, per sample of a batch [B, ...]."""
    a, s = coefficients(abar, t, x0.ndim)
    return a * x0.astype(np.float64) + s * noise.astype(np.float64)


def target(abar: np.ndarray, x0: np.ndarray, noise: np.ndarray, t: np.ndarray, prediction: str) -> np.ndarray:
    """What the network must predict: n, or v = a n - s x0 (Salimans and Ho 2022)."""
    if prediction == "epsilon":
        return noise.astype(np.float64)
    a, s = coefficients(abar, t, x0.ndim)
    return a * noise.astype(np.float64) - s * x0.astype(np.float64)


def coefficients(abar: np.ndarray, t: np.ndarray, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, s) shaped to broadcast over [B, ...]."""
    picked = abar[t].reshape(-1, *([1] * (ndim - 1)))
    return np.sqrt(picked), np.sqrt(1.0 - picked)


def prediction_from_x0(abar: np.ndarray, guess: np.ndarray, x_t: np.ndarray, t: np.ndarray, kind: str) -> np.ndarray:
    """The eps or v output that is the same statement as the guess `guess` of x0 at x_t."""
    a, s = coefficients(abar, t, x_t.ndim)
    eps = (x_t - a * guess) / s
    return eps if kind == "epsilon" else a * eps - s * guess


def min_snr_weight(abar: np.ndarray, gamma: float, prediction: str) -> np.ndarray:
    """Hang et al. 2023: x0-loss weight min(SNR, gamma), turned into a weight on the eps or v loss.

    ||eps error||^2 = SNR ||x0 error||^2 and ||v error||^2 = (SNR + 1) ||x0 error||^2.
    """
    ratio = snr(abar)
    capped = np.minimum(ratio, gamma)
    return capped / ratio if prediction == "epsilon" else capped / (ratio + 1.0)


# --------------------------------------------------------------------------- losses


def per_sample(loss: str, prediction: np.ndarray, truth: np.ndarray, delta: float = 1.0) -> np.ndarray:
    """Mean over all but the first axis of squared, absolute, Huber or pseudo-Huber error: [B]."""
    error = prediction.astype(np.float64) - truth.astype(np.float64)
    if loss == "l2":
        value = error**2
    elif loss == "l1":
        value = np.abs(error)
    elif loss == "huber":  # Huber 1964: quadratic inside delta, linear outside
        size = np.abs(error)
        value = np.where(size <= delta, 0.5 * error**2, delta * (size - 0.5 * delta))
    elif loss == "pseudo_huber":  # Charbonnier et al. 1997, as used for consistency training
        value = 2.0 * delta * (np.sqrt(error**2 + delta**2) - delta)
    else:
        raise ValueError(loss)
    return value.reshape(value.shape[0], -1).mean(axis=1)


def offset_noise(noise: np.ndarray, draw: np.ndarray, k: float) -> np.ndarray:
    """n' = n + k m, with m one N(0, 1) value for each (sample, channel): draw [B, C]."""
    return noise.astype(np.float64) + k * draw.astype(np.float64)[:, :, None, None]


def channel_mean_variance(height: int, width: int, k: float) -> float:
    """Variance of the mean of one channel of offset noise."""
    return 1.0 / (height * width) + k * k


# --------------------------------------------------------------------------- EMA


def ema_decays(
    updates: int, decay: float, *, start: int = 0, minimum: float = 0.0, inv_gamma: float = 1.0, power: float | None
) -> list[float]:
    """Decay at updates 1..N: k = update - start - 1, k <= 0 copies; (1+k)/(10+k), or 1-(1+k/g)^-p with a power."""
    out = []
    for update in range(1, updates + 1):
        k = update - start - 1
        if k <= 0:
            out.append(0.0)
            continue
        ramp = (1.0 + k) / (10.0 + k) if power is None else 1.0 - (1.0 + k / inv_gamma) ** (-power)
        out.append(max(min(ramp, decay), minimum))
    return out


def ema_of_step(decays: Sequence[float], before: float, after: float) -> float:
    """Average after feeding the constant `after` to a shadow that began at `before`: a closed product."""
    return after + (before - after) * math.prod(decays)


# --------------------------------------------------------------------------- latents, adapters, gradients


def scale_latents(raw: np.ndarray, *, factor: float, shift: float = 0.0) -> np.ndarray:
    """latent = (raw - shift) * factor."""
    return (raw.astype(np.float64) - shift) * factor


def lora_merge(
    weight: np.ndarray, down: np.ndarray, up: np.ndarray, *, alpha: float, rslora: bool = False
) -> np.ndarray:
    """Hu et al. 2021: W + (alpha / r) B A with A = down [r, in], B = up [out, r]; rsLoRA divides by sqrt r."""
    rank = down.shape[0]
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    low = up.astype(np.float64).reshape(up.shape[0], rank) @ down.astype(np.float64).reshape(rank, -1)
    return weight.astype(np.float64) + scale * low.reshape(weight.shape)


# --------------------------------------------------------------------------- statistics


def chi_square(counts: np.ndarray) -> float:
    """How many standard deviations a count table lies from uniform (normal approximation of chi-square)."""
    expected = counts.sum() / counts.size
    value = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    return (value - freedom) / math.sqrt(2.0 * freedom)


def ks_normal(values: np.ndarray) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of values [n] from N(0, 1); above 1.95 has p < 0.001."""
    ordered = np.sort(values.astype(np.float64).ravel())
    exact = np.array([0.5 * (1.0 + math.erf(x / math.sqrt(2.0))) for x in ordered.tolist()])
    grid = np.arange(ordered.size + 1) / ordered.size
    distance = max(float((grid[1:] - exact).max()), float((exact - grid[:-1]).max()))
    return distance * math.sqrt(ordered.size)


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest elementwise relative error, with exact zeros wanted compared absolutely."""
    scale = np.where(wanted == 0.0, 1.0, np.abs(wanted))
    return float((np.abs(found - wanted) / scale).max())


def relative_l2(found: np.ndarray, wanted: np.ndarray) -> float:
    """|found - wanted| / |wanted|."""
    return float(np.linalg.norm((found - wanted).ravel()) / np.linalg.norm(wanted.ravel()))


# --------------------------------------------------------------------------- learning rate, random numbers


def learning_rate(
    kind: str, step: int, total: int, *, warmup: int, floor: float, cycles: int = 1, power: float = 1.0
) -> float:
    """Factor at 0-based optimiser step `step` of `total`: (k+1)/(warmup+1), then a curve from 1 down to `floor`.

    Progress is a fraction of whole numbers, so that a restart falls on the step that it belongs to.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = min(Fraction(step - warmup, max(total - 1 - warmup, 1)), Fraction(1))
    if kind == "constant":
        return 1.0
    if kind == "cosine_restarts" and done < 1:  # Loshchilov and Hutter 2017, equal cycles
        done = done * cycles - math.floor(done * cycles)
    if kind == "linear":
        curve = float(1 - done)
    elif kind == "polynomial":
        curve = float(1 - done) ** power
    else:
        curve = 0.5 * (1.0 + math.cos(math.pi * float(done)))
    return floor + (1.0 - floor) * curve


def philox_uniform(key: int, count: int) -> list[float]:
    """The first `count` 53-bit uniforms of Philox-4x64-10 (Salmon et al. 2011), counter from 1, 128-bit `key`."""
    mask = 2**64 - 1
    words: list[int] = []
    counter = 1
    while len(words) < count:
        c = [counter & mask, counter >> 64 & mask, counter >> 128 & mask, counter >> 192 & mask]
        k0, k1 = key & mask, key >> 64
        for _ in range(10):
            first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [second >> 64 ^ c[1] ^ k0, second & mask, first >> 64 ^ c[3] ^ k1, first & mask]
            k0, k1 = k0 + 0x9E3779B97F4A7C15 & mask, k1 + 0xBB67AE8584CAA73B & mask
        words += c
        counter += 1
    return [(word >> 11) * 2.0**-53 for word in words[:count]]


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on one vector."""

    def __init__(self, weights: np.ndarray, *, beta1: float, beta2: float, eps: float, decay: float) -> None:
        self.weights = weights.astype(np.float64)
        self._beta1, self._beta2, self._eps, self._decay = beta1, beta2, eps, decay
        self._mean, self._square, self._steps = np.zeros_like(self.weights), np.zeros_like(self.weights), 0

    def step(self, gradient: np.ndarray, rate: float) -> None:
        """One update at learning rate `rate`."""
        self._steps += 1
        self._mean = self._beta1 * self._mean + (1 - self._beta1) * gradient
        self._square = self._beta2 * self._square + (1 - self._beta2) * gradient**2
        mean = self._mean / (1 - self._beta1**self._steps)
        square = self._square / (1 - self._beta2**self._steps)
        self.weights = self.weights * (1 - rate * self._decay) - rate * mean / (np.sqrt(square) + self._eps)


class Lion:
    """The sign of a mixture of momentum and gradient (Chen et al. 2023, program 1), with decoupled decay."""

    def __init__(self, weights: np.ndarray, *, beta1: float, beta2: float, decay: float) -> None:
        self.weights = weights.astype(np.float64)
        self._beta1, self._beta2, self._decay, self._mean = beta1, beta2, decay, np.zeros_like(self.weights)

    def step(self, gradient: np.ndarray, rate: float) -> None:
        """One update at learning rate `rate`."""
        update = np.sign(self._beta1 * self._mean + (1 - self._beta1) * gradient)
        self._mean = self._beta2 * self._mean + (1 - self._beta2) * gradient
        self.weights = self.weights * (1 - rate * self._decay) - rate * update
