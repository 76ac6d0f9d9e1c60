"""LoRA files of any origin -> the low-rank pairs in them, under canonical names and with their exact strength."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gesso.errors import UserError
from gesso.families import lora_names

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file name that diffusers looks for in a folder."""

Format = Literal["diffusers", "kohya"]
_DOTTED = re.compile(r"(?P<module>.+)\.(?:lora_(?P<ab>[AB])|lora(?:_linear_layer)?\.(?P<du>down|up))\.weight")
_PROCESSOR = re.compile(r"(?P<module>.+?)(?:\.processor)?\.to_(?P<leaf>q|k|v|out)_lora\.(?P<du>down|up)\.weight")
_FLAT = re.compile(r"(?P<module>lora_(?:unet|te|te1|te2)_[^.]+)\.lora_(?P<du>down|up)\.weight")
_BUNDLED = "bundle_emb."
_SIDE = {"A": "down", "B": "up", "down": "down", "up": "up"}
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a Tucker LoRA",
    "oft_": "OFT",
}


@dataclass(frozen=True)
class Pair:
    """One layer's LoRA: down [r, in, ...], up [out, r, ...]; the layer's weight grows by scale * up down."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Width of the matrices."""
        return self.down.shape[0]

    @property
    def alpha(self) -> float:
        """The strength as files state it: scale * rank."""
        return self.scale * self.rank

    def delta(self) -> Tensor:
        """What is added to the layer's weight, float32 in its shape."""
        product = self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1))
        return product.view(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class LoRAFile:
    """What a LoRA file holds; `pairs` are keyed by the file's own names for the layers."""

    path: Path
    format: Format
    pairs: Mapping[str, Pair]
    metadata: Mapping[str, str]
    words: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Vectors [n, width] of new words that are bundled with it, by token and text encoder (clip_l, clip_g)."""

    @cached_property
    def blocks(self) -> Literal["sgm", "diffusers", "none"]:
        """Whose names the UNet's blocks go by; "none" where the file has no UNet layers."""
        if any(re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_", name) for name in self.pairs):
            return "sgm"
        return "diffusers" if any(n.startswith(("lora_unet_", "unet.")) for n in self.pairs) else "none"

    def match(self, modules: lora_names.Modules) -> dict[str, Pair]:
        """The pairs by canonical name.

        Raises `UserError` if any layer of the file is not in the model or has another shape there.
        """
        table = lora_names.spellings(modules)
        strange = [name for name in self.pairs if name not in table]
        if strange:
            none = len(strange) == len(self.pairs)
            raise UserError(
                f"{len(strange)} of the LoRA's {len(self.pairs)} layers are not in this model (first: {strange[0]})",
                where=str(self.path),
                fix="it was made for another model family" if none else "it was made for another model of this family",
            )
        found = {table[name]: pair for name, pair in self.pairs.items()}
        for name, pair in found.items():
            shape, own = modules[name], (pair.up.shape[0], *pair.down.shape[1:])
            if tuple(shape) != own or pair.up.shape[1] != pair.rank:
                raise UserError(
                    f"{name} changes a weight of shape {own}, but this model's has {tuple(shape)}",
                    where=str(self.path),
                    fix="use the base model that the LoRA was trained on",
                )
        return found


def read(path: Path) -> LoRAFile:
    """Read a LoRA from a `.safetensors` file, or from a folder that holds one, and recognise its format.

    Known are diffusers' names (new and old) and kohya's, with SGM or diffusers block names. Raises `UserError` for a
    file that is missing, damaged, incomplete, empty of LoRA layers, or of another kind (DoRA, LoHa, LoKr, ...).
    """
    from safetensors import SafetensorError, safe_open

    file = locate(path)
    try:
        with safe_open(str(file), framework="pt") as handle:
            metadata, keys = dict(handle.metadata() or {}), list(handle.keys())
            # A whole model given by mistake is refused before gigabytes are read.
            _check_names(keys, file)
            tensors = {key: handle.get_tensor(key) for key in keys}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"not a readable safetensors file ({str(error).splitlines()[0]})", where=str(file), fix="fetch it again"
        ) from error
    return parse(tensors, metadata, path=file)


def is_lora(file: Path) -> bool:
    """Whether a readable safetensors file holds nothing but LoRA layers; reads its header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as handle:
            keys = list(handle.keys())
    except (OSError, SafetensorError):
        return False
    return bool(keys) and all(_known(key) for key in keys)


def locate(path: Path) -> Path:
    """The LoRA file that a path means: itself, or the weights in a checkpoint or download folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError("there is no such LoRA file or folder", where=str(path), fix="check the path")
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(f.name for f in files[:5]) or "none"
    raise UserError(
        f"expected one .safetensors file in this folder, found: {found}", where=str(path), fix="name the file"
    )


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, path: Path) -> LoRAFile:
    """Sort the tensors of a LoRA file into pairs; `path` is for messages. Raises as `read` does."""
    _check_names(tensors, path)
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    words: dict[str, dict[str, Tensor]] = {}
    flat = any(key.startswith("lora_") for key in tensors)
    for key, tensor in tensors.items():
        if key.startswith(_BUNDLED):
            token, _, encoder = key.removeprefix(_BUNDLED).rpartition(".")
            words.setdefault(token, {})[encoder] = tensor
        elif (place := _place(key)) is not None:
            halves.setdefault(place[0], {})[place[1]] = tensor
        else:
            alphas[key.removesuffix(".alpha")] = float(tensor)
    lonely = [*(m for m, h in halves.items() if len(h) < 2), *(m for m in alphas if m not in halves)]
    if lonely or not halves:
        raise UserError(
            f"{lonely[0]} is incomplete: down, up or both are missing" if lonely else "the file holds no LoRA layers",
            where=str(path),
            fix="fetch or export the file again",
        )
    stated = {} if flat else scales({m: h["down"].shape[0] for m, h in halves.items()}, metadata, path=path)
    pairs = {
        m: Pair(h["down"], h["up"], alphas[m] / h["down"].shape[0] if m in alphas else stated.get(m, 1.0))
        for m, h in halves.items()
    }
    return LoRAFile(path, "kohya" if flat else "diffusers", pairs, dict(metadata), words)


