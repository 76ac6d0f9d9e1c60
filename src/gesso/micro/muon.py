"""The optimiser of the recipe: Muon for matrices and convolutions, AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes each update orthogonal. On these small
networks it needs about half the pictures that AdamW needs, and pictures are what costs time on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

_POLYNOMIAL = (3.4445, -4.7750, 2.0315)
"""Quintic whose iteration pushes all singular values towards 1."""


def orthogonal(matrix: Tensor, *, iterations: int = 5) -> Tensor:
    """The matrix with its singular values moved to about 1 (between 0.7 and 1.2), [m, n]."""
    a, b, c = _POLYNOMIAL
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon:
    """Momentum, made orthogonal per tensor; a convolution counts as a matrix [out, in x k x k]."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, momentum: float = 0.95) -> None:
        self._parameters = list(parameters)
        self._momentum = momentum
        self._means = [torch.zeros_like(p) for p in self._parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], *, rate: float) -> None:
        """One update with one gradient for each parameter."""
        for parameter, mean, gradient in zip(self._parameters, self._means, gradients, strict=True):
            mean.lerp_(gradient, 1 - self._momentum)
            update = gradient.lerp(mean, self._momentum).flatten(1)
            scale = math.sqrt(max(1.0, update.shape[0] / update.shape[1]))
            parameter.add_(orthogonal(update).reshape(parameter.shape), alpha=-rate * scale)


class Optimizer:
    """Both together, with linear warm-up, cosine decay, and an average of the weights.

    `matrices` go to Muon at 5 times the rate, `others` to AdamW.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], others: Iterable[nn.Parameter], *, rate: float, steps: int
    ) -> None:
        self._matrices, self._others = list(matrices), list(others)
        self._muon = Muon(self._matrices)
        self._adam = torch.optim.AdamW(self._others, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
        self._rate, self._steps, self._step = rate, steps, 0
        self.parameters = [*self._matrices, *self._others]
        self._average = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Clip, update and average; `gradients` are in the order of `parameters`."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
        torch._foreach_mul_(list(gradients), torch.clamp(1 / (norm + 1e-6), max=1.0))
        rate = self._rate * self._factor()
        self._muon.step(gradients[: len(self._matrices)], rate=5 * rate)
        for parameter, gradient in zip(self._others, gradients[len(self._matrices) :], strict=True):
            parameter.grad = gradient
        self._adam.param_groups[0]["lr"] = rate
        self._adam.step()
        self._step += 1
        keep = min(0.995, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(self._average, [p.detach() for p in self.parameters], 1 - keep)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averaged weights into the networks."""
        for parameter, average in zip(self.parameters, self._average, strict=True):
            parameter.copy_(average)
            parameter.grad = None

    def _factor(self) -> float:
        warmup = min(1.0, (self._step + 1) / 30)
        return warmup * max(0.5 * (1 + math.cos(math.pi * self._step / self._steps)), 0.02)
