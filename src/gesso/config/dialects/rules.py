"""What the settings of diffusers-style training tools mean here. Names are those of the diffusers scripts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gesso.config import schema
from gesso.config.dialects.draft import Draft, Item, number


@dataclass(frozen=True)
class Direct:
    """A setting that is one of ours under another name."""

    native: str
    kind: Literal["number", "text", "flag", "model", "folder"] = "number"
    note: str = ""


@dataclass(frozen=True)
class Alias:
    """A setting that has another name among these tools, or that only means something together with others."""

    name: str


@dataclass(frozen=True)
class Ignored:
    """A setting that changes nothing here."""

    why: str


@dataclass(frozen=True)
class Refused:
    """A setting that is not there, unless it has one of the values that leave it off."""

    why: str
    off: tuple[Any, ...] = ()
    fix: str = ""


Rule = Direct | Alias | Ignored | Refused


DIRECT = {
    "base_model": Direct("model.base", "model"),
    "vae": Direct("model.vae", "model"),
    "revision": Direct("model.revision", "text"),
    "variant": Direct("model.variant", "text"),
    "prediction_type": Direct("model.prediction", "text"),
    "val_data_dir": Direct("data.validation.path", "folder"),
    "resolution": Direct("data.resolution"),
    "random_flip": Direct("data.flip", "flag"),
    "dataloader_num_workers": Direct("data.workers"),
    "proportion_empty_prompts": Direct("data.captions.dropout"),
    "rank": Direct("adapter.rank"),
    "lora_alpha": Direct("adapter.alpha"),
    "lora_dropout": Direct("adapter.dropout"),
    "train_text_encoder": Direct("adapter.train_text_encoders", "flag"),
    "train_batch_size": Direct("training.batch_size"),
    "gradient_accumulation_steps": Direct("training.accumulation"),
    "learning_rate": Direct("training.learning_rate"),
    "adam_beta1": Direct("training.optimizer.beta1"),
    "adam_beta2": Direct("training.optimizer.beta2"),
    "adam_epsilon": Direct("training.optimizer.eps"),
    "adam_weight_decay": Direct("training.optimizer.weight_decay"),
    "max_grad_norm": Direct("training.clip"),
    "gradient_checkpointing": Direct("training.gradient_checkpointing", "flag"),
    "use_ema": Direct("training.ema.enabled", "flag"),
    "ema_decay": Direct("training.ema.decay"),
    "snr_gamma": Direct("objective.min_snr_gamma"),
    "noise_offset": Direct("objective.noise_offset"),
    "input_perturbation": Direct("objective.input_perturbation"),
    "seed": Direct("seed"),
    "run_name": Direct("name", "text"),
    "checkpointing_steps": Direct("checkpoint.every"),
    "preview_seed": Direct("preview.seed"),
    "negative_prompt": Direct("preview.negative", "text"),
    "guidance_scale": Direct("preview.guidance"),
    "num_inference_steps": Direct("preview.inference_steps"),
}

IGNORED = {
    "cache_latents": "latents are always cached",
    "cache_text_embeddings": "text embeddings are always cached, unless the text encoders train",
    "allow_tf32": "torch's own setting is left as it is",
    "logging_dir": "logs go to logs/ in the run folder",
    "logging_steps": "every step is logged",
    "validation_epochs": "previews come every preview.every steps, or at every checkpoint",
    "pin_memory": "the loader sees to it",
    "set_grads_to_none": "always so",
    "sample_batch_size": "class images are drawn four at a time",
    "prior_generation_precision": "class images are drawn in the precision of the training",
    "image_interpolation_mode": "pictures are resized with Lanczos",
    "cache_dir": "models from the hub are kept where HF_HOME says",
    "local_rank": "the launcher tells it",
}

REFUSED = {
    "output_kohya_format": "after training, `gesso export RUN --format kohya` writes it",
    "do_edm_style_training": "EDM-style training comes in a later version",
    "adam_weight_decay_text_encoder": "all parts have one weight decay, adam_weight_decay",
    "enable_cpu_offload": "CPU offload comes in a later version",
    "use_dora": "DoRA comes in a later version",
    "scale_lr": "the learning rate is taken as written; multiply it yourself",
    "max_train_samples": "a run sees all images of its sources; put those that it is to see in a folder of their own",
}


def apply(draft: Draft) -> None:
    """Read every queued setting that stands for itself; those that hang together are read by `groups` before."""
    for name in [name for name in draft.items if name in DIRECT]:
        if item := draft.take(name):
            _direct(draft, item, DIRECT[name])
    for name in [name for name in draft.items if name in REFUSED]:
        if item := draft.take(name):
            refused(draft, item, REFUSED[name])
    for name in [name for name in draft.items if name in IGNORED]:
        if item := draft.take(name):
            draft.ignore(item, IGNORED[name])


def read(draft: Draft, item: Item, table: Mapping[str, Rule]) -> None:
    """Do with one key what a table says, or note that nobody knows it."""
    rule = table.get(str(item.path[-1]))
    if rule is None:
        unknown(draft, item, table)
    else:
        obey(draft, item, rule)


def obey(draft: Draft, item: Item, rule: Rule) -> None:
    """Do with one key what a rule says."""
    match rule:
        case Ignored(why):
            draft.ignore(item, why)
        case _ if item.value is None:
            draft.ignore(item, "empty")
        case Alias(name):
            draft.add(name, item)
        case Direct():
            _direct(draft, item, rule)
        case Refused(why, off, fix):
            refused(draft, item, why, off=off, fix=fix)


def unknown(draft: Draft, item: Item, known: Mapping[str, Any]) -> None:
    """The problem with a key that is in no table, and the nearest spelling."""
    near = schema.nearest(str(item.path[-1]), known)
    fix = f"did you mean {near}?" if near else f"known here: {', '.join(sorted(known)[:40])}"
    draft.problem(item, f"unknown key {item.key} (read as {draft.tool})", fix=fix)


def _direct(draft: Draft, item: Item, rule: Direct) -> None:
    value: Any = item.value
    if rule.kind == "flag":
        value = draft.flag(item)
        if value is None:
            return
    elif rule.kind == "number":
        value = number(value)
    elif rule.kind == "folder" and isinstance(value, str):
        value = draft.path(value)
    elif rule.kind == "model" and isinstance(value, str):
        here = draft.path(value)
        value = here if value.startswith((".", "~", "/")) or Path(here).exists() else value
    draft.set(rule.native, value, item, note=rule.note)


def refused(draft: Draft, item: Item, why: str, *, off: tuple[Any, ...] = (), fix: str = "") -> None:
    """Refuse a setting by name, unless its value (or one of `off`) means that it is not wanted."""
    if item.value in off:
        draft.ignore(item, "it is so here")
    elif item.value in (False, 0, "", "none", "no", "off", [], {}):
        draft.ignore(item, f"off ({why})")
    else:
        draft.refuse(item, why, fix=fix or f"take {item.key} out of the file")


OPTIMIZERS = {
    "pagedadamw8bit": "paged_adamw8bit",
    "dadaptation": "dadapt_adam",
    "dadaptadam": "dadapt_adam",
    "dadaptlion": "dadapt_lion",
    "adamwschedulefree": "schedule_free",
    "schedulefreeadamw": "schedule_free",
}
"""Other tools' names, without case, dashes and underscores."""