def scales(ranks: Mapping[str, int], metadata: Mapping[str, str], *, path: Path) -> dict[str, float]:
    """Strength of each layer of a diffusers file, from the header key `lora_adapter_metadata`; 1 where it is silent.

    The key holds peft's settings, prefixed by part: `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, `use_rslora`.
    Raises `UserError` where the header's rank is not that of the tensors.
    """
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        return _scales(json.loads(text), ranks, path)
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        raise UserError(
            f"the header key lora_adapter_metadata is damaged ({error})",
            where=str(path),
            fix="fetch or export the file again",
        ) from error


def _scales(settings: Mapping[str, Any], ranks: Mapping[str, int], path: Path) -> dict[str, float]:
    found = {}
    for module, rank in ranks.items():
        part, _, layer = module.partition(".")
        if f"{part}.lora_alpha" not in settings:
            continue
        layers = [layer, layer.removeprefix("text_model.")]
        stated = _pattern(settings.get(f"{part}.rank_pattern"), layers, settings[f"{part}.r"])
        if stated != rank:
            raise UserError(
                f"the header says rank {stated}, but {module} has rank {rank}",
                where=str(path),
                fix="fetch or export the file again",
            )
        alpha = _pattern(settings.get(f"{part}.alpha_pattern"), layers, settings[f"{part}.lora_alpha"])
        found[module] = float(alpha) / (rank**0.5 if settings.get(f"{part}.use_rslora") else rank)
    return found


def folded(pair: Pair) -> Pair:
    """The same change with the strength multiplied into `up`, for readers that take alpha to be the rank."""
    return replace(pair, up=pair.up.float() * pair.scale, scale=1.0)


def _place(key: str) -> tuple[str, str] | None:
    """The layer and the side (down or up) that a tensor belongs to."""
    for pattern in (_FLAT, _PROCESSOR, _DOTTED):
        match = pattern.fullmatch(key)
        if match is None:
            continue
        groups = match.groupdict()
        module, side = groups["module"], _SIDE[groups.get("ab") or groups["du"]]
        if leaf := groups.get("leaf"):
            text = module.startswith("text_encoder")
            module += "." + (f"{leaf}_proj" if text else "to_out.0" if leaf == "out" else f"to_{leaf}")
        return module, side
    return None


def _pattern(patterns: Mapping[str, Any] | None, layers: Iterable[str], default: Any) -> Any:
    """peft's rule: a pattern key is a regular expression for the whole end of a module path."""
    for key, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", layer) for layer in layers):
            return value
    return default


def _known(key: str) -> bool:
    return key.endswith(".alpha") or key.startswith(_BUNDLED) or _place(key) is not None


def _check_names(keys: Collection[str], path: Path) -> None:
    """Refuse a file with any tensor that is no part of a plain LoRA."""
    unknown = [key for key in keys if not _known(key)]
    if not unknown:
        return
    kinds = {kind for key in unknown for mark, kind in _OTHER_KINDS.items() if mark in key}
    if kinds:
        raise UserError(
            f"the file is {' and '.join(sorted(kinds))}, which this version cannot load",
            where=str(path),
            fix="use a plain LoRA",
        )
    raise UserError(
        f"{len(unknown)} of its {len(keys)} tensors are not LoRA layers (first: {unknown[0]})",
        where=str(path),
        fix="use a LoRA in the diffusers or kohya format; give a whole model as the model, not as a LoRA",
    )
