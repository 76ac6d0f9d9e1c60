"""Full fine-tuning: the weights themselves train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from gesso.adapters.parts import Plain, config_json, copy_into, prefix, trained_networks
from gesso.core.seams import Family, Layout, Parts, Spec
from gesso.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Targets = Literal["all", "attention", "attention-mlp", "all-linear"] | tuple[str, ...]


class Full(Spec):
    """The weights of the denoiser, all of them or those of some layers, and of the text encoders by choice."""

    type: Literal["full"] = "full"
    train_denoiser: bool = True
    """Off: the denoiser stays exactly as it is, and only the text encoders train."""
    targets: Targets = "all"
    """Which layers of the denoiser train: all, a preset (attention, attention-mlp, all-linear), or a list of names. A
    name is that of a layer, a block or a parameter, or the end of it, and * stands for anything: attn2, up_blocks.1,
    mid_block.*.ff, bias. The rest stays exactly as it is."""
    train_text_encoders: bool = False
    """Also train every weight of the text encoders; then text embeddings are not cached."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """What the trained weights are kept in. bf16 halves them and their gradients; each update is then rounded up or
    down at random, so that small ones still add up. It takes training.precision: bf16 and an optimizer that works
    number by number, such as adamw or adamw8bit."""

    @model_validator(mode="after")
    def _something(self) -> Full:
        if not (self.train_denoiser or self.train_text_encoders):
            raise ValueError("nothing trains: set train_denoiser or train_text_encoders to true")
        if not self.train_denoiser and self.targets != "all":
            raise ValueError("targets are layers of the denoiser, which does not train: leave them out")
        if self.targets == ():
            raise ValueError("the list of targets is empty: leave it out to train every layer")
        return self

    def summary(self) -> dict[str, str]:
        """What a model card says of it."""
        named = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        layers = "all" if self.targets == "all" else f"{named} of the denoiser"
        return {"layers": f"{layers}, every weight" if self.train_denoiser else "text encoders, every weight"}

    def at(self, learning_rate: float) -> Full:
        """The same with the denoiser left alone if its learning rate is 0: it then costs what a frozen one does."""
        return self if learning_rate else self.model_copy(update={"train_denoiser": False, "targets": "all"})

    def dtype(self) -> torch.dtype:
        """What networks that train are to be loaded in."""
        import torch

        return torch.bfloat16 if self.weights == "bf16" else torch.float32

    def types(self, dtype: torch.dtype, *, text_encoders: bool) -> tuple[torch.dtype, torch.dtype]:
        """Networks that train are loaded in the type that they are kept in, the others in `dtype`."""
        own = self.dtype()
        return own if self.train_denoiser else dtype, own if text_encoders else dtype

    def attach(
        self, parts: Parts, family: Family, *, seed: int, text_encoders: Sequence[int] = (), reference: bool = False
    ) -> AttachedFull:
        """Unfreeze the denoiser's targets and the text encoders with the given indices; nothing is drawn (`seed`).

        With `reference`, a copy of what trains is kept beside it. Raises `UserError` for a target that names nothing,
        and for networks that were not loaded as `dtype` says.
        """
        del seed
        denoiser = family.part_names[0]
        networks = trained_networks(parts, family, text_encoders)
        if not self.train_denoiser:
            del networks[denoiser]
        if not networks:
            what = "nothing trains: the denoiser is left alone, and every text encoder has the learning rate 0"
            raise UserError(what, where="adapter.train_denoiser", fix="set it to true, or give a rate above 0")
        for part, network in networks.items():
            if network.dtype != self.dtype():
                what = f"the weights of {part} are {network.dtype} and should be kept in {self.weights}"
                raise UserError(what.replace("torch.", ""), where="adapter.weights", fix="load them in this type")
            whole = self.targets == "all" or part != denoiser
            chosen = None if whole else self._chosen([name for name, _ in network.named_parameters()], family)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(chosen is None or name in chosen)
        return AttachedFull(networks, denoiser=denoiser, keep=reference)

    def _chosen(self, names: Collection[str], family: Family) -> set[str]:
        """Those of a denoiser's parameters that the targets mean."""
        targets = family.targets(self.targets) if isinstance(self.targets, str) else self.targets
        found = {target: {name for name in names if _means(target, name)} for target in targets}
        # A preset lists what some models of the family do not have.
        if not isinstance(self.targets, str) and (idle := [target for target, chosen in found.items() if not chosen]):
            raise UserError(
                f"nothing in the denoiser is called {', '.join(idle)}",
                where="adapter.targets",
                fix=f"use a preset (attention, attention-mlp, all-linear) or names from: {', '.join(_pieces(names))}",
            )
        return set().union(*found.values())


class AttachedFull(Plain):
    """Networks in training: a denoiser or some of its layers, and perhaps text encoders."""

    def __init__(self, networks: Mapping[str, Any], *, denoiser: str, keep: bool = False) -> None:
        self._networks, self._denoiser = dict(networks), denoiser
        self._before = [(p, p.detach().clone()) for p in self._trained()] if keep else None

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """What trains, by network, under the names that `state` uses."""
        from torch import nn

        return {
            part: {name: t for name, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad}
            for part, tensors in self._tensors().items()
        }

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the networks hold the weights that they had before training; after it, also after an error, theirs.

        Only pointers change hands: nothing is copied, the optimiser's views stay views, and a forward pass from before
        still has its true gradient after.
        """
        if self._before is None:
            raise RuntimeError("there is no reference: attach with reference=True")
        trained = [(parameter, parameter.data) for parameter, _ in self._before]
        try:
            for parameter, before in self._before:
                parameter.data = before
            yield
        finally:
            for parameter, now in trained:
                parameter.data = now

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the networks, frozen layers and buffers included, as `<part>.<key>`."""
        return {k: t.detach() for tensors in self._tensors().values() for k, t in tensors.items()}

    def layout(self) -> Layout:
        """A folder a network, each of which `from_pretrained` reads."""
        headers: dict[str, dict[str, str]] = {}
        texts: dict[str, str] = {}
        for part, network in self._networks.items():
            stem = "diffusion_pytorch_model" if part == self._denoiser else "model"
            headers[f"{part}/{stem}.safetensors"] = {"format": "pt"}
            texts[f"{part}/config.json"] = config_json(network if part == self._denoiser else network.config)
        return Layout(headers, texts)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` back in place; raises `UserError` when names or shapes are not those of these networks."""
        fix = "use the base model and the text encoders that it was trained with"
        copy_into(state, self.state(), what="the saved model", fix=fix)

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self.parameters().values() for parameter in group.values()]

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Parameters and saved buffers by part and name; a tensor that has two names goes by its first."""
        found: dict[str, dict[str, Tensor]] = {}
        for part, network in self._networks.items():
            first = {id(t): key for key, t in reversed(network.state_dict(keep_vars=True).items())}
            own = network.state_dict(keep_vars=True)
            found[part] = {f"{prefix(part, network)}{k}": t for k, t in own.items() if first[id(t)] == k}
        return found


def _means(target: str, name: str) -> bool:
    """Whether a target is a parameter's name, that of a layer or block around it, or the end of one of these."""
    around = accumulate(name.split("."), lambda path, piece: f"{path}.{piece}")
    return any(fnmatchcase(path, target) or fnmatchcase(path, f"*.{target}") for path in around)


def _pieces(names: Iterable[str]) -> list[str]:
    """The words that parameter names are made of, numbers apart."""
    return sorted({piece for name in names for piece in name.split(".") if not piece.isdigit()})
