"""Where events go. JSONL is always on; `AnyTracker` lists the ones a run file can add."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gesso.core.seams import Spec


class TensorBoard(Spec):
    """Scalars and preview pictures under `logs/` for `tensorboard --logdir`."""

    type: Literal["tensorboard"] = "tensorboard"


class Wandb(Spec):
    """Weights & Biases. Log in with `wandb login` or WANDB_API_KEY; no key is ever read from a run file."""

    type: Literal["wandb"] = "wandb"
    project: str = "gesso"
    """Project on W&B."""
    run_name: str | None = None
    """Name there. Empty: the run's name."""
    entity: str | None = None
    """User or team. Empty: your default."""


AnyTracker = Annotated[TensorBoard | Wandb, Field(discriminator="type")]
