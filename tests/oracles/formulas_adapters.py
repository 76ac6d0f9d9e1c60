"""What adapters do to a weight, written from the papers in float64.

Like `formulas`, nothing here imports the product, torch, diffusers or peft. Weights are [out, in] or [out, in, k, k].
"""

from __future__ import annotations

import numpy as np


def wide(matrix: np.ndarray) -> np.ndarray:
    """float64, as [first axis, all others]."""
    return matrix.astype(np.float64).reshape(len(matrix), -1)


def dora(weight: np.ndarray, change: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Liu et al. 2024, equation 5: m (W + dW) / ||W + dW||, one norm and one m for each output."""
    grown = weight.astype(np.float64) + change
    norm = np.sqrt((wide(grown) ** 2).sum(axis=1))
    return grown * (magnitude.astype(np.float64).ravel() / norm).reshape(-1, *([1] * (weight.ndim - 1)))


def loha(factors: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """Hyeon-Woo et al. 2021, equation 3: (w1_a w1_b) * (w2_a w2_b), elementwise; [out, in x ...]."""
    first, second = (wide(factors[f"hada_w{i}_a"]) @ wide(factors[f"hada_w{i}_b"]) for i in (1, 2))
    return scale * first * second


def lokr(factors: dict[str, np.ndarray], scale: float) -> np.ndarray:
    """Yeh et al. 2023, equation 4: the Kronecker product of w1 and w2, each whole or the product of two; [out, in]."""

    def whole(name: str) -> np.ndarray:
        if name in factors:
            return wide(factors[name])
        return wide(factors[f"{name}_a"]) @ wide(factors[f"{name}_b"])

    first, second = whole("lokr_w1"), whole("lokr_w2")
    rows, columns = (first.shape[i] * second.shape[i] for i in (0, 1))
    blocks = first[:, None, :, None] * second[None, :, None, :]
    return scale * blocks.reshape(rows, columns)


def cayley(angles: np.ndarray, size: int) -> np.ndarray:
    """Qiu et al. 2023, section 3.3: (I + Q)(I - Q)^-1 of the skew Q with the upper triangle `angles`."""
    skew = np.zeros((size, size))
    skew[np.triu_indices(size, 1)] = angles.astype(np.float64)
    skew -= skew.T
    return (np.eye(size) + skew) @ np.linalg.inv(np.eye(size) - skew)
