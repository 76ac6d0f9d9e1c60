"""What all adapters share: which networks train, how their tensors are named, and how saved tensors come back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from gesso.core.seams import Family, Parts, Spec
from gesso.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from gesso.core.changes import Change


class Beside(Spec):
    """What adapters say whose own weights stand beside those of the networks, which stay as they are."""

    def at(self, learning_rate: float) -> Self:  # noqa: ARG002
        """The same at any learning rate of the denoiser."""
        return self

    def types(self, dtype: torch.dtype, *, text_encoders: bool) -> tuple[torch.dtype, torch.dtype]:  # noqa: ARG002
        """The networks are loaded in the type that they compute in."""
        return dtype, dtype


class Plain:
    """What most adapters answer: nothing to read at the start, one learning rate, nothing after a step, no changes."""

    def begin(self) -> None:
        """Nothing is read."""

    def rate_factor(self, name: str) -> float:  # noqa: ARG002
        """1 for every parameter."""
        return 1.0

    def after_step(self) -> None:
        """Nothing is done."""

    def changes(self) -> Mapping[str, Change]:
        """None: the weights themselves train."""
        return {}


def trained_networks(parts: Parts, family: Family, text_encoders: Sequence[int]) -> dict[str, Any]:
    """The networks that train by name, the denoiser first."""
    denoiser, *encoders = family.part_names
    return {denoiser: parts.denoiser} | {encoders[i]: parts.text_encoders[i] for i in text_encoders}


def prefix(part: str, network: nn.Module) -> str:
    """What names of a part's tensors begin with before their path in the network."""
    # transformers 5.6 dropped `text_model` from the first encoder's paths; files keep the older, common name.
    return f"{part}." if part == "unet" or _has_text_model(network) else f"{part}.text_model."


def copy_into(state: Mapping[str, Tensor], own: Mapping[str, Tensor], *, what: str, fix: str) -> None:
    """Copy saved tensors in place; raises `UserError` when a name or a shape does not fit."""
    import torch

    wrong = [k for k in own if k not in state or state[k].shape != own[k].shape]
    surplus = [k for k in state if k not in own]
    if wrong or surplus:
        raise UserError(
            f"{what} does not fit this run: {len(wrong)} tensors missing or of another shape, "
            f"{len(surplus)} surplus (first: {(wrong + surplus)[0]})",
            fix=fix,
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def config_json(source: Any) -> str:
    """A network's config.json without the place that it was loaded from."""
    content = json.loads(source.to_json_string())
    content.pop("_name_or_path", None)
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _has_text_model(network: nn.Module) -> bool:
    return any(name == "text_model" for name, _ in network.named_children())
