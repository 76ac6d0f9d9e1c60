"""The optimiser as a section of the run file, and what is known of each one that has a name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gesso.core.seams import Spec

Name = Literal[
    "adamw", "adamw8bit", "paged_adamw8bit", "lion", "lion8bit", "adafactor", "prodigy", "dadapt_adam", "dadapt_lion",
    "schedule_free", "came", "muon", "soap"
]  # fmt: skip
Option = bool | int | float | str | tuple[float, ...] | None

_CONSTANTS = ("beta1", "beta2", "beta3", "eps")
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Kind:
    """A named optimiser: where it comes from, and how it is fed."""

    path: str
    """Package and class."""
    betas: tuple[float | None, ...]
    """The usual ones; how many there are is how many it takes."""
    moments: int
    """Bytes a trained parameter of what it remembers."""
    eps: float | None = None
    """The usual one; None where it takes none."""
    by_tensor: bool = False
    """It looks at the shape of a tensor, so that it cannot take all of them as one vector."""
    averages: bool = False
    """The weights to use are an average of those that train."""
    finds_rate: bool = False
    """It looks for the learning rate by itself, so that ours is a factor on what it finds."""
    options: Mapping[str, Option] = field(default_factory=dict)
    """What we ask of it beside its defaults."""
    paged: bool = False
    """What it remembers moves to main memory where the GPU's is short."""

    @property
    def package(self) -> str:
        """What must be installed."""
        return self.path.partition(".")[0]

    @property
    def by_number(self) -> bool:
        """Whether each weight's update depends on that weight alone."""
        return not (self.by_tensor or self.finds_rate or self.averages)

    def runs_on(self, device: str) -> bool:
        """Whether it can be used on a kind of device."""
        known = ("cuda",) if self.paged else ("cuda", "cpu")
        return self.package != "bitsandbytes" or device in known


_OWN_RATE: Mapping[str, Option] = {"scale_parameter": False, "relative_step": False}
_BASIS: Mapping[str, Option] = {"max_precondition_dim": 1024}
_DECOUPLED: Mapping[str, Option] = {"weight_decouple": True}
_USUAL, _LION, _LIBRARY = (0.9, 0.999), (0.9, 0.99), "pytorch_optimizer"

KINDS: Mapping[str, Kind] = {
    "adamw": Kind("torch.optim.AdamW", _USUAL, 8, eps=1e-8),
    "adamw8bit": Kind("bitsandbytes.optim.AdamW8bit", _USUAL, 2, eps=1e-8),
    "paged_adamw8bit": Kind("bitsandbytes.optim.PagedAdamW8bit", _USUAL, 2, eps=1e-8, paged=True),
    "lion": Kind(f"{_LIBRARY}.Lion", _LION, 4),
    "lion8bit": Kind("bitsandbytes.optim.Lion8bit", _LION, 1),
    "adafactor": Kind(f"{_LIBRARY}.AdaFactor", (None, 0.999), 1, by_tensor=True, options=_OWN_RATE),
    "prodigy": Kind(f"{_LIBRARY}.Prodigy", _USUAL, 16, eps=1e-8, finds_rate=True),
    "dadapt_adam": Kind(f"{_LIBRARY}.DAdaptAdam", _USUAL, 12, eps=1e-8, finds_rate=True, options=_DECOUPLED),
    "dadapt_lion": Kind(f"{_LIBRARY}.DAdaptLion", _LION, 8, finds_rate=True, options=_DECOUPLED),
    "schedule_free": Kind(f"{_LIBRARY}.ScheduleFreeAdamW", _USUAL, 12, eps=1e-8, averages=True),
    "came": Kind(f"{_LIBRARY}.CAME", (0.9, 0.999, 0.9999), 5, by_tensor=True),
    "muon": Kind("torch.optim.Muon", _USUAL, 5, eps=1e-8, by_tensor=True),
    "soap": Kind(f"{_LIBRARY}.SOAP", (0.95, 0.95), 8, eps=1e-8, by_tensor=True, options=_BASIS),
}


