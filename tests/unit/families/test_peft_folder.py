"""Folders as PEFT saves them are read as what PEFT itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gesso.errors import UserError
from gesso.families import lora_file
from gesso.families.fusing import Fused, fingerprint


class Block(nn.Module):
    """The names of a UNet's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.ModuleDict({"to_q": nn.Linear(5, 6), "to_k": nn.Linear(5, 6), "conv": nn.Conv2d(5, 6, 3)})


class Encoder(nn.Module):
    """The names of a text encoder's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(5, 6)})])})


def saved(folder: Path, network: nn.Module, **settings: Any) -> dict[str, torch.Tensor]:
    """An adapter with random weights in a folder of PEFT's; returns what PEFT adds to each layer's weight."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, **settings)
    model: Any = peft.get_peft_model(network, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            found[name.removeprefix("base_model.model.")] = layer.get_delta_weight("default").detach()
    return found


UNET = ["to_q", "to_k", "conv"]


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"to_k": 4}, "alpha_pattern": {"to_q": 7}}]
)
def test_each_layer_changes_as_peft_changes_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    wanted = saved(tmp_path, Block(), target_modules=UNET, **settings)
    file = lora_file.read(tmp_path)
    assert set(file.layers) == {f"unet.{name}" for name in wanted}
    for name, delta in wanted.items():
        torch.testing.assert_close(file.layers[f"unet.{name}"].delta(), delta)


def test_the_file_alone_is_enough_beside_its_settings(tmp_path: Path) -> None:
    saved(tmp_path, Block(), target_modules=UNET)
    assert (
        lora_file.read(tmp_path / "adapter_model.safetensors").layers.keys() == lora_file.read(tmp_path).layers.keys()
    )


def test_a_text_encoder_is_known_by_its_folder_or_class(tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder_2"
    saved(folder, Encoder(), target_modules=["q_proj"])
    assert set(lora_file.read(folder).layers) == {"text_encoder_2.encoder.layers.0.q_proj"}
    folder = folder.rename(tmp_path / "mine")
    with pytest.raises(UserError, match="nothing says of which one"):
        lora_file.read(folder)
    change(folder, auto_mapping={"base_model_class": "CLIPTextModel"})
    assert set(lora_file.read(folder).layers) == {"text_encoder.encoder.layers.0.q_proj"}


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, Block(), target_modules=UNET)
    change(tmp_path, peft_type="LOHA")
    with pytest.raises(UserError, match="LOHA in PEFT's format is not read"):
        lora_file.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not a readable configuration"):
        lora_file.read(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"adapter_config\.json: it is missing"):
        lora_file.read(tmp_path)


def test_another_strength_is_another_base_model(tmp_path: Path) -> None:
    """What is encoded with a merged LoRA must not be taken for that of the same weights at another strength."""
    saved(tmp_path, Block(), target_modules=UNET)
    before = fingerprint([Fused(path=str(tmp_path))])
    change(tmp_path, lora_alpha=6)
    assert fingerprint([Fused(path=str(tmp_path))]) != before


def test_other_things_than_a_lora_are_named(tmp_path: Path) -> None:
    saved(tmp_path, Block(), target_modules=UNET)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(
        tensors | {"base_model.model.mid_block.to_q.bias": torch.zeros(6)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="not LoRA layers"):
        lora_file.read(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="a whole model, not a LoRA"):
        lora_file.read(tmp_path / "model")
    save_file({"clip_l": torch.zeros(1, 4), "clip_g": torch.zeros(1, 4)}, tmp_path / "word.safetensors")
    with pytest.raises(UserError, match="vectors of a new word"):
        lora_file.read(tmp_path / "word.safetensors")
    with pytest.raises(UserError, match=r"there is no .*missing"):
        lora_file.fetched(str(tmp_path / "missing.safetensors"), key="--lora")


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
