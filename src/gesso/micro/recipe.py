"""How the demo's base model is made: a VAE, two text encoders and a denoiser, trained on the painted world.

Everything is drawn, trained and kept on this machine, from one seed; about three minutes on two CPU cores.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTokenizer

from gesso.core.events import Progress
from gesso.core.noise import DDPM
from gesso.core.seams import Emit
from gesso.micro import models, words, world
from gesso.micro.halves import Halves, two_threads
from gesso.micro.models import Networks, Size
from gesso.micro.muon import Optimizer

BASE = Size(
    unet_channels=(32, 64),
    unet_layers=1,
    unet_transformers=(1, 1),
    unet_heads=(1, 4),
    time_channels=8,
    vae_channels=(12, 24, 32),
    vae_layers=1,
    vae_attention=False,
    text_widths=(32, 32),
    text_layers=(2, 2),
    norm_groups=4,
    resolution=world.SIDE,
)
"""A million parameters in the denoiser; pictures of 48 pixels become latents of 12."""
_RECORD = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights of the base model."""

    size: Size = BASE
    seed: int = 0
    pictures: int = 6000
    vae_steps: int = 850
    vae_batch: int = 8
    vae_rate: float = 2e-3
    steps: int = 1050
    batch: int = 32
    rate: float = 6e-3
    unconditional: float = 0.1
    """Share of the samples that are learnt without text, as zeros: what an empty negative prompt is in SDXL."""

    @property
    def fingerprint(self) -> str:
        """Changes with any setting above, and with the code that paints and trains."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode())
        for module in ("halves.py", "models.py", "muon.py", "recipe.py", "words.py", "world.py"):
            digest.update(Path(__file__).with_name(module).read_bytes())
        return digest.hexdigest()


def base_model(folder: Path, *, emit: Emit, recipe: Recipe | None = None) -> Path:
    """The base model as a diffusers folder: the one in `folder` if it was made by this recipe, else a new one."""
    recipe = recipe or Recipe()
    record = folder / _RECORD
    if record.exists() and json.loads(record.read_text())["fingerprint"] == recipe.fingerprint:
        return folder
    parts = train(recipe, emit=emit)
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    models.save(fresh, parts)
    content = {"fingerprint": recipe.fingerprint, **dataclasses.asdict(recipe)}
    (fresh / _RECORD).write_text(json.dumps(content, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return folder


def train(recipe: Recipe, *, emit: Emit) -> Networks:
    """The trained networks; torch's global generator is left as it was."""
    scenes = list(world.scenes(recipe.seed, recipe.pictures))
    pictures = pixels([world.paint(scene) for scene, _ in scenes])
    parts = models.networks(recipe.size, seed=recipe.seed)
    with torch.random.fork_rng(devices=[]), two_threads() as halves:
        torch.manual_seed(recipe.seed)
        train_vae(parts, pictures, recipe, halves=halves, emit=emit)
        latents = encode(parts, pictures, halves=halves)
        train_denoiser(parts, latents, [caption for _, caption in scenes], recipe, halves=halves, emit=emit)
    return parts


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as [N, 3, H, W] uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def train_vae(parts: Networks, pictures: Tensor, recipe: Recipe, *, halves: Halves, emit: Emit) -> None:
    """Fit the VAE: small crops first, which are cheap, then whole pictures, as group norms see them in use."""
    vae = parts.vae.train()
    _start_as_identity(vae)
    vae.to(memory_format=torch.channels_last)
    matrices, others = _by_shape(vae, keep_out=())
    optimizer = Optimizer(matrices, others, rate=recipe.vae_rate, steps=recipe.vae_steps)
    whole, side = recipe.size.resolution, recipe.size.resolution // 2
    for step in range(recipe.vae_steps):
        last = step >= 0.7 * recipe.vae_steps
        rows = torch.randint(len(pictures), (recipe.vae_batch // 2 if last else recipe.vae_batch,))
        top, left = (0, 0) if last else (int(v) * 4 for v in torch.randint((whole - side) // 4 + 1, (2,)))
        crop = pictures[rows] if last else pictures[rows, :, top : top + side, left : left + side]
        target = _scaled(crop)
        cells = target.shape[-1] // models.vae_factor(recipe.size)
        noise = torch.randn(len(rows), vae.config.latent_channels, cells, cells)
        loss_of = partial(vae_loss, vae, target, noise)
        optimizer.step(halves.gradients(loss_of, rows=len(rows), parameters=optimizer.parameters))
        _tell(emit, "training the VAE", step + 1, recipe.vae_steps)
    optimizer.finish()
    vae.eval().to(memory_format=torch.contiguous_format)


def vae_loss(vae: AutoencoderKL, target: Tensor, noise: Tensor, rows: slice) -> Tensor:
    """Squared and absolute error, and a weak KL term that keeps latents smooth enough to be denoised."""
    posterior = vae.encode(target[rows]).latent_dist
    error = vae.decode(posterior.mean + posterior.std * noise[rows]).sample - target[rows]
    divergence = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return error.square().mean() + 0.5 * error.abs().mean() + 2e-4 * divergence


def encode(parts: Networks, pictures: Tensor, *, halves: Halves) -> Tensor:
    """Latents [N, 4, h, w] of unit deviation; the factor that makes them so becomes the VAE's `scaling_factor`."""

    def mean(rows: Tensor) -> Tensor:
        return parts.vae.encode(_scaled(rows)).latent_dist.mean

    batches = [halves.mapped(mean, rows) for rows in pictures.split(100)]
    latents = torch.cat(batches)
    factor = round(1 / float(latents.std()), 5)
    parts.vae.register_to_config(scaling_factor=factor)
    return latents * factor


@dataclass(frozen=True)
class _Sample:
    """One batch for the denoiser, with all its random numbers; `keep` is 0 where it is to be learnt without text."""

    clean: Tensor
    tokens: Tensor
    t: Tensor
    noise: Tensor
    keep: Tensor


def train_denoiser(
    parts: Networks, latents: Tensor, captions: Sequence[str], recipe: Recipe, *, halves: Halves, emit: Emit
) -> None:
    """Fit denoiser and text encoders together, with timesteps spread evenly over each batch."""
    unet, encoders = parts.unet.train(), (parts.text_encoder, parts.text_encoder_2)
    _start_as_identity(unet)
    unet.to(memory_format=torch.channels_last)
    for encoder in encoders:
        # CLIP's own initialisation is so small that on a short run words stay alike.
        nn.init.normal_(encoder.get_input_embeddings().weight, std=0.3)
    matrices, others = _by_shape(unet, keep_out=(unet.conv_in.weight, unet.conv_out.weight))
    text = [p for encoder in encoders for p in encoder.parameters()]
    optimizer = Optimizer(matrices, [*others, *text], rate=recipe.rate, steps=recipe.steps)
    process, tokens, batch = DDPM.from_config(models.SCHEDULER), tokenize(captions), recipe.batch
    for step in range(recipe.steps):
        rows = torch.randint(len(latents), (batch,))
        sample = _Sample(
            clean=latents[rows],
            tokens=tokens[:, rows],
            t=process.sample_t((torch.arange(batch) + torch.rand(1)) / batch),
            noise=torch.randn(latents[rows].shape),
            keep=(torch.rand(batch) >= recipe.unconditional).float(),
        )
        loss_of = partial(denoiser_loss, parts, process, sample)
        optimizer.step(halves.gradients(loss_of, rows=batch, parameters=optimizer.parameters))
        _tell(emit, "training the base model", step + 1, recipe.steps)
    optimizer.finish()
    unet.eval().to(memory_format=torch.contiguous_format)


def denoiser_loss(parts: Networks, process: DDPM, sample: _Sample, rows: slice) -> Tensor:
    """Squared error in the noise, min-SNR 5; text is zeros where it is left out, as for an empty negative prompt."""
    clean, t, target, keep = sample.clean[rows], sample.t[rows], sample.noise[rows], sample.keep[rows]
    embeddings, pooled = embed(parts, sample.tokens[:, rows])
    side = parts.vae.config.sample_size
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).expand(len(clean), -1)
    prediction = parts.unet(
        process.corrupt(clean, target, t).contiguous(memory_format=torch.channels_last),
        t,
        encoder_hidden_states=embeddings * keep[:, None, None],
        added_cond_kwargs={"text_embeds": pooled * keep[:, None], "time_ids": sizes},
    ).sample
    errors = (prediction - target).square().mean((1, 2, 3))
    return (errors * process.weight(t, min_snr_gamma=5)).mean()


def embed(parts: Networks, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [2, B, 77] -> what SDXL's denoiser reads: [B, 77, D] and the pooled [B, P]."""
    first = parts.text_encoder(tokens[0], output_hidden_states=True)
    second = parts.text_encoder_2(tokens[1], output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


def tokenize(captions: Sequence[str]) -> Tensor:
    """Token ids of both tokenizers, [2, B, 77]."""
    found = []
    for pad in (words.END, "!"):
        with tempfile.TemporaryDirectory() as folder:
            words.write(Path(folder), pad=pad)
            tokenizer = CLIPTokenizer.from_pretrained(folder)
        ids = tokenizer(list(captions), padding="max_length", max_length=words.LENGTH, truncation=True).input_ids
        found.append(torch.tensor(ids))
    return torch.stack(found)


def _scaled(pictures: Tensor) -> Tensor:
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def _start_as_identity(network: nn.Module) -> None:
    """Silence the second convolution of each residual block, so that the network starts nearly linear."""
    for module in network.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)


def _by_shape(network: nn.Module, *, keep_out: tuple[Tensor, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights for Muon, and the rest: vectors, and the first and last layer of the denoiser."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in network.parameters():
        is_matrix = parameter.ndim > 1 and all(parameter is not other for other in keep_out)
        (matrices if is_matrix else others).append(parameter)
    return matrices, others


def _tell(emit: Emit, task: str, done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        emit(Progress(0, task, done, total))
