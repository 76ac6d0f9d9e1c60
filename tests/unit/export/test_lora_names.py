"""kohya's names, checked against the real SDXL's layout and against layouts SDXL does not have."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from gesso.errors import UserError
from gesso.families import lora_names, sdxl_layers


@pytest.fixture(scope="module")
def names() -> dict[str, str]:
    return lora_names.kohya(sdxl_layers.published())


def test_sdxl_has_kohyas_722_72_and_192_modules(names: dict[str, str]) -> None:
    transformers = [flat for name, flat in names.items() if name.startswith("unet.") and ".attentions." in name]
    assert len(set(transformers)) == 722
    first = [f for f in names.values() if f.startswith("lora_te1_") and ("_self_attn_" in f or "_mlp_" in f)]
    second = [f for f in names.values() if f.startswith("lora_te2_") and ("_self_attn_" in f or "_mlp_" in f)]
    assert len(set(first)) == 72
    assert len(set(second)) == 192
    assert len(set(names.values())) == len(names)


def test_sdxl_attention_sits_where_kohya_has_it(names: dict[str, str]) -> None:
    # (place in SGM's numbering, transformer layers there): 70 layers of 10 modules, 11 times proj_in and proj_out.
    wanted = {f"input_blocks_{i}_1": 2 for i in (4, 5)} | {f"input_blocks_{i}_1": 10 for i in (7, 8)}
    wanted |= {"middle_block_1": 10} | {f"output_blocks_{i}_1": 10 for i in (0, 1, 2)}
    wanted |= {f"output_blocks_{i}_1": 2 for i in (3, 4, 5)}
    leaves = [f"attn{a}_to_{x}" for a in (1, 2) for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    expected = {f"lora_unet_{place}_{end}" for place in wanted for end in ("proj_in", "proj_out")}
    expected |= {
        f"lora_unet_{place}_transformer_blocks_{layer}_{leaf}"
        for place, layers in wanted.items()
        for layer in range(layers)
        for leaf in leaves
    }
    assert {flat for name, flat in names.items() if ".attentions." in name} == expected


@pytest.mark.parametrize(
    ("name", "flat"),
    [
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        ("unet.down_blocks.0.downsamplers.0.conv", "lora_unet_input_blocks_3_0_op"),
        ("unet.down_blocks.1.downsamplers.0.conv", "lora_unet_input_blocks_6_0_op"),
        ("unet.down_blocks.1.resnets.0.conv_shortcut", "lora_unet_input_blocks_4_0_skip_connection"),
        ("unet.down_blocks.2.resnets.1.conv1", "lora_unet_input_blocks_8_0_in_layers_2"),
        ("unet.mid_block.resnets.1.time_emb_proj", "lora_unet_middle_block_2_emb_layers_1"),
        ("unet.up_blocks.2.resnets.2.conv2", "lora_unet_output_blocks_8_0_out_layers_3"),
        ("unet.up_blocks.0.upsamplers.0.conv", "lora_unet_output_blocks_2_2_conv"),
        ("unet.up_blocks.1.upsamplers.0.conv", "lora_unet_output_blocks_5_2_conv"),
        ("unet.conv_in", "lora_unet_input_blocks_0_0"),
        ("unet.conv_out", "lora_unet_out_2"),
        ("unet.time_embedding.linear_2", "lora_unet_time_embed_2"),
        ("unet.add_embedding.linear_1", "lora_unet_label_emb_0_0"),
        (
            "text_encoder.text_model.encoder.layers.11.self_attn.out_proj",
            "lora_te1_text_model_encoder_layers_11_self_attn_out_proj",
        ),
        ("text_encoder_2.text_model.encoder.layers.31.mlp.fc1", "lora_te2_text_model_encoder_layers_31_mlp_fc1"),
    ],
)
def test_sdxl_spot_names(names: dict[str, str], name: str, flat: str) -> None:
    assert names[name] == flat


def test_a_layout_that_is_not_sdxls() -> None:
    """SD 1.5's blocks: three layers with attention and one without, four halvings, an upsampler after no attention."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16, 16, 16), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2
        )
    table = lora_names.sgm([n.removeprefix("unet.") for n in lora_names.modules({"unet": unet})])
    assert table["down_blocks.0.attentions.0.proj_in"] == "input_blocks.1.1.proj_in"
    assert table["down_blocks.2.attentions.1.proj_in"] == "input_blocks.8.1.proj_in"
    assert table["down_blocks.3.resnets.1.conv1"] == "input_blocks.11.0.in_layers.2"
    assert table["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert table["up_blocks.1.upsamplers.0.conv"] == "output_blocks.5.2.conv"
    assert table["up_blocks.3.attentions.2.proj_out"] == "output_blocks.11.1.proj_out"
    assert len(set(table.values())) == len(table)


def test_one_layer_blocks_are_numbered_on() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=2,
        )
    table = lora_names.sgm([n.removeprefix("unet.") for n in lora_names.modules({"unet": unet})])
    assert table["down_blocks.0.downsamplers.0.conv"] == "input_blocks.2.0.op"
    assert table["down_blocks.1.attentions.0.proj_in"] == "input_blocks.3.1.proj_in"
    assert table["up_blocks.0.attentions.1.proj_in"] == "output_blocks.1.1.proj_in"
    assert table["up_blocks.0.upsamplers.0.conv"] == "output_blocks.1.2.conv"
    assert table["up_blocks.1.resnets.0.conv1"] == "output_blocks.2.0.in_layers.2"


def test_a_layer_without_a_counterpart_is_refused() -> None:
    with pytest.raises(UserError, match="encoder_hid_proj has no name in kohya's format"):
        lora_names.sgm(["conv_in", "encoder_hid_proj"])
