"""New words for a model: what the run file says of them, and where their vectors are kept."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator

from gesso.core.seams import Spec

_SIGNS = r"""\s.,:;()\[\]{}|\\/"'"""


class NewToken(Spec):
    """A word that the model learns: in captions and prompts it stands for vectors that are trained (Gal et al. 2022,
    "An Image is Worth One Word", arXiv:2208.01618)."""

    token: str
    """The word, such as <aldar>: lower case, without blanks or punctuation, and new to the model."""
    initial: str = ""
    """Words whose embeddings it starts from, such as man. Several are shared out among the vectors; fewer than there
    are vectors are repeated. Empty: random vectors as large as those of the model's own words."""
    vectors: int = Field(default=1, ge=1, le=75)
    """How many vectors it stands for: each can hold something, and takes the place of one word in a prompt."""

    keep_norm: bool = False
    """Keep each vector as long as it was at the start, so that only its direction is learnt: it then weighs no more in
    a prompt than other words do."""

    @field_validator("token")
    @classmethod
    def _word(cls, value: str) -> str:
        if not value or re.search(f"[{_SIGNS}]", value) or not re.search(r"\w", value):
            raise ValueError(f"'{value}' is no word: write letters, as in <aldar>, without blanks or punctuation")
        if value != value.lower():
            raise ValueError(f"the text encoders read lower case only: write {value.lower()}")
        return value

    @property
    def names(self) -> tuple[str, ...]:
        """One token a vector, as diffusers calls them: <aldar>, <aldar>_1, <aldar>_2."""
        return (self.token, *(f"{self.token}_{i}" for i in range(1, self.vectors)))

    @property
    def stem(self) -> str:
        """Its name in file names, without signs: aldar."""
        return re.sub(r"\W+", "_", self.token).strip("_")

    @property
    def folder(self) -> str:
        """Where a checkpoint keeps its vectors."""
        return f"embeddings/{self.stem}"

    @property
    def file(self) -> str:
        """The file in a checkpoint, under the name that diffusers looks for in a folder."""
        return f"{self.folder}/learned_embeds.safetensors"


def _apart(tokens: Sequence[NewToken]) -> Sequence[NewToken]:
    """Readers replace a token wherever its letters stand, so none may be inside of another."""
    for i, one in enumerate(tokens):
        for j, other in enumerate(tokens):
            if i != j and one.token in other.token:
                raise ValueError(f"{one.token} is {'twice there' if one == other else f'a part of {other.token}'}")
            if i < j and one.stem == other.stem:
                raise ValueError(f"{one.token} and {other.token} would have files of one name, {one.stem}")
    return tokens


NewTokens = Annotated[tuple[NewToken, ...], AfterValidator(_apart)]
"""Tokens that can be told apart wherever they stand."""


def expanded(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The ids with each new token's own followed by those of its further vectors.

    diffusers does the same to the text, but only where upper and lower case are as the token has them.
    """
    followers = _followers(tokenizer)
    return [each for one in ids for each in (one, *followers.get(one, ()))]


def several(tokenizers: Sequence[Any]) -> bool:
    """Whether any token stands for more than one vector."""
    return any(_followers(tokenizer) for tokenizer in tokenizers)


def _followers(tokenizer: Any) -> dict[int, list[int]]:
    """Ids of the second and further vectors by the id of the first."""
    added = tokenizer.added_tokens_encoder
    found = {}
    for name, first in added.items():
        ids: list[int] = []
        while (follower := added.get(f"{name}_{len(ids) + 1}")) is not None:
            ids.append(follower)
        if ids:
            found[first] = ids
    return found
