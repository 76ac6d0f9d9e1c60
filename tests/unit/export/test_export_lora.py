"""Exported LoRAs: they reload as the trained model, other tools find every key, and headers say what it is."""

import json
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from export_helpers import ABOUT, ADAPTER, CPU, Trained, export
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file

from gesso.adapters import LoRA
from gesso.core.runtime import Runtime
from gesso.core.seams import Parts
from gesso.export import lora
from gesso.families import lora_names
from gesso.families.sdxl import SDXL


def deltas(trained: Trained) -> dict[str, torch.Tensor]:
    """What training added to each weight, as peft merges it."""
    networks = [trained.parts.denoiser, *trained.parts.text_encoders]
    return {
        lora_names.canonical(part, path): layer.get_delta_weight("default").detach()
        for part, network in zip(trained.family.part_names, networks, strict=True)
        for path, layer in network.named_modules()
        if isinstance(layer, LoraLayer)
    }


def header(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as handle:
        return dict(handle.metadata())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("fp16", 5e-3), ("bf16", 5e-2)])
def test_a_file_reloads_as_the_trained_model(
    train: Callable[[LoRA], Trained], tmp_path: Path, format: lora.Format, precision: str, limit: float
) -> None:
    trained = train(ADAPTER)
    path = tmp_path / "out" / "aldar.safetensors"
    report = export(trained, path, format, precision)
    assert report.layers == len(trained.attached.state()) / 2 > 100
    assert report.error <= limit
    assert report.text_error <= limit
    assert report.effect > 0.1, "the LoRA does so little that the comparison proves nothing"
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {t.dtype for name, t in load_file(path).items() if not name.endswith(".alpha")} == {wanted}
    assert [p.name for p in path.parent.iterdir()] == ["aldar.safetensors"]


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_half_precision_model_verifies_too(base: Path, tmp_path: Path, format: lora.Format) -> None:
    """As after training in bf16: float32 adapters on a bf16 model, an fp16 file, a fresh bf16 model."""
    family, half = SDXL(base=str(base)), Runtime(torch.device("cpu"), "bf16")
    parts = family.load(("denoiser", "text"), dtype=half.dtype, device=half.device)
    attached = ADAPTER.attach(parts, family, seed=1, text_encoders=(0, 1))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for tensor in attached.state().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    report = lora.export(
        tmp_path / "a.safetensors",
        lora.taken(attached),
        format=format,
        precision="fp16",
        about=ABOUT,
        family=family,
        expected=lora.probe(family, parts),
        runtime=half,
    )
    assert report.effect > 2 * report.error > 0


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_user_of_diffusers_gets_the_trained_weights(
    train: Callable[[LoRA], Trained], base: Path, tmp_path: Path, format: lora.Format
) -> None:
    trained = train(ADAPTER)
    path = tmp_path / "aldar.safetensors"
    export(trained, path, format)
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    before = {part: dict(pipeline.components[part].named_parameters()) for part in trained.family.part_names}
    before = {part: {k: v.detach().clone() for k, v in group.items()} for part, group in before.items()}
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(components=list(trained.family.part_names))
    pipeline.unload_lora_weights()
    wanted = deltas(trained)
    for part, group in before.items():
        for name, weight in pipeline.components[part].named_parameters():
            layer = lora_names.canonical(part, name.removesuffix(".weight"))
            delta = wanted[layer] if layer in wanted and name.endswith(".weight") else torch.zeros_like(weight)
            torch.testing.assert_close(weight.detach() - group[name], delta, rtol=0, atol=2e-6, msg=f"{part}.{name}")


def test_without_text_encoders_only_the_denoiser_is_in_the_file(
    train: Callable[[LoRA], Trained], tmp_path: Path
) -> None:
    trained = train(LoRA(rank=2, alpha=1))
    parts = Parts(denoiser=trained.parts.denoiser)  # as training leaves them when text is cached
    expected = lora.probe(trained.family, parts)
    path = tmp_path / "a.safetensors"
    report = lora.export(
        path,
        lora.taken(trained.attached),
        format="kohya",
        precision="fp16",
        about=ABOUT,
        family=trained.family,
        expected=expected,
        runtime=CPU,
    )
    assert report.text_error == 0
    assert all(name.startswith("lora_unet_") for name in load_file(path))


