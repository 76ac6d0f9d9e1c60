"""The standard diffusion loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from gesso.core.seams import Policy, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from gesso.core.batch import Batch


class Denoise(Spec):
    """Predict the noise (or v) that was mixed into a latent: the standard diffusion loss."""

    type: Literal["denoise"] = "denoise"
    loss_type: Literal["l2", "l1", "huber"] = "l2"
    """Distance between prediction and target: squared, absolute, or pseudo-Huber (quadratic near 0, then linear)."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where `huber` turns from quadratic to linear, in units of the target."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Min-SNR loss weighting (Hang et al. 2023); 5 is the paper's choice, empty turns it off."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Deviation of a constant added to the noise of each sample and channel; helps very dark or bright pictures."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Extra noise in the input only, not in the target (Ning et al. 2023); 0.1 is usual."""
    timestep_low: float = Field(default=0.0, ge=0, lt=1)
    """Train only on timesteps above this fraction of the range (0 = least noise)."""
    timestep_high: float = Field(default=1.0, gt=0, le=1)
    """Train only on timesteps below this fraction of the range (1 = most noise)."""

    unmasked_weight: float = Field(default=0.0, ge=0, le=1)
    """What the loss outside of a mask counts; see `data.sources[].mask`."""

    @model_validator(mode="after")
    def _range(self) -> Denoise:
        if self.timestep_low >= self.timestep_high:
            raise ValueError("timestep_low must be below timestep_high")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Nothing beside captioned pictures."""
        return frozenset()

    @property
    def reference(self) -> bool:
        """The model before training takes no part."""
        return False

    def measure(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """The loss."""
        return {"loss": self.loss(policy, batch)}

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        """Weighted mean loss of each sample over its latent, [B] float32."""
        t = policy.noise.sample_t(batch.u, low=self.timestep_low, high=self.timestep_high)
        noise = self._noise(batch)
        mixed = noise
        if self.input_perturbation:
            mixed = noise + self.input_perturbation * _normal(batch, "input perturbation", noise.shape[1:])
        noisy = policy.noise.corrupt(batch.latents, mixed, t)
        # The target comes first: it may need the networks as they were before training.
        target = self.target(policy, batch, noisy=noisy, noise=noise, t=t)
        prediction = policy.predict(noisy, t, policy.condition(batch))
        per_sample = self._mean(self._distance(prediction.float(), target), batch.mask)
        return per_sample * policy.noise.weight(t, min_snr_gamma=self.min_snr_gamma) * batch.weights

    def target(self, policy: Policy, batch: Batch, *, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        """What the denoiser is asked for at the noisy latents, [B, C, h, w] float32."""
        return policy.noise.target(batch.latents, noise, t)

    def _mean(self, distance: Tensor, mask: Tensor | None) -> Tensor:
        """Mean over channels and cells [B], weighted by the mask: sum(m d) / sum(m), so a small mask counts no less."""
        if mask is None:
            return distance.flatten(1).mean(1)
        weights = self.unmasked_weight + (1 - self.unmasked_weight) * mask
        # A mask that a crop has emptied gives a loss of zero and not of nothing over nothing.
        area = weights.flatten(1).mean(1).clamp(min=1e-6)
        return (distance * weights).flatten(1).mean(1) / area

    def _noise(self, batch: Batch) -> Tensor:
        if not self.noise_offset:
            return batch.noise
        channels = batch.noise.shape[1]
        return batch.noise + self.noise_offset * _normal(batch, "noise offset", (channels, 1, 1))

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        difference = prediction - target
        match self.loss_type:
            case "l2":
                return difference.square()
            case "l1":
                return difference.abs()
            case "huber":
                delta = self.huber_delta
                return 2 * delta * ((difference.square() + delta**2).sqrt() - delta)


def _normal(batch: Batch, domain: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    return torch.from_numpy(batch.draws.normal(domain, shape)).to(batch.noise.device)
