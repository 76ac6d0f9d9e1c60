"""OFT, thin over peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from gesso.adapters import attached
from gesso.adapters.attached import NAME, AttachedLayers
from gesso.adapters.layered import Choice, Layered, Placed, Shape
from gesso.core.changes import Rotation
from gesso.core.seams import Attached, Family, Parts
from gesso.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class OFT(Layered):
    """Rotations of the inputs of linear layers, block by block (Qiu et al. 2023, arXiv:2306.07280).

    The angles between a layer's weights stay as they are, so it forgets little. Its files are for PEFT alone; export it
    merged for other programs.
    """

    type: Literal["oft"] = "oft"
    block_size: int = Field(default=32, ge=2)
    """Side of the rotated blocks; has to divide the number of inputs of every adapted layer. Larger can hold more."""
    share: bool = False
    """One rotation for all blocks of a layer."""
    exact: bool = False
    """Exact rotations, by a matrix inverse. Off: its series up to the fourth power, which is faster."""

    def summary(self) -> dict[str, str]:
        """What a model card says of it."""
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        return {"block size": str(self.block_size), "layers": targets}

    def choose(self, layers: Mapping[str, Shape], family: Family) -> dict[str, Choice]:
        """Those of the given layers that are adapted; see `Layered.choose`."""
        chosen = super().choose(layers, family)
        if odd := [name for name in chosen if len(layers[name]) == 4]:
            what = f"OFT is for linear layers, and {odd[0]} is a convolution"
            raise UserError(what, where="adapter.targets", fix="write all-linear, or names of linear layers")
        if odd := [name for name in chosen if layers[name][1] % self.block_size]:
            what = f"{odd[0]} has {layers[odd[0]][1]} inputs, which is no multiple of {self.block_size}"
            raise UserError(what, where="adapter.block_size", fix="choose a number that divides it")
        return chosen

    def size(self, shape: Shape, choice: Choice) -> int:  # noqa: ARG002
        """How many numbers train on a layer."""
        blocks = 1 if self.share else shape[1] // self.block_size
        return blocks * self.block_size * (self.block_size - 1) // 2

    def attach(
        self,
        parts: Parts,
        family: Family,
        *,
        seed: int,
        text_encoders: Sequence[int] = (),
        reference: bool = False,  # noqa: ARG002 (the base is under the adapter, so it costs nothing)
    ) -> Attached:
        """Put rotations on the denoiser and on the text encoders with the given indices.

        They start at none, so the networks first behave as before, but for rounding where a layer's input lay
        transposed in memory. Raises `UserError` when a target or a pattern means no layer, or a layer cannot be cut
        into such blocks.
        """
        placed = attached.put(self, parts, family, text_encoders, config=self._config, draw=_draw, seed=seed)
        return AttachedOFT(self, placed)

    def _choice(self, name: str, shape: Shape) -> Choice:  # noqa: ARG002
        return Choice(1, 1.0)

    def _config(self, one: Placed, names: list[str]) -> Any:  # noqa: ARG002
        from peft import OFTConfig

        return OFTConfig(
            oft_block_size=self.block_size,
            block_share=self.share,
            use_cayley_neumann=not self.exact,
            target_modules=names,
        )


def _draw(role: str, shape: tuple[int, ...], numbers: np.random.Generator) -> NDArray[Any] | None:  # noqa: ARG001
    """All rotations start at none."""
    return None


class AttachedOFT(AttachedLayers):
    """Rotations in place on the layers of a denoiser, and perhaps of text encoders."""

    @property
    def _kind(self) -> str:
        return "OFT"

    def _change(self, layer: Any) -> Rotation:
        import torch

        with torch.no_grad():
            return Rotation(layer.oft_R[NAME].get_weight())
