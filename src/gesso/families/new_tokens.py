"""New tokens in CLIP's tokenizers and text encoders: how they are read, and the vectors that are looked up for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gesso.core.random import generator
from gesso.core.tokens import NewToken
from gesso.errors import UserError

_END_OF_WORD = "</w>"


class NewVectors(nn.Module):
    """A table of embeddings in which some tokens have trainable float32 vectors of their own.

    It stands in the place of an encoder's `known` table, which is left alone: the vectors of tokens `first`,
    `first` + 1, ... are looked up in small tables beside it, one [n, width] a new token, and cast to its dtype. So no
    optimiser, decay or average ever sees another row. With `at_start` they are those from before training.
    """

    def __init__(self, known: nn.Embedding, first: int, start: Sequence[Tensor]) -> None:
        super().__init__()
        self.known, self.first, self.at_start = known, first, False
        # After `known`: an encoder takes the dtype of its first parameter for its own.
        self.tables = nn.ModuleList(nn.Embedding.from_pretrained(t.clone(), freeze=False) for t in start)
        self.register_buffer("start", torch.cat(list(start)), persistent=False)

    @property
    def vectors(self) -> list[nn.Parameter]:
        """What trains: [n, width] float32 for each token."""
        return [table.weight for table in self.tables]  # type: ignore[misc]

    @property
    def first_values(self) -> list[Tensor]:
        """What they were before training."""
        assert isinstance(self.start, Tensor)
        return list(self.start.split([len(vectors) for vectors in self.vectors]))

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings [..., width] of ids [...]."""
        own = self.start if self.at_start else torch.cat([*self.vectors])
        assert isinstance(own, Tensor)
        place = ids - self.first
        found = functional.embedding(place.clamp(0, len(own) - 1), own).to(self.known.weight.dtype)
        words = self.known(ids.clamp(max=self.known.num_embeddings - 1))
        return torch.where(((place >= 0) & (place < len(own)))[..., None], found, words)


def taught(tokenizers: Sequence[Any], tokens: Sequence[NewToken]) -> list[Any]:
    """Copies of the tokenizers that know the tokens; raises `UserError` for one that the model knows as a word."""
    copies = [copy.deepcopy(tokenizer) for tokenizer in tokenizers]
    for tokenizer in copies:
        words = tokenizer.get_vocab()
        for i, token in enumerate(tokens):
            for name in token.names:
                if name in words or name + _END_OF_WORD in words:
                    raise UserError(
                        f"the model has a token {name} already",
                        where=f"adapter.tokens.{i}.token",
                        fix=f"choose a word of your own, such as <my-{token.stem}>",
                    )
            tokenizer.add_tokens(list(token.names))
    return copies


def add(encoder: Any, tokenizer: Any, tokens: Sequence[NewToken], *, seed: int, part: str) -> NewVectors:
    """Put vectors for the tokens, which the tokenizer knows, into the encoder's table of embeddings."""
    known = encoder.get_input_embeddings()
    first = tokenizer.convert_tokens_to_ids(tokens[0].token)
    start = [_start(known.weight, tokenizer, token, seed=seed, part=part) for token in tokens]
    vectors = NewVectors(known, first, start).train(encoder.training)
    encoder.set_input_embeddings(vectors)
    return vectors


def pool_at_end(encoder: Any, tokenizer: Any) -> None:
    """Let the pooled embedding be that of the end mark, wherever new tokens stand.

    Models from before 2023, SDXL among them, have 2 for the end mark in their config, and transformers then takes the
    highest id for it, which is that of a new token. Where there is none, the two are the same place.
    """
    for module in encoder.modules():
        if "eos_token_id" in vars(module):  # in one class in transformers 4, in another in 5
            module.eos_token_id = tokenizer.eos_token_id


def _start(known: Tensor, tokenizer: Any, token: NewToken, *, seed: int, part: str) -> Tensor:
    """The first values of a token's vectors, [n, width] float32.

    Of m initial tokens each of n vectors has one in turn where n >= m, else the mean of its share of neighbours.
    """
    table, count = known.detach().float(), token.vectors
    ids = tokenizer(token.initial, truncation=False).input_ids[1:-1] if token.initial else []
    if not ids:
        draw = generator(seed, "new token", part, token.token).standard_normal((count, table.shape[1]))
        # The deviation of each coordinate alone, so that the vectors lie where words do.
        deviation, mean = torch.std_mean(table, dim=0)
        return mean + deviation * torch.from_numpy(draw).to(table)
    if count >= len(ids):
        return table[[ids[i % len(ids)] for i in range(count)]]
    return torch.stack([table[share.tolist()].mean(0) for share in np.array_split(np.array(ids), count)])
