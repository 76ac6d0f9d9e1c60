"""What is trained. Each adapter is one class; `AnyAdapter` is the registry that the run file chooses from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Discriminator, Tag

from gesso.adapters.embedding import TOKENS, AttachedTokens, Embedding
from gesso.adapters.full import AttachedFull, Full
from gesso.adapters.layered import Layered
from gesso.adapters.lora import AttachedLoRA, LoRA
from gesso.adapters.lycoris import LoHa, LoKr
from gesso.adapters.oft import OFT
from gesso.core.seams import chosen_by_type

AnyAdapter = Annotated[
    Annotated[LoRA, Tag("lora")]
    | Annotated[LoHa, Tag("loha")]
    | Annotated[LoKr, Tag("lokr")]
    | Annotated[OFT, Tag("oft")]
    | Annotated[Full, Tag("full")]
    | Annotated[Embedding, Tag("embedding")],
    Discriminator(chosen_by_type("lora")),
]

__all__ = [
    "OFT",
    "TOKENS",
    "AnyAdapter",
    "AttachedFull",
    "AttachedLoRA",
    "AttachedTokens",
    "Embedding",
    "Full",
    "Layered",
    "LoHa",
    "LoKr",
    "LoRA",
]
