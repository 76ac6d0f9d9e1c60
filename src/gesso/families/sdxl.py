"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gesso.core.seams import Spec


class SDXL(Spec):
    """Stable Diffusion XL."""

    family: Literal["sdxl"] = "sdxl"
    base: str = "stabilityai/stable-diffusion-xl-base-1.0"
    """The model to start from: a diffusers folder, a hub id, or a single .safetensors checkpoint."""
    revision: str | None = None
    """Commit or branch of a hub model."""
    variant: str | None = None
    """File variant of a hub model or folder, such as fp16."""
    vae: str | None = None
    """Another VAE: folder, hub id or .safetensors. Empty: the model's own, except that the public SDXL base
    gets the fp16-safe one (madebyollin/sdxl-vae-fp16-fix)."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the denoiser predicts. Empty: read from the model."""
    long_prompts: Literal["truncate", "chunk"] = "truncate"
    """Prompts over 77 tokens: cut (and counted), or encoded in chunks of 75 that are joined."""
    max_chunks: int = Field(default=3, ge=1)
    """Chunks of 75 tokens that `chunk` pads every prompt to; longer prompts are cut (and counted)."""
