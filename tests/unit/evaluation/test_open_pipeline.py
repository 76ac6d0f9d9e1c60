"""Opening runs, checkpoints, models and LoRA files; whatever does not fit is refused with the way out."""

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from gesso.adapters import LoRA
from gesso.config import files
from gesso.config.run import RunConfig
from gesso.core.runtime import Runtime
from gesso.errors import UserError
from gesso.evaluation.sample import Shot, draw, open_pipeline
from gesso.families import lora_names

CPU = Runtime(torch.device("cpu"), "fp32")
SHOT = Shot("a photo of sks aldar", seed=7, steps=2, guidance=5.0, width=64, height=64)
NAME = "pytorch_lora_weights.safetensors"
ADAPTER = LoRA(rank=4, alpha=6, train_text_encoders=True)


def picture(target: Path | str, loras: Sequence[tuple[str, float]] = ()) -> np.ndarray:
    pipeline, _ = open_pipeline(str(target), loras=loras, runtime=CPU)
    return pixels(pipeline)


def pixels(pipeline: Any) -> np.ndarray:
    return np.asarray(draw(pipeline, [SHOT])[0]).astype(int)


def users(base: Path, loras: Sequence[tuple[Path, float]]) -> np.ndarray:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    names = [f"adapter_{i}" for i in range(len(loras))]
    for name, (path, _) in zip(names, loras, strict=True):
        pipeline.load_lora_weights(path, adapter_name=name)
    if loras:
        pipeline.set_adapters(names, [weight for _, weight in loras])
    return pixels(pipeline)


