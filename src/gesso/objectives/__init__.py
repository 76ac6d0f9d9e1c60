"""What is minimised. Each objective is one class; `AnyObjective` is the registry that the run file chooses from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from gesso.core.seams import chosen_by_type
from gesso.objectives.denoise import Denoise
from gesso.objectives.dpo import DPO
from gesso.objectives.dreambooth import DreamBooth

AnyObjective = Annotated[
    Annotated[Denoise, Tag("denoise")] | Annotated[DreamBooth, Tag("dreambooth")] | Annotated[DPO, Tag("dpo")],
    Discriminator(chosen_by_type("denoise")),
]

__all__ = ["DPO", "AnyObjective", "Denoise", "DreamBooth"]
