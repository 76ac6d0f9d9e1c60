"""Full fine-tuning: the weights themselves train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from gesso.adapters.parts import Plain, config_json, copy_into, prefix, trained_networks
from gesso.core.seams import Family, Layout, Parts, Spec
from gesso.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

FULL_IN_16_BITS = "full fine-tuning computes in the float32 of its weights; 16 bits come in a later version"


class Full(Spec):
    """Every weight of the denoiser, and of the text encoders by choice."""

    type: Literal["full"] = "full"
    train_text_encoders: bool = False
    """Also train every weight of the text encoders; then text embeddings are not cached."""

    def summary(self) -> dict[str, str]:
        """What a model card says of it."""
        return {"layers": "all, every weight"}

    def attach(
        self, parts: Parts, family: Family, *, seed: int, text_encoders: Sequence[int] = (), reference: bool = False
    ) -> AttachedFull:
        """Unfreeze the denoiser and the text encoders with the given indices; nothing is drawn, so `seed` is unused.

        With `reference`, a copy of their weights is kept in main memory. Raises `UserError` for weights that are not
        float32: updates of less than 1/256 of a weight would be lost in 16 bits.
        """
        import torch

        del seed
        networks = trained_networks(parts, family, text_encoders)
        for network in networks.values():
            if network.dtype != torch.float32:
                raise UserError(FULL_IN_16_BITS, where="training.precision", fix="write fp32, or train a LoRA")
            network.requires_grad_(True)
        return AttachedFull(networks, keep=reference)


class AttachedFull(Plain):
    """Whole networks in training: a denoiser, and perhaps text encoders."""

    def __init__(self, networks: Mapping[str, Any], *, keep: bool = False) -> None:
        self._networks = dict(networks)
        self._before = {k: v.to("cpu", copy=True) for k, v in self.state().items()} if keep else None

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """All weights by network, under the names that `state` uses."""
        from torch import nn

        return {
            part: {name: tensor for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter)}
            for part, tensors in self._tensors().items()
        }

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the networks hold the weights that they had before training; restored also after an error."""
        if self._before is None:
            raise RuntimeError("there is no reference: attach with reference=True")
        trained = {name: tensor.clone() for name, tensor in self.state().items()}
        self.restore(self._before)
        try:
            yield
        finally:
            self.restore(trained)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the networks, buffers included, as `<part>.<key>`."""
        return {k: t.detach() for tensors in self._tensors().values() for k, t in tensors.items()}

    def layout(self) -> Layout:
        """A folder a network, each of which `from_pretrained` reads."""
        headers: dict[str, dict[str, str]] = {}
        texts: dict[str, str] = {}
        denoiser = next(iter(self._networks))
        for part, network in self._networks.items():
            stem = "diffusion_pytorch_model" if part == denoiser else "model"
            headers[f"{part}/{stem}.safetensors"] = {"format": "pt"}
            texts[f"{part}/config.json"] = config_json(network if part == denoiser else network.config)
        return Layout(headers, texts)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` back in place; raises `UserError` when names or shapes are not those of these networks."""
        fix = "use the base model and the text encoders that it was trained with"
        copy_into(state, self.state(), what="the saved model", fix=fix)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """Parameters and saved buffers by part and name; a tensor that has two names goes by its first."""
        found: dict[str, dict[str, Tensor]] = {}
        for part, network in self._networks.items():
            first = {id(t): key for key, t in reversed(network.state_dict(keep_vars=True).items())}
            own = network.state_dict(keep_vars=True)
            found[part] = {f"{prefix(part, network)}{k}": t for k, t in own.items() if first[id(t)] == k}
        return found
