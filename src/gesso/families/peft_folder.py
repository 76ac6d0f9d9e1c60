"""PEFT's own folders (`adapter_config.json` + `adapter_model.safetensors`), in the terms of diffusers' LoRA files."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gesso.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What PEFT calls its files: the strength of each layer is in the first."""
PREFIX = "base_model.model."
"""What the names of its tensors begin with."""

_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
_TEXT = re.compile(r"(text_model\.)?encoder\.layers\.")
_CLASSES = {"CLIPTextModel": "text_encoder", "CLIPTextModelWithProjection": "text_encoder_2"}


def is_peft(keys: Collection[str]) -> bool:
    """Whether these are the names of PEFT's tensors."""
    return bool(keys) and all(key.startswith(PREFIX) for key in keys)


def as_diffusers(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header as diffusers' LoRA files have them.

    Raises `UserError` without a readable configuration beside the file, for other methods than LoRA, and for a text
    encoder's LoRA that says nowhere which of the encoders it belongs to.
    """
    settings = _settings(file.with_name(CONFIG))
    layers = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    part = _part(layers, settings, file)
    stated = {f"{part}.{name}": settings[name] for name in _SETTINGS if name in settings}
    return {f"{part}.{key}": tensor for key, tensor in layers.items()}, {"lora_adapter_metadata": json.dumps(stated)}


def _settings(config: Path) -> dict[str, Any]:
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        kind, _ = settings["peft_type"], (settings["r"], settings["lora_alpha"])
    except FileNotFoundError as error:
        what = "it is missing, and it says how strong the LoRA beside it is"
        raise UserError(what, where=str(config), fix=f"copy it from where {WEIGHTS} comes from") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, KeyError) and settings.get("peft_type", "LORA") != "LORA":
            kind = settings["peft_type"]
        else:
            raise UserError("not a readable configuration of PEFT", where=str(config), fix="fetch it again") from error
    if kind != "LORA":
        raise UserError(f"{kind} in PEFT's format is not read", where=str(config), fix="use a LoRA")
    return dict(settings)


def _part(layers: Collection[str], settings: Mapping[str, Any], file: Path) -> str:
    """The network that an adapter belongs to: PEFT writes one folder for each, and names it at most by its class."""
    if not any(_TEXT.match(key) for key in layers):
        return "unet"
    kind = (settings.get("auto_mapping") or {}).get("base_model_class")
    if (part := _CLASSES.get(str(kind), file.parent.name)) in _CLASSES.values():
        return part
    raise UserError(
        "this is a text encoder's LoRA, and nothing says of which one",
        where=str(file),
        fix="name its folder text_encoder or text_encoder_2",
    )
