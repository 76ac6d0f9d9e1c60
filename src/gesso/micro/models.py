"""SDXL in miniature: the real classes and the real folder layout with very few channels."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from gesso.families import model_folder
from gesso.micro import words


@dataclass(frozen=True)
class Size:
    """How large a micro SDXL is. The defaults keep SDXL's structure (blocks, layers, VAE factor 8) in under 2 MB."""

    unet_channels: tuple[int, ...] = (8, 16, 16)
    unet_layers: int = 2
    unet_transformers: tuple[int, ...] = (1, 2, 2)
    """Transformer layers of each block; the first block has no attention, as in SDXL."""
    unet_heads: tuple[int, ...] = (1, 2, 2)
    time_channels: int = 8
    """Channels of each of the six size and crop numbers."""
    vae_channels: tuple[int, ...] = (8, 8, 16, 16)
    """One more block than halvings: four give a factor of 8."""
    vae_layers: int = 1
    vae_attention: bool = True
    vae_scale: float = 0.13025
    """Scaling factor that gives the latents unit deviation."""
    text_widths: tuple[int, int] = (16, 24)
    text_layers: tuple[int, int] = (2, 2)
    text_heads: int = 2
    norm_groups: int = 4
    resolution: int = 64
    """The default picture size in pixels."""
    zeros_for_empty: bool = True
    """SDXL 1.0's pipeline takes zeros for an empty negative prompt; off, the empty text is encoded like any other."""


MICRO = Size(
    unet_channels=(48, 96, 128),
    unet_layers=1,
    unet_transformers=(1, 1, 1),
    unet_heads=(1, 3, 4),
    time_channels=32,
    vae_channels=(24, 48, 64),
    vae_layers=1,
    vae_attention=False,
    text_widths=(64, 64),
    text_layers=(2, 2),
    norm_groups=8,
    resolution=64,
    zeros_for_empty=False,
)
"""The `micro:sdxl` that the package ships: 64-pixel pictures, latents of 16 by 16."""


SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
}
"""SDXL 1.0's noise schedule."""


@dataclass
class Networks:
    """The four networks of a micro SDXL."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection


def build_sdxl(folder: Path, *, seed: int = 0, size: Size | None = None) -> Path:
    """Write a micro SDXL with random weights as a diffusers folder, and return the folder.

    The same seed and size give the same bytes. torch's global generator is left as it was.
    """
    size = size or Size()
    return save(folder, networks(size, seed=seed), zeros_for_empty=size.zeros_for_empty)


def networks(size: Size, *, seed: int) -> Networks:
    """Freshly initialised networks, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Networks(
            unet=_unet(size).eval(),
            vae=_vae(size).eval(),
            text_encoder=CLIPTextModel(_text_config(size, 0, activation="quick_gelu")).eval(),
            text_encoder_2=CLIPTextModelWithProjection(_text_config(size, 1, activation="gelu")).eval(),
        )


def autoencoder(size: Size, *, seed: int) -> AutoencoderKL:
    """The VAE alone with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _vae(size).eval()


def clip(*, seed: int) -> CLIPModel:
    """A CLIP for 64-pixel pictures with random weights: 1.5 million parameters, embeddings of width 64."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=64,
    )
    text = dataclasses.replace(MICRO, text_widths=(128, 128), text_layers=(3, 3), text_heads=4)
    config = CLIPConfig(
        text_config=_text_config(text, 0, activation="quick_gelu").to_dict() | {"projection_dim": 64},
        vision_config=vision.to_dict(),
        projection_dim=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPModel(config).eval()


def identity(*, seed: int) -> CLIPVisionModelWithProjection:
    """An encoder of 64-pixel pictures of people with random weights; embeddings [B, 64]."""
    config = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
        projection_dim=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIPVisionModelWithProjection(config).eval()


def save_clip_files(folder: Path) -> None:
    """Write what belongs beside a micro CLIP's weights: tokenizer and picture settings."""
    words.write(folder, pad=words.END)
    save_image_processor(folder)


def save_image_processor(folder: Path) -> None:
    """Write the settings by which `CLIPImageProcessor` prepares pictures for a micro CLIP or identity encoder."""
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": 64, "width": 64},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save(folder: Path, parts: Networks, *, zeros_for_empty: bool = True) -> Path:
    """Write networks, tokenizers and scheduler as the folder that `StableDiffusionXLPipeline.from_pretrained` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    with model_folder.without_bars():
        parts.unet.save_pretrained(folder / "unet")
        parts.vae.save_pretrained(folder / "vae")
        parts.text_encoder.save_pretrained(folder / "text_encoder")
        parts.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    words.write(folder / "tokenizer", pad=words.END)
    words.write(folder / "tokenizer_2", pad="!")
    EulerDiscreteScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": diffusers.__version__,
        "force_zeros_for_empty_prompt": zeros_for_empty,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def _unet(size: Size) -> UNet2DConditionModel:
    blocks = len(size.unet_channels)
    return UNet2DConditionModel(
        sample_size=size.resolution // vae_factor(size),
        in_channels=4,
        out_channels=4,
        block_out_channels=size.unet_channels,
        layers_per_block=size.unet_layers,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (blocks - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (blocks - 1), "UpBlock2D"),
        transformer_layers_per_block=size.unet_transformers,
        attention_head_dim=size.unet_heads,
        cross_attention_dim=sum(size.text_widths),
        use_linear_projection=True,
        norm_num_groups=size.norm_groups,
        addition_embed_type="text_time",
        addition_time_embed_dim=size.time_channels,
        projection_class_embeddings_input_dim=size.text_widths[1] + 6 * size.time_channels,
    )


def _vae(size: Size) -> AutoencoderKL:
    blocks = len(size.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=size.vae_channels,
        layers_per_block=size.vae_layers,
        latent_channels=4,
        norm_num_groups=size.norm_groups,
        sample_size=size.resolution,
        scaling_factor=size.vae_scale,
        mid_block_add_attention=size.vae_attention,
        force_upcast=False,
    )


def vae_factor(size: Size) -> int:
    """Pixels per latent cell along one side."""
    return 2 ** (len(size.vae_channels) - 1)


def _text_config(size: Size, which: int, *, activation: str) -> Any:
    vocabulary = words.vocabulary(words.COMMON)
    width = size.text_widths[which]
    return CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=size.text_layers[which],
        num_attention_heads=size.text_heads,
        max_position_embeddings=words.LENGTH,
        hidden_act=activation,
        bos_token_id=vocabulary[words.START],
        eos_token_id=vocabulary[words.END],
        pad_token_id=vocabulary[words.END] if which == 0 else vocabulary["!"],
    )
