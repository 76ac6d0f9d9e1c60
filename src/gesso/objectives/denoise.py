"""The standard diffusion loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from gesso.core.seams import Policy
from gesso.core.weighting import AnyWeighting, MinSNR, Unweighted, Weighting
from gesso.objectives.distance import DeltaSchedule, Distance, delta_at, distance
from gesso.objectives.identity import IdentityLoss
from gesso.objectives.noising import Noising

if TYPE_CHECKING:
    from torch import Tensor

    from gesso.core.batch import Batch


class Denoise(Noising):
    """Predict the noise (or v, or flow) that was mixed into a latent: the standard diffusion loss."""

    type: Literal["denoise"] = "denoise"
    loss_type: Distance = "l2"
    """Distance between prediction and target: squared (l2), absolute (l1), pseudo-Huber (huber: quadratic near 0, then
    linear), the same divided by its delta (smooth_l1), or log_cosh."""
    huber_delta: float = Field(default=0.1, gt=0)
    """Where `huber` and `smooth_l1` turn from quadratic to linear, in units of the target."""
    huber_schedule: DeltaSchedule = "constant"
    """How that delta follows the noise: not at all, or from 1 at the least noise down to `huber_delta` at the most, by
    delta^(t / T) (exponential) or (1 - delta) / (1 + 1 / sqrt(SNR))^2 + delta (snr)."""
    min_snr_gamma: float | None = Field(default=None, gt=0)
    """Min-SNR loss weighting (Hang et al. 2023); 5 is the paper's choice, empty turns it off. Short for `weighting`
    with `type: min_snr`."""
    weighting: AnyWeighting = Unweighted()
    """How much each noise level counts."""
    unmasked_weight: float = Field(default=0.0, ge=0, le=1)
    """What the loss outside of a mask counts; see `data.sources[].mask`."""
    identity: IdentityLoss | None = None
    """Also ask that the estimated clean picture shows the same person; `{}` takes the usual."""

    @model_validator(mode="after")
    def _one_weighting(self) -> Denoise:
        if self.min_snr_gamma is not None and not isinstance(self.weighting, Unweighted):
            what = f"min_snr_gamma and weighting ({self.weighting.type}) are both given, and a run has one"
            raise ValueError(f"{what}: leave min_snr_gamma empty")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Nothing beside captioned pictures, but for the identity loss."""
        return frozenset({"pixels"}) if self.identity is not None else frozenset()

    @property
    def reference(self) -> bool:
        """The model before training takes no part."""
        return False

    @property
    def rule(self) -> Weighting:
        """The loss weighting, whichever way it is written."""
        return self.weighting if self.min_snr_gamma is None else MinSNR(gamma=self.min_snr_gamma)

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        """Weighted mean loss of each sample over its latent, [B] float32."""
        t = self.draw_t(policy.noise, batch)
        asked, mixed = self.draw_noise(batch)
        noisy = policy.noise.corrupt(batch.latents, mixed, t)
        # The target comes first: it may need the networks as they were before training.
        target = self.target(policy, batch, noisy=noisy, noise=asked, t=t)
        prediction = policy.predict(noisy, t, policy.condition(batch))
        cost = self.cost(policy, batch, prediction, target, t)
        if self.identity is not None:
            cost = cost + self.identity.loss(policy, batch, noisy=noisy, prediction=prediction, t=t)
        return cost * batch.weights

    @property
    def measures(self) -> tuple[str, ...]:
        """The loss alone."""
        return ("loss",)

    def measure(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """The loss."""
        return {"loss": self.loss(policy, batch)}

    def cost(self, policy: Policy, batch: Batch, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """Mean distance of each sample [B], weighted by its noise level and by the mask, not by the sample's weight."""
        delta = delta_at(self.huber_schedule, self.huber_delta, policy.noise, t)
        apart = distance(self.loss_type, prediction.float() - target, delta)
        return self._mean(apart, batch.mask) * policy.noise.weight(t, self.rule)

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