def differ(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def as_kohya(path: Path, base: Path, to: Path, *, blocks: str = "sgm", alpha: float = 6.0) -> Path:
    """The LoRA of a checkpoint under kohya's names, with SGM or diffusers names for the UNet's blocks."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    parts = ("unet", "text_encoder", "text_encoder_2")
    names = lora_names.kohya(lora_names.modules({part: pipeline.components[part] for part in parts}))
    tensors = {}
    for key, tensor in load_file(path).items():
        module, _, side = key.removesuffix(".weight").rpartition(".")
        flat = names[module]
        if blocks == "diffusers" and module.startswith("unet."):
            flat = "lora_unet_" + module.removeprefix("unet.").replace(".", "_")
        tensors[f"{flat}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, to)
    return to


@pytest.fixture
def run(train: Callable[..., Any], base: Path, tmp_path: Path) -> Callable[..., Path]:
    """A run folder as training leaves it, with checkpoints 5 and 10 that differ."""

    def make(*, average: bool = False, use: bool = True) -> Path:
        (tmp_path / "images").mkdir()
        folder = tmp_path / "out"
        for step in (5, 10):
            checkpoint = folder / f"checkpoint-{step}"
            train(ADAPTER, path=checkpoint / NAME, seed=step)
            if average:
                train(ADAPTER, path=checkpoint / "ema" / NAME, seed=100 + step)
            (checkpoint / "state").mkdir()
            save_file({"a": torch.zeros(1)}, checkpoint / "state" / "optimizer.safetensors")
            (checkpoint / "state" / "position.json").write_text("{}")
            manifest = {
                str(p.relative_to(checkpoint)): {"size": p.stat().st_size, "sha256": sha256(p.read_bytes()).hexdigest()}
                for p in sorted(checkpoint.rglob("*.*"))
            }
            (checkpoint / "manifest.json").write_text(json.dumps(manifest))
        config = RunConfig.model_validate(
            {
                "output": folder,
                "model": {"base": str(base)},
                "data": {"sources": [{"path": tmp_path / "images"}]},
                "adapter": ADAPTER.model_dump(),
                "training": {"steps": 10, "ema": {"enabled": average, "use_for_samples": use}},
            }
        )
        (folder / "run.yaml").write_text(files.dump(config))
        return folder

    return make


def test_a_base_model_draws_as_it_is(base: Path) -> None:
    pipeline, said = open_pipeline(str(base), runtime=CPU)
    assert differ(pixels(pipeline), users(base, [])) <= 1
    assert said == str(base)


def test_a_run_means_its_newest_checkpoint(run: Callable[..., Path], base: Path) -> None:
    folder = run()
    pipeline, said = open_pipeline(str(folder), runtime=CPU)
    found = pixels(pipeline)
    assert said == f"{base} + checkpoint-10"
    assert differ(found, users(base, [(folder / "checkpoint-10", 1.0)])) <= 2
    assert differ(found, picture(folder / "checkpoint-10")) == 0
    assert differ(found, picture(folder / "checkpoint-5")) > 2


def test_a_damaged_checkpoint_is_passed_over(run: Callable[..., Path], base: Path) -> None:
    folder = run()
    weights = folder / "checkpoint-10" / NAME
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    assert open_pipeline(str(folder), runtime=CPU)[1] == f"{base} + checkpoint-5"
    (folder / "checkpoint-5" / "manifest.json").unlink()
    with pytest.raises(UserError, match="every checkpoint of this run is damaged"):
        open_pipeline(str(folder), runtime=CPU)


def test_averaged_weights_are_used_where_the_run_samples_with_them(run: Callable[..., Path], base: Path) -> None:
    folder = run(average=True)
    pipeline, said = open_pipeline(str(folder), runtime=CPU)
    assert said == f"{base} + checkpoint-10 (averaged)"
    assert differ(pixels(pipeline), users(base, [(folder / "checkpoint-10" / "ema", 1.0)])) <= 2
    assert differ(pixels(pipeline), users(base, [(folder / "checkpoint-10", 1.0)])) > 2


def test_averaged_weights_are_left_alone_where_it_does_not(run: Callable[..., Path], base: Path) -> None:
    folder = run(average=True, use=False)
    assert open_pipeline(str(folder), runtime=CPU)[1] == f"{base} + checkpoint-10"


def test_a_run_without_checkpoints_says_so(run: Callable[..., Path]) -> None:
    folder = run()
    for step in (5, 10):
        (folder / f"checkpoint-{step}").rename(folder / f"elsewhere-{step}")
    with pytest.raises(UserError, match="no checkpoint yet"):
        open_pipeline(str(folder), runtime=CPU)


@pytest.mark.parametrize("blocks", ["sgm", "diffusers"])
def test_kohya_loras_draw_as_in_diffusers(train: Callable[..., Any], base: Path, tmp_path: Path, blocks: str) -> None:
    train(ADAPTER, path=tmp_path / NAME)
    path = as_kohya(tmp_path / NAME, base, tmp_path / "kohya.safetensors", blocks=blocks)
    found = picture(base, [(str(path), 1.0)])
    assert differ(found, users(base, [(path, 1.0)])) <= 2
    assert differ(found, users(base, [(tmp_path / NAME, 1.0)])) <= 2
    assert differ(found, users(base, [])) > 2


def test_weights_of_several_loras_count(train: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    """One adapts all parts and one the denoiser alone."""
    train(ADAPTER, path=tmp_path / "a" / NAME)
    train(LoRA(rank=2), path=tmp_path / "b" / NAME, seed=9)
    stack = [(tmp_path / "a", 0.7), (tmp_path / "b", -0.4)]
    found = picture(base, [(str(p), w) for p, w in stack])
    assert differ(found, users(base, stack)) <= 2
    assert differ(found, users(base, [(tmp_path / "a", 0.7), (tmp_path / "b", 0.4)])) > 2


def test_loras_go_on_top_of_a_run(
    run: Callable[..., Path], train: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    folder = run()
    train(LoRA(rank=2), path=tmp_path / "b" / NAME, seed=9)
    pipeline, said = open_pipeline(str(folder), loras=[(str(tmp_path / "b"), 0.5)], runtime=CPU)
    assert said == f"{base} + checkpoint-10 + {tmp_path / 'b'} x 0.5"
    wanted = users(base, [(folder / "checkpoint-10", 1.0), (tmp_path / "b", 0.5)])
    assert differ(pixels(pipeline), wanted) <= 2


def test_strengths_that_differ_between_text_layers_are_kept(
    train: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    """diffusers alone loses these: it looks for each layer's alpha under a name that no layer has."""
    train(ADAPTER, path=tmp_path / NAME)
    path = as_kohya(tmp_path / NAME, base, tmp_path / "kohya.safetensors")
    tensors = load_file(path)
    one = "lora_te2_text_model_encoder_layers_0_self_attn_v_proj"
    tensors[f"{one}.alpha"] = torch.tensor(24.0)
    save_file(tensors, path)
    tensors[f"{one}.lora_up.weight"] *= 4
    tensors[f"{one}.alpha"] = torch.tensor(6.0)
    save_file(tensors, tmp_path / "same.safetensors")
    found = picture(base, [(str(path), 1.0)])
    assert differ(found, users(base, [(tmp_path / "same.safetensors", 1.0)])) <= 2


def test_a_lora_of_another_model_is_refused(train: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    train(LoRA(rank=2), path=tmp_path / NAME)
    tensors = load_file(tmp_path / NAME)
    name = next(iter(tensors)).rpartition(".lora_")[0]
    save_file({k.replace(name, f"{name}_x"): t for k, t in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="1 of the LoRA's"):
        picture(base, [(str(tmp_path / "a.safetensors"), 1.0)])


def test_a_lora_that_does_nothing_is_refused(train: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    train(LoRA(rank=2), path=tmp_path / NAME)
    zeros = {k: torch.zeros_like(t) if "lora_B" in k else t for k, t in load_file(tmp_path / NAME).items()}
    save_file(zeros, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="changes nothing"):
        picture(base, [(str(tmp_path / "a.safetensors"), 1.0)])


def test_mistaken_targets_say_what_to_do(train: Callable[..., Any], tmp_path: Path) -> None:
    train(LoRA(rank=2), path=tmp_path / "c" / NAME)
    with pytest.raises(UserError, match="base model is not known") as caught:
        picture(tmp_path / "c")
    assert "--lora" in caught.value.fix
    with pytest.raises(UserError, match="a LoRA, not a model") as caught:
        picture(tmp_path / "c" / NAME)
    assert "--lora" in caught.value.fix
    with pytest.raises(UserError, match="no folder or file"):
        picture(tmp_path / "absent")


def test_a_lora_that_is_not_there_is_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        picture(base, [(str(tmp_path / "absent.safetensors"), 1.0)])
    assert "absent.safetensors" in str(caught.value)
    assert "--lora" in str(caught.value)
