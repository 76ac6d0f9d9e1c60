"""The losses of preference training and of DreamBooth, written from the papers in float64.

Like `formulas`, nothing here imports the product, torch or diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def latent_errors(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """L [B]: the squared error, averaged over channels, lines and columns of each latent."""
    error = prediction.astype(np.float64) - truth.astype(np.float64)
    return (error**2).reshape(len(error), -1).mean(axis=1)


def dpo_logit(
    beta: float, chosen: np.ndarray, rejected: np.ndarray, chosen_before: np.ndarray, rejected_before: np.ndarray
) -> np.ndarray:
    """u = -(beta/2) [(Lw - Lw_ref) - (Ll - Ll_ref)] (Wallace et al. 2023, equation 14 and the authors' code)."""
    return -0.5 * beta * ((chosen - chosen_before) - (rejected - rejected_before))


def log_sigmoid(u: np.ndarray) -> np.ndarray:
    """log(1 / (1 + e^-u)), without overflow."""
    return np.array([-math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x)) for x in u.tolist()])


def dpo_loss(u: np.ndarray, *, smoothing: float = 0.0) -> np.ndarray:
    """-log sigmoid(u); with `smoothing` so much of the labels is the other way round (Mitchell 2023, cDPO)."""
    return -(1 - smoothing) * log_sigmoid(u) - smoothing * log_sigmoid(-u)


def ipo_loss(u: np.ndarray, beta: float) -> np.ndarray:
    """Azar et al. 2023, equation 17, with h = u / beta and tau = beta: (h - 1 / (2 beta))^2, times beta^2."""
    h = u / beta
    return (h - 1 / (2 * beta)) ** 2 * beta**2


def dpo_slope(u: np.ndarray, *, smoothing: float = 0.0) -> np.ndarray:
    """The derivative of `dpo_loss` by u: sigmoid(u) - 1, mixed with that of the other label."""
    sigmoid = np.exp(log_sigmoid(u))
    return (1 - smoothing) * (sigmoid - 1) + smoothing * sigmoid


def prior_preservation(losses: np.ndarray, roles: Sequence[str], weight: float) -> float:
    """Ruiz et al. 2023, equation 2, as a step's mean: mean(instance) + weight * mean(prior)."""
    prior = np.array([role == "prior" for role in roles])
    instance = float(losses[~prior].mean())
    return instance + (weight * float(losses[prior].mean()) if prior.any() else 0.0)
