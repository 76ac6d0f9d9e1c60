"""Adapters as files: kohya's and LyCORIS' names, diffusers', and back into a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapter_helpers import CPU, KINDS, answer, fill, loaded
from safetensors.torch import load_file

from gesso.adapters import OFT, LoHa, LoKr, LoRA
from gesso.core.runtime import Runtime
from gesso.errors import UserError
from gesso.export import lora
from gesso.export.lora import About
from gesso.families import lora_file, lora_names

FP32 = Runtime(CPU, "fp32")
ABOUT = About(title="thing", architecture="stable-diffusion-xl-v1-base")
KOHYA = [kind for kind in KINDS if not kind.startswith("oft")]
DIFFUSERS = [kind for kind in KOHYA if not kind.startswith("lo") or kind.startswith("lora")]


def exported(base: Path, kind: str, path: Path, format: lora.Format) -> tuple[lora.Verified, torch.Tensor]:
    """Write a filled adapter; returns what the check found, and the live model's answer."""
    family, parts = loaded(base)
    encoders = () if kind.startswith("dora") and format == "diffusers" else (0, 1)
    attached = KINDS[kind].attach(parts, family, seed=0, text_encoders=encoders)
    fill(attached)
    report = lora.export(
        path,
        lora.taken(attached),
        format=format,
        precision="fp32",
        about=ABOUT,
        family=family,
        expected=lora.probe(family, parts),
        runtime=FP32,
    )
    return report, answer(family, parts)


def merged(base: Path, path: Path) -> torch.Tensor:
    """A fresh model's answer with a file merged into its weights."""
    family, parts = loaded(base)
    networks = dict(zip(family.part_names, [parts.denoiser, *parts.text_encoders], strict=True))
    lora_names.merge(networks, lora_file.read(path).match(lora_names.modules(networks)))
    return answer(family, parts)


@pytest.mark.parametrize(("kind", "format"), [*((k, "kohya") for k in KOHYA), *((k, "diffusers") for k in DIFFUSERS)])
def test_a_file_is_the_trained_model(tiny_base: Path, tmp_path: Path, kind: str, format: lora.Format) -> None:
    path = tmp_path / "thing.safetensors"
    report, live = exported(tiny_base, kind, path, format)
    assert report.error < 1e-5 < 1e-2 < report.effect
    assert (merged(tiny_base, path) - live).abs().max() < 2e-4 * live.abs().max()


@pytest.mark.parametrize(
    ("kind", "endings"),
    [
        ("dora-conv", {"lora_down.weight", "lora_up.weight", "alpha", "dora_scale"}),
        ("loha", {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}),
        ("lokr", {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "lokr_w2", "alpha"}),
        ("lokr-whole", {"lokr_w1", "lokr_w2", "alpha"}),
    ],
)
def test_the_names_are_those_that_others_read(tiny_base: Path, tmp_path: Path, kind: str, endings: set[str]) -> None:
    path = tmp_path / "thing.safetensors"
    exported(tiny_base, kind, path, "kohya")
    tensors = load_file(path)
    assert {name.partition(".")[2] for name in tensors} == endings
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in tensors
    assert "lora_te2_text_model_encoder_layers_0_self_attn_q_proj.alpha" in tensors
    for name, tensor in tensors.items():
        if name.endswith("dora_scale"):
            assert tensor.shape[0] == tensors[name.replace("dora_scale", "lora_up.weight")].shape[0]
            assert tensor.ndim == tensors[name.replace("dora_scale", "lora_down.weight")].ndim


@pytest.mark.parametrize(
    ("kind", "format", "instead"),
    [
        ("lokr", "diffusers", "kohya"),
        ("loha", "diffusers", "kohya"),
        ("oft", "diffusers", "merged"),
        ("oft", "kohya", "merged"),
    ],
)
def test_a_format_without_names_for_it_is_refused(
    tiny_base: Path, tmp_path: Path, kind: str, format: lora.Format, instead: str
) -> None:
    with pytest.raises(UserError, match=f"no names for[^|]*--format {instead}"):
        exported(tiny_base, kind, tmp_path / "thing.safetensors", format)
    assert not list(tmp_path.iterdir())


def test_a_changed_layer_is_noticed(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in which one layer is a little weaker does not reach its place."""
    convert = lora.convert

    def weaker(*args: object, **settings: object) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        tensors, header = convert(*args, **settings)  # type: ignore[arg-type]
        name = next(name for name in tensors if name.endswith("lokr_w1"))
        tensors[name] = tensors[name] * 1.01
        return tensors, header

    monkeypatch.setattr(lora, "convert", weaker)
    with pytest.raises(UserError, match="is another one"):
        exported(tiny_base, "lokr", tmp_path / "thing.safetensors", "kohya")
    assert not list(tmp_path.iterdir())


def test_the_format_that_most_read() -> None:
    """What is written where no format is named is never refused for lack of names."""
    assert (
        lora.suited(LoRA())
        == lora.suited(LoRA(dora=True))
        == lora.suited(LoRA(train_text_encoders=True))
        == "diffusers"
    )
    assert lora.suited(LoHa()) == lora.suited(LoKr()) == "kohya"
    assert lora.suited(LoRA(dora=True, train_text_encoders=True)) == "kohya"
    assert lora.suited(OFT()) == "merged"
