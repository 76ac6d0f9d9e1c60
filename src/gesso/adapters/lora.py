"""LoRA and DoRA, thin over peft."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from gesso.adapters import attached
from gesso.adapters.attached import NAME, AttachedLayers
from gesso.adapters.embedding import with_tokens
from gesso.adapters.layered import Choice, Placed, Ranked, Shape, whole
from gesso.core.changes import Pair
from gesso.core.folder import WEIGHTS
from gesso.core.seams import Attached, Family, Layout, Parts
from gesso.core.tokens import NewTokens
from gesso.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class LoRA(Ranked):
    """Low-rank matrices added to layers: W + (alpha / rank) B A (Hu et al. 2021, arXiv:2106.09685)."""

    type: Literal["lora"] = "lora"
    dora: bool = False
    """Train the norm of each output's weights by itself (DoRA, Liu et al. 2024, arXiv:2402.09353): closer to full
    fine-tuning at low ranks, and slower."""
    rslora: bool = False
    """Strength is alpha / sqrt(rank), which keeps high ranks learning (Kalajdzievski 2023, arXiv:2312.03732)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the adapter's inputs dropped in training."""
    tokens: NewTokens = ()
    """New words whose vectors train beside the matrices (pivotal tuning), at `training.token_learning_rate`."""
    lora_plus_ratio: float | None = Field(default=None, gt=0)
    """Learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354); 16 is usual. Empty: the same."""
    max_norm: float | None = Field(default=None, gt=0)
    """Longest that a layer's change (alpha / rank) B A may be, in the Frobenius norm: after each step both matrices of
    longer ones are scaled down. 1 is usual."""
    init_from: str | None = None
    """Start from the weights of this LoRA: a file or folder (diffusers' or kohya's names) or a hub id. Its layers have
    to be among the adapted ones, and its ranks no larger than theirs."""

    @model_validator(mode="after")
    def _combinations(self) -> LoRA:
        if self.dora and self.rank_dropout:
            raise ValueError("rank_dropout does not go with dora: the norms would be those of other weights")
        if self.dora and self.max_norm is not None:
            raise ValueError("max_norm does not go with dora, which trains the norms")
        if self.dora and self.tokens:
            raise ValueError("tokens do not go with dora: files that hold both are read by no program")
        return self

    def choose(self, layers: Mapping[str, Shape], family: Family) -> dict[str, Choice]:
        """Those of the given layers that are adapted, and how; see `Layered.choose`."""
        chosen = super().choose(layers, family)
        if self.dora and self.dropout and (odd := [n for n in chosen if len(layers[n]) == 4]):
            what = f"dropout does not go with dora on convolutions, such as {odd[0]}"
            raise UserError(what, where="adapter.dropout", fix="set it to 0, or leave the convolutions out")
        return chosen

    def size(self, shape: Shape, choice: Choice) -> int:
        """How many numbers train on a layer."""
        return choice.rank * (math.prod(shape[1:]) + shape[0]) + shape[0] * self.dora

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

        B starts at 0, so the networks first behave exactly as before; A is drawn from a key of (seed, layer). Raises
        `UserError` when a target or a pattern means no layer.
        """
        placed = attached.put(self, parts, family, text_encoders, config=self._config, draw=_draw, seed=seed)
        for one in placed:
            for _, layer in attached.layers(one):
                layer.rank_dropout, layer.module_dropout = self.rank_dropout, self.module_dropout
                if self.dora:
                    _take_norms(layer)
        return with_tokens(AttachedLoRA(self, placed, family), self.tokens, parts, family, seed=seed)

    def _config(self, one: Placed, names: list[str]) -> Any:
        from peft import LoraConfig
        from torch import nn

        from gesso.adapters import modules

        usual = Choice(self.rank, self.effective_alpha)
        ranks, alphas = one.patterns(usual)
        config = LoraConfig(
            r=usual.rank,
            lora_alpha=whole(usual.alpha),
            lora_dropout=self.dropout,
            target_modules=names,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=False,
        )
        config._register_custom_module({nn.Linear: modules.Linear, nn.Conv2d: modules.Conv2d})
        return config


class AttachedLoRA(AttachedLayers):
    """LoRA layers in place on a denoiser and perhaps on text encoders."""

    def __init__(self, spec: LoRA, placed: Sequence[Placed], family: Family) -> None:
        super().__init__(spec, placed)
        self._lora, self._family = spec, family

    def layout(self) -> Layout:
        """One file, which diffusers' `load_lora_weights` reads."""
        return Layout({WEIGHTS: self.metadata()})

    def metadata(self) -> dict[str, str]:
        """The safetensors header that carries rank and alpha to diffusers."""
        flat = {f"{one.part}.{k}": v for one in self._placed for k, v in attached.settings(one.network).items()}
        return {"format": "pt", "lora_adapter_metadata": attached.to_json(flat)}

    def rate_factor(self, name: str) -> float:
        """The factor of the pattern that is found in the parameter's name, and for B that of LoRA+."""
        own = self._lora.lora_plus_ratio if name.endswith(".lora_B.weight") else None
        return super().rate_factor(name) * (own if own is not None else 1.0)

    def begin(self) -> None:
        """Take over the LoRA that training starts from; raises `UserError` by layer where it does not fit."""
        if self._lora.init_from is None:
            return
        networks = {one.part: one.network for one in self._placed}
        where = "adapter.init_from"
        changes = self._family.read_changes(self._lora.init_from, networks, key=where)
        own = {f"{one.prefix}{path}": layer for one in self._placed for path, layer in attached.layers(one)}
        if strange := sorted(changes.keys() - own.keys()):
            what = f"{len(strange)} of its {len(changes)} layers are not adapted here (first: {strange[0]})"
            raise UserError(what, where=where, fix="widen adapter.targets, or train the text encoders")
        for name, change in changes.items():
            _take_over(name, change, own[name], dora=self._lora.dora)

    def after_step(self) -> None:
        """Scale down what is longer than `max_norm`."""
        import torch

        if self._lora.max_norm is None:
            return
        with torch.no_grad():
            for one in self._placed:
                for _, layer in attached.layers(one):
                    a, b = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
                    rows, columns = a.flatten(1), b.flatten(1)
                    # |B A|^2 is the sum of the elementwise product of A A' and B' B, which are r x r.
                    square = ((rows @ rows.t()) * (columns.t() @ columns)).sum().clamp(min=0)
                    norm = layer.scaling[NAME] * square.sqrt()
                    factor = (self._lora.max_norm / norm).clamp(max=1).sqrt()
                    a.mul_(factor)
                    b.mul_(factor)

    @property
    def _kind(self) -> str:
        return "LoRA"

    def _prefix(self, one: Placed) -> str:
        return one.prefix

    def _change(self, layer: Any) -> Pair:
        norms = layer.lora_magnitude_vector[NAME].weight.detach().flatten() if self._lora.dora else None
        a, b = layer.lora_A[NAME].weight.detach(), layer.lora_B[NAME].weight.detach()
        return Pair(a, b, layer.scaling[NAME], norms)


