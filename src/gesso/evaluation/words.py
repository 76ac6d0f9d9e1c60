"""New words in a model that draws: those of the run it comes from, and those bundled with LoRA files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from safetensors.torch import load_file

from gesso.adapters import AttachedTokens, Embedding
from gesso.core.seams import Family, Parts
from gesso.core.tokens import NewToken
from gesso.errors import UserError
from gesso.families.lora_file import LoRAFile

if TYPE_CHECKING:
    from torch import Tensor

Words = dict[str, Mapping[str, "Tensor"]]
"""Of each token the vectors [n, width] by the key of the text encoder."""


def of_run(tokens: Sequence[NewToken], weights: Path) -> Words:
    """Those that a run trained, from the folder of its weights."""
    return {token.token: load_file(weights / token.file) for token in tokens}


def teach(parts: Parts, family: Family, own: Words, loras: Sequence[LoRAFile]) -> None:
    """Put words into tokenizers and text encoders; raises `UserError` for those that do not fit or are there twice."""
    words = dict(own)
    for file in loras:
        if twice := sorted(words.keys() & file.words.keys()):
            fix = "draw without one of the two"
            raise UserError(f"the word {twice[0]} is there twice", where=str(file.path), fix=fix)
        words |= file.words
    if not words:
        return
    files = ", ".join(str(file.path) for file in loras if file.words)
    try:
        spec = Embedding.model_validate(
            {"tokens": [{"token": name, "vectors": len(next(iter(v.values())))} for name, v in words.items()]}
        )
    except ValidationError as error:
        what = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
        raise UserError(f"its words cannot be read: {what}", where=files, fix="use the LoRA without them") from error
    attached = AttachedTokens(spec.tokens, family.add_tokens(parts, spec.tokens, seed=0))
    try:
        attached.restore({f"{t.folder}.{key}": v for t in spec.tokens for key, v in words[t.token].items()})
    except UserError as error:
        what = "its words are of another kind of model"
        raise UserError(what, where=files, fix="use the base model that they were trained on") from error
