"""The tensors of an adapter's file -> one change a layer: which names mean what, and what belongs together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gesso.core.changes import Change, Hadamard, Kronecker, Pair

if TYPE_CHECKING:
    from torch import Tensor

_LOW_RANK = r"lora_(?P<ab>[AB])\.weight|lora(?:_linear_layer)?\.(?P<du>down|up)\.weight"
_OTHERS = r"(?P<role>alpha|dora_scale|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))"
_DOTTED = re.compile(rf"(?P<module>.+)\.(?:{_LOW_RANK}|(?P<norm>lora_magnitude_vector)(?:\.weight)?|{_OTHERS})")
_PROCESSOR = re.compile(r"(?P<module>.+?)(?:\.processor)?\.to_(?P<leaf>q|k|v|out)_lora\.(?P<du>down|up)\.weight")
_FLAT = re.compile(
    rf"(?P<module>(?:lora_(?:unet|te|te1|te2)|lycoris)_[^.]+)\.(?:lora_(?P<du>down|up|mid)\.weight|{_OTHERS})"
)
_SIDE = {"A": "down", "B": "up"}
_KRONECKER = ("lokr_w1", "lokr_w2")
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
OTHER_KINDS = {"oft_": "OFT", "boft_": "BOFT", ".glora_": "GLoRA"}
"""Marks in the names of tensors that are not read, and what such files are."""


@dataclass
class Layer:
    """What a file says of one layer: tensors by their role (down, up, mid, norms, hada_..., lokr_...), and alpha."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    def put(self, role: str, tensor: Tensor) -> None:
        """Add what a tensor says."""
        if role == "alpha":
            self.alpha = float(tensor)
        else:
            self.tensors[role] = tensor

    @property
    def whole(self) -> bool:
        """Whether nothing is missing and nothing is too much."""
        roles = set(self.tensors)
        if any(role.startswith("hada_") for role in roles):
            return roles - {"hada_t1", "hada_t2"} == _LOHA and ("hada_t1" in roles) == ("hada_t2" in roles)
        if any(role.startswith("lokr_") for role in roles):
            sides = [{r for r in roles if r.startswith(side)} for side in _KRONECKER]
            made = [own in ({name}, {f"{name}_a", f"{name}_b"}) for own, name in zip(sides, _KRONECKER, strict=True)]
            return all(made) and not roles - sides[0] - sides[1] - {"lokr_t2"}
        return {"down", "up"} <= roles

    def change(self, stated: float) -> Change:
        """The layer's change; `stated` is its strength where no alpha says another. Raises `ValueError` for norms."""
        roles = self.tensors
        if "hada_w1_a" in roles:
            return Hadamard(roles, self._strength(roles["hada_w1_b"].shape[0], 1.0))
        if "lokr_w1" in roles or "lokr_w1_a" in roles:
            change = Kronecker(roles, 1.0)
            return change if change.rank is None else Kronecker(roles, self._strength(change.rank, 1.0))
        down, up = roles["down"], roles["up"]
        scale = self._strength(down.shape[0], stated)
        if "mid" in roles:
            down = _joined(roles["mid"], down)
        return Pair(down, up, scale, self._norms(up.shape[0]))

    def _strength(self, rank: int, otherwise: float) -> float:
        return self.alpha / rank if self.alpha is not None else otherwise

    def _norms(self, outputs: int) -> Tensor | None:
        norms = self.tensors.get("dora_scale", self.tensors.get("magnitude"))
        if norms is None:
            return None
        if norms.numel() != outputs or ("dora_scale" in self.tensors and norms.shape[0] != outputs):
            raise ValueError("a DoRA with norms of inputs and not of outputs")
        return norms.flatten()


def place(key: str) -> tuple[str, str] | None:
    """The layer, by the file's own name for it, and the role that a tensor has there; None for anything else."""
    for pattern in (_FLAT, _PROCESSOR, _DOTTED):
        match = pattern.fullmatch(key)
        if match is None:
            continue
        found = match.groupdict()
        module = str(found["module"])
        role = _SIDE.get(found.get("ab") or "") or found.get("du") or found.get("role") or "magnitude"
        if leaf := found.get("leaf"):
            text = module.startswith("text_encoder")
            module += "." + (f"{leaf}_proj" if text else "to_out.0" if leaf == "out" else f"to_{leaf}")
        return module, role
    return None


def kinds(keys: Iterable[str]) -> set[str]:
    """What files with tensors of these names are, as far as that is known."""
    return {kind for key in keys for mark, kind in OTHER_KINDS.items() if mark in key}


def _joined(mid: Tensor, down: Tensor) -> Tensor:
    """A Tucker LoRA's core [r, r, k, k] and its down [r, in, 1, 1] as one down [r, in, k, k]."""
    import torch

    return torch.einsum("ijkl,jm->imkl", mid.float(), down.float().flatten(1))
