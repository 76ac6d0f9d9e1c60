"""What all adapters on layers share: which layers they take, how wide and strong they are, how fast they learn."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from gesso.adapters.parts import Beside, prefix, trained_networks
from gesso.core.seams import Family, Parts
from gesso.errors import UserError

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, ...]
"""Of a layer's weight: [out, in] of a linear layer, [out, in, k, k] of a convolution."""

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Ends of the names of the text encoders' layers that are adapted."""
_Value = TypeVar("_Value")


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text} is no regular expression: {error}") from error
    return text


Pattern = Annotated[str, AfterValidator(_expression)]


@dataclass(frozen=True)
class Choice:
    """How one layer is adapted."""

    rank: int
    alpha: float


class Layered(Beside, ABC):
    """An adapter on some layers of the denoiser, and of the text encoders by choice."""

    targets: Literal["attention", "attention-mlp", "all-linear", "all"] | tuple[str, ...] = "attention"
    """Which denoiser layers: a preset, or a list of module names such as to_q or to_out.0. all is every linear layer
    and convolution but the first and the last."""
    train_text_encoders: bool = False
    """Also adapt the attention of the text encoders; then text embeddings are not cached."""
    learning_rates: dict[Pattern, Annotated[float, Field(gt=0)]] = {}
    """Learning rates of some layers, as factors of their part's: pieces of layers' names, or regular expressions, such
    as mid_block, attn2 or up_blocks.1, each with its factor. The first that is found in a name counts."""

    def choose(self, layers: Mapping[str, Shape], family: Family) -> dict[str, Choice]:
        """Those of the given layers (canonical names) that are adapted, and how.

        Raises `UserError` for targets and patterns that mean none of them, and for layers that cannot be adapted so.
        """
        chosen = {n: self._choice(n, shape) for n, shape in layers.items() if self._is_target(n, family)}
        self._refuse_idle(layers, list(chosen), family)
        return {name: choice for name, choice in chosen.items() if choice.rank > 0}

    @abstractmethod
    def size(self, shape: Shape, choice: Choice) -> int:
        """How many numbers train on a layer."""

    def rate(self, name: str) -> float:
        """The factor of a layer's learning rate."""
        return found(self.learning_rates, name, 1.0)

    def names(self, family: Family) -> list[str]:
        """Ends of the names of the denoiser's layers that are meant."""
        return family.targets(self.targets) if isinstance(self.targets, str) else list(self.targets)

    @abstractmethod
    def _choice(self, name: str, shape: Shape) -> Choice:
        """How a layer that is meant is adapted."""

    def _patterns(self) -> dict[str, Sequence[str]]:
        """The patterns of each field that has some."""
        return {"learning_rates": list(self.learning_rates)}

    def _is_target(self, name: str, family: Family) -> bool:
        part, _, path = name.partition(".")
        names = self.names(family) if part == family.part_names[0] else TEXT_TARGETS
        return any(path == target or path.endswith(f".{target}") for target in names)

    def _refuse_idle(self, layers: Mapping[str, Shape], chosen: Sequence[str], family: Family) -> None:
        denoiser = f"{family.part_names[0]}."
        own = [name for name in layers if name.startswith(denoiser)]
        # A preset names layers that not every model has.
        listed = self.targets if isinstance(self.targets, tuple) else ()
        if idle := [t for t in listed if not any(f".{name}".endswith(f".{t}") for name in own)]:
            leaves = sorted({n.rsplit(".", 1)[-1] for n in own} - {"0", "1", "2"})
            raise UserError(
                f"no layer of the denoiser is called {', '.join(idle)}",
                where="adapter.targets",
                fix=f"use a preset (attention, attention-mlp, all-linear, all) or names from: {', '.join(leaves)}",
            )
        for key, patterns in self._patterns().items():
            for pattern in patterns:
                if not any(re.search(pattern, name) for name in chosen):
                    raise UserError(
                        f"'{pattern}' is found in the name of no adapted layer",
                        where=f"adapter.{key}",
                        fix=f"such names are {', '.join(chosen[:: max(1, len(chosen) // 3)][:3])}",
                    )


