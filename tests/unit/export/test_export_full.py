"""A fully trained model as a diffusers folder: what users load is what was trained, or nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from gesso import stages
from gesso.config.run import RunConfig
from gesso.core.events import Event, Finished
from gesso.core.runtime import Runtime
from gesso.errors import ResourceError, UserError
from gesso.evaluation.sample import Shot, draw, open_pipeline
from gesso.export import pipeline
from run_helpers import MakeRun, settings

CPU = Runtime(torch.device("cpu"), "fp32")
FULL = {"type": "full", "train_text_encoders": True}
SHOT = Shot("a photo of thing", seed=7, steps=2, guidance=5.0, width=64, height=64)
WEIGHTS = "diffusion_pytorch_model.safetensors"


SHORT: dict[str, Any] = {"adapter": FULL, "training__steps": 3, "training__learning_rate": 3e-3}


@pytest.fixture(scope="module")
def trained_once(tiny_base: Path, pictures: Path, encodings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = settings("thing", tiny_base, pictures, encodings, tmp_path_factory.mktemp("full"), SHORT)
    return stages.train(RunConfig.model_validate(values))


@pytest.fixture
def folder(trained_once: Path, tmp_path: Path) -> Path:
    """A short full run with averaged weights."""
    return Path(shutil.copytree(trained_once, tmp_path / "thing"))


def train(make_run: MakeRun, **overrides: Any) -> Path:
    return stages.train(make_run("thing", **SHORT | overrides))


def pixels(pipe: Any) -> np.ndarray:
    return np.asarray(draw(pipe, [SHOT])[0]).astype(int)


def ours(target: Path) -> np.ndarray:
    return pixels(open_pipeline(str(target), runtime=CPU)[0])


def users(target: Path) -> np.ndarray:
    return pixels(StableDiffusionXLPipeline.from_pretrained(target, add_watermarker=False))


def differ(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def test_the_exported_folder_draws_what_the_run_draws(folder: Path, tiny_base: Path) -> None:
    path = stages.export(str(folder), precision="fp32")
    assert path == folder / "thing-checkpoint-3"
    assert differ(users(path), ours(folder)) <= 2
    assert differ(users(path), users(tiny_base)) > 2
    assert differ(ours(path), ours(folder)) <= 2, "it serves as a target itself"


def test_a_run_a_checkpoint_and_its_average_are_told_apart(folder: Path, tmp_path: Path) -> None:
    _, said = open_pipeline(str(folder), runtime=CPU)
    assert said.endswith("checkpoint-3 (averaged)")
    _, said = open_pipeline(str(folder / "checkpoint-3"), runtime=CPU)
    assert said.endswith("checkpoint-3 (averaged)"), "as the run samples"
    last = stages.export(str(folder), precision="fp32", use_ema=False, output=tmp_path / "last")
    mean = stages.export(str(folder), precision="fp32", use_ema=True, output=tmp_path / "mean")
    for path, saved in ((last, folder / "checkpoint-3"), (mean, folder / "checkpoint-3" / "ema")):
        wanted, got = load_file(saved / "unet" / WEIGHTS), load_file(path / "unet" / WEIGHTS)
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[k], got[k]) for k in wanted)
    assert differ(users(last), users(mean)) > 0
    assert differ(users(mean), ours(folder / "checkpoint-3" / "ema")) <= 2


def test_checkpoint_folders_load_network_by_network(folder: Path) -> None:
    for place in (folder / "checkpoint-3", folder / "checkpoint-3" / "ema"):
        for kind, part in (
            (UNet2DConditionModel, "unet"),
            (CLIPTextModel, "text_encoder"),
            (CLIPTextModelWithProjection, "text_encoder_2"),
        ):
            network, info = kind.from_pretrained(place / part, output_loading_info=True)
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            (file,) = (place / part).glob("*.safetensors")
            saved = load_file(file)
            loaded = network.state_dict()
            for name, tensor in saved.items():
                key = name if name in loaded else name.removeprefix("text_model.")
                assert torch.equal(loaded[key], tensor)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_holds_for_every_network(folder: Path, precision: str) -> None:
    path = stages.export(str(folder), precision=precision)  # type: ignore[arg-type]
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (path / part).glob("*.safetensors")
        tensors = load_file(file)
        assert {t.dtype for t in tensors.values()} == {dtype}
        if part.startswith("text_encoder"):
            assert all(k.startswith(("text_model.", "text_projection.")) for k in tensors), "for older readers"


def test_a_finished_run_leaves_the_model_and_a_longer_one_replaces_it(make_run: MakeRun) -> None:
    told: list[Event] = []
    run = make_run("thing", adapter=FULL, training__steps=2, training__schedule={"type": "constant"})
    folder = stages.train(run, emit=told.append)
    path = folder / "thing"
    assert isinstance(told[-1], Finished)
    assert told[-1].outputs["model"] == str(path)
    first = load_file(path / "unet" / WEIGHTS)
    assert first["conv_in.weight"].dtype == torch.float16
    assert differ(users(path), ours(folder)) <= 3
    longer = make_run("thing", adapter=FULL, training__steps=3, training__schedule={"type": "constant"})
    stages.train(longer, resume="latest")
    assert not torch.equal(load_file(path / "unet" / WEIGHTS)["conv_in.weight"], first["conv_in.weight"])
    assert not [p.name for p in folder.iterdir() if p.name.startswith((".partial", ".trash"))]


def test_long_prompts_leave_a_class_that_diffusers_has(make_run: MakeRun, tiny_base: Path) -> None:
    folder = train(make_run, model={"base": str(tiny_base), "long_prompts": "chunk"})
    index = json.loads((folder / "thing" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    users(folder / "thing")


def test_nothing_in_the_folder_names_a_place_on_this_machine(folder: Path, tmp_path: Path) -> None:
    for file in [*(folder / "thing").rglob("*.json"), *(folder / "checkpoint-3").glob("*/config.json")]:
        assert str(tmp_path.parent) not in file.read_text(), file
        assert not re.search(r'"_name_or_path"', file.read_text()), file


def test_frozen_text_encoders_are_those_of_the_base(make_run: MakeRun, tiny_base: Path) -> None:
    folder = train(make_run, adapter={"type": "full"})
    assert not (folder / "checkpoint-3" / "text_encoder").exists()
    path = stages.export(str(folder), precision="fp32")
    assert differ(users(path), ours(folder)) <= 2
    for part in ("text_encoder", "text_encoder_2"):
        (one,), (other,) = ((f / part).glob("*.safetensors") for f in (path, tiny_base))
        assert all(k.startswith(("text_model.", "text_projection.")) for k in load_file(one)), "for older readers"
        wanted = {k.removeprefix("text_model."): t for k, t in load_file(other).items()}
        got = {k.removeprefix("text_model."): t for k, t in load_file(one).items()}
        assert wanted.keys() == got.keys()
        assert all(torch.equal(wanted[k], got[k]) for k in wanted)


def test_what_is_there_stays(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "thing", tmp_path):
        before = sorted(p.name for p in path.iterdir())
        with pytest.raises(UserError, match="something is there already"):
            stages.export(str(folder), output=path)
        assert sorted(p.name for p in path.iterdir()) == before


def test_options_of_lora_files_are_refused_with_the_reason(folder: Path) -> None:
    with pytest.raises(UserError, match="kohya is a format of LoRA files"):
        stages.export(str(folder), format="kohya")
    with pytest.raises(UserError, match="only LoRA files are pushed") as caught:
        stages.export(str(folder), hub_repo="me/thing")
    assert "hf upload me/thing" in caught.value.fix


def altered(real: Any, change: Any) -> Any:
    def write(folder: Path, family: Any, parts: Any) -> None:
        real(folder, family, parts)
        change(folder)

    return write


def zero_one_tensor(folder: Path) -> None:
    file = folder / "text_encoder_2" / "model.safetensors"
    tensors = load_file(file)
    tensors["text_projection.weight"] = torch.zeros_like(tensors["text_projection.weight"])
    save_file(tensors, file, {"format": "pt"})


def drop_one_tensor(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    tensors = load_file(file)
    del tensors["mid_block.resnets.0.conv1.weight"]
    save_file(tensors, file, {"format": "pt"})


def another_vae(folder: Path) -> None:
    """Which the trained model's answers do not depend on, but its pictures do."""
    file = folder / "vae" / WEIGHTS
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"] += 0.5
    save_file(tensors, file, {"format": "pt"})


