"""Flat files of diffusers-script options, as LoRA guides and `train_*_lora_sdxl.py` wrappers write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gesso.config import schema
from gesso.config.dialects import groups, rules
from gesso.config.dialects.draft import Converted, Draft, Item
from gesso.config.document import Document
from gesso.errors import UserError

NAME = "diffusers options"

_GROUPED = (
    "enable_identity_loss",
    "identity_loss_weight",
    "face_model",
    "concepts_list",
    *("finetune_method", "train_data_dir", "dataset_name", "dataset_config_name", "image_column", "caption_column"),
    *(
        "metadata_file",
        "dataset_split_name",
        "random_crop",
        "repeats",
        "instance_prompt",
        "center_crop",
        "target_modules",
        "max_train_steps",
        "num_train_epochs",
    ),
    *("lr_scheduler", "lr_warmup_steps", "lr_num_cycles", "lr_power", "optimizer", "use_8bit_adam"),
    *("mixed_precision", "enable_xformers", "text_encoder_lr", "output_dir", "checkpoints_total_limit"),
    *("validation_prompts", "num_validation_images", "validation_steps", "report_to", "use_tensorboard", "use_wandb"),
    *("wandb_project", "wandb_run_name", "wandb_entity", "hub_model_id", "push_to_hub", "hub_token"),
    *("resume_from_checkpoint", "use_lora", *groups.PRIOR),
    *(f"timestep_bias_{name}" for name in ("strategy", "multiplier", "portion", "begin", "end")),
)
_ALIASES = {
    "model_name": "base_model",
    "model_id": "base_model",
    "base_model_id": "base_model",
    "pretrained_model_name_or_path": "base_model",
    "vae_name": "vae",
    "vae_id": "vae",
    "vae_model_id": "vae",
    "pretrained_vae_model_name_or_path": "vae",
    "instance_data_dir": "train_data_dir",
    "data_dir": "train_data_dir",
    "validation_data_dir": "val_data_dir",
    "num_workers": "dataloader_num_workers",
    "lora_rank": "rank",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_layers": "target_modules",
    "batch_size": "train_batch_size",
    "num_epochs": "num_train_epochs",
    "max_steps": "max_train_steps",
    "weight_decay": "adam_weight_decay",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "enable_xformers_memory_efficient_attention": "enable_xformers",
    "text_encoder_learning_rate": "text_encoder_lr",
    "min_snr_gamma": "snr_gamma",
    "save_steps": "checkpointing_steps",
    "save_every": "checkpointing_steps",
    "save_total_limit": "checkpoints_total_limit",
    "validation_prompt": "validation_prompts",
    "num_validation_samples": "num_validation_images",
    "log_every": "logging_steps",
    "tracker_project_name": "wandb_project",
    "output_name": "run_name",
}
KEYS = {**{name: name for name in (*rules.DIRECT, *rules.IGNORED, *rules.REFUSED, *_GROUPED)}, **_ALIASES}


def score(mapping: Mapping[str, Any]) -> int:
    """How many top-level keys are options of this kind and hold no section."""
    return sum(key in KEYS and not isinstance(value, Mapping) for key, value in mapping.items())


def to_run(document: Document, *, folder: Path) -> Converted:
    """Read a flat file as a run file."""
    draft = Draft(NAME, document, folder)
    for key, value in document.data.items():
        collect(draft, Item((key,), value, document.lines.get((key,))), KEYS)
    return finish(draft, rank=4, why="the default of the diffusers scripts")


def collect(draft: Draft, item: Item, keys: Mapping[str, str]) -> None:
    """Queue one key, or note that nobody knows it."""
    name = str(item.path[-1])
    if name in keys:
        draft.add(keys[name], item)
        return
    near = schema.nearest(name, keys)
    fix = f"did you mean {near}?" if near else f"known here: {', '.join(sorted(keys)[:40])} ..."
    draft.problem(item, f"unknown key {item.key} (read as a file of {draft.tool})", fix=fix)


def finish(draft: Draft, *, rank: int, why: str) -> Converted:
    """Apply all rules and check that the file names images and a length."""
    method = draft.items.get("finetune_method")
    if "rank" not in draft.items and (method is None or method.value != "full"):
        draft.assume("adapter.rank", rank, why)
    needs_images = not {"train_data_dir", "dataset_name", "concepts_list"} & set(draft.items)
    needs_length = not {"max_train_steps", "num_train_epochs"} & set(draft.items)
    groups.apply(draft)
    rules.apply(draft)
    if needs_images:
        fix = "add train_data_dir: FOLDER_WITH_IMAGES"
        draft.problems.append(UserError("no training images are named", where=draft.document.file, fix=fix))
    if needs_length:
        fix = "add max_train_steps or num_train_epochs"
        draft.problems.append(UserError("the run has no length", where=draft.document.file, fix=fix))
    return draft.finish()
