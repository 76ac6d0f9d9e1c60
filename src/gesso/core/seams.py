"""The seams: what a model family, an objective, an adapter, a policy and a tracker promise each other.

Nothing here imports an implementation. A spec is the working object: a frozen pydantic model whose fields are
the hyperparameters in the run file and whose methods do the work; heavy libraries are imported inside methods.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import BaseModel, ConfigDict

from gesso.core.batch import Batch, Geometry
from gesso.core.events import Event

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gesso.core.changes import Change
    from gesso.core.tokens import NewToken
    from gesso.core.weighting import Weighting

Cond = dict[str, "Tensor"]
"""What a denoiser is conditioned on; opaque outside its family. Every value is [B, ...]."""

Emit = Callable[[Event], None]


class Spec(BaseModel):
    """Base of every section of a run file: frozen, unknown keys forbidden, documented field by field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def chosen_by_type(default: str) -> Callable[[Any], str]:
    """A discriminator for a section with a `type`: the value's own, or `default` where a run file does not say."""

    def kind(value: Any) -> str:
        if isinstance(value, Mapping):
            return str(value.get("type", default))
        return str(type(value).model_fields["type"].default) if isinstance(value, Spec) else default

    return kind


@dataclass(frozen=True)
class Layout:
    """The files that trained tensors are kept in, as readers of such weights know them.

    A tensor's name is its file's folder and its key in the file, joined by a dot: `unet.conv_in.bias` is `conv_in.bias`
    in `unet/diffusion_pytorch_model.safetensors`. A file that is in no folder has the whole names for keys, and what
    belongs into no other's folder.
    """

    headers: Mapping[str, Mapping[str, str]]
    """The safetensors header of each file of tensors, by the file's name."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """What goes beside them, such as configurations, by the file's name."""

    @staticmethod
    def prefix(file: str) -> str:
        """What the names of a file's tensors begin with."""
        folder = file.rpartition("/")[0]
        return f"{folder}." if folder else ""

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Each file's tensors by their keys in it."""
        places = {file: self.prefix(file) for file in self.headers}
        found: dict[str, dict[str, Tensor]] = {file: {} for file in places}
        for name, tensor in tensors.items():
            file = max((f for f, start in places.items() if name.startswith(start)), key=lambda f: len(places[f]))
            found[file][name.removeprefix(places[file])] = tensor
        return found


@dataclass
class Parts:
    """The networks of one model, as far as they are loaded.

    They are typed Any because what Gesso asks of them (dtype, config, hooks) is their own class's, not nn.Module's.
    """

    denoiser: Any = None
    vae: Any = None
    text_encoders: list[Any] = field(default_factory=list)
    tokenizers: list[Any] = field(default_factory=list)


Place = Callable[["Tensor", float, float], "Tensor"]
"""(u, low, high) -> where in the stretch from low to high a draw lies, as a share of it; see `core.timesteps.place`."""


