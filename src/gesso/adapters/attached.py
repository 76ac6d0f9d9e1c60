"""Adapters in place on layers, as peft puts them there: their weights, their names in files, and switching them off."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gesso.adapters.layered import TEXT_TARGETS, Layered, Placed, place
from gesso.adapters.parts import Plain, copy_into
from gesso.core.changes import Change
from gesso.core.random import generator
from gesso.core.seams import Family, Layout, Parts
from gesso.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

NAME = "default"
"""The name of the one adapter there is."""

Draw = Callable[[str, tuple[int, ...], "np.random.Generator"], "NDArray[Any] | None"]
"""Start values of a parameter by its role and shape, from a generator of its own; None for zeros."""


def put(
    spec: Layered,
    parts: Parts,
    family: Family,
    text_encoders: Sequence[int],
    *,
    config: Callable[[Placed, list[str]], Any],
    draw: Draw,
    seed: int,
) -> list[Placed]:
    """Put peft's layers on the networks that train, with their start values; raises as `Layered.choose` does.

    `config` makes peft's settings from a network and the names of its layers.
    """
    placed = place(spec, parts, family, text_encoders)
    for one in placed:
        _inject(one, config, targets=spec.names(family) if one.network is parts.denoiser else TEXT_TARGETS)
        _start(one, f"{seed}/{one.part}", draw)
    return placed


def _inject(one: Placed, config: Callable[[Placed, list[str]], Any], *, targets: Sequence[str]) -> None:
    """`targets` are the ends of names that say the same as the layers in short, and are used where they do."""
    from peft import inject_adapter_in_model

    if one.choices:
        training = one.network.training
        inject_adapter_in_model(config(one, _names(one, targets)), one.network)
        one.network.train(training)  # peft's new layers would have their dropout on in any case


def _start(placed: Placed, stream: str, draw: Draw) -> None:
    """Give all parameters of a network's adapter their start values, from a key of (stream, layer, role).

    They are float32 whatever the base is: bf16 would lose every update below 1/256 of a weight.
    """
    import torch

    for path, layer in layers(placed):
        for role, parameter in roles(layer):
            # The plain LoRA's key is as it was before there were other roles, so that runs can be repeated.
            key = (stream, path) if role == "lora_A.weight" else (stream, path, role)
            drawn = draw(role, tuple(parameter.shape), generator(0, "lora init", *key))
            zeros = torch.zeros(parameter.shape)
            values = zeros if drawn is None else torch.from_numpy(drawn)
            parameter.data = values.to(parameter.device, torch.float32)


def layers(placed: Placed) -> Iterator[tuple[str, Any]]:
    """The adapted layers of a network by path."""
    modules = dict(placed.network.named_modules())
    return ((path, modules[path]) for path in modules if path in placed.choices)


def roles(layer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The adapter's parameters of one layer by their names in files, such as lora_A.weight."""
    for name, parameter in layer.named_parameters():
        if not name.startswith("base_layer."):
            yield name.replace(f".{NAME}", ""), parameter


class AttachedLayers(Plain, ABC):
    """Adapters on the layers of a denoiser, and perhaps of text encoders."""

    def __init__(self, spec: Layered, placed: Sequence[Placed]) -> None:
        self._spec, self._placed = spec, [one for one in placed if one.choices]

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable tensors by network, under the names that `state` uses."""
        return {one.part: dict(self._named(one)) for one in self._placed}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the networks behave as before the adapter was attached; restored also after an error."""
        found = [layer for one in self._placed for _, layer in layers(one)]
        moving = [(p, p.requires_grad) for layer in found for _, p in roles(layer)]
        for layer in found:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in found:
                layer.enable_adapters(True)
            for parameter, moves in moving:  # peft would wake up parts that stand still
                parameter.requires_grad_(moves)

    def state(self) -> dict[str, Tensor]:
        """The trained float32 tensors under the names of the files in `layout`."""
        return {k: p.detach() for group in self.parameters().values() for k, p in group.items()}

    def layout(self) -> Layout:
        """A folder a network, which `PeftModel.from_pretrained` reads."""
        headers = {f"{one.part}/adapter_model.safetensors": {"format": "pt"} for one in self._placed}
        texts = {}
        for one in self._placed:
            config = settings(one.network) | {"base_model_name_or_path": None, "inference_mode": True}
            texts[f"{one.part}/adapter_config.json"] = to_json(config) + "\n"
        return Layout(headers, texts)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` back in place; raises `UserError` when names or shapes do not fit this adapter."""
        own = {k: p for group in self.parameters().values() for k, p in group.items()}
        fix = "use the adapter settings (rank, targets, text encoders) that it was trained with"
        copy_into(state, own, what=f"the saved {self._kind}", fix=fix)

    def rate_factor(self, name: str) -> float:
        """The factor of the pattern that is found in the parameter's name."""
        return self._spec.rate(name)

    def changes(self) -> dict[str, Change]:
        """What it does to each layer's weight now, by canonical name."""
        return {f"{one.prefix}{path}": self._change(layer) for one in self._placed for path, layer in layers(one)}

    @property
    def _kind(self) -> str:
        return "adapter"

    @abstractmethod
    def _change(self, layer: Any) -> Change:
        """What one layer in place does to its weight."""

    def _prefix(self, one: Placed) -> str:
        """What the names of a network's tensors begin with."""
        return f"{one.part}.base_model.model."

    def _named(self, one: Placed) -> Iterator[tuple[str, nn.Parameter]]:
        for path, layer in layers(one):
            for role, parameter in roles(layer):
                yield f"{self._prefix(one)}{path}.{role}", parameter


def settings(network: Any) -> dict[str, Any]:
    """peft's settings of a network's adapter, in a fixed order."""
    config = network.peft_config[NAME].to_dict()
    del config["auto_mapping"]
    return {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}


def to_json(content: Mapping[str, Any]) -> str:
    """Settings as text in a fixed order."""
    return json.dumps(content, indent=2, sort_keys=True, default=str)


def _names(one: Placed, targets: Sequence[str]) -> list[str]:
    """The ends of names that are meant where they mean just the chosen layers, else the layers themselves."""
    from torch import nn

    meant = {
        path
        for path, module in one.network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        if any(path == target or path.endswith(f".{target}") for target in targets)
    }
    return list(targets) if meant == one.choices.keys() else list(one.choices)


def misfit(layer: str, why: str) -> UserError:
    """The error for a layer that cannot be adapted so."""
    return UserError(f"{layer} {why}", where="adapter", fix="choose other layers with adapter.targets")
