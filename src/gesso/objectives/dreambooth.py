"""DreamBooth: learn one thing and keep what the model knows of its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from gesso.core.seams import Policy
from gesso.objectives.denoise import Denoise

if TYPE_CHECKING:
    from torch import Tensor

    from gesso.core.batch import Batch


class DreamBooth(Denoise):
    """Denoise with prior preservation (Ruiz et al. 2022, DreamBooth, arXiv:2208.12242).

    The loss of an optimiser step is mean(instance samples) + prior_weight x mean(prior samples), however the step is
    cut into batches. A step takes as many prior samples as instance samples, on top of these: batch_size and the
    learning rate mean what they mean without.
    """

    type: Literal["dreambooth"] = "dreambooth"  # type: ignore[assignment]
    prior: Literal["images", "model"] = "images"
    """Where the prior samples come from. images: the sources with `role: prior`, pictures of the class. model: no
    pictures; each instance picture is seen again under its `class_prompt`, and the target is what the model said of it
    before training."""
    prior_weight: float = Field(default=1.0, ge=0)
    """How much the prior samples count beside the instance samples."""
    class_prompt: str | None = None
    """What the class is called, such as "a photo of a person", where a source does not say so itself. With `prior:
    images` the class images that are missing from the folder are drawn from it before training; `prior: model` needs
    it."""
    class_images: int | None = Field(default=None, ge=1)
    """How many class images each folder that is filled is to have, where its source does not say so itself. Empty:
    200."""

    @model_validator(mode="after")
    def _prompted(self) -> DreamBooth:
        if self.class_prompt is not None and not self.class_prompt.strip():
            raise ValueError("class_prompt is blank")
        if self.class_images is not None and self.prior == "model":
            raise ValueError("class_images: prior: model takes no class images")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Prior samples, unless the model itself gives them."""
        return super().needs | (frozenset({"prior"}) if self.prior == "images" else frozenset())

    @property
    def reference(self) -> bool:
        """Whether the model before training takes part."""
        return self.prior == "model"

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        """Loss of each sample [B] float32, such that the mean over the step's samples is the loss of the step."""
        import torch

        per_role = {role: sum(batch.counts.values()) / count for role, count in batch.counts.items() if count}
        if "prior" in per_role:
            per_role["prior"] *= self.prior_weight
        factors = torch.tensor([per_role[role] for role in batch.roles], device=batch.latents.device)
        return super().loss(policy, batch) * factors

    def target(self, policy: Policy, batch: Batch, *, noisy: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Of prior samples with `prior: model` what the model before training answers, else the usual [B, C, h, w]."""
        import torch

        usual = super().target(policy, batch, noisy=noisy, noise=noise, t=t)
        if self.prior == "images" or "prior" not in batch.roles:
            return usual
        prior = torch.tensor([role == "prior" for role in batch.roles], device=usual.device)
        with torch.no_grad(), policy.reference():
            before = policy.predict(noisy, t, policy.condition(batch)).float()
        return torch.where(prior.view(-1, 1, 1, 1), before, usual)
