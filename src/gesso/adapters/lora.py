"""LoRA, thin over peft."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from gesso.adapters.embedding import with_tokens
from gesso.adapters.parts import Plain, copy_into, prefix, trained_networks
from gesso.core.folder import WEIGHTS
from gesso.core.random import generator
from gesso.core.seams import Attached, Family, Layout, Parts, Spec
from gesso.core.tokens import NewTokens
from gesso.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

_TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


class LoRA(Spec):
    """Low-rank matrices added to linear layers: W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=4096)
    """Width of the low-rank matrices: more can hold more, and overfits sooner. 16 to 64 for a character."""
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the adapter is alpha / rank. Empty means alpha = rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the adapter's inputs dropped in training."""
    targets: Literal["attention", "attention-mlp", "all-linear"] | tuple[str, ...] = "attention"
    """Which denoiser layers: a preset, or a list of module names such as to_q or to_out.0."""
    train_text_encoders: bool = False
    """Also adapt the attention of the text encoders; then text embeddings are not cached."""
    tokens: NewTokens = ()
    """New words whose vectors train beside the matrices (pivotal tuning), at `training.token_learning_rate`."""

    @property
    def effective_alpha(self) -> float:
        """alpha, or rank where alpha is empty."""
        return self.alpha if self.alpha is not None else float(self.rank)

    def summary(self) -> dict[str, str]:
        """What a model card says of it."""
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        return {"rank, alpha": f"{self.rank}, {self.effective_alpha:g}", "layers": targets}

    def attach(
        self,
        parts: Parts,
        family: Family,
        *,
        seed: int,
        text_encoders: Sequence[int] = (),
        reference: bool = False,  # noqa: ARG002 (the base is under the adapter, so it costs nothing)
    ) -> Attached:
        """Put adapters on the denoiser and on the text encoders with the given indices.

        B starts at 0, so the networks first behave exactly as before; A is drawn from a key of (seed, layer).
        Raises `UserError` when a target names no layer of the denoiser.
        """
        targets = family.targets(self.targets) if isinstance(self.targets, str) else list(self.targets)
        _check_targets(parts.denoiser, targets)
        networks = trained_networks(parts, family, text_encoders)
        for name, network in networks.items():
            denoiser = network is parts.denoiser
            self._inject(network, targets if denoiser else list(_TEXT_TARGETS), f"{seed}/{name}")
        return with_tokens(AttachedLoRA(networks), self.tokens, parts, family, seed=seed)

    def _inject(self, network: nn.Module, targets: list[str], stream: str) -> None:
        import torch
        from peft import LoraConfig, inject_adapter_in_model
        from torch import nn

        config = LoraConfig(
            r=self.rank,
            lora_alpha=_whole(self.effective_alpha),
            lora_dropout=self.dropout,
            target_modules=targets,
            init_lora_weights=False,
        )
        config._register_custom_module({nn.Linear: _fused_linear()})
        training = network.training
        inject_adapter_in_model(config, network)
        network.train(training)  # peft's new layers would have their dropout on in any case
        for name, layer in _lora_layers(network):
            a, b = _matrices(layer)
            bound = 1 / math.sqrt(a[0].numel())
            start = generator(0, "lora init", stream, name).uniform(-bound, bound, tuple(a.shape))
            # float32 whatever the base is: bf16 would lose every update below 1/256 of a weight.
            a.data = torch.from_numpy(start).to(a.device, torch.float32)
            b.data = torch.zeros_like(b, dtype=torch.float32)


class AttachedLoRA(Plain):
    """LoRA layers in place on a denoiser and perhaps on text encoders."""

    def __init__(self, networks: Mapping[str, Any]) -> None:
        self._networks = dict(networks)

    def parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Trainable matrices by network, under the names that `state` uses."""
        return {name: dict(self._named(name, network)) for name, network in self._networks.items()}

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the networks behave as before the adapter was attached; restored also after an error."""
        layers = [layer for network in self._networks.values() for _, layer in _lora_layers(network)]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def state(self) -> dict[str, Tensor]:
        """Trained float32 matrices under the names that diffusers' `load_lora_weights` reads."""
        return {k: p.detach() for group in self.parameters().values() for k, p in group.items()}

    def layout(self) -> Layout:
        """One file, which diffusers' `load_lora_weights` reads."""
        return Layout({WEIGHTS: self.metadata()})

    def metadata(self) -> dict[str, str]:
        """The safetensors header that carries rank and alpha to diffusers."""
        flat: dict[str, Any] = {}
        for name, network in self._networks.items():
            config = network.peft_config["default"].to_dict()
            del config["auto_mapping"]
            flat |= {f"{name}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.items()}
        return {"format": "pt", "lora_adapter_metadata": json.dumps(flat, indent=2, sort_keys=True, default=str)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` back in place; raises `UserError` when names or shapes do not fit this adapter."""
        own = {k: p for group in self.parameters().values() for k, p in group.items()}
        fix = "use the adapter settings (rank, targets, text encoders) that it was trained with"
        copy_into(state, own, what="the saved LoRA", fix=fix)

    def _named(self, name: str, network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        start = prefix(name, network)
        for path, layer in _lora_layers(network):
            a, b = _matrices(layer)
            yield f"{start}{path}.lora_A.weight", a
            yield f"{start}{path}.lora_B.weight", b


@cache
def _fused_linear() -> type:
    """peft's LoRA layer, its plain case (one active adapter, no dropout, nothing merged) in one autograd function."""
    from peft.tuners.lora import Linear
    from torch import nn

    from gesso.core.fused import LoRALinear

    class FusedLinear(Linear):
        def forward(self, x: Tensor) -> Tensor:
            plain = not (self.disable_adapters or self.merged or self.lora_variant) and self.active_adapters == [
                "default"
            ]
            if not plain or (self.training and not isinstance(self.lora_dropout["default"], nn.Identity)):
                return super().forward(x)
            a, b = _matrices(self)
            base = self.base_layer
            return LoRALinear.apply(x, base.weight, base.bias, a, b, self.scaling["default"])

    return FusedLinear


def _lora_layers(network: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))


def _matrices(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def _whole(alpha: float) -> float | int:
    """peft and the files' readers expect an integer where there is one."""
    return int(alpha) if alpha == int(alpha) else alpha


def _check_targets(denoiser: nn.Module, targets: Sequence[str]) -> None:
    names = [name for name, _ in denoiser.named_modules()]
    idle = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names)]
    if idle:
        leaves = sorted({n.rsplit(".", 1)[-1] for n in names if n and not n.rsplit(".", 1)[-1].isdigit()})
        raise UserError(
            f"no layer of the denoiser is called {', '.join(idle)}",
            where="adapter.targets",
            fix=f"use a preset (attention, attention-mlp, all-linear) or names from: {', '.join(leaves)}",
        )
