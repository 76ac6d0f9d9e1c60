"""A fully trained model as one file under SDXL's original names: other programs read what was trained, or nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file

from gesso import stages
from gesso.core.runtime import Runtime
from gesso.errors import ResourceError, UserError
from gesso.export import single_file
from gesso.families import original_names
from gesso.families.sdxl import SDXL
from gesso.micro.models import Size, build_sdxl
from run_helpers import MakeRun

sys.path.insert(0, str(Path(__file__).parents[1] / "families"))
import original_layout
from family_helpers import CPU, answers, load, reconfigure, same_answers, same_networks

FULL: dict[str, Any] = {
    "adapter": {"type": "full", "train_text_encoders": True, "targets": ["attn2", "up_blocks"]},
    "training__steps": 2,
    "training__learning_rate": 3e-3,
}
REAL = Size(
    unet_channels=(4, 8, 16),
    unet_layers=2,
    unet_transformers=(1, 2, 10),
    unet_heads=(1, 1, 1),
    time_channels=4,
    vae_channels=(4, 8, 16, 16),
    vae_layers=2,
    text_widths=(4, 8),
    text_layers=(12, 32),
    norm_groups=2,
)
"""As many blocks and layers as SDXL has, very narrow."""


def states(base: Path) -> dict[str, dict[str, torch.Tensor]]:
    parts = load(SDXL(base=str(base)))
    networks = {"unet": parts.denoiser, "vae": parts.vae}
    networks |= dict(zip(("text_encoder", "text_encoder_2"), parts.text_encoders, strict=True))
    return {part: network.state_dict() for part, network in networks.items()}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("real") / "sdxl", size=REAL, seed=2)


def test_sdxls_own_layout_has_the_published_names(real: Path) -> None:
    """The published file holds 1680, 248, 197 and 390 tensors; the one that is left out is OpenCLIP's logit_scale."""
    found = original_names.original(states(real))
    counts = {part: sum(name.startswith(p) for name in found) for part, p in original_names.PREFIXES.items()}
    assert counts == {"unet": 1680, "vae": 248, "text_encoder": 197, "text_encoder_2": 389}
    for name in (  # as they stand in sd_xl_base_1.0.safetensors, first and last of each kind
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_out.0.bias",
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight",
        "model.diffusion_model.middle_block.2.out_layers.3.weight",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.out.0.weight",
        "model.diffusion_model.out.2.bias",
        "first_stage_model.encoder.down.2.downsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.decoder.up.3.upsample.conv.bias",
        "first_stage_model.post_quant_conv.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.self_attn.out_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
        "conditioner.embedders.1.model.positional_embedding",
        "conditioner.embedders.1.model.text_projection",
        "conditioner.embedders.1.model.ln_final.bias",
    ):
        assert name in found, name


@pytest.mark.parametrize("which", ["real", "tiny"])
def test_every_tensor_is_where_another_writing_of_the_names_puts_it(real: Path, tiny_base: Path, which: str) -> None:
    base = real if which == "real" else tiny_base
    wanted, found = original_layout.original(base), original_names.original(states(base))
    assert wanted.keys() - found.keys() == {"conditioner.embedders.1.model.logit_scale"}
    assert found.keys() <= wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    assert all(tensor.is_contiguous() for tensor in found.values())


def test_diffusers_converts_sdxls_layout_back_to_the_same_tensors(real: Path) -> None:
    """Its own converters, which read the published file, as the judge of every name and transposition."""
    before = states(real)
    found = original_names.original(before)
    configs = {part: json.loads((real / part / "config.json").read_text()) for part in before}
    unet = convert_ldm_unet_checkpoint(dict(found), config=configs["unet"])
    vae = convert_ldm_vae_checkpoint(dict(found), config=configs["vae"])
    parts = load(SDXL(base=str(real)))
    clip = convert_open_clip_checkpoint(parts.text_encoders[1], dict(found), prefix="conditioner.embedders.1.model.")
    for part, converted in (("unet", unet), ("vae", vae), ("text_encoder_2", clip)):
        back = {name.removeprefix("text_model."): tensor for name, tensor in converted.items()}
        back.pop("embeddings.position_ids", None)
        wanted = {name.removeprefix("text_model."): tensor for name, tensor in before[part].items()}
        assert back.keys() == wanted.keys()
        assert all(torch.equal(back[name].reshape(t.shape), t) for name, t in wanted.items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_trained_model_in_one_file_is_the_one_in_the_folder(
    make_run: MakeRun, tiny_base: Path, precision: str
) -> None:
    folder = stages.train(make_run("thing", **FULL))
    file = stages.export(str(folder), format="single-file", precision=precision)  # type: ignore[arg-type]
    assert file == folder / "thing-checkpoint-2.safetensors"
    model = stages.export(str(folder), precision=precision)  # type: ignore[arg-type]
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    assert {t.dtype for t in load_file(file).values()} == {dtype, torch.int64}
    one, other = SDXL(base=str(model)), SDXL(base=str(file), config=str(tiny_base))
    same_networks(load(one), load(other))
    same_answers(answers(one, load(one)), answers(other, load(other)))
    pictures = []
    for pipe in (
        StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False),
        StableDiffusionXLPipeline.from_single_file(file, config=str(model), add_watermarker=False),
    ):
        drawn = pipe.to(torch.float32)("a photo of thing", num_inference_steps=2, height=64, width=64,
                                       output_type="np", generator=torch.Generator().manual_seed(1))  # fmt: skip
        pictures.append(torch.from_numpy(drawn.images))
    assert torch.equal(*pictures)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".thing")]


