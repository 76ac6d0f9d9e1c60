"""Adapters' files of any origin -> what they do to each layer, under canonical names and with its exact strength."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gesso.core import resolve
from gesso.core.changes import Change, Pair
from gesso.errors import UserError
from gesso.families import layer_tensors, lora_names, peft_folder

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file name that diffusers looks for in a folder."""

Format = Literal["diffusers", "kohya"]
_BUNDLED = "bundle_emb."


@dataclass(frozen=True)
class LoRAFile:
    """What an adapter's file holds; `layers` are keyed by the file's own names for them."""

    path: Path
    format: Format
    layers: Mapping[str, Change]
    metadata: Mapping[str, str]
    words: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    """Vectors [n, width] of new words that are bundled with it, by token and text encoder (clip_l, clip_g)."""

    @property
    def kinds(self) -> set[str]:
        """LoRA, DoRA, LoHa, LoKr: what its layers are."""
        return {change.kind for change in self.layers.values()}

    @cached_property
    def blocks(self) -> Literal["sgm", "diffusers", "none"]:
        """Whose names the UNet's blocks go by; "none" where the file has no UNet layers."""
        if any(re.match(r"lora_unet_(input_blocks|middle_block|output_blocks)_", name) for name in self.layers):
            return "sgm"
        unet = ("lora_unet_", "unet.", "lycoris_")
        return "diffusers" if any(n.startswith(unet) for n in self.layers) else "none"

    def match(self, modules: lora_names.Modules) -> dict[str, Change]:
        """The changes by canonical name.

        Raises `UserError` if any layer of the file is not in the model or has another shape there.
        """
        table = lora_names.spellings(modules)
        strange = [name for name in self.layers if name not in table]
        if strange:
            none = len(strange) == len(self.layers)
            raise UserError(
                f"{len(strange)} of the LoRA's {len(self.layers)} layers are not in this model (first: {strange[0]})",
                where=str(self.path),
                fix="it was made for another model family" if none else "it was made for another model of this family",
            )
        found = {table[name]: change for name, change in self.layers.items()}
        for name, change in found.items():
            if not change.fits(tuple(modules[name])):
                raise UserError(
                    f"{name} changes a weight of another shape than this model's, which has {tuple(modules[name])}",
                    where=str(self.path),
                    fix="use the base model that the LoRA was trained on",
                )
        return found


def read(path: Path) -> LoRAFile:
    """Read an adapter from a `.safetensors` file, or from a folder that holds one, and recognise its format.

    Known are LoRA and DoRA by diffusers' names (new and old) and in PEFT's folders, and LoRA, DoRA, LoHa and LoKr by
    the names of kohya and LyCORIS, with SGM or diffusers block names. Raises `UserError` for a file that is missing,
    damaged, incomplete, empty of such layers, or of another kind (OFT, ...).
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
    if peft_folder.is_peft(keys):
        tensors, metadata = peft_folder.as_diffusers(tensors, file)
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
    for name in (WEIGHTS, peft_folder.WEIGHTS):
        if (path / name).is_file():
            return path / name
    if (path / "model_index.json").is_file():
        fix = "give it as the model, and here a LoRA that goes on top"
        raise UserError("this is a whole model, not a LoRA", where=str(path), fix=fix)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    found = ", ".join(f.name for f in files[:5]) or "none"
    raise UserError(
        f"expected one .safetensors file in this folder, found: {found}", where=str(path), fix="name the file"
    )


def fetched(name: str, *, key: str) -> Path:
    """The file or folder that a name means; a hub model is fetched. `key` is for messages."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix == ".safetensors" or path.is_absolute() or name.startswith("."):
        raise UserError(f"there is no {name}", where=key, fix="name a LoRA file, its folder or a hub id")
    return resolve.locate(name, patterns=["*.safetensors", peft_folder.CONFIG], key=key)


def sources(path: Path) -> list[Path]:
    """The files that decide what `read` finds."""
    file = locate(path)
    config = file.with_name(peft_folder.CONFIG)
    return [file, config] if file.name == peft_folder.WEIGHTS and config.is_file() else [file]


def parse(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, path: Path) -> LoRAFile:
    """Sort the tensors of a LoRA file into pairs; `path` is for messages. Raises as `read` does."""
    _check_names(tensors, path)
    layers: dict[str, layer_tensors.Layer] = {}
    words: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith(_BUNDLED):
            token, _, encoder = key.removeprefix(_BUNDLED).rpartition(".")
            words.setdefault(token, {})[encoder] = tensor
        elif (place := layer_tensors.place(key)) is not None:
            layers.setdefault(place[0], layer_tensors.Layer()).put(place[1], tensor)
    lonely = [module for module, layer in layers.items() if not layer.whole]
    if lonely or not layers:
        raise UserError(
            f"{lonely[0]} is incomplete: some of its matrices are missing"
            if lonely
            else "the file holds no LoRA layers",
            where=str(path),
            fix="fetch or export the file again",
        )
    flat = any(key.startswith(("lora_", "lycoris_")) for key in tensors)
    ranks = {m: layer.tensors["down"].shape[0] for m, layer in layers.items() if "down" in layer.tensors}
    stated = {} if flat else scales(ranks, metadata, path=path)
    try:
        changes = {m: layer.change(stated.get(m, 1.0)) for m, layer in layers.items()}
    except ValueError as error:
        raise UserError(f"the file is {error}, which is not read", where=str(path), fix="use another LoRA") from error
    return LoRAFile(path, "kohya" if flat else "diffusers", changes, dict(metadata), words)


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


def _pattern(patterns: Mapping[str, Any] | None, layers: Iterable[str], default: Any) -> Any:
    """peft's rule: a pattern key is a regular expression for the whole end of a module path."""
    for key, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({key})$", layer) for layer in layers):
            return value
    return default


def _known(key: str) -> bool:
    return key.startswith(_BUNDLED) or layer_tensors.place(key) is not None


def _check_names(keys: Collection[str], path: Path) -> None:
    """Refuse a file with any tensor that is no part of an adapter's layer."""
    unknown = [key for key in keys if not _known(key)]
    if not unknown:
        return
    if set(keys) <= {"clip_l", "clip_g"}:
        raise UserError(
            "these are the vectors of a new word, not a LoRA",
            where=str(path),
            fix="sample from the run that made them, or use its bundled file",
        )
    if kinds := layer_tensors.kinds(unknown):
        raise UserError(
            f"the file is {' and '.join(sorted(kinds))}, which is not read", where=str(path), fix="use a LoRA or LoKr"
        )
    raise UserError(
        f"{len(unknown)} of its {len(keys)} tensors are not LoRA layers (first: {unknown[0]})",
        where=str(path),
        fix="use a LoRA in the diffusers or kohya format; give a whole model as the model, not as a LoRA",
    )