class Noise(Protocol):
    """A forward process: how a latent is corrupted and what the denoiser is asked for. All in float32."""

    def sample_t(
        self, u: Tensor, *, low: float = 0.0, high: float = 1.0, place: Place | None = None, cells: int | None = None
    ) -> Tensor:
        """Timesteps [B] from uniform numbers u [B]; low and high bound the range as fractions of it.

        `place` says how they are spread where it is not evenly; `cells` is the number of latent cells of the picture.
        """
        ...

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def clean(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The latent that an answer of the denoiser says was corrupted; differentiable."""
        ...

    def level(self, t: Tensor) -> Tensor:
        """Timesteps as fractions of the range [B]: 0 = least noise, 1 = most."""
        ...

    def by_snr(self, t: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of the signal-to-noise ratio at these timesteps, [B]."""
        ...

    def weight(self, t: Tensor, rule: Weighting | None = None) -> Tensor:
        """Loss weight [B] of a rule for what this process asks of the denoiser; without one it is 1."""
        ...


class TokenVectors(Protocol):
    """The vectors of new tokens in one text encoder, which looks them up beside its own words'."""

    at_start: bool
    """Set, the encoder reads the values from before training."""

    @property
    def vectors(self) -> Sequence[nn.Parameter]:
        """What trains: [n, width] float32 for each token."""
        ...

    @property
    def first_values(self) -> Sequence[Tensor]:
        """What they were before training."""
        ...


class Family(Protocol):
    """A model family: how its networks are loaded, fed and sampled."""

    @property
    def noise(self) -> Noise: ...

    @property
    def part_names(self) -> Sequence[str]:
        """The denoiser's name in adapter files, then the text encoders' names."""
        ...

    @property
    def latent_factor(self) -> int:
        """Pixels per latent cell along one side."""
        ...

    def load(self, names: Collection[str], *, dtype: torch.dtype, device: torch.device) -> Parts:
        """Load some of "denoiser", "vae", "text"; all frozen and in eval mode."""
        ...

    def encode_images(self, parts: Parts, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] -> posterior moments [B, 2C, h, w] float32 (mean, then std)."""
        ...

    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Moments [B, 2C, h, w] and unit noise [B, C, h, w] -> latents as the denoiser expects them."""
        ...

    def decode_images(self, parts: Parts, latents: Tensor) -> Tensor:
        """Latents as the denoiser knows them -> pixels [B, 3, H, W], about [-1, 1]; gradients reach the latents."""
        ...

    def encode_text(self, parts: Parts, captions: Sequence[str]) -> Cond:
        """Text embeddings, each [B, ...]; differentiable where the encoders train."""
        ...

    def condition(self, text: Cond, geometry: Sequence[Geometry]) -> Cond:
        """Everything `predict` needs beside the noisy latent."""
        ...

    def predict(self, denoiser: Any, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor: ...

    def fingerprint(self, name: str) -> str:
        """Hash of the weights of "denoiser", "vae" or "text": what a cached result depends on."""
        ...

    def pipeline(self, parts: Parts) -> Any:
        """A diffusers pipeline over the loaded networks, with the model's own sampler."""
        ...

    def overlong(self, tokenizers: Sequence[Any], captions: Sequence[str]) -> list[str]:
        """Captions that lose words to the tokenizers' length limit."""
        ...

    def token_counts(self, tokenizers: Sequence[Any], captions: Sequence[str]) -> list[int]:
        """Tokens of each caption by the tokenizer that makes most of it, without marks of start and end."""
        ...

    def taught(self, tokenizers: Sequence[Any], tokens: Sequence[NewToken]) -> list[Any]:
        """Copies of the tokenizers that know new tokens; a token that is no news is a `UserError`."""
        ...

    def add_tokens(self, parts: Parts, tokens: Sequence[NewToken], *, seed: int) -> Mapping[str, TokenVectors]:
        """Teach the tokenizers new tokens and give the text encoders their vectors, by the keys of embedding files."""
        ...

    def targets(self, preset: str) -> list[str]:
        """Module names that an adapter preset means in this family's denoiser."""
        ...

    def published_layers(self) -> Mapping[str, tuple[int, ...]]:
        """Names and weight shapes of the linear layers and convolutions of the published model's networks."""
        ...

    def read_changes(self, file: str, networks: Mapping[str, Any], *, key: str) -> dict[str, Change]:
        """What a LoRA (file, folder or hub id) does to each layer of these networks, by the layer's name in files.

        `key` is for messages; a file that does not fit is a `UserError`.
        """
        ...


class Adapter(Protocol):
    """What is trained: low-rank matrices, embeddings, or the whole model."""

    @property
    def train_text_encoders(self) -> bool:
        """Whether text encoders train; then text embeddings are not cached."""
        ...

    def at(self, learning_rate: float) -> Adapter:
        """What is left to train at this learning rate of the denoiser, which may be 0."""
        ...

    def types(self, dtype: torch.dtype, *, text_encoders: bool) -> tuple[torch.dtype, torch.dtype]:
        """What the denoiser and the text encoders are to be loaded in; `dtype` is what networks compute in.

        `text_encoders` says whether any of these trains.
        """
        ...

    def attach(
        self, parts: Parts, family: Family, *, seed: int, text_encoders: Sequence[int] = (), reference: bool = False
    ) -> Attached:
        """Make the denoiser and the text encoders with the given indices trainable.

        `reference` says that `Attached.reference` will be asked for, which may cost a copy of the weights.
        """
        ...


class Attached(Protocol):
    """An adapter in place on loaded networks."""

    def parameters(self) -> Mapping[str, Mapping[str, nn.Parameter]]:
        """Trainable parameters by part (see `Family.part_names`) and stable name."""
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Inside: the networks behave as before the adapter was attached."""
        ...

    def state(self) -> dict[str, Tensor]:
        """The trained tensors, float32, under names that `layout` turns into files that diffusers reads."""
        ...

    def layout(self) -> Layout:
        """Which files hold `state`."""
        ...

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave; a missing or surplus tensor is a `UserError`."""
        ...

    def begin(self) -> None:
        """Put in place what a new training starts from, where that is read from files; not called on resuming."""
        ...

    def rate_factor(self, name: str) -> float:
        """What the part's learning rate is multiplied by for a parameter, by its name in `parameters`."""
        ...

    def after_step(self) -> None:
        """Called after each optimiser step, before the weights are averaged."""
        ...

    def changes(self) -> Mapping[str, Change]:
        """What it does to each layer's weight, by the layer's name in adapter files; none if weights train as such."""
        ...


class Policy(Protocol):
    """Family, denoiser and adapter as one function from noisy latents to predictions."""

    @property
    def noise(self) -> Noise: ...

    def condition(self, batch: Batch) -> Cond: ...

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of latents; for objectives that need "pixels"."""
        ...

    def reference(self) -> AbstractContextManager[None]: ...


class Objective(Protocol):
    """What is minimised."""

    @property
    def needs(self) -> frozenset[str]:
        """What it takes beside captioned pictures: "pair" or "prior" samples, or "pixels", the VAE at hand."""
        ...

    @property
    def reference(self) -> bool:
        """Whether `Policy.reference` is asked for."""
        ...

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        """Weighted loss of each sample, [B] float32; the loop divides by the step's sample count."""
        ...

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of what `measure` reports."""
        ...

    def measure(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """What validation reports of each sample, [B] each: "loss", and more where there is more to say."""
        ...


class Tracker(Protocol):
    """Where events go. A tracker that fails is dropped with a warning; it never stops a run."""

    def handle(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Stream(Protocol):
    """The training data as the loop sees it: optimiser steps, each some batches of one shape."""

    @property
    def steps_per_epoch(self) -> int: ...

    def window(self, step: int) -> Iterator[Batch]:
        """The batches of optimiser step `step`, a pure function of (seed, step)."""
        ...

    def window_size(self, step: int) -> int:
        """Samples in optimiser step `step`."""
        ...
