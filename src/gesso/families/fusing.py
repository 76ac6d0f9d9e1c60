"""LoRAs that are merged into a model whenever it is loaded, so that all else takes the sum for the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pydantic import Field

from gesso.core import resolve
from gesso.core.seams import Spec
from gesso.errors import UserError
from gesso.families import lora_file, lora_names

if TYPE_CHECKING:
    from pathlib import Path

_STARTS = {
    "unet": ("unet.", "lora_unet_", "lycoris_"),
    "text_encoder": ("text_encoder.", "lora_te_", "lora_te1_"),
    "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
}


class Fused(Spec):
    """A LoRA (DoRA, LoHa, LoKr) that belongs to the base model of a run."""

    path: str
    """Its file or folder, in diffusers' or kohya's format, or a hub id."""
    weight: float = Field(default=1.0, ge=-10, le=10)
    """Strength."""


def merge(fused: Sequence[Fused], networks: Mapping[str, Any]) -> None:
    """Merge them, one after another, into the networks that are loaded, by the names of their parts.

    Raises `UserError` for a file that does not fit the model layer by layer.
    """
    starts = tuple(start for part in _STARTS if part not in networks for start in _STARTS[part])
    for one in fused:
        file = lora_file.read(_place(one))
        if file.words:
            what = "it holds vectors of new words, which cannot be merged"
            raise UserError(what, where=str(file.path), fix="use a LoRA without them")
        here = replace(file, layers={k: c for k, c in file.layers.items() if not k.startswith(starts)})
        lora_names.merge(networks, here.match(lora_names.modules(networks)), strength=one.weight)


def fingerprint(fused: Sequence[Fused]) -> str:
    """What the contents and strengths of these files come to, to be put behind the hash of a model's own; maybe ""."""
    if not fused:
        return ""
    return "".join(f" + {one.weight:g} {' '.join(map(resolve.file_sha256, _files(one)))}" for one in fused)


def _files(one: Fused) -> list[Path]:
    return lora_file.sources(_place(one))


def _place(one: Fused) -> Path:
    return lora_file.fetched(one.path, key="model.fuse")