def another_activation(folder: Path) -> None:
    file = folder / "unet" / "config.json"
    file.write_text(file.read_text().replace('"silu"', '"gelu"'))


def no_tokenizer(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        file.unlink()


@pytest.mark.parametrize("change", [zero_one_tensor, drop_one_tensor, another_vae, another_activation, no_tokenizer])
def test_a_folder_that_is_not_the_trained_model_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    monkeypatch.setattr(pipeline, "_write", altered(pipeline._write, change))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="does not reload as the trained model"):
        stages.export(str(folder), precision="fp32", output=tmp_path / "out" / "model")
    assert not list((tmp_path / "out").iterdir())


def test_a_failed_replacement_keeps_the_older_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p: p.read_bytes() for p in (folder / "thing").rglob("*") if p.is_file()}

    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "_write", full_disk)
    from gesso.config import files

    run = files.load(folder / "run.yaml").run
    trained = pipeline.Trained.load(run, folder / "checkpoint-3" / "ema", runtime=CPU)
    with pytest.raises(ResourceError, match="No space left"):
        trained.finish(folder, runtime=CPU)
    assert {p: p.read_bytes() for p in (folder / "thing").rglob("*") if p.is_file()} == before
    assert not [p.name for p in folder.iterdir() if p.name.startswith((".partial", ".trash"))]


