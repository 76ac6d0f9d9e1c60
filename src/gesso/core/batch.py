"""What the loader hands to an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from gesso.core.random import Draws

if TYPE_CHECKING:
    import torch


class Geometry(NamedTuple):
    """How one image was fitted into its bucket, in pixels; SDXL conditions on these six numbers.

    `crop_top` and `crop_left` are measured in the resized picture as the model sees it (after a flip).
    Order and meaning: Podell et al. 2023 (SDXL), section 2.2, `time_ids` in diffusers.
    """

    original_height: int
    original_width: int
    crop_top: int
    crop_left: int
    target_height: int
    target_width: int


@dataclass(frozen=True)
class Batch:
    """Samples of one shape, with every random number that all objectives need already drawn.

    latents  [B, C, h, w] float32, scaled as the denoiser expects
    noise    [B, C, h, w] float32, standard normal
    u        [B] float32 in [0, 1], decides the timestep
    weights  [B] float32, the per-sample loss weight
    geometry one `Geometry` per sample
    text     cached text embeddings, each [B, ...], or None where text encoders are live
    mask     [B, 1, h, w] float32 in [0, 1], where the loss counts, or None where it counts everywhere
    rejected [B, C, h, w] float32, the picture of each pair that was not preferred, in the same crop; None without pairs
    roles    "instance" or "prior" for each sample
    counts   samples of each role in the whole optimiser step, over all its batches and processes
    held_out whether these are validation pictures, at an even grid of u
    """

    latents: torch.Tensor
    noise: torch.Tensor
    u: torch.Tensor
    weights: torch.Tensor
    geometry: tuple[Geometry, ...]
    captions: tuple[str, ...]
    text: dict[str, torch.Tensor] | None
    files: tuple[str, ...]
    draws: Draws
    mask: torch.Tensor | None = None
    rejected: torch.Tensor | None = None
    roles: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    held_out: bool = False

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        # Elsewhere than on CUDA a copy that nobody waits for may be read before it is there.
        soon = str(device).startswith("cuda")
        text = None if self.text is None else {k: v.to(device, non_blocking=soon) for k, v in self.text.items()}
        moved = {k: v.to(device, non_blocking=soon) for k, v in vars(self).items() if k in _TENSORS and v is not None}
        return replace(self, text=text, **moved)


_TENSORS = ("latents", "noise", "u", "weights", "mask", "rejected")
