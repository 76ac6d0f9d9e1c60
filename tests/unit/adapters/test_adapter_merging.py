"""Adapters in the weights: exported as whole models, and fused into the base before training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_helpers import CPU, answer, fill, loaded
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file

from gesso import stages
from gesso.adapters import LoRA
from gesso.core.runtime import Runtime
from gesso.core.seams import Parts
from gesso.errors import UserError
from gesso.evaluation.models import open_pipeline
from gesso.families.fusing import Fused
from gesso.families.sdxl import SDXL
from run_helpers import MakeRun

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 2, "conv_rank": 2},
    "dora": {"type": "lora", "rank": 2, "dora": True, "train_text_encoders": True},
    "lokr": {"type": "lokr", "rank": 2, "factor": 4},
    "oft": {"type": "oft", "block_size": 8},
}


def parts_of(pipe: Any) -> Parts:
    encoders, tokenizers = [pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2]
    return Parts(denoiser=pipe.unet, vae=pipe.vae, text_encoders=encoders, tokenizers=tokenizers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_trained_one(make_run: MakeRun, kind: str) -> None:
    run = make_run("run", adapter=KINDS[kind], training__steps=1, training__learning_rate=0.02)
    folder = stages.train(run)
    pipe, _ = open_pipeline(str(folder), runtime=Runtime.for_inference("fp32", "cpu"))
    trained = answer(run.model, parts_of(pipe))
    path = stages.export(str(folder), format="merged", precision="fp32", device="cpu")
    plain = answer(run.model, parts_of(StableDiffusionXLPipeline.from_pretrained(path)))
    base = answer(*loaded(Path(run.model.base)))
    assert (plain - trained).abs().max() < 1e-4 * trained.abs().max()
    assert (plain - base).abs().max() > 1e-3 * base.abs().max()


def test_a_merged_model_is_not_pushed_with_a_loras_card(make_run: MakeRun) -> None:
    folder = stages.train(make_run("run", adapter=KINDS["oft"], training__steps=1))
    with pytest.raises(UserError, match="only LoRA files are pushed"):
        stages.export(str(folder), format="merged", hub_repo="me/thing")


@pytest.mark.parametrize("format", ["kohya", "diffusers", "merged", "single-file"])
def test_nothing_is_written_over(make_run: MakeRun, tmp_path: Path, format: Any) -> None:
    folder = stages.train(make_run("run", adapter=KINDS["lora"], training__steps=1))
    (tmp_path / "mine.safetensors").write_text("mine")
    with pytest.raises(UserError, match="something is there already"):
        stages.export(str(folder), format=format, output=tmp_path / "mine.safetensors", device="cpu")
    assert (tmp_path / "mine.safetensors").read_text() == "mine"


@pytest.fixture
def lora(tiny_base: Path, tmp_path: Path) -> Path:
    """A LoRA on the UNet and the second text encoder."""
    family, parts = loaded(tiny_base)
    attached = LoRA(rank=2, alpha=3).attach(parts, family, seed=0, text_encoders=(1,))
    fill(attached)
    path = tmp_path / "old.safetensors"
    (header,) = attached.layout().headers.values()
    save_file({k: t.clone() for k, t in attached.state().items()}, path, dict(header))
    return path


@pytest.mark.parametrize("weight", [1.0, -0.5])
def test_a_fused_lora_belongs_to_the_model_wherever_it_is_loaded(tiny_base: Path, lora: Path, weight: float) -> None:
    _, plain = loaded(tiny_base)
    pipe, _ = open_pipeline(str(tiny_base), loras=[(str(lora), weight)], runtime=Runtime.for_inference("fp32", "cpu"))
    family = SDXL(base=str(tiny_base), fuse=(Fused(path=str(lora), weight=weight),))
    wanted = answer(family, parts_of(pipe))
    parts = family.load(("denoiser", "text"), dtype=torch.float32, device=CPU)
    assert (answer(family, parts) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (answer(family, plain) - wanted).abs().max() > 0.01 * wanted.abs().max()
    alone = family.load(("denoiser",), dtype=torch.float32, device=CPU).denoiser
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), parts.denoiser.parameters(), strict=True))


def test_what_is_fused_is_part_of_the_runs_identity(make_run: MakeRun, lora: Path, tmp_path: Path) -> None:
    def settings(path: Path, weight: float = 1.0, **more: Any) -> Any:
        fuse = {"fuse": [{"path": str(path), "weight": weight}]}
        base = make_run("x").model.base
        return make_run("run", model={"base": base, **fuse}, training__steps=2, checkpoint__every=1, **more)

    run = settings(lora)
    plain, fused = make_run("x").model, run.model
    assert plain.fingerprint("vae") == fused.fingerprint("vae")
    assert plain.fingerprint("text") != fused.fingerprint("text")
    stages.train(run)
    moved = tmp_path / "moved.safetensors"
    shutil.move(lora, moved)
    with pytest.raises(UserError, match=r"model\.fuse\.0\.weight"):
        stages.train(settings(moved, 0.5), resume="latest")
    stages.train(settings(moved), resume="latest")


def test_a_file_that_does_not_fit_is_refused_by_layer(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"unet.nothing.lora_A.weight": torch.ones(1, 2), "unet.nothing.lora_B.weight": torch.ones(2, 1)}, path)
    family = SDXL(base=str(tiny_base), fuse=(Fused(path=str(path)),))
    with pytest.raises(UserError, match=r"unet\.nothing"):
        family.load(("denoiser",), dtype=torch.float32, device=CPU)