def _draw(role: str, shape: tuple[int, ...], numbers: np.random.Generator) -> NDArray[Any] | None:
    if role != "lora_A.weight":
        return None
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return numbers.uniform(-bound, bound, shape)


def _take_norms(layer: Any) -> None:
    """Set DoRA's norms to those of the weight with its LoRA, computed just as in the forward pass."""
    import torch

    norms, a, b = layer.lora_magnitude_vector[NAME], layer.lora_A[NAME], layer.lora_B[NAME]
    weight = layer.base_layer.weight.float()
    with torch.no_grad():
        grown = norms.get_lora_weight(lora_A=a, lora_B=b).reshape(weight.shape)
        norms.weight.data = norms.get_weight_norm(weight, grown, layer.scaling[NAME])


def _take_over(name: str, change: Any, layer: Any, *, dora: bool) -> None:
    """Put another LoRA's matrices into a layer; ranks that it lacks keep their start, at which they do nothing."""
    import torch

    a, b, where = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, "adapter.init_from"
    if not isinstance(change, Pair) or (change.magnitude is not None and not dora):
        fix = "set adapter.dora: true" if change.kind == "DoRA" else "start from a LoRA"
        raise UserError(f"{name} of it is a {change.kind}, and not a LoRA as here", where=where, fix=fix)
    if change.rank > a.shape[0]:
        what = f"{name} has rank {change.rank} there, and {a.shape[0]} here"
        raise UserError(what, where=where, fix=f"set adapter.rank: {change.rank}, or an adapter.rank_pattern")
    with torch.no_grad():
        a[: change.rank] = change.down.to(a)
        b[:, : change.rank] = change.up.to(b) * (change.scale / layer.scaling[NAME])
    if dora:
        _take_norms(layer)
    if change.magnitude is not None:
        norms = layer.lora_magnitude_vector[NAME].weight
        norms.data = change.magnitude.to(norms).reshape(norms.shape)
