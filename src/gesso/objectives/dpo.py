"""Preference training: Diffusion-DPO and its IPO variant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field, model_validator

from gesso.core.seams import Policy
from gesso.objectives.noising import Noising

if TYPE_CHECKING:
    from torch import Tensor

    from gesso.core.batch import Batch


class _Sides(NamedTuple):
    """Mean squared error over each latent, [B] float32, of both pictures of each pair."""

    chosen: Tensor
    rejected: Tensor


class DPO(Noising):
    """Prefer one picture of a pair to the other (Wallace et al. 2023, Diffusion-DPO, arXiv:2311.12908).

    With L the mean squared error of the prediction over a latent, and L_ref that of the model before training, at the
    same noise and timestep for both pictures:

        u = -(beta / 2) [(L_chosen - L_ref_chosen) - (L_rejected - L_ref_rejected)],    loss = -log sigmoid(u)

    The timestep weighting and the number of timesteps are folded into beta, as the paper's own code does, and L is a
    mean, not a sum: beta does not depend on the size of the pictures. A script that sums over d latent values reaches
    the same with beta / d; one that leaves out the half, with beta / 2. Works alike for predictions of noise, v and
    velocity. Before the first step the loss is ln 2, whatever the pairs are.
    """

    type: Literal["dpo"] = "dpo"
    beta: float = Field(default=5000.0, gt=0)
    """How closely the model is held to the one before training: higher stays closer. The paper takes 5000 for SDXL."""
    variant: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO's loss. ipo: (u - 1/2)^2, which stops pulling once a pair is told apart by enough (Azar et al.
    2023, arXiv:2310.12036; its loss times beta^2)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the labels that are taken to be wrong (conservative DPO); for the sigmoid variant."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Add so much of the preferred picture's ordinary loss, which keeps it from becoming less likely as well."""

    @model_validator(mode="after")
    def _whole(self) -> DPO:
        if self.label_smoothing and self.variant != "sigmoid":
            raise ValueError("label_smoothing belongs to the sigmoid variant")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """Samples are pairs."""
        return frozenset({"pair"})

    @property
    def reference(self) -> bool:
        """The model before training takes part."""
        return True

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        """Weighted loss of each pair, [B] float32."""
        trained, before = self._errors(policy, batch)
        u = self._logit(trained, before)
        per_pair = self._of(u)
        if self.sft_weight:
            per_pair = per_pair + self.sft_weight * trained.chosen
        return per_pair * batch.weights

    @property
    def measures(self) -> tuple[str, ...]:
        """What validation reports."""
        return ("loss", "accuracy", "margin")

    def measure(self, policy: Policy, batch: Batch) -> dict[str, Tensor]:
        """Per pair, [B] float32: the loss; whether the preferred picture is the likelier one now, where 1/2 means
        neither (`accuracy`); and by how much, u (`margin`)."""
        trained, before = self._errors(policy, batch)
        u = self._logit(trained, before)
        loss = self._of(u) + self.sft_weight * trained.chosen
        return {"loss": loss * batch.weights, "accuracy": (u.sign() + 1) / 2, "margin": u}

    def _errors(self, policy: Policy, batch: Batch) -> tuple[_Sides, _Sides]:
        """The errors of the model in training, and of the one before it."""
        import torch

        assert batch.rejected is not None
        t, (asked, mixed) = self.draw_t(policy.noise, batch), self.draw_noise(batch)
        pictures = _twice(batch.latents, batch.rejected)
        asked, mixed, times = _twice(asked), _twice(mixed), _twice(t)
        noisy = policy.noise.corrupt(pictures, mixed, times)
        target = policy.noise.target(pictures, asked, times)

        def errors() -> _Sides:
            cond = {name: _twice(value) for name, value in policy.condition(batch).items()}
            prediction = policy.predict(noisy, times, cond).float()
            return _Sides(*(prediction - target).square().flatten(1).mean(1).chunk(2))

        # The reference comes first: a network whose weights are swapped after its forward pass has no true gradient.
        with torch.no_grad(), policy.reference():
            before = errors()
        return errors(), before

    def _logit(self, trained: _Sides, before: _Sides) -> Tensor:
        return -self.beta / 2 * ((trained.chosen - before.chosen) - (trained.rejected - before.rejected))

    def _of(self, u: Tensor) -> Tensor:
        from torch.nn.functional import logsigmoid

        if self.variant == "ipo":
            return (u - 0.5).square()
        wrong = self.label_smoothing
        return -(1 - wrong) * logsigmoid(u) - (wrong * logsigmoid(-u) if wrong else 0)


def _twice(first: Tensor, second: Tensor | None = None) -> Tensor:
    """One after the other along the batch, the same again if there is no second."""
    import torch

    return torch.cat([first, first if second is None else second])
