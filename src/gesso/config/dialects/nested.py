"""Nested files with the sections model, lora, text_encoder, dataset, training, prior_preservation, and so on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gesso.config import schema
from gesso.config.dialects import flat
from gesso.config.dialects.draft import Converted, Draft, Item
from gesso.config.document import Document

NAME = "nested SDXL training YAML"

_OWN: dict[str, dict[str, str]] = {
    "model": {},
    "lora": {"rank": "rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"},
    "text_encoder": {"learning_rate": "text_encoder_lr", "lr": "text_encoder_lr"},
    "dataset": {},
    "training": {},
    "prior_preservation": {"enabled": "with_prior_preservation", "weight": "prior_loss_weight"},
    "validation": {"seed": "preview_seed"},
    "logging": {},
    "consistency": {},
}
_ONLY: dict[str, set[str]] = {
    "lora": {"use_dora", "lora_alpha", "lora_dropout", "lora_rank", "lora_target_modules"},
    "text_encoder": {"train_text_encoder", "text_encoder_lr", "text_encoder_learning_rate"},
    "prior_preservation": {"class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"},
    "consistency": {"enable_identity_loss", "identity_loss_weight", "face_model"},
}
_LORA_ONLY = {"rank", "lora_alpha", "lora_dropout", "target_modules", "alpha", "dropout", "lora_layers"}
_HALLMARKS = {"lora", "text_encoder", "dataset", "prior_preservation", "logging", "consistency"}


def keys(section: str) -> dict[str, str]:
    """Keys that a section may hold, with their canonical names."""
    if section in _ONLY:
        return {**{key: flat.KEYS[key] for key in _ONLY[section]}, **_OWN[section]}
    return {**{key: name for key, name in flat.KEYS.items() if key not in _LORA_ONLY}, **_OWN[section]}


def score(mapping: Mapping[str, Any]) -> int:
    """How many keys inside the sections belong to this tool, counting its own section names too."""
    score = sum(name in _HALLMARKS and isinstance(value, Mapping) for name, value in mapping.items())
    for section, value in mapping.items():
        if section in _OWN and isinstance(value, Mapping):
            known = keys(section)
            score += sum(key in known for key in value)
    return score


def to_run(document: Document, *, folder: Path) -> Converted:
    """Read a nested file as a run file; loose settings at the top level are taken as if they stood in `training`."""
    draft = Draft(NAME, document, folder)
    for section, value in document.data.items():
        line = document.lines.get((section,))
        if section in _OWN and value is None:
            draft.ignore(Item((section,), None, line), "empty")
        elif section in _OWN and isinstance(value, Mapping):
            known = keys(section)
            for key, inner in value.items():
                flat.collect(draft, Item((section, key), inner, document.lines.get((section, key))), known)
        elif section in _OWN:
            draft.problem(Item((section,), value, line), f"{section} must be a section with keys of its own")
        elif section in flat.KEYS:
            flat.collect(draft, Item((section,), value, line), flat.KEYS)
        else:
            near = schema.nearest(section, [*_OWN, *flat.KEYS])
            fix = f"did you mean {near}?" if near else f"sections are {', '.join(_OWN)}"
            draft.problem(Item((section,), value, line), f"unknown key {section} (read as {NAME})", fix=fix)
    return flat.finish(draft, rank=64, why="what the tool's guide starts with")
