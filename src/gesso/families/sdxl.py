"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from gesso.core import resolve
from gesso.core.batch import Geometry
from gesso.core.changes import Change
from gesso.core.seams import Cond, Parts, Spec
from gesso.core.tokens import NewToken, expanded, several
from gesso.errors import UserError
from gesso.families import fusing, lora_file, lora_names, model_folder, sampler, sdxl_layers, single_file
from gesso.families.prompt_weights import emphasise, token_weights

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline
    from torch import Tensor

    from gesso.core.noise import DDPM
    from gesso.families.new_tokens import NewVectors

PUBLIC_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
FP16_SAFE_VAE = "madebyollin/sdxl-vae-fp16-fix"
_FOLDERS = {"denoiser": ("unet",), "vae": ("vae",), "text": ("text_encoder", "text_encoder_2")}
_TOKENIZERS = ("tokenizer", "tokenizer_2")
_EMBEDDING_KEYS = ("clip_l", "clip_g")
_CONFIGS = ["model_index.json", "scheduler/*.json", *(f"{t}/*.{end}" for t in _TOKENIZERS for end in ("json", "txt"))]


class SDXL(Spec):
    """Stable Diffusion XL."""

    family: Literal["sdxl"] = "sdxl"
    base: str = PUBLIC_BASE
    """The model to start from: a diffusers folder, a hub id, or a single .safetensors checkpoint."""
    revision: str | None = None
    """Commit or branch of a hub model."""
    variant: str | None = None
    """File variant of the base model where it is a hub model or a folder, such as fp16."""
    config: str | None = None
    """Where a single .safetensors checkpoint takes its configuration and tokenizers from: a diffusers folder or
    hub id. Empty: the public SDXL base."""
    vae: str | None = None
    """Another VAE: folder, hub id or .safetensors. Empty: the model's own, except that the public SDXL base
    gets the fp16-safe one (madebyollin/sdxl-vae-fp16-fix)."""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """What the denoiser predicts. Empty: read from the model."""
    zero_terminal_snr: bool | None = None
    """Rescale the noise schedule so that its last timestep is nothing but noise (Lin et al. 2024), in training and in
    sampling; only for models that predict v. Empty: as the model's own schedule is."""
    long_prompts: Literal["truncate", "chunk"] = "truncate"
    """Prompts over 77 tokens: cut (and counted), or encoded in chunks of 75 that are joined."""
    max_chunks: int = Field(default=3, ge=1)
    """Chunks of 75 tokens that `chunk` pads every prompt to; longer prompts are cut (and counted)."""
    fuse: tuple[fusing.Fused, ...] = ()
    """LoRAs that are merged into the model before anything else, so that training starts from the sum. What is trained
    then belongs on top of it; gesso sample and export do so."""
    prompt_weights: bool = False
    """Read weights of words in captions and prompts as AUTOMATIC1111's webui does: (x:1.2), (x) = 1.1, [x] = 1 / 1.1;
    nested ones multiply, and a backslash makes a bracket ordinary. The hidden states of a word are multiplied by its
    weight, then all are scaled to keep their mean; the pooled embedding is unweighted. Off: brackets are ordinary
    text."""

    @property
    def part_names(self) -> tuple[str, str, str]:
        """The denoiser's name in adapter files, then the text encoders' names."""
        return ("unet", "text_encoder", "text_encoder_2")

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell along one side."""
        return int(2 ** (len(self._vae_config["block_out_channels"]) - 1))

    @property
    def architecture(self) -> str:
        """ModelSpec name of the architecture."""
        return "stable-diffusion-xl-v1-base"

    @cached_property
    def noise(self) -> DDPM:
        """The forward process the model was trained with."""
        from gesso.core.noise import DDPM

        return DDPM.from_config(self._schedule)

    @property
    def predicts(self) -> str:
        """What the denoiser predicts, by the run file or by the model's own files."""
        return str(self._schedule.get("prediction_type", "epsilon"))

    def targets(self, preset: str) -> list[str]:
        """Module names that an adapter preset means in the UNet."""
        return sdxl_layers.TARGETS[preset]

    def published_layers(self) -> dict[str, tuple[int, ...]]:
        """Names and weight shapes of the linear layers and convolutions of SDXL's networks."""
        return sdxl_layers.published()

    def read_changes(self, file: str, networks: Mapping[str, Any], *, key: str) -> dict[str, Change]:
        """What a LoRA does to each layer of these networks."""
        return lora_file.read(lora_file.fetched(file, key=key)).match(lora_names.modules(networks))

    # Loading

    def load(self, names: Collection[str], *, dtype: torch.dtype, device: torch.device) -> Parts:
        """Load some of "denoiser", "vae", "text", frozen and in eval mode.

        The VAE is always float32: SDXL's own overflows in fp16, and it runs once per image.
        """
        import torch

        from gesso.families import new_tokens

        parts = Parts()
        _ = self._index  # a broken one shows now, and not when the trained model is exported
        with model_folder.without_bars():
            if "denoiser" in names:
                parts.denoiser = self._network("unet", dtype)
            if "vae" in names:
                parts.vae = self._network("vae", torch.float32)
            if "text" in names:
                parts.text_encoders = [self._network(part, dtype) for part in _FOLDERS["text"]]
                parts.tokenizers = [model_folder.tokenizer(self._config_root / name) for name in _TOKENIZERS]
                for encoder, tokenizer in zip(parts.text_encoders, parts.tokenizers, strict=True):
                    new_tokens.pool_at_end(encoder, tokenizer)
        for network in [parts.denoiser, parts.vae, *parts.text_encoders]:
            if network is not None:
                network.requires_grad_(False).eval().to(device)
        loaded = zip(self.part_names, [parts.denoiser, *parts.text_encoders], strict=False)
        fusing.merge(self.fuse, {part: network for part, network in loaded if network is not None})
        return parts

    def fingerprint(self, name: str) -> str:
        """Hash of the weights and configs (and, for "text", tokenizers and prompt policy) of a part."""
        files = [file for part in _FOLDERS[name] for file in self._files(part)]
        fused = fusing.fingerprint(self.fuse)
        if name != "text":
            return resolve.fingerprint(files) + (fused if name == "denoiser" else "")
        tokens = [p for t in _TOKENIZERS for p in sorted((self._config_root / t).iterdir()) if p.is_file()]
        policy = "" if self.long_prompts == "truncate" else f" chunk {self.max_chunks}"
        policy += " weights" if self.prompt_weights else ""
        return resolve.fingerprint([*files, *tokens]) + policy + fused

    def pipeline(self, parts: Parts) -> StableDiffusionXLPipeline:
        """A diffusers pipeline over the loaded networks with the model's own sampler."""
        from diffusers import StableDiffusionXLPipeline

        from gesso.families.long_prompts import chunking

        tokenizers = parts.tokenizers or [None, None]
        encoders = parts.text_encoders or [None, None]
        usual = self.long_prompts == "truncate" and not self.prompt_weights and not several(parts.tokenizers)
        kind = StableDiffusionXLPipeline if usual else chunking(self.encode_text)
        pipeline = kind(
            vae=parts.vae,
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            tokenizer=tokenizers[0],
            tokenizer_2=tokenizers[1],
            unet=parts.denoiser,
            scheduler=sampler.build(self._schedule),
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
        mean, std = moments.chunk(2, dim=1)
        raw, config = mean + std * noise, self._vae_config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            centre, spread = (raw.new_tensor(config[k]).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std"))
            return (raw - centre) * config["scaling_factor"] / spread
        return (raw - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]

    def decode_images(self, parts: Parts, latents: Tensor) -> Tensor:
        """The VAE's pictures of latents as the UNet knows them, [B, 3, H, W] float32; gradients reach the latents."""
        assert parts.vae is not None
        config, raw = self._vae_config, latents.float()
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            centre, spread = (raw.new_tensor(config[k]).view(1, -1, 1, 1) for k in ("latents_mean", "latents_std"))
            raw = raw * spread / config["scaling_factor"] + centre
        else:
            raw = raw / config["scaling_factor"] + (config.get("shift_factor") or 0.0)
        return parts.vae.decode(raw.to(parts.vae.dtype), return_dict=False)[0].float()

    def encode_text(self, parts: Parts, captions: Sequence[str]) -> Cond:
        """Penultimate hidden states of both encoders, [B, 77 n, d1 + d2], and the pooled projection of the second.

        Equal bit for bit to the diffusers pipeline's `encode_prompt` when `long_prompts` is "truncate" and no word has
        a weight. Weights act on each chunk of each encoder by itself, as in the webui (see `prompt_weights.emphasise`).
        """
        import torch

        hidden, pooled = [], None
        for encoder, tokenizer in zip(parts.text_encoders, parts.tokenizers, strict=True):
            ids, weights = self._chunks(tokenizer, captions)
            batch, chunks, length = ids.shape
            output = encoder(ids.view(batch * chunks, length).to(encoder.device), output_hidden_states=True)
            states = emphasise(output.hidden_states[-2], weights.view(batch * chunks, length))
            hidden.append(states.view(batch, chunks * length, -1))
            if output[0].ndim == 2:
                pooled = output[0].view(batch, chunks, -1)[:, 0]
        assert pooled is not None
        return {"prompt_embeds": torch.cat(hidden, dim=-1), "pooled": pooled}

    def token_counts(self, tokenizers: Sequence[Any], captions: Sequence[str]) -> list[int]:
        """Tokens of each caption by the tokenizer that makes most of it: all of them, start and end marks apart."""
        counts = [[len(tokens) for tokens in self._tokens(tokenizer, captions)] for tokenizer in tokenizers]
        return [max(each) for each in zip(*counts, strict=True)]

    def token_limit(self, tokenizers: Sequence[Any]) -> int:
        """How many of these tokens are read; the policy for long prompts cuts the others."""
        return min(tokenizer.model_max_length - 2 for tokenizer in tokenizers) * self._chunk_count

    def overlong(self, tokenizers: Sequence[Any], captions: Sequence[str]) -> list[str]:
        """Those captions that the policy for long prompts cuts."""
        limit, counts = self.token_limit(tokenizers), self.token_counts(tokenizers, captions)
        return [caption for caption, count in zip(captions, counts, strict=True) if count > limit]

    def taught(self, tokenizers: Sequence[Any], tokens: Sequence[NewToken]) -> list[Any]:
        """Copies of the tokenizers that know new tokens; raises `UserError` for one that they know already."""
        from gesso.families import new_tokens

        return new_tokens.taught(tokenizers, tokens)

    def add_tokens(self, parts: Parts, tokens: Sequence[NewToken], *, seed: int) -> dict[str, NewVectors]:
        """Teach the tokenizers new tokens and give each text encoder their vectors, by its key in embedding files."""
        from gesso.families import new_tokens

        parts.tokenizers = self.taught(parts.tokenizers, tokens)
        every = zip(_EMBEDDING_KEYS, parts.text_encoders, parts.tokenizers, strict=True)
        return {key: new_tokens.add(e, tokenizer, tokens, seed=seed, part=key) for key, e, tokenizer in every}

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

    @property
    def _chunk_count(self) -> int:
        return self.max_chunks if self.long_prompts == "chunk" else 1

    def _tokens(self, tokenizer: Any, captions: Sequence[str]) -> list[list[tuple[int, float]]]:
        """Token ids and weights, of any number, without start and end marks."""
        if self.prompt_weights:
            return token_weights(tokenizer, captions)
        encoded = tokenizer(list(captions), truncation=False).input_ids if captions else []
        return [[(token, 1.0) for token in expanded(tokenizer, ids[1:-1])] for ids in encoded]

    def _chunks(self, tokenizer: Any, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and weights as the encoder reads them, [B, chunks, 77] each."""
        import torch

        length, rows = tokenizer.model_max_length, []
        first, last = (tokenizer.bos_token_id, 1.0), (tokenizer.eos_token_id, 1.0)
        for tokens in self._tokens(tokenizer, captions):
            row = []
            for chunk in range(self._chunk_count):
                framed = [first, *tokens[chunk * (length - 2) : (chunk + 1) * (length - 2)], last]
                row.append(framed + [(tokenizer.pad_token_id, 1.0)] * (length - len(framed)))
            rows.append(row)
        ids = torch.tensor([[[token for token, _ in chunk] for chunk in row] for row in rows])
        return ids, torch.tensor([[[weight for _, weight in chunk] for chunk in row] for row in rows])

    # Files

    @cached_property
    def _root(self) -> Path:
        """The model's folder or file, with all that is needed in it."""
        needed = [*chain(*_FOLDERS.values())]
        if self._vae_name is not None:
            needed.remove("vae")
        patterns = [*_CONFIGS, "vae/config.json"]
        patterns += [f"{part}/{p}" for part in needed for p in model_folder.patterns(part, self.variant)]
        location = self._locate(self.base, patterns, key="model.base")
        if location.is_file():
            single_file.check(location, needed)
            return location
        lacking = [name for name in (*needed, *_TOKENIZERS, "scheduler") if not (location / name).is_dir()]
        if lacking:
            inside = ", ".join(sorted(p.name for p in location.iterdir())[:8]) or "nothing"
            raise UserError(
                f"{self.base} is not an SDXL diffusers folder: it holds no {lacking[0]} folder (found: {inside})",
                where="model.base",
                fix="give the folder that holds model_index.json, or the path of a .safetensors checkpoint",
            )
        return location

    @cached_property
    def _vae_root(self) -> Path | None:
        """The folder or file of another VAE; the name may also mean a whole model with a VAE in it."""
        if self._vae_name is None:
            return None
        names = {name for variant in (None, self.variant) for name in model_folder.patterns("vae", variant)}
        location = self._locate(self._vae_name, sorted([*names, *(f"vae/{name}" for name in names)]), key="model.vae")
        return location / "vae" if (location / "vae").is_dir() else location

    @cached_property
    def _config_root(self) -> Path:
        """Where configs and tokenizers are: the model's folder, or that of `config` for a single file."""
        if self._root.is_dir():
            return self._root
        patterns = [*_CONFIGS, *(f"{part}/config.json" for part in chain(*_FOLDERS.values()))]
        return self._locate(self.config or PUBLIC_BASE, patterns, key="model.config")

    def _locate(self, name: str, patterns: Sequence[str], *, key: str) -> Path:
        return resolve.locate(name, revision=self.revision if name == self.base else None, patterns=patterns, key=key)

    def _place(self, part: str) -> Path:
        """The folder of one network, or the file it is in."""
        if part == "vae" and self._vae_root is not None:
            return self._vae_root
        return self._root if self._root.is_file() else self._root / part

    def _variant(self, part: str) -> str | None:
        """The variant to read; another VAE has plain files as a rule, whatever the base model has."""
        if part == "vae" and self._vae_root is not None and model_folder.has(self._vae_root, part, None):
            return None
        return self.variant

    def _files(self, part: str) -> list[Path]:
        place = self._place(part)
        if place.is_file():
            return [place, self._config_root / part / "config.json"]
        return model_folder.files(place, part, self._variant(part))

    @cached_property
    def _index(self) -> dict[str, Any]:
        return model_folder.read_json(self._config_root / "model_index.json")

    @property
    def _vae_name(self) -> str | None:
        if self.vae is not None:
            return self.vae
        return FP16_SAFE_VAE if self.base == PUBLIC_BASE else None

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        place = self._place("vae")
        file = (place if place.is_dir() else self._config_root / "vae") / "config.json"
        found = model_folder.read_json(file)
        for key in ("block_out_channels", "scaling_factor"):
            if key not in found:
                raise UserError(f"the VAE's config holds no {key}", where=str(file), fix="fetch the VAE again")
        return found

    @cached_property
    def _schedule(self) -> dict[str, Any]:
        """The config of the model's sampler, with what a single file and the run file say about the training."""
        found = model_folder.read_json(self._config_root / "scheduler" / "scheduler_config.json")
        if self._root.is_file():
            found |= single_file.schedule(self._root)
        if self.zero_terminal_snr is not None:
            found |= single_file.ZERO_TERMINAL_SNR if self.zero_terminal_snr else {"rescale_betas_zero_snr": False}
        return found if self.prediction is None else found | {"prediction_type": self.prediction}

    def _network(self, part: str, dtype: torch.dtype) -> Any:
        place = self._place(part)
        if place.is_file():
            return single_file.read(place, part, config=self._config_root, dtype=dtype)
        return model_folder.read(place, part, variant=self._variant(part), dtype=dtype)
