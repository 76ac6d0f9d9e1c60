"""One training step from the files on disk to the loss, computed again with diffusers and formulas, nothing of ours.

A fault anywhere between a picture and its gradient (another caption, a wrong size or crop, an unscaled latent, the
wrong hidden layer, a shifted timestep, a target of the wrong sign) changes a number here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file

from gesso import stages
from gesso.config.run import RunConfig
from gesso.core.batch import Batch
from gesso.core.folder import RunFolder
from gesso.core.runtime import Runtime
from gesso.training.session import Session
from run_helpers import settings

SIDE = 64
GAMMA = 5.0
CAPTIONS = {
    "a red yurt in the steppe": (64, 64),
    "a mosaic of a yellow cat at night": (96, 64),
    "a woman in a blue robe at the market": (64, 128),
    "a black horse": (112, 64),
}
"""Sizes (width, height) whose cover of a square needs no resize, so that crops are whole pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of different sizes, each with a caption of its own."""
    made = tmp_path_factory.mktemp("whole-step")
    rng = np.random.default_rng(5)
    for i, (text, (width, height)) in enumerate(CAPTIONS.items()):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / f"{i}.png")
        (made / f"{i}.txt").write_text(text)
    return made


class Step:
    """What the denoiser was asked and answered in one step of a run, and what plain diffusers makes of its files."""

    def __init__(self, base: Path, run: RunConfig) -> None:
        place = RunFolder(run.folder)
        place.prepare()
        runtime = Runtime.detect("fp32", "cpu")
        data = stages.prepare(run, place, runtime, stages.ignore)
        session = Session.build(run, data.parts, runtime)
        self.asked: list[Any] = []
        self.answered: list[torch.Tensor] = []
        assert session.parts.denoiser is not None
        session.parts.denoiser.register_forward_hook(self._keep, with_kwargs=True)
        (self.batch,) = data.stream.window(0)
        self.loss = run.objective.loss(session.policy, self.batch).detach()
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(base)
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.t = torch.floor(self.batch.u * 1000).long()

    def _keep(self, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        noisy, t, text = args
        self.asked.append((noisy, t, text, kwargs["added_cond_kwargs"]))
        self.answered.append(output[0].detach())

    def latents(self) -> torch.Tensor:
        """The pictures on disk, cropped in the middle and encoded by the VAE of the pipeline."""
        vae, batch = self.pipeline.vae, self.batch
        rows = []
        for file in batch.files:
            pixels = np.asarray(Image.open(file), np.float32) / 127.5 - 1
            top, left = corner(file)
            rows.append(torch.from_numpy(pixels[top : top + SIDE, left : left + SIDE]).permute(2, 0, 1))
        with torch.no_grad():
            found = vae.encode(torch.stack(rows)).latent_dist
        drawn = torch.from_numpy(batch.draws.normal("vae posterior", found.mean.shape[1:]))
        return (found.mean + found.std * drawn) * vae.config.scaling_factor


def corner(file: str) -> tuple[int, int]:
    """(top, left) of the middle square."""
    width, height = Image.open(file).size
    return (height - SIDE) // 2, (width - SIDE) // 2


def said(file: str) -> str:
    return Path(file).with_suffix(".txt").read_text()


@pytest.fixture(scope="module", params=["cached text", "live text"])
def step(
    request: pytest.FixtureRequest, tiny_base: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Step:
    place = tmp_path_factory.mktemp("whole-step-run")
    overrides = {
        "data__sources": [{"path": str(folder)}],
        "data__buckets": {"enabled": False},
        "data__captions__dropout": 0.0,
        "data__flip": False,
        "training__batch_size": 4,
        "training__accumulation": 1,
        "adapter__train_text_encoders": request.param == "live text",
        "objective__min_snr_gamma": GAMMA,
    }
    values = settings("run", tiny_base, folder, place / "cache", place, overrides)
    return Step(tiny_base, RunConfig.model_validate(values))


def test_every_picture_comes_once_with_its_own_caption(step: Step) -> None:
    batch: Batch = step.batch
    assert sorted(said(file) for file in batch.files) == sorted(CAPTIONS)
    assert list(batch.captions) == [said(file) for file in batch.files]


def test_the_denoiser_reads_the_caption_of_the_picture_as_diffusers_encodes_it(step: Step) -> None:
    ((_, _, text, added),) = step.asked
    for i, file in enumerate(step.batch.files):
        hidden, _, pooled, _ = step.pipeline.encode_prompt(said(file), do_classifier_free_guidance=False)
        torch.testing.assert_close(text[i], hidden[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(added["text_embeds"][i], pooled[0], rtol=1e-4, atol=1e-5)


def test_the_denoiser_is_told_the_size_and_crop_that_diffusers_would_tell(step: Step) -> None:
    width = step.pipeline.text_encoder_2.config.projection_dim
    ((_, _, _, added),) = step.asked
    for i, file in enumerate(step.batch.files):
        wide, high = Image.open(file).size
        ids = step.pipeline._get_add_time_ids(
            (high, wide), corner(file), (SIDE, SIDE), dtype=torch.float32, text_encoder_projection_dim=width
        )
        assert torch.equal(added["time_ids"][i], ids[0])


def test_the_denoiser_sees_the_picture_of_the_file_at_the_noise_level_of_diffusers(step: Step) -> None:
    ((noisy, t, _, _),) = step.asked
    assert torch.equal(t, step.t)
    wanted = step.scheduler.add_noise(step.latents(), step.batch.noise, step.t)
    torch.testing.assert_close(noisy, wanted, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_weighted_error_in_the_noise(step: Step) -> None:
    a2 = step.scheduler.alphas_cumprod.double()[step.t]
    snr = a2 / (1 - a2)
    error = (step.answered[0] - step.batch.noise).square().mean((1, 2, 3))
    torch.testing.assert_close(step.loss, (error * snr.clamp(max=GAMMA) / snr).float(), rtol=1e-4, atol=1e-6)


def test_the_average_is_that_of_the_weights_that_were_saved(make_run: Callable[..., RunConfig]) -> None:
    """Of every step's weights in float64, by the formula: half of what is new at first, then the decay's share."""
    decay, steps = 0.5, 6
    run = make_run(
        "run",
        training__steps=steps,
        training__ema={"enabled": True, "decay": decay},
        checkpoint={"every": 1, "keep_last": steps},
    )
    where = stages.train(run)
    name = "pytorch_lora_weights.safetensors"
    saved = [load_file(where / f"checkpoint-{i}" / name) for i in range(1, steps + 1)]
    wanted = {key: tensor.double() for key, tensor in saved[0].items()}
    for k, weights in enumerate(saved[1:], start=1):
        keep = min(decay, (1 + k) / (10 + k))
        wanted = {key: keep * before + (1 - keep) * weights[key] for key, before in wanted.items()}
    found = load_file(where / f"checkpoint-{steps}" / "ema" / name)
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.double(), wanted[key], rtol=1e-5, atol=1e-9)
    gap = max(float((found[key] - saved[-1][key]).abs().max()) for key in found)
    assert gap > 1e-5, "the average equals the weights, so the comparison proves nothing"


def test_every_file_of_a_run_carries_the_strength_that_was_trained(
    make_run: Callable[..., RunConfig], tiny_base: Path, tmp_path: Path
) -> None:
    """Merged by plain diffusers, each adds (alpha / rank) B A to the weights: by the checkpoint, both formats, all."""
    rank, alpha = 4, 6
    run = make_run("run", adapter={"rank": rank, "alpha": alpha, "train_text_encoders": True}, training__steps=3)
    where = stages.train(run)
    trained = load_file(where / "checkpoint-3" / "ema" / "pytorch_lora_weights.safetensors")
    layers = sorted(name.removesuffix(".lora_A.weight") for name in trained if name.endswith(".lora_A.weight"))
    wanted = {
        name: alpha / rank * trained[f"{name}.lora_B.weight"] @ trained[f"{name}.lora_A.weight"] for name in layers
    }
    files = [where / "checkpoint-3" / "ema", where / "run.safetensors"]
    files += [stages.export(str(where), format=f, output=tmp_path / f"{f}.safetensors") for f in ("diffusers", "kohya")]
    before = weights(StableDiffusionXLPipeline.from_pretrained(tiny_base))
    assert {name for name in wanted if name in before} == wanted.keys()
    largest = max(float(delta.abs().max()) for delta in wanted.values())
    for file in files:
        pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_base)
        pipeline.load_lora_weights(file)
        pipeline.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
        pipeline.unload_lora_weights()
        after = weights(pipeline)
        for name, delta in wanted.items():
            torch.testing.assert_close(after[name] - before[name], delta, rtol=0, atol=0.02 * largest, msg=str(file))


def weights(pipeline: Any) -> dict[str, torch.Tensor]:
    """Copies of the linear layers' weights, under the names that LoRA files have for them."""
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        for name, tensor in pipeline.components[part].state_dict().items():
            path = name.removeprefix("text_model.")
            prefix = f"{part}." if part == "unet" else f"{part}.text_model."
            found[f"{prefix}{path}".removesuffix(".weight")] = tensor.detach().clone()
    return found
