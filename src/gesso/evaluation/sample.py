"""Draw pictures with a diffusers pipeline, leaving the networks and the random state as they were.

A picture is a function of its shot alone: the same prompt, seed and settings in plain diffusers give the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gesso.errors import NumericError, UserError
from gesso.evaluation.models import attached, open_pipeline, trained
from gesso.evaluation.pictures import grid, read_settings, save_png, unused

__all__ = [
    "Embeddings",
    "Shot",
    "attached",
    "draw",
    "encode",
    "grid",
    "open_pipeline",
    "read_settings",
    "save_png",
    "settings",
    "trained",
    "unused",
]

Embeddings = dict[str, "Tensor | None"]
"""One shot's encoded prompts under the names that the pipeline takes them by, on the CPU."""

_EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass(frozen=True)
class Shot:
    """One picture to draw. An empty negative prompt means none, as when a pipeline is called without one."""

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.0
    width: int = 1024
    height: int = 1024


def encode(pipeline: Any, shots: Sequence[Shot]) -> list[Embeddings]:
    """Encode the shots' prompts, so that `draw` can do without the text encoders."""
    found = []
    with _untouched(pipeline), torch.no_grad():
        for shot in shots:
            encoded = pipeline.encode_prompt(
                prompt=shot.prompt,
                negative_prompt=shot.negative or None,
                do_classifier_free_guidance=shot.guidance > 1,
                num_images_per_prompt=1,
            )
            on_cpu = [None if tensor is None else tensor.cpu() for tensor in encoded]
            found.append(dict(zip(_EMBEDDINGS, on_cpu, strict=True)))
    return found


def draw(
    pipeline: Any,
    shots: Sequence[Shot],
    *,
    embeddings: Sequence[Embeddings] | None = None,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draw the shots through the pipeline's own `__call__`; `progress` hears (done, total).

    Up to `batch` of them that follow one another and differ only in prompt and seed are drawn at once. Noise comes from
    a CPU generator seeded per picture. Raises `UserError` for a size that the model cannot have and `NumericError` for
    a picture that is not finite or is one flat colour.
    """
    for shot in shots:
        if shot.width % 8 or shot.height % 8 or min(shot.width, shot.height) < 8:
            raise UserError(
                f"a picture of {shot.width} x {shot.height} pixels cannot be drawn", fix="use multiples of 8"
            )
    pictures: list[Image.Image] = []
    pipeline.set_progress_bar_config(disable=True)
    with _untouched(pipeline):
        # Training parks the VAE in main memory between previews.
        pipeline.vae.to(pipeline.unet.device)
        while len(pictures) < len(shots):
            done = len(pictures)
            part = _alike(shots[done : done + batch])
            encoded = None if embeddings is None else embeddings[done : done + len(part)]
            pictures += _draw(pipeline, part, encoded)
            if progress is not None:
                progress(len(pictures), len(shots))
    return pictures


def settings(shot: Shot, *, pipeline: Any, model: str) -> dict[str, Any]:
    """What a picture's metadata says of how it was made."""
    return {**vars(shot), "sampler": type(pipeline.scheduler).__name__, "model": model}


def _alike(shots: Sequence[Shot]) -> list[Shot]:
    """The first of them, and those right after it that differ from it only in prompt and seed."""

    def rest(shot: Shot) -> tuple[object, ...]:
        return shot.negative, shot.steps, shot.guidance, shot.width, shot.height

    return list(takewhile(lambda shot: rest(shot) == rest(shots[0]), shots))


def _draw(pipeline: Any, shots: Sequence[Shot], embeddings: Sequence[Embeddings] | None) -> list[Image.Image]:
    """Shots that differ in prompt and seed alone, at once; each is decoded for itself, which takes less memory."""
    first = shots[0]
    latents = pipeline(
        **(_prompts(shots) if embeddings is None else _joined(embeddings)),
        num_inference_steps=first.steps,
        guidance_scale=first.guidance,
        width=first.width,
        height=first.height,
        generator=[torch.Generator("cpu").manual_seed(shot.seed) for shot in shots],
        output_type="latent",
    ).images
    return [_picture(pipeline, shot, latents[i : i + 1]) for i, shot in enumerate(shots)]


def _prompts(shots: Sequence[Shot]) -> dict[str, Any]:
    negative = [shot.negative for shot in shots]
    return {"prompt": [shot.prompt for shot in shots], "negative_prompt": negative if any(negative) else None}


def _joined(embeddings: Sequence[Embeddings]) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    for name in embeddings[0]:
        tensors = [tensor for one in embeddings if (tensor := one[name]) is not None]
        found[name] = torch.cat(tensors) if tensors else None
    return found


def _picture(pipeline: Any, shot: Shot, latents: Tensor) -> Image.Image:
    """One picture from its latents [1, C, h, w]."""
    if not torch.isfinite(latents).all():
        raise NumericError(
            f"the denoiser's answer is not finite (seed {shot.seed}, '{shot.prompt}')",
            where="sampling",
            fix="draw in bf16 or fp32; if it stays so, the weights are damaged: use an earlier checkpoint",
        )
    pixels = _decode(pipeline, latents)
    if not np.isfinite(pixels).all():
        raise NumericError(
            f"the VAE's answer is not finite (seed {shot.seed}, '{shot.prompt}')",
            where="sampling",
            fix="use a VAE that is safe in fp16 (model.vae: madebyollin/sdxl-vae-fp16-fix), or bf16 or fp32",
        )
    picture: Image.Image = pipeline.image_processor.numpy_to_pil(pixels)[0]
    if all(low == high for low, high in picture.getextrema()):  # type: ignore[misc]
        raise NumericError(
            f"the picture is one flat colour, {picture.getpixel((0, 0))} (seed {shot.seed}, '{shot.prompt}')",
            where="sampling",
            fix="draw in bf16 or fp32; if it stays so, the weights are damaged: use an earlier checkpoint",
        )
    return picture


@torch.no_grad()
def _decode(pipeline: Any, latents: Tensor) -> np.ndarray:
    """Latents [1, C, h, w] -> pixels [1, H, W, 3] in [0, 1], as the pipeline does it.

    Done here because the pipeline fails where the VAE is float32 and the denoiser is not, which is the safe way.
    """
    vae = pipeline.vae
    if vae.dtype == torch.float16 and vae.config.force_upcast:
        vae.to(torch.float32)
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is not None and std is not None:
        mean, std = (torch.tensor(v).view(1, -1, 1, 1).to(latents) for v in (mean, std))
        latents = latents * std + mean
    image = vae.decode(latents, return_dict=False)[0]
    if pipeline.watermark is not None:
        image = pipeline.watermark.apply_watermark(image)
    pixels: np.ndarray = pipeline.image_processor.postprocess(image, output_type="np")
    return pixels


@contextmanager
def _untouched(pipeline: Any) -> Iterator[None]:
    """Inside, every network is in eval mode; after, also after an error, each is exactly as it was found.

    That is: the mode of every module, and the dtype, device and `requires_grad` of every tensor.
    """
    networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    modules = [module for network in networks for module in network.modules()]
    modes = [(module, module.training) for module in modules]
    parameters = [(p, p.requires_grad, p.dtype, p.device) for network in networks for p in network.parameters()]
    buffers = [(module, *named) for module in modules for named in module.named_buffers(recurse=False)]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wants_gradient, dtype, device in parameters:
            if parameter.dtype != dtype or parameter.device != device:
                parameter.data = parameter.data.to(device, dtype)
            parameter.requires_grad_(wants_gradient)
        for module, name, buffer in buffers:
            setattr(module, name, buffer)
