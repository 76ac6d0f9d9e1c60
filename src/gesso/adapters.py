"""What is trained. Each adapter is one class, thin over peft; `AnyAdapter` is the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from gesso.core.seams import Attached, Family, Parts, Spec

if TYPE_CHECKING:
    pass


class LoRA(Spec):
    """Low-rank matrices added to linear layers: W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=4096)
    """Width of the low-rank matrices: more can hold more, and overfits sooner. 16 to 64 for a character."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the adapter is alpha / rank. Empty means alpha = rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the adapter's inputs dropped in training."""
    targets: Literal["attention", "attention-mlp", "all-linear"] | tuple[str, ...] = "attention"
    """Which denoiser layers: a preset, or a list of module names such as to_q or to_out.0."""
    train_text_encoders: bool = False
    """Also adapt the attention of the text encoders; then text embeddings are not cached."""

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return (self.alpha if self.alpha is not None else self.rank) / self.rank

    def attach(self, parts: Parts, family: Family, *, seed: int) -> Attached:
        raise NotImplementedError


AnyAdapter = LoRA
