"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952)."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from safetensors import SafetensorError

from gesso.core import resolve
from gesso.core.batch import Geometry
from gesso.core.seams import Cond, Parts, Spec
from gesso.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline
    from torch import Tensor

    from gesso.core.noise import DDPM

PUBLIC_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
FP16_SAFE_VAE = "madebyollin/sdxl-vae-fp16-fix"
_FOLDERS = {"denoiser": ("unet",), "vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_TARGETS = {
    "attention": _ATTENTION,
    "attention-mlp": [*_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
    "all-linear": [
        *_ATTENTION,
        *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("time_emb_proj", "linear_1", "linear_2"),
    ],
}


class SDXL(Spec):
    """Stable Diffusion XL."""

    family: Literal["sdxl"] = "sdxl"
    base: str = PUBLIC_BASE
    """The model to start from: a diffusers folder, a hub id, or a single .safetensors checkpoint."""
    revision: str | None = None
    """Commit or branch of a hub model."""
    variant: str | None = None
    """File variant of a hub model or folder, such as fp16."""
    config: str | None = None
    """Where a single .safetensors checkpoint takes its configuration and tokenizers from: a diffusers folder or
    hub id. Empty: the public SDXL base."""
    vae: str | None = None
    """Another VAE: folder, hub id or .safetensors. Empty: the model's own, except that the public SDXL base
    gets the fp16-safe one (madebyollin/sdxl-vae-fp16-fix)."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the denoiser predicts. Empty: read from the model."""
    long_prompts: Literal["truncate", "chunk"] = "truncate"
    """Prompts over 77 tokens: cut (and counted), or encoded in chunks of 75 that are joined."""
    max_chunks: int = Field(default=3, ge=1)
    """Chunks of 75 tokens that `chunk` pads every prompt to; longer prompts are cut (and counted)."""

    @property
    def part_names(self) -> tuple[str, str, str]:
        """The denoiser's name in adapter files, then the text encoders' names."""
        return ("unet", "text_encoder", "text_encoder_2")

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return int(2 ** (len(self._config("vae")["block_out_channels"]) - 1))

    @property
    def architecture(self) -> str:
        """ModelSpec name of the architecture."""
        return "stable-diffusion-xl-v1-base"

    @cached_property
    def noise(self) -> DDPM:
        """The forward process the model was trained with."""
        from gesso.core.noise import DDPM

        return DDPM.from_config(self._config("scheduler", "scheduler_config.json"), prediction=self.prediction)

    def targets(self, preset: str) -> list[str]:
        """Module names that an adapter preset means in the UNet."""
        return _TARGETS[preset]

    # Loading

    def load(self, names: Collection[str], *, dtype: torch.dtype, device: torch.device) -> Parts:
        """Load some of "denoiser", "vae", "text", frozen and in eval mode.

        The VAE is always float32: SDXL's own overflows in fp16, and it runs once per image.
        """
        import torch

        parts = Parts()
        _ = self._index  # a broken one shows now, and not when the trained model is exported
        with _without_bars():
            if "denoiser" in names:
                parts.denoiser = self._network("unet", dtype)
            if "vae" in names:
                parts.vae = self._network("vae", torch.float32)
            if "text" in names:
                parts.text_encoders = [self._network(part, dtype) for part in _FOLDERS["text"]]
                parts.tokenizers = self._tokenizers()
        for network in [parts.denoiser, parts.vae, *parts.text_encoders]:
            if network is not None:
                network.requires_grad_(False).eval().to(device)
        return parts

    def fingerprint(self, name: str) -> str:
        """Hash of the weights (and, for "text", the prompt policy) of "denoiser", "vae" or "text"."""
        if name == "vae" and self._vae_name is not None:
            location = self._locate(self._vae_name, (), key="model.vae")
            folder = location / "vae" if (location / "vae").is_dir() else location
            return resolve.fingerprint(_weights(folder, self.variant))
        if self._root.is_file():
            return resolve.fingerprint([self._root])
        folders = [self._root / part for part in _FOLDERS[name]]
        if name == "text":
            tokens = [p for t in _TOKENIZERS for p in (self._root / t).iterdir() if p.is_file()]
            files = [*(w for f in folders for w in _weights(f, self.variant)), *tokens]
            policy = "" if self.long_prompts == "truncate" else f" chunk {self.max_chunks}"
            return resolve.fingerprint(files) + policy
        return resolve.fingerprint(_weights(folders[0], self.variant))

    def pipeline(self, parts: Parts) -> StableDiffusionXLPipeline:
        """A diffusers pipeline over the loaded networks with the model's own sampler."""
        from diffusers import StableDiffusionXLPipeline

        from gesso.families.long_prompts import chunking

        scheduler_config = dict(self._config("scheduler", "scheduler_config.json"))
        if self.prediction is not None:
            scheduler_config["prediction_type"] = self.prediction
        tokenizers = parts.tokenizers or [None, None]
        encoders = parts.text_encoders or [None, None]
        kind = StableDiffusionXLPipeline if self.long_prompts == "truncate" else chunking(self.encode_text)
        pipeline = kind(
            vae=parts.vae,
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=parts.denoiser,
            scheduler=_scheduler(scheduler_config),
            force_zeros_for_empty_prompt=bool(self._index.get("force_zeros_for_empty_prompt", True)),
            add_watermarker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    # Numbers

    def encode_images(self, parts: Parts, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> posterior moments [B, 2C, h, w] float32: mean, then standard deviation."""
        import torch

        assert parts.vae is not None
        with torch.no_grad():
            posterior = parts.vae.encode(pixels.to(parts.vae.device, torch.float32)).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1).float()

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A sample of the posterior, shifted and scaled as the UNet expects it: [B, C, h, w] float32."""
        import torch

        mean, std = moments.chunk(2, dim=1)
        raw, config = mean + std * noise, self._config("vae")
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            centre, spread = (torch.tensor(config[k]).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std"))
            return (raw - centre) * config["scaling_factor"] / spread
        return (raw - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def encode_text(self, parts: Parts, captions: Sequence[str]) -> Cond:
        """Penultimate hidden states of both encoders, [B, 77 n, d1 + d2], and the pooled projection of the second.

        Equal bit for bit to the diffusers pipeline's `encode_prompt` when `long_prompts` is "truncate".
        """
        import torch

        hidden, pooled = [], None
        for encoder, tokenizer in zip(parts.text_encoders, parts.tokenizers, strict=True):
            ids = self._token_ids(tokenizer, captions).to(encoder.device)
            batch, chunks, length = ids.shape
            output = encoder(ids.view(batch * chunks, length), output_hidden_states=True)
            states = output.hidden_states[-2]
            hidden.append(states.view(batch, chunks * length, -1))
            if output[0].ndim == 2:
                pooled = output[0].view(batch, chunks, -1)[:, 0]
        assert pooled is not None
        return {"prompt_embeds": torch.cat(hidden, dim=-1), "pooled": pooled}

    def overlong(self, tokenizers: Sequence[Any], captions: Sequence[str]) -> list[str]:
        """Those captions that the policy for long prompts cuts."""
        tokenizer = tokenizers[0]
        limit = (tokenizer.model_max_length - 2) * (self.max_chunks if self.long_prompts == "chunk" else 1)
        lengths = [len(ids) - 2 for ids in tokenizer(list(captions)).input_ids]
        return [caption for caption, length in zip(captions, lengths, strict=True) if length > limit]

    def condition(self, text: Cond, geometry: Sequence[Geometry]) -> Cond:
        """Text embeddings and the size and crop conditioning; time ids are [B, 6] float32."""
        import torch

        time_ids = torch.tensor(geometry, dtype=torch.float32, device=text["pooled"].device)
        return {**text, "time_ids": time_ids}

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The UNet's answer, [B, C, h, w] in its dtype; time ids and timesteps reach it unrounded."""
        dtype = denoiser.dtype
        added = {"text_embeds": cond["pooled"].to(dtype), "time_ids": cond["time_ids"]}
        hidden = cond["prompt_embeds"].to(dtype)
        return denoiser(noisy.to(dtype), t, hidden, added_cond_kwargs=added, return_dict=False)[0]

    def _token_ids(self, tokenizer: Any, captions: Sequence[str]) -> Tensor:
        """[B, chunks, 77]."""
        import torch

        length = tokenizer.model_max_length
        if self.long_prompts == "truncate":
            encoded = tokenizer(
                list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            return encoded.input_ids[:, None]
        rows = []
        for ids in tokenizer(list(captions), truncation=False).input_ids:
            body = ids[1:-1]
            row = []
            for chunk in range(self.max_chunks):
                piece = body[chunk * (length - 2) : (chunk + 1) * (length - 2)]
                framed = [ids[0], *piece, ids[-1]]
                row.append(framed + [tokenizer.pad_token_id] * (length - len(framed)))
            rows.append(row)
        return torch.tensor(rows)

    # Files

    @cached_property
    def _root(self) -> Path:
        patterns = ["*.json", "*.txt", *(f"{f}/*" for f in ("scheduler", *_TOKENIZERS, "unet", "vae"))]
        patterns += [f"{f}/*" for f in _FOLDERS["text"]]
        location = self._locate(self.base, patterns, key="model.base")
        if location.is_dir() and not (location / "unet").is_dir():
            inside = ", ".join(sorted(p.name for p in location.iterdir())[:8]) or "nothing"
            raise UserError(
                f"{self.base} is not an SDXL diffusers folder: it holds no unet folder (found: {inside})",
                where="model.base",
                fix="give the folder that holds model_index.json",
            )
        return location

    def _locate(self, name: str, patterns: Sequence[str], *, key: str) -> Path:
        return resolve.locate(name, revision=self.revision if name == self.base else None, patterns=patterns, key=key)

    @cached_property
    def _config_root(self) -> Path:
        """Where configs and tokenizers are: the model's folder, or that of `config` for a single file."""
        if self._root.is_dir():
            return self._root
        return self._locate(self.config or PUBLIC_BASE, ["*.json", "*/*.json", "*/*.txt"], key="model.config")

    @cached_property
    def _index(self) -> dict[str, Any]:
        return self._json(self._config_root / "model_index.json")

    @property
    def _vae_name(self) -> str | None:
        if self.vae is not None:
            return self.vae
        return FP16_SAFE_VAE if self.base == PUBLIC_BASE else None

    def _config(self, part: str, file: str = "config.json") -> dict[str, Any]:
        if part == "vae" and self._vae_name is not None:
            location = self._locate(self._vae_name, (), key="model.vae")
            if location.is_dir():
                return self._json((location / "vae" if (location / "vae").is_dir() else location) / file)
        return self._json(self._config_root / part / file)

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"the model's {path.name} cannot be read ({error})", where=str(path), fix="fetch the model again"
            ) from error
        return content

    def _tokenizers(self) -> list[Any]:
        from transformers import CLIPTokenizer

        return [CLIPTokenizer.from_pretrained(self._config_root / name) for name in _TOKENIZERS]

    def _network(self, part: str, dtype: torch.dtype) -> Any:
        """One network from wherever its weights are; whatever a loader says becomes one message with the path."""
        location, folder = self._root, part
        if part == "vae" and self._vae_name is not None:
            location = self._locate(self._vae_name, (), key="model.vae")
            folder = "vae" if (location / "vae").is_dir() else ""
        try:
            if location.is_file():
                return self._from_single_file(location, part, dtype)
            network = _network_class(part).from_pretrained(
                location, subfolder=folder, variant=self.variant, torch_dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"the weights of {part} cannot be read ({_first_line(error)})",
                where=str(location / folder if folder and location.is_dir() else location),
                fix="fetch or export the model again; if its files carry a variant such as fp16, set model.variant",
            ) from error
        return network

    def _from_single_file(self, file: Path, part: str, dtype: torch.dtype) -> Any:
        from diffusers import StableDiffusionXLPipeline

        if part in ("unet", "vae"):
            network = _network_class(part).from_single_file(
                str(file), config=str(self._config_root), subfolder=part, torch_dtype=dtype
            )
            return network
        others: dict[str, Any] = {"unet": None, "vae": None, "scheduler": None}
        pipeline = StableDiffusionXLPipeline.from_single_file(
            str(file), config=str(self._config_root), torch_dtype=dtype, **others
        )
        return pipeline.components[part]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' bar per network, which would tear ours apart."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _network_class(part: str) -> Any:
    import diffusers
    import transformers

    return {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }[part]


def _scheduler(config: dict[str, Any]) -> Any:
    """The sampler that a scheduler_config.json names."""
    import diffusers

    name = config.get("_class_name", "EulerDiscreteScheduler")
    if name not in dir(diffusers):
        raise UserError(f"diffusers has no sampler '{name}'", where="scheduler_config.json", fix="update diffusers")
    return getattr(diffusers, name).from_config(config)


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files of one network, those of the variant if one is asked for."""
    found = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    chosen = [p for p in found if f".{variant}" in p.name] if variant else [p for p in found if ".fp16" not in p.name]
    if not (chosen or found):
        raise UserError("no .safetensors weights in this folder", where=str(folder), fix="fetch the model again")
    return chosen or found


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
