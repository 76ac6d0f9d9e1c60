"""A linear layer plus its low-rank adapter as one autograd function.

Written out, y = x W' + b + s (x A') B' costs eager mode some eight small operators and keeps three intermediates
a layer. Here the low-rank product is added into the base product in place, and only x (shared by the layers that read
it) and the rank-r product are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class LoRALinear(torch.autograd.Function):
    """y = x W' + b + scale (x A') B', with W and b frozen; x is [..., in], A [r, in], B [out, r]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        # On x as it is, not on its rows: another shape may round differently, and B = 0 must give the base exactly.
        y = functional.linear(x, weight, bias)
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ a.to(x.dtype).t()
        y.view(-1, weight.shape[0]).addmm_(inner, b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        rows, inner, weight, a, b = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_inner, grad_b = grad_rows @ b.to(grad.dtype), grad_rows.t() @ inner
        if ctx.scale != 1:
            grad_inner, grad_b = grad_inner.mul_(ctx.scale), grad_b.mul_(ctx.scale)
        grad_a, grad_b = (grad_inner.t() @ rows).to(a.dtype), grad_b.to(b.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_inner, a.to(grad.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None
