"""LoHa and LoKr, thin over peft; their files are those of LyCORIS."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from gesso.adapters import attached
from gesso.adapters.attached import NAME, AttachedLayers
from gesso.adapters.layered import Choice, Placed, Ranked, Shape, whole
from gesso.core.changes import Change, Hadamard, Kronecker
from gesso.core.seams import Attached, Family, Parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class _Lycoris(Ranked):
    tucker: bool = False
    """Give 3 x 3 convolutions a core of their own (Tucker decomposition), which takes far fewer numbers."""

    def attach(
        self,
        parts: Parts,
        family: Family,
        *,
        seed: int,
        text_encoders: Sequence[int] = (),
        reference: bool = False,  # noqa: ARG002 (the base is under the adapter, so it costs nothing)
    ) -> Attached:
        """Put adapters on the denoiser and on the text encoders with the given indices.

        The networks first behave exactly as before. Raises `UserError` when a target or a pattern means no layer.
        """
        from gesso.adapters.modules import FASTER

        placed = attached.put(self, parts, family, text_encoders, config=self._config, draw=self._draw, seed=seed)
        for one in placed:
            for _, layer in attached.layers(one):
                layer.__class__ = FASTER[type(layer)]
        return _AttachedLycoris(self, placed)

    @abstractmethod
    def _config(self, one: Placed, names: list[str]) -> Any:
        """peft's settings for a network's layers of these names."""

    @abstractmethod
    def _draw(self, role: str, shape: tuple[int, ...], numbers: np.random.Generator) -> NDArray[Any] | None:
        """First values of a tensor by its role; None for zeros."""

    @abstractmethod
    def change(self, layer: Any) -> Change:
        """What a layer in place does to its weight."""

    def _shared(self, one: Placed, names: list[str]) -> dict[str, Any]:
        """peft's settings that both have."""
        usual = Choice(self.rank, self.effective_alpha)
        ranks, alphas = one.patterns(usual)
        return {
            "r": usual.rank,
            "alpha": whole(usual.alpha),
            "rank_dropout": self.rank_dropout,
            "module_dropout": self.module_dropout,
            "use_effective_conv2d": self.tucker,
            "target_modules": names,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        }


class LoHa(_Lycoris):
    """The elementwise product of two low-rank matrices (Hyeon-Woo et al. 2021, arXiv:2108.06098): a rank of r^2."""

    type: Literal["loha"] = "loha"

    def size(self, shape: Shape, choice: Choice) -> int:
        """How many numbers train on a layer."""
        rank, kernel = choice.rank, math.prod(shape[2:])
        if self.tucker and kernel > 1:
            return 2 * rank * (shape[0] + shape[1] + rank * kernel)
        return 2 * rank * (shape[0] + shape[1] * kernel)

    def change(self, layer: Any) -> Hadamard:
        """What a layer in place does to its weight."""
        return Hadamard({r: p.detach() for r, p in attached.roles(layer)}, layer.scaling[NAME])

    def _config(self, one: Placed, names: list[str]) -> Any:
        from peft import LoHaConfig

        return LoHaConfig(**self._shared(one, names))

    def _draw(self, role: str, shape: tuple[int, ...], numbers: np.random.Generator) -> NDArray[Any] | None:
        # As in LyCORIS, but for the 1 / sqrt(r): with it a LoHa learns about as fast as a LoRA, whatever its rank.
        if role == "hada_w2_a":
            return None
        return numbers.standard_normal(shape) * (0.1 if role == "hada_w1_a" else 1 / math.sqrt(shape[0]))


class LoKr(_Lycoris):
    """The Kronecker product of a small matrix and a low-rank one (Yeh et al. 2023, arXiv:2309.14859)."""

    type: Literal["lokr"] = "lokr"
    factor: int = Field(default=-1, ge=-1)
    """Largest size of the small matrix: sizes are split into a factor up to this and the rest. -1: as square as can
    be, which takes the fewest numbers; 4 to 16 hold more."""
    decompose_both: bool = False
    """Make the small matrix low-rank too, where that is smaller."""

    def size(self, shape: Shape, choice: Choice) -> int:
        """How many numbers train on a layer."""
        rank, kernel = choice.rank, math.prod(shape[2:])
        (o1, o2), (i1, i2) = factors(shape[0], self.factor), factors(shape[1], self.factor)
        small = rank * (o1 + i1) if self.decompose_both and rank < max(o1, i1) / 2 else o1 * i1
        if rank >= max(o2, i2) / 2:
            return small + o2 * i2 * kernel
        core = rank * rank * kernel + rank * (o2 + i2)
        return small + (core if self.tucker and kernel > 1 else rank * (o2 + i2 * kernel))

    def change(self, layer: Any) -> Kronecker:
        """What a layer in place does to its weight."""
        return Kronecker({r: p.detach() for r, p in attached.roles(layer)}, layer.scaling[NAME])

    def _config(self, one: Placed, names: list[str]) -> Any:
        from peft import LoKrConfig

        own = {"decompose_factor": self.factor, "decompose_both": self.decompose_both}
        return LoKrConfig(**self._shared(one, names), **own)

    def _draw(self, role: str, shape: tuple[int, ...], numbers: np.random.Generator) -> NDArray[Any] | None:
        if role in ("lokr_w2", "lokr_w2_b"):
            return None
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        return numbers.uniform(-bound, bound, shape)


class _AttachedLycoris(AttachedLayers):
    def __init__(self, spec: _Lycoris, placed: Sequence[Placed]) -> None:
        super().__init__(spec, placed)
        self._lycoris = spec

    @property
    def _kind(self) -> str:
        return str(type(self._lycoris).__name__)

    def _change(self, layer: Any) -> Change:
        return self._lycoris.change(layer)


def factors(size: int, most: int) -> tuple[int, int]:
    """The two factors that LoKr splits a size into: `most` if it divides it, else the most even ones up to it."""
    if most > 0 and size % most == 0:
        return most, size // most
    small, large, limit = 1, size, most if most != -1 else size
    while small < large:
        nearer = next(n for n in range(small + 1, size + 1) if size % n == 0)
        if nearer + size // nearer > small + large or nearer > limit:
            break
        small, large = nearer, size // nearer
    return min(small, large), max(small, large)
