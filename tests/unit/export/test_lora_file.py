"""LoRA files of any origin give the same layers and strengths; what cannot be used is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gesso.errors import UserError
from gesso.export.lora import read
from gesso.families import lora_file

Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
OUT = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
MODULES = {Q: (6, 5), OUT: (6, 5), TEXT: (6, 5), "unet.down_blocks.1.resnets.0.conv1": (6, 5, 3, 3)}
MODULES |= {"unet.down_blocks.0.resnets.0.conv1": (6, 5, 3, 3), "unet.down_blocks.0.downsamplers.0.conv": (6, 5, 3, 3)}
DOWN, UP = torch.arange(10.0).view(2, 5), torch.arange(12.0).view(6, 2)


def saved(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    file = path / "lora.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata)
    return file


def pair(module: str, down: str, up: str) -> dict[str, torch.Tensor]:
    return {f"{module}.{down}": DOWN, f"{module}.{up}": UP}


def flat(module: str) -> dict[str, torch.Tensor]:
    return pair(module, "lora_down.weight", "lora_up.weight") | {f"{module}.alpha": torch.tensor(1.0)}


SPELLINGS = {
    "diffusers": (pair(Q, "lora_A.weight", "lora_B.weight"), Q, 1.0),
    "diffusers, older": (pair(Q, "lora.down.weight", "lora.up.weight"), Q, 1.0),
    "diffusers, processors": (
        pair(OUT.replace(".to_out.0", ".processor"), "to_out_lora.down.weight", "to_out_lora.up.weight"),
        OUT,
        1.0,
    ),
    "diffusers text": (pair(TEXT, "lora_A.weight", "lora_B.weight"), TEXT, 1.0),
    "diffusers text without text_model": (
        pair(TEXT.replace("text_model.", ""), "lora_A.weight", "lora_B.weight"),
        TEXT,
        1.0,
    ),
    "diffusers text, older": (pair(TEXT, "lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), TEXT, 1.0),
    "kohya, SGM blocks": (flat("lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"), Q, 0.5),
    "kohya, diffusers blocks": (flat("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"), Q, 0.5),
    "kohya text": (flat("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"), TEXT, 0.5),
    "kohya without alpha": (
        pair("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "lora_down.weight", "lora_up.weight"),
        TEXT,
        1.0,
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_means_the_same_layer(tmp_path: Path, spelling: str) -> None:
    tensors, name, scale = SPELLINGS[spelling]
    file = read(saved(tmp_path, tensors))
    assert file.format == spelling.split()[0].rstrip(",")
    matched = file.match(MODULES)
    assert list(matched) == [name]
    torch.testing.assert_close(matched[name].delta(), scale * UP @ DOWN)


def test_block_names_are_recognised(tmp_path: Path) -> None:
    blocks = {spelling: read(saved(tmp_path, content[0])).blocks for spelling, content in SPELLINGS.items()}
    assert blocks["kohya, SGM blocks"] == "sgm"
    assert blocks["kohya, diffusers blocks"] == blocks["diffusers"] == "diffusers"
    assert blocks["kohya text"] == "none"


def test_strength_comes_from_the_header(tmp_path: Path) -> None:
    settings = {"unet.r": 2, "unet.lora_alpha": 8, "unet.alpha_pattern": {"to_out.0": 1}}
    tensors = {**pair(Q, "lora_A.weight", "lora_B.weight"), **pair(OUT, "lora_A.weight", "lora_B.weight")}
    tensors |= pair(TEXT, "lora_A.weight", "lora_B.weight")
    file = read(saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)}))
    assert {name: p.scale for name, p in file.match(MODULES).items()} == {Q: 4.0, OUT: 0.5, TEXT: 1.0}
    settings |= {"unet.use_rslora": True}
    file = read(saved(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)}))
    assert file.layers[Q].scale == pytest.approx(8 / 2**0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [('{"unet.r": 3, "unet.lora_alpha": 3}', "says rank 3"), ("{", "damaged"), ('{"unet.lora_alpha": 1}', "damaged")],
)
def test_a_header_that_cannot_be_true_is_refused(tmp_path: Path, settings: str, message: str) -> None:
    path = saved(tmp_path, pair(Q, "lora_A.weight", "lora_B.weight"), {"lora_adapter_metadata": settings})
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_convolution_keeps_its_kernel() -> None:
    found = lora_file.Pair(torch.randn(2, 5, 3, 3), torch.randn(6, 2, 1, 1), 0.5)
    convolution = torch.nn.functional.conv2d
    x = torch.randn(1, 5, 8, 8)
    wanted = 0.5 * convolution(convolution(x, found.down), found.up)
    torch.testing.assert_close(convolution(x, found.delta()), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.diffusion_model.out.2.weight": UP}, "are not LoRA layers"),
        ({f"{Q}.lora_A.weight": DOWN}, "incomplete"),
        ({"lora_unet_a.alpha": torch.tensor(1.0)}, "incomplete"),
        ({}, "no LoRA layers"),
        ({**flat("lora_unet_a"), "lora_unet_a.dora_scale": torch.ones(1, UP.shape[0])}, "norms of inputs"),
        ({"lora_unet_a.hada_w1_a": UP, "lora_unet_a.alpha": torch.tensor(1.0)}, "incomplete"),
        ({"lora_unet_a.lokr_w1": UP}, "incomplete"),
        ({"lora_unet_a.lokr_w1": UP, "lora_unet_a.lokr_w2_a": UP}, "incomplete"),
        ({"lora_unet_a.oft_blocks": UP}, "OFT"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    path = saved(tmp_path, tensors)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert caught.value.where == str(path)


def test_a_lora_is_told_from_a_model_by_its_names(tmp_path: Path) -> None:
    assert lora_file.is_lora(saved(tmp_path, SPELLINGS["kohya text"][0]))
    assert lora_file.is_lora(saved(tmp_path, SPELLINGS["diffusers"][0]))
    assert not lora_file.is_lora(saved(tmp_path, {"model.diffusion_model.out.2.weight": UP}))
    assert not lora_file.is_lora(saved(tmp_path, {}))
    assert not lora_file.is_lora(tmp_path / "absent.safetensors")


def test_layers_that_are_not_in_the_model_are_refused(tmp_path: Path) -> None:
    file = read(saved(tmp_path, flat("lora_te_text_model_encoder_layers_0_self_attn_q_proj")))
    with pytest.raises(UserError, match="1 of the LoRA's 1 layers") as caught:
        file.match(MODULES)
    assert "another model family" in caught.value.fix
    file = read(saved(tmp_path, SPELLINGS["kohya text"][0] | flat("lora_unet_input_blocks_9_1_proj_in")))
    with pytest.raises(UserError, match="1 of the LoRA's 2 layers"):
        file.match(MODULES)


def test_another_width_is_refused(tmp_path: Path) -> None:
    file = read(saved(tmp_path, SPELLINGS["kohya text"][0]))
    with pytest.raises(UserError, match=r"another shape than this model's, which has \(6, 7\)"):
        file.match({**MODULES, TEXT: (6, 7)})


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"not a safetensors file at all")
    with pytest.raises(UserError, match="not a readable safetensors"):
        read(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="no such LoRA"):
        read(tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="found: none"):
        read(tmp_path / "empty")


def test_a_folder_means_the_weights_in_it(tmp_path: Path) -> None:
    path = saved(tmp_path, SPELLINGS["diffusers"][0])
    assert read(tmp_path).path == path
    path.rename(tmp_path / "pytorch_lora_weights.safetensors")
    saved(tmp_path, SPELLINGS["kohya text"][0])
    assert read(tmp_path).format == "diffusers"