class Ranked(Layered):
    """An adapter of low-rank matrices."""

    rank: int = Field(default=16, ge=1, le=4096)
    """Width of the low-rank matrices: more can hold more, and overfits sooner. 16 to 64 for a character."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the adapter is alpha / rank. Empty means alpha = rank."""
    conv_rank: int | None = Field(default=None, ge=1, le=4096)
    """Also adapt the denoiser's convolutions, those of 3 x 3 with this rank and those of 1 x 1 with `rank`. Empty: only
    if `targets` names them, with `rank`."""
    conv_alpha: float | None = Field(default=None, gt=0)
    """alpha of the 3 x 3 convolutions. Empty means conv_rank."""
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=0, le=4096)]] = {}
    """Other ranks for some layers, by pieces of their names as in `learning_rates`; 0 leaves a layer alone."""
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = {}
    """Other alphas for some layers, by pieces of their names as in `learning_rates`."""
    rank_dropout: float = Field(default=0.0, ge=0, lt=1)
    """In training, the share of the ranks that is left out; of LoHa and LoKr, the share of each layer's outputs."""
    module_dropout: float = Field(default=0.0, ge=0, lt=1)
    """In training, how often the adapter of a whole layer is left out."""

    @model_validator(mode="after")
    def _convolutions(self) -> Ranked:
        if self.conv_alpha is not None and self.conv_rank is None:
            raise ValueError("conv_alpha is given without conv_rank")
        return self

    @property
    def effective_alpha(self) -> float:
        """alpha, or rank where alpha is empty."""
        return self.alpha if self.alpha is not None else float(self.rank)

    def names(self, family: Family) -> list[str]:
        """Ends of the names of the denoiser's layers that are meant."""
        more = family.targets("convolutions") if self.conv_rank is not None else []
        return [*super().names(family), *more]

    def summary(self) -> dict[str, str]:
        """What a model card says of it."""
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        more = f", convolutions at {self.conv_rank}" if self.conv_rank is not None else ""
        return {"rank, alpha": f"{self.rank}, {self.effective_alpha:g}", "layers": targets + more}

    def _choice(self, name: str, shape: Shape) -> Choice:
        wide = self.conv_rank if prod(shape[2:]) > 1 else None
        rank = found(self.rank_pattern, name, wide or self.rank)
        usual = self.alpha if wide is None else self.conv_alpha
        return Choice(rank, found(self.alpha_pattern, name, usual if usual is not None else float(rank)))

    def _patterns(self) -> dict[str, Sequence[str]]:
        return super()._patterns() | {
            "rank_pattern": list(self.rank_pattern),
            "alpha_pattern": list(self.alpha_pattern),
        }


def found(patterns: Mapping[str, _Value], name: str, otherwise: _Value) -> _Value:
    """The value of the first pattern that is found in a name."""
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), otherwise)


@dataclass(frozen=True)
class Placed:
    """The layers of one network that are adapted, by their paths in it."""

    part: str
    network: Any
    prefix: str
    """What canonical names have before the path."""
    choices: Mapping[str, Choice]

    def patterns(self, usual: Choice) -> tuple[dict[str, int], dict[str, float | int]]:
        """peft's `rank_pattern` and `alpha_pattern`: the layers that differ from the usual."""
        ranks = {path: c.rank for path, c in self.choices.items() if c.rank != usual.rank}
        return ranks, {path: whole(c.alpha) for path, c in self.choices.items() if c.alpha != usual.alpha}


def place(spec: Layered, parts: Parts, family: Family, text_encoders: Sequence[int]) -> list[Placed]:
    """Which layers of which networks an adapter takes; raises as `Layered.choose` does."""
    networks = trained_networks(parts, family, text_encoders)
    layers = {part: dict(_layers(part, network)) for part, network in networks.items()}
    every = {name: shape for own in layers.values() for name, (_, shape) in own.items()}
    choices = spec.choose(every, family)
    if not choices:
        raise UserError("no layer is adapted", where="adapter", fix="change adapter.targets or adapter.rank_pattern")
    return [
        Placed(
            part,
            network,
            prefix(part, network),
            {path: choices[name] for name, (path, _) in layers[part].items() if name in choices},
        )
        for part, network in networks.items()
    ]


def whole(alpha: float) -> float | int:
    """peft and the files' readers expect an integer where there is one."""
    return int(alpha) if alpha == int(alpha) else alpha


def _layers(part: str, network: nn.Module) -> Iterator[tuple[str, tuple[str, Shape]]]:
    """Canonical name -> path and weight shape, of each layer that an adapter can sit on."""
    from torch import nn

    start = prefix(part, network)
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield f"{start}{path}", (path, tuple(module.weight.shape))
