"""How the micro models are made: `gesso micro build` paints the world and trains four networks on it.

First a VAE, then the denoiser and its text encoders as an ordinary full fine-tune from random weights, and beside
them a CLIP and an identity encoder. Every stage is resumable and decided by the recipe and its seed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTokenizer

from gesso import stages
from gesso.config import files
from gesso.config.optimizer import Optimizer
from gesso.config.run import EMA, Training
from gesso.core import checkpoints
from gesso.core.events import Progress
from gesso.core.random import generator
from gesso.core.schedule import Schedule
from gesso.core.seams import Emit, Spec
from gesso.errors import UserError
from gesso.micro import captions, characters, models, painter, pretraining, words, world
from gesso.micro.pack import pack
from gesso.micro.pretraining import Pictures
from gesso.micro.score import one_thread

STAGES = ("vae", "sdxl", "clip", "identity")


def _training(steps: int, batch_size: int, rate: float, *, decay: float, warmup: int = 50) -> Training:
    return Training(
        steps=steps,
        batch_size=batch_size,
        learning_rate=rate,
        schedule=Schedule(type="cosine", warmup=warmup),
        optimizer=Optimizer(type="muon", beta2=0.99, weight_decay=0.0),
        precision="fp32",
        ema=EMA(enabled=True, decay=decay),
    )


class Recipe(Spec):
    """All that decides the weights."""

    seed: int = 0
    """Of the world, the first weights and all draws."""
    pictures: int = 24_000
    """Pictures of the base world."""
    vae_pictures: int = 6_000
    """How many of them the VAE is trained on."""
    characters: int = 400
    """People whom the identity encoder learns to tell apart."""
    vae: Training = _training(1800, 16, 2e-3, decay=0.995)
    """Small crops for the first 70 % of the steps, then whole pictures."""
    sdxl: Training = _training(5500, 32, 3e-3, decay=0.999, warmup=100)
    """Denoiser and text encoders together."""
    text_encoder_rate: float = 2e-3
    """Learning rate of the text encoders."""
    clip: Training = _training(2500, 64, 1e-3, decay=0.995)
    """Pictures against captions."""
    identity: Training = _training(1500, 64, 1e-3, decay=0.995)
    """Pictures of one character against those of others."""

    def fingerprint(self, stage: str) -> str:
        """Changes with any setting that a stage's weights depend on, with the networks, and with the world itself."""
        vae, sdxl = {"vae", "vae_pictures"}, {"vae", "vae_pictures", "pictures", "sdxl", "text_encoder_rate"}
        own = {"vae": vae, "sdxl": sdxl, "clip": {"clip", "pictures"}, "identity": {"identity", "characters"}}[stage]
        size = dataclasses.asdict(models.MICRO)
        network = {key: value for key, value in size.items() if stage == "sdxl" or key.startswith(stage)}
        digest = hashlib.sha256(self.model_dump_json(include=own | {"seed"}).encode())
        digest.update(json.dumps([network, words.COMMON]).encode())
        digest.update(_looks(self.seed))
        return digest.hexdigest()[:8]


def build(folder: Path, *, emit: Emit, recipe: Recipe | None = None, only: Sequence[str] = STAGES) -> dict[str, Path]:
    """Make the models of the stages in `only`; returns the folder of each, and of the packed weights if all were made.

    Goes on where an earlier call stopped. The two encoders are made in a second process beside the denoiser. Raises
    `UserError` for an unknown stage or where that process failed.
    """
    if unknown := set(only) - set(STAGES):
        raise UserError(f"no such stage: {', '.join(unknown)}", where="--only", fix=f"take from {', '.join(STAGES)}")
    recipe = recipe or Recipe()
    makers: dict[str, Callable[[Path, Recipe, Emit], Path]] = {
        "vae": make_vae,
        "sdxl": make_sdxl,
        "clip": make_clip,
        "identity": make_identity,
    }
    together = set(only) == set(STAGES)
    with one_thread(), _beside(folder, recipe, STAGES[2:] if together else ()) as finished:
        made = {stage: makers[stage](folder, recipe, emit) for stage in STAGES[: 2 if together else 4] if stage in only}
        finished()
        if together:
            made |= {stage: makers[stage](folder, recipe, emit) for stage in STAGES[2:]}
            made["weights"] = pack(folder, made, recipe=recipe.model_dump(mode="json"))
    return made


@functools.cache
def _looks(seed: int) -> bytes:
    """Changes with what the world looks like and how it is captioned."""
    digest = hashlib.sha256()
    for i, scene in enumerate(world.scenes(seed, 50)):
        digest.update(painter.paint(scene).tobytes())
        digest.update(captions.say(scene.facts, generator(seed, "caption", i)).encode())
    return digest.digest()


