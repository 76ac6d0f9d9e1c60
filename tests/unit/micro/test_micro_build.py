"""The micro models can be made anew: resumable, decided by the recipe, and packed as they are shipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModelWithProjection

from gesso.config.run import EMA, Optimizer, Training
from gesso.core.batch import Batch
from gesso.core.resolve import file_sha256
from gesso.core.schedule import Schedule
from gesso.errors import Interrupted, UserError
from gesso.micro import build, painter, pretraining, world
from gesso.micro.build import Recipe
from gesso.micro.pretraining import Pictures


def short(steps: int, batch_size: int = 4) -> Training:
    return Training(
        steps=steps,
        batch_size=batch_size,
        learning_rate=1e-3,
        schedule=Schedule(type="cosine", warmup=1),
        optimizer=Optimizer(type="muon", weight_decay=0.0),
        precision="fp32",
        device="cpu",
        ema=EMA(enabled=True, decay=0.9),
    )


RECIPE = Recipe(
    pictures=12, vae_pictures=12, characters=3, vae=short(4), sdxl=short(2), clip=short(2), identity=short(2, 8)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    patch = pytest.MonkeyPatch()
    patch.setattr(build, "RUN_FILE", build.RUN_FILE.replace("inference_steps: 20", "inference_steps: 1"))
    patch.setenv("GESSO_CACHE", str(tmp_path_factory.mktemp("cache")))
    try:
        return build.build(tmp_path_factory.mktemp("build"), emit=lambda event: None, recipe=RECIPE)
    finally:
        patch.undo()


def test_the_folder_loads_in_diffusers_unchanged_and_draws(made: dict[str, Path]) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(made["weights"] / "sdxl")
    pipeline.set_progress_bar_config(disable=True)
    kinds = {network.dtype for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)}
    assert kinds == {torch.float32}
    picture = pipeline("a red horse", num_inference_steps=2, guidance_scale=4.0).images[0]
    assert picture.size == (world.SIDE, world.SIDE)


def test_every_network_was_trained(made: dict[str, Path]) -> None:
    run = made["sdxl"].parent
    for part in ("unet", "text_encoder", "text_encoder_2"):
        name = "diffusion_pytorch_model" if part == "unet" else "model"
        before, after = (
            {k.removeprefix("text_model."): t for k, t in load_file(folder / part / f"{name}.safetensors").items()}
            for folder in (run.parent / "start", run / "checkpoint-2")
        )
        still = {key for key in before if torch.equal(before[key], after[key])}
        # SDXL reads the last but one layer of its first encoder, so that what comes after it has nothing to learn.
        unread = ("encoder.layers.1.", "final_layer_norm.") if part == "text_encoder" else ()
        assert not {key for key in still if not key.startswith(unread)}, part
    vae = AutoencoderKL.from_pretrained(made["vae"])
    assert torch.equal(
        vae.encoder.conv_in.weight.half(),
        load_file(made["weights"] / "sdxl" / "vae" / "diffusion_pytorch_model.safetensors")["encoder.conv_in.weight"],
    )


def test_latents_have_unit_deviation(made: dict[str, Path]) -> None:
    vae = AutoencoderKL.from_pretrained(made["vae"])
    pictures = pretraining.pixels([painter.paint(scene) for scene in world.scenes(0, 12)])
    with torch.no_grad():
        latents = vae.encode(pretraining.scaled(pictures)).latent_dist.mean * vae.config.scaling_factor
    assert float(latents.std()) == pytest.approx(1, abs=0.01)


def test_the_weights_are_packed_as_they_are_shipped(made: dict[str, Path]) -> None:
    folder = made["weights"]
    record = json.loads((folder / "recipe.json").read_text())
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 6
    for file in files:
        assert record["sha256"][str(file.relative_to(folder))] == file_sha256(file)
        assert {t.dtype for t in load_file(file).values() if t.is_floating_point()} == {torch.float16}
    assert record["bytes"] == sum(file.stat().st_size for file in files) < 24_000_000
    assert Recipe.model_validate(record["recipe"]) == RECIPE
    assert record["stages"]["vae"]["steps"] == 4
    assert len(record["stages"]["sdxl"]["loss"]) == 2
    assert record["stages"]["sdxl"]["validation_loss"]
    assert "micro:sdxl" in (folder / "README.md").read_text(encoding="utf-8")
    CLIPModel.from_pretrained(folder / "clip")
    CLIPVisionModelWithProjection.from_pretrained(folder / "identity")


def test_a_second_call_makes_nothing_again(made: dict[str, Path]) -> None:
    file = made["vae"] / "diffusion_pytorch_model.safetensors"
    before = file.stat().st_mtime_ns
    again = build.build(made["vae"].parent, emit=lambda event: None, recipe=RECIPE, only=["vae"])
    assert again == {"vae": made["vae"]}
    assert file.stat().st_mtime_ns == before


def test_the_fingerprint_follows_what_a_stage_depends_on() -> None:
    changed = RECIPE.model_copy(update={"clip": short(3)})
    assert changed.fingerprint("clip") != RECIPE.fingerprint("clip")
    assert changed.fingerprint("sdxl") == RECIPE.fingerprint("sdxl")
    for stage in build.STAGES:
        assert RECIPE.model_copy(update={"seed": 1}).fingerprint(stage) != RECIPE.fingerprint(stage)
    for stage in ("vae", "sdxl"):
        assert RECIPE.model_copy(update={"vae": short(5)}).fingerprint(stage) != RECIPE.fingerprint(stage)


def test_an_unknown_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such stage: unet"):
        build.build(tmp_path, emit=lambda event: None, only=["unet"])


class _Stopped(Exception):
    """The process died here."""


def _pretrained(folder: Path, *, die_at: int | None = None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, 3, 3, padding=1))
    pictures = pretraining.pixels([painter.paint(scene) for scene in world.scenes(0, 20)])
    stream = Pictures(pictures, [str(i) for i in range(20)], 4, seed=3, crop=lambda step: 16 if step < 4 else 32)

    def loss(network: Any, batch: Batch) -> Tensor:
        noise = torch.from_numpy(batch.draws.normal("noise", batch.latents.shape[1:]))
        return (network(batch.latents + 0.1 * noise) - batch.latents).square().flatten(1).mean(1)

    def emit(event: Any) -> None:
        if die_at is not None and type(event).__name__ == "StepDone" and event.step == die_at:
            raise _Stopped

    monkeypatch.setattr(pretraining, "_SAVE_EVERY", 2)
    pretraining.pretrain("toy", network, loss=loss, stream=stream, training=short(8), seed=0, folder=folder, emit=emit)
    return network.state_dict()


def test_a_pretraining_that_died_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _pretrained(tmp_path / "whole", monkeypatch=monkeypatch)
    for die_at in (3, 5, 6):
        with pytest.raises(_Stopped):
            _pretrained(tmp_path / str(die_at), die_at=die_at, monkeypatch=monkeypatch)
        resumed = _pretrained(tmp_path / str(die_at), monkeypatch=monkeypatch)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), die_at


def test_stopping_saves_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import signal

    def emit(event: Any) -> None:
        if type(event).__name__ == "StepDone" and event.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    torch.manual_seed(0)
    network = nn.Conv2d(3, 3, 1)
    stream = Pictures(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), [str(i) for i in range(8)], 2, seed=0)
    with pytest.raises(Interrupted):
        pretraining.pretrain(
            "toy",
            network,
            loss=lambda n, batch: n(batch.latents).square().flatten(1).mean(1),
            stream=stream,
            training=short(8, 2),
            seed=0,
            folder=tmp_path,
            emit=emit,
        )
    assert (tmp_path / "checkpoint-3").is_dir()


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    pictures = torch.arange(10 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(10, 3, 8, 8)
    names = [str(i) for i in range(10)]
    first, again = (next(Pictures(pictures, names, 4, seed=1).window(7)) for _ in range(2))
    assert torch.equal(first.latents, again.latents)
    assert first.captions == again.captions
    other = next(Pictures(pictures, names, 4, seed=1).window(8))
    assert not torch.equal(first.latents, other.latents)
    for row, name in zip(first.latents, first.captions, strict=True):
        assert torch.equal(row, pretraining.scaled(pictures[int(name)]))


def test_contrast_counts_equal_captions_as_right_answers() -> None:
    """Two pictures of one caption: the loss is least where the text fits both, and not where they repel."""

    class Fixed:
        def __init__(self, logits: Tensor) -> None:
            self.logits_per_image = logits

        def __call__(self, **inputs: Any) -> Fixed:
            return self

    batch = next(Pictures(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ["same", "same"], 2, seed=0).window(0))
    tokens = torch.zeros(2, 4, dtype=torch.long)
    even = pretraining.contrasting(lambda texts: tokens, Fixed(torch.full((2, 2), 5.0)), batch)
    diagonal = pretraining.contrasting(lambda texts: tokens, Fixed(torch.tensor([[5.0, 0.0], [0.0, 5.0]])), batch)
    assert even.mean() < diagonal.mean()
