"""Textual inversion: vectors of new words train, alone or beside another adapter (pivotal tuning)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from gesso.adapters.parts import Beside, Plain, copy_into
from gesso.core.seams import Attached, Family, Layout, Parts
from gesso.core.tokens import NewToken, NewTokens

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gesso.core.changes import Change
    from gesso.core.seams import TokenVectors

TOKENS = "tokens"
"""What the vectors of new tokens are called among the parts that train."""


class Embedding(Beside):
    """Vectors of new words alone, with the whole model frozen: textual inversion (Gal et al. 2022)."""

    type: Literal["embedding"] = "embedding"
    tokens: Annotated[NewTokens, Field(min_length=1)]
    """New words, each of which stands for vectors that are trained."""

    @property
    def train_text_encoders(self) -> bool:
        """Never: only what they read trains."""
        return False

    def summary(self) -> dict[str, str]:
        """What a model card says of it."""
        return {"new words": ", ".join(f"{t.token} ({t.vectors})" for t in self.tokens)}

    def attach(
        self,
        parts: Parts,
        family: Family,
        *,
        seed: int,
        text_encoders: Sequence[int] = (),
        reference: bool = False,  # noqa: ARG002 (the first values are kept in any case)
    ) -> AttachedTokens:
        """Teach the tokenizers the words and put their vectors into every text encoder; nothing else trains."""
        assert not text_encoders
        return AttachedTokens(self.tokens, family.add_tokens(parts, self.tokens, seed=seed))


class AttachedTokens(Plain):
    """Vectors of new tokens in place, by the keys that files know the text encoders by."""

    def __init__(self, tokens: Sequence[NewToken], encoders: Mapping[str, TokenVectors]) -> None:
        self._tokens, self._encoders = tuple(tokens), dict(encoders)

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """One part with the vectors of every token in every encoder, [n, width] each."""
        named = {
            f"{token.folder}.{key}": vectors
            for key, encoder in self._encoders.items()
            for token, vectors in zip(self._tokens, encoder.vectors, strict=True)
        }
        return {TOKENS: named}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the vectors have the values that they started with, for prompts that are encoded inside.

        The model without the tokens at all could not read the captions.
        """
        for encoder in self._encoders.values():
            encoder.at_start = True
        try:
            yield
        finally:
            for encoder in self._encoders.values():
                encoder.at_start = False

    def state(self) -> dict[str, Tensor]:
        """The trained vectors, float32."""
        return {name: vectors.detach() for name, vectors in self.parameters()[TOKENS].items()}

    def layout(self) -> Layout:
        """A folder a token with one file, in which each text encoder has a key (clip_l and clip_g for SDXL)."""
        return Layout({token.file: {"format": "pt", "token": token.token} for token in self._tokens})

    def after_step(self) -> None:
        """Give the vectors of tokens with `keep_norm` back the lengths that they started with."""
        import torch

        with torch.no_grad():
            for encoder in self._encoders.values():
                for token, vectors, start in zip(self._tokens, encoder.vectors, encoder.first_values, strict=True):
                    if token.keep_norm:
                        vectors.mul_(start.norm(dim=1, keepdim=True) / vectors.norm(dim=1, keepdim=True))

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` back in place; raises `UserError` where tokens or their numbers of vectors differ."""
        fix = "use the adapter.tokens (words, numbers of vectors) that it was trained with"
        copy_into(state, self.state(), what="the saved embedding", fix=fix)


class AttachedWithTokens:
    """An adapter and new tokens in training together."""

    def __init__(self, adapter: Attached, tokens: AttachedTokens) -> None:
        self._adapter, self._tokens = adapter, tokens

    def parameters(self) -> dict[str, Mapping[str, nn.Parameter]]:
        """Those of the adapter, and the tokens' as one more part."""
        return {**self._adapter.parameters(), **self._tokens.parameters()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the networks are as before training, and the tokens have their first values."""
        with self._adapter.reference(), self._tokens.reference():
            yield

    def state(self) -> dict[str, Tensor]:
        """Both states."""
        return {**self._adapter.state(), **self._tokens.state()}

    def layout(self) -> Layout:
        """The files of both."""
        own, words = self._adapter.layout(), self._tokens.layout()
        return Layout({**own.headers, **words.headers}, {**own.texts, **words.texts})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` back in place; raises `UserError` where it is not of both."""
        words = self._tokens.state().keys()
        self._tokens.restore({k: t for k, t in state.items() if k in words})
        self._adapter.restore({k: t for k, t in state.items() if k not in words})

    def begin(self) -> None:
        """What the adapter starts from is read; the words have their first values already."""
        self._adapter.begin()

    def rate_factor(self, name: str) -> float:
        """That of the adapter; 1 for vectors."""
        return 1.0 if name in self._tokens.state() else self._adapter.rate_factor(name)

    def after_step(self) -> None:
        """Both, each for its own."""
        self._adapter.after_step()
        self._tokens.after_step()

    def changes(self) -> Mapping[str, Change]:
        """Those of the adapter; the words change no layer's weight."""
        return self._adapter.changes()


def with_tokens(adapter: Attached, tokens: Sequence[NewToken], parts: Parts, family: Family, *, seed: int) -> Attached:
    """The adapter, joined by new tokens if there are any."""
    if not tokens:
        return adapter
    return AttachedWithTokens(adapter, AttachedTokens(tokens, family.add_tokens(parts, tokens, seed=seed)))