def test_weights_beyond_fp16_are_refused_and_fp32_is_named(folder: Path) -> None:
    file = folder / "checkpoint-3" / "ema" / "unet" / WEIGHTS
    tensors = load_file(file)
    tensors["mid_block.resnets.0.conv1.bias"] += 1e5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match="of unet do not fit into float16") as caught:
        stages.export(str(folder / "checkpoint-3"), precision="fp16")
    assert "fp32" in caught.value.fix
    assert not (folder / "thing-checkpoint-3").exists()


def test_a_lora_goes_on_top_of_a_full_run(folder: Path, make_run: MakeRun, tmp_path: Path) -> None:
    lora = stages.train(make_run("lora", training__steps=2, training__learning_rate=5e-2))
    plain, both = tmp_path / "plain.png", tmp_path / "both.png"
    common: dict[str, Any] = {"prompts": ["a photo of thing"], "steps": 2, "device": "cpu"}
    stages.sample(str(folder), output=plain, **common)
    stages.sample(str(folder), loras=[(str(lora / "lora.safetensors"), 1.0)], output=both, **common)
    assert plain.read_bytes() != both.read_bytes()


def test_weights_without_their_run_say_so(folder: Path, tmp_path: Path) -> None:
    (folder / "checkpoint-3").rename(tmp_path / "checkpoint-3")
    with pytest.raises(UserError, match=r"without their run\.yaml"):
        open_pipeline(str(tmp_path / "checkpoint-3"), runtime=CPU)


def test_a_trained_network_that_is_damaged_is_named(folder: Path) -> None:
    (folder / "checkpoint-3" / "ema" / "text_encoder" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="weights of text_encoder cannot be read"):
        open_pipeline(str(folder / "checkpoint-3" / "ema"), runtime=CPU)