def test_text_encoders_that_are_equally_wide_are_told_apart(tmp_path: Path) -> None:
    """As those of micro:sdxl are; diffusers by itself takes the second for another of the first's kind."""
    family, file = SDXL(base="micro:sdxl"), tmp_path / "micro.safetensors"
    write(file, family, load(family), Runtime(CPU, "fp32"))
    same_networks(load(family), load(SDXL(base=str(file), config="micro:sdxl")))


def test_the_header_says_what_it_is_and_equal_exports_are_equal_files(make_run: MakeRun, tmp_path: Path) -> None:
    folder = stages.train(make_run("thing", **FULL))
    one, two = (stages.export(str(folder), format="single-file", output=tmp_path / f"{i}.safetensors") for i in "ab")
    said, again = header(one)["__metadata__"], header(two)["__metadata__"]
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert said["modelspec.title"] == "thing"
    assert said["modelspec.prediction_type"] == "epsilon"
    assert list(said) == sorted(said) == list(again)
    assert {k: v for k, v in said.items() if k != "modelspec.date"}.items() <= again.items()
    assert header(one) | {"__metadata__": 0} == header(two) | {"__metadata__": 0}
    length = one.stat().st_size - 8 - int.from_bytes(one.read_bytes()[:8], "little")
    assert one.read_bytes()[-length:] == two.read_bytes()[-length:]


def header(file: Path) -> dict[str, Any]:
    """The head of a safetensors file as it is written, which the library gives in any order."""
    content = file.read_bytes()
    return dict(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))


def test_the_kind_of_prediction_travels_with_the_file(tiny_base: Path, tmp_path: Path) -> None:
    base = original_layout.write(
        tiny_base, tmp_path / "v.safetensors", extra={"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    )
    family = SDXL(base=str(base), config=str(tiny_base))
    parts, runtime = load(family), Runtime(CPU, "fp32")
    file = tmp_path / "again.safetensors"
    write(file, family, parts, runtime)
    again = SDXL(base=str(file), config=str(tiny_base))
    assert again.noise.prediction == "v_prediction"
    assert float(again.noise.alphas_cumprod[-1]) == 0


def write(file: Path, family: SDXL, parts: Any, runtime: Runtime) -> None:
    from gesso.export.about import About
    from gesso.export.proof import probe

    expected = probe(family, parts)
    about = About(title="x", architecture=family.architecture)
    single_file.export(file, parts, precision="fp32", about=about, family=family, expected=expected, runtime=runtime)


def swap_query_and_key(file: Path) -> None:
    tensors = load_file(file)
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    tensors[name] = tensors[name].roll(tensors[name].shape[0] // 3, 0)
    save_file(tensors, file)


def turn_the_projection(file: Path) -> None:
    tensors = load_file(file)
    name = "conditioner.embedders.1.model.text_projection"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, file)


def drop_a_tensor(file: Path) -> None:
    tensors = load_file(file)
    del tensors["model.diffusion_model.middle_block.0.in_layers.2.weight"]
    save_file(tensors, file)


def change_the_vae(file: Path) -> None:
    tensors = load_file(file)
    tensors["first_stage_model.decoder.conv_out.bias"] += 0.5
    save_file(tensors, file)


@pytest.mark.parametrize("change", [swap_query_and_key, turn_the_projection, drop_a_tensor, change_the_vae])
def test_a_file_that_is_not_the_trained_model_is_not_kept(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    family = SDXL(base=str(tiny_base))
    monkeypatch.setattr(single_file, "_sort_header", change)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="does not reload as the trained model"):
        write(tmp_path / "out" / "model.safetensors", family, load(family), Runtime(CPU, "fp32"))
    assert not list((tmp_path / "out").iterdir())


def test_what_cannot_be_written_is_said(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, runtime = SDXL(base=str(tiny_base)), Runtime(CPU, "fp32")
    parts = load(family)
    there = tmp_path / "there.safetensors"
    there.write_bytes(b"x")
    with pytest.raises(UserError, match="something is there already"):
        write(there, family, parts, runtime)
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        write(tmp_path / "model.ckpt", family, parts, runtime)

    def full_disk(file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(single_file, "_sort_header", full_disk)
    with pytest.raises(ResourceError, match="No space left"):
        write(tmp_path / "new.safetensors", family, parts, runtime)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
    assert there.read_bytes() == b"x"


def test_a_lora_becomes_a_whole_model_with_its_base(make_run: MakeRun, tiny_base: Path, tmp_path: Path) -> None:
    folder = stages.train(make_run("lora", training__steps=2))
    merged = load_file(stages.export(str(folder), format="single-file", precision="fp32", device="cpu"))
    family = SDXL(base=str(tiny_base))
    write(tmp_path / "base.safetensors", family, load(family), Runtime(CPU, "fp32"))
    base = load_file(tmp_path / "base.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all(name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")) for name in changed)


def test_a_folder_whose_scheduler_predicts_v_marks_its_file(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    base = Path(shutil.copytree(tiny_base, tmp_path / "v"))
    reconfigure(base / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    family = SDXL(base=str(base))
    write(tmp_path / "v.safetensors", family, load(family), Runtime(CPU, "fp32"))
    names = header(tmp_path / "v.safetensors")
    assert "v_pred" in names
    assert "ztsnr" not in names
