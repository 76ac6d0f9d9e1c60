"""Build the model folder and the image folder that every benchmarked trainer reads.

The model is an ordinary diffusers SDXL folder with random weights: speed does not depend on their values, so nothing
has to be downloaded, and the full-size model can be built too.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import nn
    from transformers import CLIPTextConfig, CLIPTokenizer


@dataclass(frozen=True)
class TextSize:
    """Width and depth of one CLIP text encoder."""

    width: int
    layers: int
    heads: int
    activation: str


@dataclass(frozen=True)
class ModelSize:
    """Widths and depths of an SDXL-shaped model."""

    widths: tuple[int, int, int]
    heads: tuple[int, int, int]
    depths: tuple[int, int, int]
    unet_layers: int
    unet_groups: int
    time_ids: int
    text: tuple[TextSize, TextSize]
    vae_widths: tuple[int, int, int, int]
    vae_layers: int
    vae_groups: int

    @property
    def cross_attention(self) -> int:
        """Width of the text embeddings that the denoiser sees: both encoders side by side."""
        return self.text[0].width + self.text[1].width


SIZES = {
    # All depths of SDXL, a tenth of its widths, rounded to what heads of 8 channels divide. The VAE is rounded down,
    # so that a trainer which encodes each picture at every step is not made to look slower than it is.
    "tenth": ModelSize(
        widths=(32, 64, 128),
        heads=(4, 8, 16),
        depths=(1, 2, 10),
        unet_layers=2,
        unet_groups=8,
        time_ids=24,
        text=(TextSize(80, 12, 10, "quick_gelu"), TextSize(128, 32, 16, "gelu")),
        vae_widths=(12, 24, 48, 48),
        vae_layers=2,
        vae_groups=4,
    ),
    # SDXL itself (but for the token table, which is small).
    "full": ModelSize(
        widths=(320, 640, 1280),
        heads=(5, 10, 20),
        depths=(1, 2, 10),
        unet_layers=2,
        unet_groups=32,
        time_ids=256,
        text=(TextSize(768, 12, 12, "quick_gelu"), TextSize(1280, 32, 20, "gelu")),
        vae_widths=(128, 256, 512, 512),
        vae_layers=2,
        vae_groups=32,
    ),
    # For testing the harness: too small to say anything about speed.
    "smoke": ModelSize(
        widths=(8, 8, 16),
        heads=(1, 1, 2),
        depths=(1, 1, 1),
        unet_layers=1,
        unet_groups=4,
        time_ids=8,
        text=(TextSize(16, 2, 2, "quick_gelu"), TextSize(16, 2, 2, "gelu")),
        vae_widths=(8, 8, 8, 8),
        vae_layers=1,
        vae_groups=4,
    ),
}

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 70), "blue": (40, 70, 200), "white": (235, 235, 235)}
SHAPES = ("circle", "square", "triangle")


def build_model(folder: Path, *, size: ModelSize) -> dict[str, int]:
    """Write an SDXL folder with random weights; returns the number of parameters of each network."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizers = (_tokenizer(EOS), _tokenizer("!"))
    networks: dict[str, nn.Module] = {
        "unet": _unet(size),
        "vae": _vae(size),
        "text_encoder": CLIPTextModel(_text_config(size.text[0], tokenizers[0])),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(size.text[1], tokenizers[1])),
    }
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    pipeline = StableDiffusionXLPipeline(
        **networks, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], scheduler=scheduler
    )
    pipeline.save_pretrained(folder)
    return {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}


def _unet(size: ModelSize) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=size.widths,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=size.unet_layers,
        transformer_layers_per_block=size.depths,
        attention_head_dim=size.heads,  # diffusers reads this field as the number of heads
        norm_num_groups=size.unet_groups,
        cross_attention_dim=size.cross_attention,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=size.time_ids,
        projection_class_embeddings_input_dim=size.text[1].width + 6 * size.time_ids,
    )


def _vae(size: ModelSize) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=1024,
        block_out_channels=size.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=size.vae_layers,
        norm_num_groups=size.vae_groups,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=True,
    )


def _text_config(text: TextSize, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text.width,
        intermediate_size=4 * text.width,
        num_hidden_layers=text.layers,
        num_attention_heads=text.heads,
        projection_dim=text.width,
        hidden_act=text.activation,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _tokenizer(padding: str) -> CLIPTokenizer:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), BOS, EOS]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        bos_token=BOS,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=padding,
        model_max_length=77,
    )


def build_images(folder: Path, *, count: int, side: int) -> None:
    """Paint `count` captioned squares of `side` pixels with a `metadata.jsonl` that both trainers read."""
    import numpy as np
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        colour, ground = sorted(COLOURS)[number % 4], sorted(COLOURS)[(number + 1 + number // 4) % 4]
        shape = SHAPES[number % 3]
        picture = Image.new("RGB", (side, side), COLOURS[ground])
        draw = ImageDraw.Draw(picture)
        box = [side // 4, side // 4, 3 * side // 4, 3 * side // 4]
        if shape == "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            draw.rectangle(box, fill=COLOURS[colour])
        else:
            draw.polygon([(side // 2, box[1]), (box[0], box[3]), (box[2], box[3])], fill=COLOURS[colour])
        # Grain makes the files compress and decode as photographs do, and no two of them equal.
        grain = np.random.default_rng(number).normal(0, 8, (side, side, 3))
        pixels = np.clip(np.asarray(picture) + grain, 0, 255).astype(np.uint8)
        name = f"{number:03d}.png"
        Image.fromarray(pixels).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"a {colour} {shape} on a {ground} ground"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Build both folders and print what the model weighs as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="folder to write the model to; leave out to skip it")
    parser.add_argument("--size", choices=sorted(SIZES), default="tenth")
    parser.add_argument("--images", type=Path, help="folder to write the images to; leave out to skip them")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--side", type=int, default=256)
    arguments = parser.parse_args()
    built: dict[str, object] = {}
    if arguments.model:
        size = SIZES[arguments.size]
        built = {"parameters": build_model(arguments.model, size=size), "size": asdict(size)}
    if arguments.images:
        build_images(arguments.images, count=arguments.count, side=arguments.side)
    print(json.dumps(built))


if __name__ == "__main__":
    main()