class Optimizer(Spec):
    """The optimiser and its constants. Each part of the model has one of its own."""

    type: Name | str = "adamw"
    """A name, or the dotted path of a class, such as torch.optim.NAdam. The 8-bit ones need bitsandbytes, and the paged
    one a GPU too; lion, adafactor, prodigy, dadapt, schedule_free, came and soap need pytorch-optimizer. prodigy and
    dadapt find the learning rate themselves: set it to 1. schedule_free averages instead of lowering the rate;
    pictures, measurements and files are of its average. muon (torch 2.9 or newer) makes the updates of matrices and
    convolutions orthogonal and leaves the rest to adamw, at the same learning rate."""
    beta1: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the first moment. Empty: 0.9; soap 0.95; adafactor keeps none."""
    beta2: float | None = Field(default=None, ge=0, lt=1)
    """Decay of the second moment. Empty: 0.999; lion and dadapt_lion 0.99; soap 0.95."""
    beta3: float | None = Field(default=None, ge=0, lt=1)
    """Decay of what came trusts its updates by. Empty: 0.9999."""
    eps: float | None = Field(default=None, gt=0)
    """Added to the denominator. Empty: 1e-8; lion, dadapt_lion, adafactor and came have none."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay. Empty: 0.01, or the default of a class that is named by its path."""
    options: dict[str, Option] = Field(default_factory=dict)
    """What else its class takes, under the names that it has there; refused if it does not."""

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value in KINDS or _CLASS.fullmatch(value):
            return value
        near = difflib.get_close_matches(value.lower().replace("-", "_"), KINDS, n=1, cutoff=0.7)
        guess = f"; did you mean {near[0]}?" if near else ""
        names = ", ".join(KINDS)
        raise ValueError(f"must be one of {names}, or the dotted path of a class, not '{value}'{guess}")

    @model_validator(mode="after")
    def _only_its_own(self) -> Optimizer:
        given = [name for name in _CONSTANTS if vars(self)[name] is not None]
        for name in given:
            if self.kind is None:
                raise ValueError(f"{name} is for the named optimisers: put what {self.type} takes under options")
            if name not in self._takes():
                raise ValueError(f"{self.type} has no {name}: leave it out")
        taken = {"betas", "eps", "weight_decay"} & self.options.keys()
        if taken and self.kind is not None:
            raise ValueError(f"options: {', '.join(sorted(taken))} has a key of its own here")
        if {"params", "lr"} & self.options.keys():
            raise ValueError("options: the learning rate is training.learning_rate")
        return self

    @property
    def kind(self) -> Kind | None:
        """What is known of it; None for a class that is named by its path."""
        return KINDS.get(self.type)

    @property
    def by_piece(self) -> bool:
        """Whether a tensor's update depends on that tensor alone, so that each can be updated at a time of its own."""
        kind = self.kind
        return kind is not None and (kind.by_number or (kind.by_tensor and self.type != "muon"))

    @property
    def path(self) -> str:
        """Package and class."""
        return self.type if self.kind is None else self.kind.path

    @property
    def betas(self) -> tuple[float | None, ...]:
        """The ones given, and the usual ones for the others."""
        usual = () if self.kind is None else self.kind.betas
        own = (self.beta1, self.beta2, self.beta3)
        return tuple(b if given is None else given for b, given in zip(usual, own, strict=False))

    @property
    def decay(self) -> float:
        """Weight decay of a named optimiser."""
        return _WEIGHT_DECAY if self.weight_decay is None else self.weight_decay

    def arguments(self) -> dict[str, Any]:
        """What its class is made with, beside parameters and rates."""
        if self.kind is None:
            decay = {} if self.weight_decay is None else {"weight_decay": self.weight_decay}
            return decay | self.options
        eps = self.kind.eps if self.eps is None else self.eps
        own = {"betas": self.betas, "weight_decay": self.decay} | ({} if eps is None else {"eps": eps})
        return own | dict(self.kind.options) | self.options

    def _takes(self) -> tuple[str, ...]:
        assert self.kind is not None
        return (*_CONSTANTS[: len(self.kind.betas)], *(("eps",) if self.kind.eps is not None else ()))