@contextmanager
def _beside(folder: Path, recipe: Recipe, only: Sequence[str]) -> Iterator[Callable[[], None]]:
    """Inside, another process makes the stages in `only`; the yielded function waits for it."""
    if not only:
        yield lambda: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{'-'.join(only)}.log"
    with log.open("a") as out:
        command = [sys.executable, "-m", "gesso.micro.build", str(folder), recipe.model_dump_json(), *only]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)

    def finished() -> None:
        if process.wait():
            raise UserError(f"making {' and '.join(only)} failed", where=str(log), fix="read it, then start again")

    try:
        yield finished
    finally:
        process.terminate()
        process.wait()


def make_vae(folder: Path, recipe: Recipe, emit: Emit) -> Path:
    """The VAE, as a folder that `AutoencoderKL.from_pretrained` reads."""
    result = _place(folder, "vae", recipe)
    if (result / "config.json").is_file():
        return result
    vae = models.autoencoder(models.MICRO, seed=recipe.seed)
    start_as_identity(vae)
    scenes = list(world.scenes(recipe.seed, recipe.vae_pictures))
    steps, side = recipe.vae.steps or 0, world.SIDE // 2
    stream = Pictures(
        pixels=pretraining.pixels([painter.paint(scene) for scene in scenes]),
        captions=[str(i) for i in range(len(scenes))],
        batch_size=recipe.vae.batch_size,
        seed=recipe.seed,
        crop=lambda step: side if step < 0.7 * steps else None,
    )
    _pretrain("vae", vae, pretraining.autoencoding, stream, recipe.vae, result, recipe, emit)
    vae.register_to_config(scaling_factor=unit_scale(vae, stream.pixels[:2000]))
    vae.save_pretrained(result)
    return result


def make_sdxl(folder: Path, recipe: Recipe, emit: Emit) -> Path:
    """The whole micro SDXL, by an ordinary run from random weights; returns the exported diffusers folder."""
    vae, place = make_vae(folder, recipe, emit), _place(folder, "sdxl", recipe)
    run_file = place / "run.yaml"
    if not run_file.is_file():
        start = models.networks(models.MICRO, seed=recipe.seed)
        start.vae = AutoencoderKL.from_pretrained(vae)
        start_as_identity(start.unet)
        for encoder in (start.text_encoder, start.text_encoder_2):
            spread_embeddings(encoder, seed=recipe.seed)
        models.save(place / "start", start, zeros_for_empty=models.MICRO.zeros_for_empty)
        paint_pictures(place / "pictures", list(world.scenes(recipe.seed, recipe.pictures)), recipe.seed, emit)
        paint_pictures(place / "validation", world.held_out_scenes(recipe.seed, 32), recipe.seed, emit)
        write_run_file(run_file, recipe)
    run = files.load(run_file, sets=[f"output={json.dumps(str((place / 'run').absolute()))}"]).run
    result = run.folder / run.name
    if not (result / "model_index.json").is_file():
        stages.train(run, resume="latest" if checkpoints.listed(run.folder) else None, emit=emit)
    return result


def make_clip(folder: Path, recipe: Recipe, emit: Emit) -> Path:
    """A small CLIP that knows the words of the painted world."""
    result = _place(folder, "clip", recipe)
    if (result / "config.json").is_file():
        return result
    network = models.clip(seed=recipe.seed)
    spread_embeddings(network.text_model, seed=recipe.seed)
    scenes = list(world.scenes(recipe.seed, recipe.pictures))
    texts = [captions.say(scene.facts, generator(recipe.seed, "caption", i)) for i, scene in enumerate(scenes)]
    stream = Pictures(
        pixels=pretraining.pixels([painter.paint(scene) for scene in scenes]),
        captions=texts,
        batch_size=recipe.clip.batch_size,
        seed=recipe.seed,
    )
    models.save_clip_files(result)
    tokenizer = CLIPTokenizer.from_pretrained(result)

    def tokenize(texts: Sequence[str]) -> Tensor:
        return tokenizer(list(texts), padding=True, return_tensors="pt").input_ids

    def loss(clip: Any, batch: Any) -> Tensor:
        return pretraining.contrasting(tokenize, clip, batch)

    _pretrain("clip", network, loss, stream, recipe.clip, result, recipe, emit)
    network.save_pretrained(result)
    return result


def make_identity(folder: Path, recipe: Recipe, emit: Emit) -> Path:
    """An encoder of people whose embeddings say who somebody is, whatever the place, the pose and the mood."""
    result = _place(folder, "identity", recipe)
    if (result / "config.json").is_file():
        return result
    network = models.identity(seed=recipe.seed)
    scenes = characters.scenes(recipe.seed, recipe.characters, each=24)
    stream = Pictures(
        pixels=pretraining.pixels([painter.paint(scene) for _, scene in scenes]),
        captions=[name for name, _ in scenes],
        batch_size=recipe.identity.batch_size,
        seed=recipe.seed,
    )
    _pretrain("identity", network, pretraining.telling_apart, stream, recipe.identity, result, recipe, emit)
    models.save_image_processor(result)
    network.save_pretrained(result)
    return result


