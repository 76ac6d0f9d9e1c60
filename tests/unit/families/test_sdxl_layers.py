"""The published SDXL's layers by name and shape, against the networks that diffusers and transformers build."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from gesso.adapters import OFT, LoHa, LoKr, LoRA
from gesso.families import lora_names, sdxl_layers
from gesso.families.sdxl import SDXL


def test_the_table_is_the_networks() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        first = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
        second = CLIPTextModel(CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32))
    wanted = lora_names.modules({"unet": unet, "text_encoder": first, "text_encoder_2": second})
    assert sdxl_layers.published() == wanted


def test_counts_of_trained_numbers() -> None:
    """By hand, of one layer each: 320 outputs and 640 inputs, and a 3 x 3 convolution of 320 to 640 channels."""
    linear, kernel = (320, 640), (640, 320, 3, 3)
    spec = LoRA(rank=4, conv_rank=2, targets="all", dora=True)
    names = {"unet.down_blocks.0.conv1": kernel, "unet.down_blocks.0.to_q": linear}
    chosen = {n: spec._choice(n, s) for n, s in names.items()}
    assert spec.size(linear, chosen["unet.down_blocks.0.to_q"]) == 4 * (320 + 640) + 320
    assert spec.size(kernel, chosen["unet.down_blocks.0.conv1"]) == 2 * (640 + 320 * 9) + 640
    four = LoHa(rank=4)._choice("x", linear)
    assert LoHa(rank=4).size(linear, four) == 2 * 4 * (320 + 640)
    # 320 = 16 x 20 and 640 = 20 x 32.
    assert LoKr(rank=4).size(linear, four) == 16 * 20 + 4 * (20 + 32)
    assert LoKr(rank=4, factor=8).size(linear, four) == 8 * 8 + 4 * (40 + 80)
    assert OFT(block_size=32).size(linear, four) == 20 * (32 * 31 // 2)


def test_kohyas_coverage_is_counted() -> None:
    """The layers that sd-scripts adapts by default: 722 of the UNet; 70 blocks of 10, and 11 projections in and out."""
    family = SDXL(base="nothing/is-loaded")
    unet = {n: s for n, s in sdxl_layers.published().items() if n.startswith("unet.")}
    assert len(LoRA(targets="attention-mlp").choose(unet, family)) == 722