def comfy_key_map(base: Path) -> dict[str, str]:
    """kohya's name -> our weight, by the published table of SDXL's block names and nothing of ours."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    table = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "down_blocks.1.downsamplers.0.conv": "input_blocks.6.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
        "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    }
    for i in (1, 2, 4, 5, 7, 8):
        table[f"down_blocks.{(i - 1) // 3}.resnets.{(i - 1) % 3}"] = f"input_blocks.{i}.0"
        table[f"down_blocks.{(i - 1) // 3}.attentions.{(i - 1) % 3}"] = f"input_blocks.{i}.1"
    for i in range(9):
        table[f"up_blocks.{i // 3}.resnets.{i % 3}"] = f"output_blocks.{i}.0"
        table[f"up_blocks.{i // 3}.attentions.{i % 3}"] = f"output_blocks.{i}.1"
    leaves = {"conv1": "in_layers.2", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    leaves["time_emb_proj"] = "emb_layers.1"
    found = {}
    for name, parameter in pipeline.unet.named_parameters():
        if parameter.ndim < 2:
            continue
        module = name.removesuffix(".weight")
        place = max((p for p in table if module == p or module.startswith(p + ".")), key=len)
        leaf = module[len(place) + 1 :]
        full = table[place] + ("." + leaves.get(leaf, leaf) if leaf else "")
        found["lora_unet_" + full.replace(".", "_")] = f"unet.{module}"
    projections = {"self_attn": ("q_proj", "k_proj", "v_proj", "out_proj"), "mlp": ("fc1", "fc2")}
    for prefix, part, encoder in (
        ("lora_te1", "text_encoder", pipeline.text_encoder),
        ("lora_te2", "text_encoder_2", pipeline.text_encoder_2),
    ):
        for layer in range(encoder.config.num_hidden_layers):
            for block, ends in projections.items():
                for end in ends:
                    flat = f"{prefix}_text_model_encoder_layers_{layer}_{block}_{end}"
                    found[flat] = f"{part}.text_model.encoder.layers.{layer}.{block}.{end}"
    return found


def test_a_comfyui_like_reader_finds_every_key_and_the_same_change(
    train: Callable[[LoRA], Trained], base: Path, tmp_path: Path
) -> None:
    trained = train(ADAPTER)
    path = tmp_path / "a.safetensors"
    export(trained, path, "kohya", "fp16")
    tensors, known, wanted = load_file(path), comfy_key_map(base), deltas(trained)
    flat = {name.split(".")[0] for name in tensors}
    assert flat <= known.keys(), f"keys not loaded: {sorted(flat - known.keys())[:5]}"
    assert {known[name] for name in flat} == wanted.keys()
    assert len(tensors) == 3 * len(flat)
    for name in flat:
        down, up = tensors.pop(f"{name}.lora_down.weight"), tensors.pop(f"{name}.lora_up.weight")
        alpha = tensors.pop(f"{name}.alpha")
        assert alpha.shape == ()
        assert float(alpha) == 6
        delta = float(alpha) / down.shape[0] * up.float() @ down.float()
        assert (delta - wanted[known[name]]).abs().max() < 1e-3
    assert not tensors


def test_folded_alpha_is_read_right_by_readers_that_know_no_alpha(
    train: Callable[[LoRA], Trained], tmp_path: Path
) -> None:
    trained = train(ADAPTER)
    path = tmp_path / "a.safetensors"
    export(trained, path, "diffusers", fold_alpha=True)
    tensors = load_file(path)
    for name, delta in deltas(trained).items():
        product = tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(product, delta, rtol=1e-5, atol=1e-6)
    settings = json.loads(header(path)["lora_adapter_metadata"])
    assert settings["unet.lora_alpha"] == settings["unet.r"] == 4


def test_unfolded_diffusers_file_states_its_alpha(train: Callable[[LoRA], Trained], tmp_path: Path) -> None:
    trained = train(ADAPTER)
    path = tmp_path / "a.safetensors"
    export(trained, path, "diffusers")
    settings = json.loads(header(path)["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"], settings["text_encoder_2.lora_alpha"]) == (4, 6, 6)
    assert header(path)["modelspec.trigger_phrase"] == "sks aldar"


def test_the_kohya_header_says_what_web_uis_show(train: Callable[[LoRA], Trained], tmp_path: Path) -> None:
    trained = train(ADAPTER)
    path = tmp_path / "a.safetensors"
    export(trained, path, "kohya", "fp16")
    said = header(path)
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"], said["ss_v2"]) == ("4", "6", "False")
    assert json.loads(said["ss_tag_frequency"]) == {"photos": {"a hat": 2, "a robe": 1}}
    assert said["ss_steps"] == "500"
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.resolution"] == "64x96"
    assert said["modelspec.tags"] == "a hat, a robe"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert said["sshs_model_hash"] == sha256(content[8 + length :]).hexdigest()
    assert re.fullmatch("[0-9a-f]{8}", said["sshs_legacy_hash"])
    assert length % 8 == 0


def test_the_legacy_hash_covers_64_kib_at_1_mib() -> None:
    tensors = {"a": torch.arange(400_000, dtype=torch.float32)}
    content = lora.serialise(tensors, {"ss_v2": "False"})
    wanted = sha256(content[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert lora.hashes(tensors, {"ss_v2": "False", "modelspec.title": "left out"})["sshs_legacy_hash"] == wanted


def test_the_same_weights_give_the_same_bytes(train: Callable[[LoRA], Trained], tmp_path: Path) -> None:
    trained = train(LoRA(rank=2))
    export(trained, tmp_path / "a.safetensors", "kohya", "fp16")
    export(trained, tmp_path / "b.safetensors", "kohya", "fp16")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_an_alpha_that_fp16_cannot_hold_is_kept_exactly(train: Callable[[LoRA], Trained], tmp_path: Path) -> None:
    trained = train(LoRA(rank=3, alpha=3.3))
    path = tmp_path / "a.safetensors"
    export(trained, path, "kohya", "fp16")
    alphas = {float(t) for name, t in load_file(path).items() if name.endswith(".alpha")}
    assert [*alphas] == [pytest.approx(3.3, rel=1e-6)]


def test_a_path_of_this_machine_never_gets_into_a_header() -> None:
    about = replace(ABOUT, base="/home/someone/models/my-sdxl")
    said = {**about.modelspec(), **about.kohya({"ss_network_module": "networks.lora"})}
    assert said["ss_sd_model_name"] == "my-sdxl"
    assert not any("someone" in value for value in said.values())
    assert not about.base_on_hub
    assert ABOUT.base_on_hub


def test_sdxl_is_what_the_family_says_it_is() -> None:
    assert SDXL().architecture in lora_names.KOHYA_BASE_VERSION