def paint_pictures(folder: Path, scenes: Sequence[world.Scene], seed: int, emit: Emit) -> None:
    """Write pictures and a `metadata.jsonl` with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, scene in enumerate(scenes):
        name = f"{i:05d}.png"
        painter.paint(scene).save(folder / name)
        text = captions.say(scene.facts, generator(seed, "caption", i))
        lines.append(json.dumps({"file_name": name, "text": text}))
        if i % 500 == 499 or i + 1 == len(scenes):
            emit(Progress(0, "painting pictures", i + 1, len(scenes)))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


RUN_FILE = """\
# The run that made micro:sdxl: every weight of the denoiser and of both text encoders, from random ones.
name: micro-sdxl
seed: {seed}
model:
  base: start
data:
  sources:
    - path: pictures
  validation:
    path: validation
  resolution: 64
  buckets:
    enabled: false
  captions:
    dropout: 0.1
  cache: cache
adapter:
  type: full
  train_text_encoders: true
training:
  steps: {steps}
  batch_size: {batch}
  learning_rate: {rate}
  text_encoder_learning_rates: {text_rate}
  schedule:
    type: cosine
    warmup: {warmup}
  optimizer:
    type: muon
    beta2: {beta2}
    weight_decay: {weight_decay}
  precision: fp32
  ema:
    enabled: true
    decay: {decay}
objective:
  min_snr_gamma: 5
validation:
  every: 500
  timesteps: 8
preview:
  every: 1000
  inference_steps: 20
  guidance: 4
  prompts:
    - a smiling woman in a striped red robe and a blue cap at the market
    - a man in a patterned green robe and a yellow kalpak with black hair and a beard, waving, at night
    - a purple horse in the steppe
    - a mosaic of a yellow cat on a blue background
    - a sepia drawing of a person in a crown in the mountains
    - an outlined drawing of a red yurt at night
    - a white carpet on a green background
    - a person
checkpoint:
  every: 250
  keep_last: 2
trackers: []
"""


def write_run_file(path: Path, recipe: Recipe) -> None:
    """The run file of the denoiser's training."""
    training = recipe.sdxl
    text = RUN_FILE.format(
        seed=recipe.seed,
        steps=training.steps,
        batch=training.batch_size,
        rate=training.learning_rate,
        text_rate=recipe.text_encoder_rate,
        warmup=training.schedule.warmup,
        beta2=json.dumps(training.optimizer.beta2),
        weight_decay=json.dumps(training.optimizer.weight_decay),
        decay=training.ema.decay,
    )
    path.write_text(text, encoding="utf-8")


def start_as_identity(network: nn.Module) -> None:
    """Silence the second convolution of each residual block, so that the network starts nearly linear."""
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)


def spread_embeddings(encoder: Any, *, seed: int) -> None:
    """Draw token embeddings wider than CLIP's own start, which is so small that on a short run words stay alike."""
    weight = encoder.get_input_embeddings().weight
    with torch.no_grad():
        draws = generator(seed, "embeddings").standard_normal(tuple(weight.shape)) * 0.3
        weight.copy_(torch.from_numpy(draws))


@torch.no_grad()
def unit_scale(vae: Any, pixels: Tensor) -> float:
    """The factor that gives latents of [N, 3, H, W] uint8 pixels unit deviation."""
    means = [vae.encode(pretraining.scaled(rows)).latent_dist.mean for rows in pixels.split(100)]
    return round(1 / float(torch.cat(means).std()), 5)


def _place(folder: Path, stage: str, recipe: Recipe) -> Path:
    """A stage's folder: another recipe gets another one, so nothing that was made is written over."""
    place = folder / f"{stage}-{recipe.fingerprint(stage)}"
    place.mkdir(parents=True, exist_ok=True)
    return place


def _pretrain(
    name: str,
    network: Any,
    loss: pretraining.Loss,
    stream: Pictures,
    training: Training,
    place: Path,
    recipe: Recipe,
    emit: Emit,
) -> None:
    run = place / "run"
    pretraining.pretrain(
        name, network, loss=loss, stream=stream, training=training, seed=recipe.seed, folder=run, emit=emit
    )


if __name__ == "__main__":
    build(Path(sys.argv[1]), emit=lambda _: None, recipe=Recipe.model_validate_json(sys.argv[2]), only=sys.argv[3:])
