"""How much the error at each noise level counts.

A rule is a weight on the squared error in x_0 as a function of the signal-to-noise ratio, w(SNR). What a denoiser is
trained on is the error in its own answer, and for one and the same guess of x_0 these errors differ by a known factor:

| answer | its squared error / squared error in x_0 | weight on its loss |
|---|---|---|
| epsilon: n | SNR | w / SNR |
| v_prediction: a n - s x_0 (Salimans & Ho 2022) | SNR + 1 | w / (SNR + 1) |
| flow: n - x_0 (rectified flow) | (1 + sqrt SNR)^2 | w / (1 + sqrt SNR)^2 |

so each rule weighs one guess alike, whatever the answer is: its loss is w(SNR) |x_0 error|^2.

| rule | w(SNR) | on epsilon | on v |
|---|---|---|---|
| `min_snr` (Hang et al. 2023) | min(SNR, g) | min(SNR, g) / SNR | min(SNR, g) / (SNR + 1) |
| `soft_min_snr` (Crowson et al. 2024) | SNR g / (SNR + g) | g / (SNR + g) | SNR g / ((SNR + g) (SNR + 1)) |
| `debiased` (Yu et al. 2023) | SNR / sqrt(min(SNR, 1000)) | 1 / sqrt(SNR), below the cap | sqrt(SNR) / (SNR + 1) |
| `p2` (Choi et al. 2022) | SNR / (k + SNR)^g | (k + SNR)^-g | SNR / ((SNR + 1) (k + SNR)^g) |
| `epsilon` | SNR | 1 | SNR / (SNR + 1) |
| `none` | as if its own answer were all that counts | 1 | 1 |

`none` is the one rule that depends on the answer. With a distance other than l2 the factors are the same, and the
equality holds for the squared error alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Discriminator, Field, Tag

from gesso.core.seams import Spec, chosen_by_type
from gesso.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

Answer = Literal["epsilon", "v_prediction", "flow"]
"""What a denoiser is asked for: the noise n, v = a n - s x_0, or n - x_0."""

_DEBIASED_CAP = 1000.0


class Weighting(Spec, ABC):
    """Base of the rules."""

    @abstractmethod
    def on_answer(self, snr: Tensor, answer: Answer) -> Tensor:
        """Weight of the squared error in a denoiser's answer."""


class OfPicture(Weighting, ABC):
    """Base of the rules that weigh a guess of the picture alike, whatever the answer is."""

    @abstractmethod
    def on_x0(self, snr: Tensor) -> Tensor:
        """Weight of the squared error in x_0 at these signal-to-noise ratios."""

    def on_answer(self, snr: Tensor, answer: Answer) -> Tensor:
        """Weight of the squared error in a denoiser's answer."""
        return self.on_x0(snr) / error_ratio(snr, answer)


def error_ratio(snr: Tensor, answer: Answer) -> Tensor:
    """The squared error in an answer over the squared error in the x_0 that it says."""
    match answer:
        case "epsilon":
            return snr
        case "v_prediction":
            return snr + 1
        case "flow":
            return (1 + snr.sqrt()).square()


class Unweighted(Weighting):
    """Every noise level counts the same, measured in what the denoiser predicts."""

    type: Literal["none"] = "none"

    def on_answer(self, snr: Tensor, answer: Answer) -> Tensor:  # noqa: ARG002
        """1."""
        return snr.new_ones(snr.shape)


class MinSNR(OfPicture):
    """Low noise counts no more than SNR = gamma does (Hang et al. 2023, arXiv:2303.09556)."""

    type: Literal["min_snr"] = "min_snr"
    gamma: float = Field(default=5.0, gt=0)
    """Where the weight stops growing; 5 is the paper's choice."""

    def on_x0(self, snr: Tensor) -> Tensor:
        """min(SNR, gamma)."""
        return snr.clamp(max=self.gamma)


class SoftMinSNR(OfPicture):
    """min_snr without its corner: SNR gamma / (SNR + gamma) (Crowson et al. 2024, arXiv:2401.11605)."""

    type: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: float = Field(default=5.0, gt=0)
    """What the weight tends to where there is little noise."""

    def on_x0(self, snr: Tensor) -> Tensor:
        """SNR gamma / (SNR + gamma)."""
        return snr * (self.gamma / (snr + self.gamma))


class Debiased(OfPicture):
    """Debiased estimation (Yu et al. 2023, arXiv:2310.08442): 1 / sqrt(SNR) on the error in noise, SNR at most 1000."""

    type: Literal["debiased"] = "debiased"
    v_rule: Literal["same", "kohya", "onetrainer"] = "same"
    """How it counts for a model that predicts v, of which the paper says nothing. same: the weight that a guess of the
    picture has with epsilon. kohya: 1 / (SNR + 1), onetrainer: 1 / sqrt(SNR + 1), as these tools have it."""

    def on_x0(self, snr: Tensor) -> Tensor:
        """SNR / sqrt(min(SNR, 1000))."""
        return snr.sqrt() * (snr / _DEBIASED_CAP).clamp(min=1).sqrt()

    def on_answer(self, snr: Tensor, answer: Answer) -> Tensor:
        """The weight, or for v that of the tool which `v_rule` names; these know no flow, which is a `UserError`."""
        if self.v_rule == "same" or answer == "epsilon":
            return super().on_answer(snr, answer)
        if answer == "flow":
            raise UserError(
                f"the rule of {self.v_rule} is for models that predict v, and this one predicts a flow",
                where="objective.weighting.v_rule",
                fix="take it out",
            )
        plain = snr.clamp(max=_DEBIASED_CAP) + 1
        return 1 / (plain if self.v_rule == "kohya" else plain.sqrt())


class P2(OfPicture):
    """Perception-prioritised: 1 / (k + SNR)^gamma on the error in noise (Choi et al. 2022, arXiv:2204.00227)."""

    type: Literal["p2"] = "p2"
    gamma: float = Field(default=1.0, gt=0)
    """How strongly little noise is played down; the paper has 0.5 and 1."""
    k: float = Field(default=1.0, gt=0)
    """Added to the SNR, so that the weight is finite where all is noise."""

    def on_x0(self, snr: Tensor) -> Tensor:
        """SNR / (k + SNR)^gamma."""
        return snr / (self.k + snr).pow(self.gamma)


class EpsilonLike(OfPicture):
    """Weigh a model of v or flow as if it predicted noise: SNR on the error in x_0."""

    type: Literal["epsilon"] = "epsilon"

    def on_x0(self, snr: Tensor) -> Tensor:
        """SNR."""
        return snr


AnyWeighting = Annotated[
    Annotated[Unweighted, Tag("none")]
    | Annotated[MinSNR, Tag("min_snr")]
    | Annotated[SoftMinSNR, Tag("soft_min_snr")]
    | Annotated[Debiased, Tag("debiased")]
    | Annotated[P2, Tag("p2")]
    | Annotated[EpsilonLike, Tag("epsilon")],
    Discriminator(chosen_by_type("none")),
]
