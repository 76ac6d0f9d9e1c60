"""What an adapter does to the weight of one layer, whatever trained it: the algebra behind merging and exporting.

Weights are [out, in] of linear layers and [out, in, k, k] of convolutions. All results are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Change(Protocol):
    """One layer's change."""

    @property
    def kind(self) -> str:
        """What users call it: LoRA, DoRA, LoHa, LoKr or OFT."""
        ...

    @property
    def moves(self) -> bool:
        """Whether the weight changes at all."""
        ...

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can act on a weight of this shape."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """A copy on a device."""
        ...

    def applied(self, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        """The changed weight; with another strength than 1, the weight and so much of the difference."""
        ...


@dataclass(frozen=True)
class Pair:
    """LoRA: the weight grows by scale * up down, with down [r, in, ...] and up [out, r, ...].

    With `magnitude`, [out], it is DoRA (Liu et al. 2024, arXiv:2402.09353): each output's grown weights are then scaled
    to have that norm.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def kind(self) -> str:
        """LoRA or DoRA."""
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def rank(self) -> int:
        """Width of the matrices."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The strength as files state it: scale * rank."""
        return self.scale * self.rank

    @property
    def moves(self) -> bool:
        """Whether the product is not 0, or there are norms to keep."""
        return self.magnitude is not None or bool(self.up.any() and self.down.any() and self.scale)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether inputs, outputs and kernel are the layer's."""
        return tuple(self.down.shape[1:]) == shape[1:] and self.up.shape[0] == shape[0]

    def to(self, device: torch.device | str) -> Pair:
        """A copy on a device."""
        norms = None if self.magnitude is None else self.magnitude.to(device, copy=True)
        return Pair(self.down.to(device, copy=True), self.up.to(device, copy=True), self.scale, norms)

    def delta(self) -> Tensor:
        """What is added to the layer's weight, float32 in its shape; the norms of DoRA come after it."""
        product = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))
        return product.view(self.up.shape[0], *self.down.shape[1:])

    def applied(self, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        """The grown weight, with DoRA each row scaled to its norm."""
        delta = self.delta()
        if self.magnitude is not None:
            grown = weight.float() + delta
            rows = grown.flatten(1)
            norms = self.magnitude.float().reshape(-1, 1) / rows.norm(dim=1, keepdim=True)
            delta = (rows * norms).view_as(grown) - weight.float()
        return weight.float() + strength * delta


@dataclass(frozen=True)
class Hadamard:
    """LoHa (Hyeon-Woo et al. 2021, arXiv:2108.06098): scale * (w1_a w1_b) * (w2_a w2_b), elementwise.

    w_a [out, r] and w_b [r, in * k * k]; or, with the cores t [r, r, k, k] (Tucker), w_a [r, out] and w_b [r, in].
    """

    tensors: Mapping[str, Tensor]
    """By LyCORIS' names: hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, and perhaps hada_t1, hada_t2."""
    scale: float

    kind = "LoHa"

    @property
    def rank(self) -> int:
        """Width of the matrices."""
        return self.tensors["hada_w1_b"].shape[0]

    @property
    def moves(self) -> bool:
        """Whether no factor is 0."""
        return bool(self.scale) and all(bool(t.any()) for t in self.tensors.values())

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether both products have the weight's shape."""
        return all(_fits(shape, *self._factors(i)) for i in (1, 2))

    def to(self, device: torch.device | str) -> Hadamard:
        """A copy on a device."""
        return Hadamard({name: tensor.to(device, copy=True) for name, tensor in self.tensors.items()}, self.scale)

    def applied(self, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        """The weight and strength times the product."""
        first, second = (_product(*self._factors(i)) for i in (1, 2))
        return weight.float() + strength * self.scale * (first * second).reshape(weight.shape)

    def _factors(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.tensors[f"hada_w{i}_a"], self.tensors[f"hada_w{i}_b"], self.tensors.get(f"hada_t{i}")


@dataclass(frozen=True)
class Kronecker:
    """LoKr (Yeh et al. 2023, arXiv:2309.14859): scale * w1 (x) w2, either factor whole or a product a b.

    w1 [o1, i1], and w2 [o2, i2, ...] or w2_a [o2, r] and w2_b [r, i2 * k * k], where out = o1 o2 and in = i1 i2; with
    the core t2 [r, r, k, k], w2_a is [r, o2] and w2_b [r, i2].
    """

    tensors: Mapping[str, Tensor]
    """By LyCORIS' names: lokr_w1 or lokr_w1_a and lokr_w1_b, lokr_w2 or lokr_w2_a and lokr_w2_b, perhaps lokr_t2."""
    scale: float

    kind = "LoKr"

    @property
    def whole(self) -> bool:
        """Whether both factors are whole; readers of LyCORIS' files then take the scale for 1."""
        return "lokr_w1" in self.tensors and "lokr_w2" in self.tensors

    @property
    def rank(self) -> int | None:
        """Width of the matrices; None where both factors are whole."""
        found = [self.tensors[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in self.tensors]
        return found[0] if found else None

    @property
    def moves(self) -> bool:
        """Whether no factor is 0."""
        return bool(self.scale) and all(bool(t.any()) for t in self.tensors.values())

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the factors' sizes multiply to the weight's."""
        first, second = self._whole_factors()
        outputs, inputs = first.shape[0] * second.shape[0], first.shape[1] * second[0].numel()
        return (outputs, inputs) == (shape[0], prod(shape[1:]))

    def to(self, device: torch.device | str) -> Kronecker:
        """A copy on a device."""
        return Kronecker({name: tensor.to(device, copy=True) for name, tensor in self.tensors.items()}, self.scale)

    def applied(self, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        """The weight and strength times the product."""
        first, second = self._whole_factors()
        if weight.ndim == 4:
            first = first[:, :, None, None]
            second = second.reshape(second.shape[0], -1, *weight.shape[2:])
        grown = strength * self.scale * first.kron(second.contiguous())
        return weight.float() + grown.reshape(weight.shape)

    def _whole_factors(self) -> tuple[Tensor, Tensor]:
        found = []
        for name, core in (("lokr_w1", None), ("lokr_w2", self.tensors.get("lokr_t2"))):
            whole = self.tensors.get(name)
            a, b = f"{name}_a", f"{name}_b"
            found.append(whole.float() if whole is not None else _product(self.tensors[a], self.tensors[b], core))
        return found[0], found[1]


@dataclass(frozen=True)
class Rotation:
    """OFT (Qiu et al. 2023, arXiv:2306.07280) of a linear layer's inputs: weight matrix'."""

    matrix: Tensor
    """[in, in], orthogonal and block-diagonal."""

    kind = "OFT"

    @property
    def moves(self) -> bool:
        """Whether it turns anything."""
        matrix = self.matrix.float()
        return not bool((matrix == matrix.new_zeros(matrix.shape).fill_diagonal_(1)).all())

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether the layer is linear and has so many inputs."""
        return len(shape) == 2 and tuple(self.matrix.shape) == (shape[1], shape[1])

    def to(self, device: torch.device | str) -> Rotation:
        """A copy on a device."""
        return Rotation(self.matrix.to(device, copy=True))

    def applied(self, weight: Tensor, *, strength: float = 1.0) -> Tensor:
        """The weight of the layer that sees turned inputs."""
        turned = weight.float() @ self.matrix.float().t()
        return weight.float() + strength * (turned - weight.float())


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a b, or the Tucker product of a core with them, [out, in, k, k]."""
    if core is None:
        return a.float() @ b.float()
    rank, kernel = core.shape[1], core.shape[2:]
    left = (a.float().t() @ core.float().flatten(1)).view(a.shape[1], rank, -1)  # [out, r, k * k]
    return (b.float().t() @ left).view(a.shape[1], b.shape[1], *kernel)


def _fits(shape: tuple[int, ...], a: Tensor, b: Tensor, core: Tensor | None) -> bool:
    if core is not None:
        return (a.shape[1], b.shape[1], *core.shape[2:]) == shape
    return (a.shape[0], b.shape[1]) == (shape[0], prod(shape[1:]))
