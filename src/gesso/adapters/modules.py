"""The layers that peft puts in place, made fast and given the kinds of dropout that peft lacks. Imports torch."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import loha, lokr, lora
from torch import Tensor, nn
from torch.nn import functional

from gesso.adapters.attached import NAME
from gesso.core.fused import LoRALinear


class LoRALayer:
    """peft's LoRA layer; its plain case (one active adapter, nothing merged, no DoRA) in the dtype of the input.

    Rank dropout zeroes whole rows of A x, drawn for each sample, and scales the rest up; module dropout skips the
    adapter of a layer in one pass. Both draw from torch's generator, which the loop seeds by step and batch.
    """

    rank_dropout = 0.0
    module_dropout = 0.0

    def _is_left_out(self: Any) -> bool:
        return bool(self.training and self.module_dropout and torch.rand(()) < self.module_dropout)

    def _is_plain(self: Any) -> bool:
        special = self.disable_adapters or self.merged or self.lora_variant
        return not special and self.active_adapters == [NAME]

    def _drop_ranks(self: Any, inner: Tensor, *, dim: int) -> Tensor:
        """Rows of A x [B, ..., r, ...] with the ranks in `dim`, some of them 0."""
        if not (self.training and self.rank_dropout):
            return inner
        shape = [1] * inner.ndim
        shape[0], shape[dim] = inner.shape[0], inner.shape[dim]
        kept = torch.rand(shape, device=inner.device) >= self.rank_dropout
        return inner * (kept / (1 - self.rank_dropout)).to(inner.dtype)


class Linear(LoRALayer, lora.Linear):
    """A linear layer with LoRA."""

    def forward(self, x: Tensor) -> Tensor:
        """Without dropout in one autograd function."""
        if not self._is_plain():
            left_out = not self.disable_adapters and self._is_left_out()
            return self.base_layer(x) if left_out else super().forward(x)
        if self._is_left_out():
            return self.base_layer(x)
        a, b, base, scale = self.lora_A[NAME].weight, self.lora_B[NAME].weight, self.base_layer, self.scaling[NAME]
        dropout = self.lora_dropout[NAME]
        if not (self.training and (self.rank_dropout or not isinstance(dropout, nn.Identity))):
            return LoRALinear.apply(x, base.weight, base.bias, a, b, scale)
        inner = functional.linear(dropout(x), a.to(x.dtype))
        return base(x) + scale * functional.linear(self._drop_ranks(inner, dim=inner.ndim - 1), b.to(x.dtype))


class Conv2d(LoRALayer, lora.Conv2d):
    """A convolution with LoRA: A has its kernel, B is 1 x 1."""

    def forward(self, x: Tensor) -> Tensor:
        """The base's answer and the adapter's."""
        if not self._is_plain():
            left_out = not self.disable_adapters and self._is_left_out()
            return self.base_layer(x) if left_out else super().forward(x)
        base = self.base_layer
        if self._is_left_out():
            return base(x)
        a, b = self.lora_A[NAME].weight.to(x.dtype), self.lora_B[NAME].weight.to(x.dtype)
        inner = functional.conv2d(
            self.lora_dropout[NAME](x), a, None, base.stride, base.padding, base.dilation, base.groups
        )
        return base(x) + self.scaling[NAME] * functional.conv2d(self._drop_ranks(inner, dim=1), b)


class _Narrow:
    """A layer whose change is made in float32 and used in the dtype of the base, which is many times faster."""

    def get_delta_weight(self: Any, adapter_name: str, *, apply_rank_dropout: bool = False) -> Tensor:
        """The change of the weight, in the base's dtype."""
        delta: Tensor = super().get_delta_weight(  # type: ignore[misc]
            adapter_name, apply_rank_dropout=apply_rank_dropout
        )
        return delta.to(self.base_layer.weight.dtype)


class LoHaLinear(_Narrow, loha.Linear):
    """A linear layer with LoHa."""


class LoHaConv2d(_Narrow, loha.Conv2d):
    """A convolution with LoHa."""


class LoKrLinear(_Narrow, lokr.Linear):
    """A linear layer with LoKr."""


class LoKrConv2d(_Narrow, lokr.Conv2d):
    """A convolution with LoKr."""


FASTER: dict[type, type] = {
    loha.Linear: LoHaLinear,
    loha.Conv2d: LoHaConv2d,
    lokr.Linear: LoKrLinear,
    lokr.Conv2d: LoKrConv2d,
}
"""peft takes classes of its users for LoRA alone; the layers of the others are turned into these afterwards."""
