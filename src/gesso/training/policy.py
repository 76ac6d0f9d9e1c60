"""Family, denoiser and adapter joined into what an objective calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from gesso.core.batch import Batch
from gesso.core.seams import Attached, Cond, Family, Noise, Parts


@dataclass(frozen=True)
class LivePolicy:
    """The model in training."""

    family: Family
    parts: Parts
    adapter: Attached

    @property
    def noise(self) -> Noise:
        """The family's forward process."""
        return self.family.noise

    @property
    def networks(self) -> list[nn.Module]:
        """Every network that takes part in a training step."""
        return [network for network in [self.parts.denoiser, *self.parts.text_encoders] if network is not None]

    def condition(self, batch: Batch) -> Cond:
        """Cached text embeddings, or live ones where text encoders train, and the size conditioning."""
        text = batch.text if batch.text is not None else self.family.encode_text(self.parts, batch.captions)
        return self.family.condition(text, batch.geometry)

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The denoiser's answer, [B, C, h, w]."""
        assert self.parts.denoiser is not None
        return self.family.predict(self.parts.denoiser, noisy, t, cond)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] of latents, about [-1, 1]."""
        return self.family.decode_images(self.parts, latents)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, predictions are those of the model before training, dropout off."""
        with self.evaluating(), self.adapter.reference():
            yield

    def train(self) -> None:
        """Turn dropout on."""
        for network in self.networks:
            network.train()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, dropout is off."""
        modes = [network.training for network in self.networks]
        for network in self.networks:
            network.eval()
        try:
            yield
        finally:
            for network, mode in zip(self.networks, modes, strict=True):
                network.train(mode)
