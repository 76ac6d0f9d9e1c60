"""A loss on who is shown: the estimate of the clean picture should have the face of the picture it came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from gesso.core import recognition
from gesso.core.seams import Policy, Spec

if TYPE_CHECKING:
    from torch import Tensor

    from gesso.core.batch import Batch


class IdentityLoss(Spec):
    """weight x (1 - cosine) between the identity embeddings of the estimated and the true picture.

    The clean latent is estimated in one step from the prediction, decoded by the VAE at a small size, and embedded by
    a frozen recogniser; gradients flow back through both. The reference is the training picture of the same sample,
    decoded in the same way. Only timesteps with little noise take part: elsewhere the estimate shows nobody yet.
    """

    weight: float = Field(default=0.1, gt=0)
    """What it counts beside the denoising loss."""
    model: str = "micro:identity"
    """The recogniser: a folder or hub id of a CLIP vision model with a projection (micro:identity, in the package,
    knows the people of the painted world only), or insightface's buffalo_l where insightface and onnx2torch are
    installed."""
    timestep_high: float = Field(default=0.25, gt=0, le=1)
    """Take part only below this fraction of the timestep range."""
    side: int = Field(default=256, ge=32)
    """Longer side of what is decoded, in pixels of a VAE with 8 of them a latent cell: larger latents are shrunk first,
    which saves memory."""

    def loss(self, policy: Policy, batch: Batch, *, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """Of each sample, [B] float32; 0 where its timestep has too much noise or no face is found."""
        import torch

        found = list(torch.zeros(len(batch), device=noisy.device).split(1))
        recogniser = recognition.load(self.model, noisy.device)
        clean = policy.noise.clean(noisy, prediction.float(), t)
        # One at a time: a decoder's memory is what limits this, and pictures must not depend on their company.
        for i in (policy.noise.level(t) < self.timestep_high).nonzero().flatten().tolist():
            with torch.no_grad():
                true = policy.decode(self._small(batch.latents[i : i + 1]))
                cut = recogniser.find(true)
                if cut is None:
                    continue
                wanted = recogniser.embed(cut(true))
            shown = recogniser.embed(cut(policy.decode(self._small(clean[i : i + 1]))))
            found[i] = 1 - (shown * wanted).sum(1)
        return self.weight * torch.cat(found)

    def _small(self, latents: Tensor) -> Tensor:
        """Latents [1, C, h, w] of a picture whose longer side is at most about `side`."""
        from torch.nn.functional import interpolate

        longest = max(latents.shape[-2:])
        cells = max(self.side // 8, 4)
        if longest <= cells:
            return latents
        shape = [max(round(cells * s / longest), 1) for s in latents.shape[-2:]]
        return interpolate(latents, shape, mode="area")
