"""Settings that only have a meaning together: data, length, schedule, optimiser, previews, trackers."""

from __future__ import annotations

import re
from pathlib import Path

from gesso.config.dialects import concepts_list
from gesso.config.dialects.draft import Draft, Item, number, words
from gesso.config.dialects.rules import OPTIMIZERS
from gesso.config.document import file_name
from gesso.config.optimizer import KINDS
from gesso.config.problems import range_hint, show

_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_restarts",
    "polynomial": "polynomial",
}
_PRECISIONS = {"no": "fp32", "fp32": "fp32", "fp16": "fp16", "bf16": "bf16"}
_NOT_IN_SDXL = ("add_k_proj", "add_v_proj", "add_q_proj", "to_add_out")


PRIOR = ("with_prior_preservation", "prior_loss_weight", "class_data_dir", "class_prompt", "num_class_images")
"""What belongs to prior preservation; without the first the others say nothing."""


def apply(draft: Draft) -> None:
    """Read all groups."""
    for group in (_method, concepts_list.lay, _source, _prior, _images, _targets, _text_encoders, _timestep_bias):
        group(draft)
    for group in (_identity, _output, _checkpoints):
        group(draft)
    training(draft)


def training(draft: Draft) -> None:
    """Read the groups that mean the same to every tool: length, schedule, optimiser, machine, previews, trackers."""
    for group in (_length, _schedule, _optimizer, _machine, _previews, _trackers, _hub):
        group(draft)


def _method(draft: Draft) -> None:
    item, low_rank = draft.take("finetune_method"), draft.take("use_lora")
    if low_rank is not None and draft.flag(low_rank) is False:
        draft.refuse(
            low_rank, "a LoRA is what trains unless another method is named", fix="write finetune_method: full"
        )
    elif low_rank is not None and item is not None and item.value == "full":
        draft.problem(low_rank, f"{low_rank.key} is on, but {item.key} is full", fix="keep one of them")
    elif low_rank is not None:
        draft.set("adapter.type", "lora", low_rank)
    if item is None:
        return
    match item.value:
        case "lora":
            draft.set("adapter.type", "lora", item)
        case "dreambooth":
            draft.set("adapter.type", "lora", item)
            prior = draft.items.get("with_prior_preservation")
            if prior is None or not prior.value:
                why = "dreambooth without prior preservation is LoRA training on the instance images"
                draft.assume("objective.type", "denoise", why)
        case "full":
            draft.set("adapter.type", "full", item)
            for name in ("rank", "lora_alpha", "lora_dropout", "target_modules"):
                if extra := draft.take(name):
                    draft.ignore(extra, "only a LoRA has it")
        case _:
            draft.problem(item, f"{item.key} must be lora, full or dreambooth, not {show(item.value)}")


def _source(draft: Draft) -> None:
    folder, dataset, part = (draft.take(name) for name in ("train_data_dir", "dataset_name", "dataset_config_name"))
    if dataset is not None and folder is not None:
        draft.problem(dataset, f"{dataset.key} and {folder.key} both name the images", fix="keep one of them")
    elif dataset is not None:
        folder = _dataset(draft, dataset, part)
        part = None
    if part is not None:
        draft.ignore(part, "a folder has no configurations")
    if folder is not None:
        draft.set("data.sources.0.path", draft.path(str(folder.value)), folder)
    for name, native in (*(2 * (n,) for n in ("image_column", "caption_column")), ("dataset_split_name", "split")):
        if item := draft.take(name):
            draft.set(f"data.sources.0.{native}", item.value, item)
    if item := draft.take("metadata_file"):
        draft.set("data.sources.0.metadata", _inside(draft, item, folder), item)
    if item := draft.take("repeats"):
        draft.set("data.sources.0.repeats", number(item.value), item)
    if prompt := draft.take("instance_prompt"):
        draft.set("data.sources.0.trigger", prompt.value, prompt)
        why = "the instance prompt is the caption of every image that has none"
        draft.assume("data.sources.0.missing_captions", "trigger", why)


def _prior(draft: Draft) -> None:
    """Prior preservation on a folder of class images, as the diffusers scripts have it."""
    on, weight, folder, prompt, count = (draft.take(name) for name in PRIOR)
    if on is None or draft.flag(on) is not True:
        switch = "with_prior_preservation" if on is None else on.key
        for item in (weight, folder, prompt, count):
            if item is not None:
                draft.ignore(item, f"prior preservation is off; {switch} turns it on")
        if on is not None:
            draft.ignore(on, "off")
        return
    draft.set("objective.type", "dreambooth", on)
    if weight is not None:
        draft.set("objective.prior_weight", number(weight.value), weight)
    for item, name, example in ((prompt, "class_prompt", "a photo of a person"), (folder, "class_data_dir", "class")):
        if item is None:
            draft.problem(on, f"{on.key} is on, but there is no {name}", fix=f"add {name}: {example}")
    if folder is None or prompt is None or not draft.data.get("data", {}).get("sources"):
        for item in (folder, prompt, count):
            if item is not None:
                draft.ignore(item, "see the problems")
        return
    draft.set("data.sources.1.path", draft.path(str(folder.value)), folder)
    draft.assume("data.sources.1.role", "prior", "it holds the class images")
    draft.set("data.sources.1.trigger", prompt.value, prompt)
    draft.assume("data.sources.1.missing_captions", "trigger", "the class prompt is the caption of every class image")
    draft.set("objective.class_prompt", prompt.value, prompt)
    if count is not None:
        draft.set("objective.class_images", number(count.value), count)
    else:
        draft.assume("objective.class_images", 100, "the default of the diffusers scripts")


def _dataset(draft: Draft, item: Item, part: Item | None) -> Item | None:
    """Name a data set of the hub as the source; if there is a folder of that name, return the item instead."""
    text = str(item.value)
    if Path(draft.path(text)).exists() or text.startswith((".", "~", "/")) or "://" in text:
        if part is not None:
            draft.ignore(part, "a folder has no configurations")
        return item
    name = text.removeprefix("hub:")
    chosen = f"/{part.value}" if part is not None and part.value != "default" else ""
    draft.set("data.sources.0.path", f"hub:{name}{chosen}", item)
    if part is not None:
        draft.mapped.append(draft.entry(part, "data.sources[].path"))
    return None


def _inside(draft: Draft, item: Item, folder: Item | None) -> object:
    """The metadata file's name inside its folder, whether it was written so or with the folder before it."""
    if folder is None or not isinstance(item.value, str):
        return item.value
    root, given = Path(draft.path(str(folder.value))), Path(draft.path(item.value))
    if not (root / item.value).exists() and given.is_relative_to(root):
        return given.relative_to(root).as_posix()
    return item.value


def _images(draft: Draft) -> None:
    center, random = draft.take("center_crop"), draft.take("random_crop")
    if center is not None:
        draft.set("data.crop", "random" if draft.flag(center) is False else "center", center)
    if random is not None and center is not None and draft.flag(center) is draft.flag(random):
        draft.problem(random, f"{random.key} and {center.key} say the opposite", fix="keep one of them")
    elif random is not None:
        draft.set("data.crop", "random" if draft.flag(random) else "center", random)
    draft.assume("data.buckets.enabled", False, "pictures are cropped to a square; true keeps their shape")


def _targets(draft: Draft) -> None:
    item = draft.take("target_modules")
    if item is None:
        return
    names = words(item.value)
    absent = [name for name in names if name in _NOT_IN_SDXL]
    kept = [name for name in names if name not in _NOT_IN_SDXL]
    for name in absent:
        draft.ignore(Item((*item.path, name), name, item.line), "SDXL has no such layer; it belongs to SD3 and FLUX")
    if not kept:
        draft.problem(item, f"{item.key}: none of {', '.join(names)} exists in SDXL", fix="to_q, to_k, to_v, to_out.0")
    else:
        draft.set("adapter.targets", kept, item)


def _length(draft: Draft) -> None:
    steps, epochs = draft.take("max_train_steps"), draft.take("num_train_epochs")
    if steps is not None:
        draft.set("training.steps", number(steps.value), steps)
    if epochs is not None and steps is not None:
        draft.ignore(epochs, f"{steps.key} wins over it, as in the diffusers scripts")
        if hint := range_hint(epochs.value):
            draft.problem(epochs, f"{epochs.key} must be a whole number, not {show(epochs.value)}", fix=hint)
    elif epochs is not None:
        draft.set("training.epochs", number(epochs.value), epochs)


def _schedule(draft: Draft) -> None:
    item = draft.take("lr_scheduler")
    name = str(item.value) if item is not None else "constant"
    if item is not None:
        if name not in _SCHEDULES:
            draft.problem(item, f"{item.key} must be one of {', '.join(_SCHEDULES)}, not {show(item.value)}")
        else:
            draft.set("training.schedule.type", _SCHEDULES[name], item)
    warmup = draft.take("lr_warmup_steps")
    if warmup is not None and name == "constant" and number(warmup.value) not in (0, None):
        draft.ignore(warmup, "the constant schedule has no warm-up; constant_with_warmup has")
    elif warmup is not None:
        draft.set("training.schedule.warmup", number(warmup.value), warmup)
    for key, field, owner in (("lr_num_cycles", "cycles", "cosine_with_restarts"), ("lr_power", "power", "polynomial")):
        if extra := draft.take(key):
            if name == owner:
                draft.set(f"training.schedule.{field}", number(extra.value), extra)
            else:
                draft.ignore(extra, f"only {owner} uses it")


def _optimizer(draft: Draft) -> None:
    item, eight = draft.take("optimizer"), draft.take("use_8bit_adam")
    on = draft.flag(eight) if eight is not None else False
    kind = "adamw"
    if item is not None:
        kind = re.sub(r"[-_]", "", str(item.value).lower())
        kind = OPTIMIZERS.get(kind, kind)
        if kind != "adam" and kind not in KINDS:
            draft.refuse(item, "this optimizer is not there by this name", fix=f"write one of {', '.join(KINDS)}")
            kind = "adamw"
        elif kind == "adam":
            draft.refuse(item, "Adam couples weight decay with the gradient", fix="write adamw")
            kind = "adamw"
        else:
            draft.set("training.optimizer.type", kind, item)
    if eight is not None and on is not None:
        draft.set("training.optimizer.type", "adamw8bit" if on else kind, eight)


def _machine(draft: Draft) -> None:
    if item := draft.take("mixed_precision"):
        # YAML 1.1 reads a bare no as false.
        word = "no" if item.value is False else str(item.value)
        if word in _PRECISIONS:
            draft.set("training.precision", _PRECISIONS[word], item)
        else:
            draft.problem(item, f"{item.key} must be no, fp16 or bf16, not {show(item.value)}")
    if item := draft.take("enable_xformers"):
        on = draft.flag(item)
        draft.set("training.attention", "xformers" if on else "sdpa", item)


def _text_encoders(draft: Draft) -> None:
    rate = draft.take("text_encoder_lr")
    train = draft.items.get("train_text_encoder")
    if rate is None:
        return
    if train is None or train.value in (False, "no", "off", "false"):
        draft.ignore(rate, "the text encoders do not train")
    else:
        many = rate.value if isinstance(rate.value, list) else [rate.value]
        draft.set("training.text_encoder_learning_rates", [number(one) for one in many], rate)


def _timestep_bias(draft: Draft) -> None:
    strategy, multiplier, portion, begin, end = (
        draft.take(f"timestep_bias_{name}") for name in ("strategy", "multiplier", "portion", "begin", "end")
    )
    kind = "none" if strategy is None else strategy.value
    if kind not in ("none", "earlier", "later", "range"):
        assert strategy is not None
        draft.problem(strategy, f"{strategy.key} must be none, earlier, later or range, not {show(kind)}")
        return
    for item, owners in ((multiplier, ("earlier", "later", "range")), (portion, ("earlier", "later"))):
        if item is not None and kind not in owners:
            draft.ignore(item, f"timestep_bias_strategy is {kind}")
    for item, native in ((begin, "begin"), (end, "end")):
        if item is not None and kind == "range":
            value = number(item.value)
            draft.set(f"objective.timestep_bias.{native}", value / 1000 if isinstance(value, int) else value, item)
        elif item is not None:
            draft.ignore(item, f"timestep_bias_strategy is {kind}")
    if strategy is None or kind == "none":
        if strategy is not None:
            draft.ignore(strategy, "off")
        return
    share = number(portion.value) if portion is not None else 0.25
    if kind != "range" and isinstance(share, int | float):
        native, value = ("end", share) if kind == "earlier" else ("begin", 1 - share)
        draft.set(f"objective.timestep_bias.{native}", value, portion or strategy)
    draft.mapped.append(draft.entry(strategy, "objective.timestep_bias"))
    if multiplier is not None:
        draft.set("objective.timestep_bias.multiplier", number(multiplier.value), multiplier)


def _identity(draft: Draft) -> None:
    enabled = draft.take("enable_identity_loss")
    on = enabled is not None and draft.flag(enabled)
    if enabled is not None:
        draft.set("objective.identity", {} if on else None, enabled)
    for name, field in (("identity_loss_weight", "weight"), ("face_model", "model")):
        if item := draft.take(name):
            if on:
                draft.set(f"objective.identity.{field}", item.value, item)
            else:
                draft.ignore(item, "the identity loss is off")


def _output(draft: Draft) -> None:
    item = draft.take("output_dir")
    if item is None:
        return
    draft.set("output", item.value, item)
    name = file_name(Path(str(item.value)).name)
    if name and "run_name" not in draft.items:
        draft.assume("name", name, "the output folder's name")


def _checkpoints(draft: Draft) -> None:
    every = draft.items.get("checkpointing_steps")
    limit = draft.take("checkpoints_total_limit")
    if limit is not None and number(limit.value) not in (0, -1):
        draft.set("checkpoint.keep_last", number(limit.value), limit)
        return
    if limit is not None:
        draft.ignore(limit, "no limit: all checkpoints are kept")
    interval = number(every.value) if every is not None and every.value is not None else 500
    draft.assume("checkpoint.keep_every", interval, "without a limit every checkpoint is kept")


def _previews(draft: Draft) -> None:
    item, count, every = (draft.take(n) for n in ("validation_prompts", "num_validation_images", "validation_steps"))
    if item is not None:
        prompts = item.value if isinstance(item.value, list) else [item.value]
        if count is not None and isinstance(number(count.value), int) and number(count.value) > 0 and prompts:
            total = number(count.value)
            prompts = [prompts[i % len(prompts)] for i in range(total)]
            draft.mapped.append(draft.entry(count, f"preview.prompts ({total} pictures, each with its own seed)"))
        elif count is not None:
            draft.problem(count, f"{count.key} must be a whole number above 0, not {show(count.value)}")
        draft.set("preview.prompts", prompts, item)
    elif count is not None:
        draft.ignore(count, "there are no validation prompts")
    if every is not None:
        draft.set("preview.every", number(every.value), every)
        if "val_data_dir" in draft.items:
            draft.set("validation.every", number(every.value), every)


def _trackers(draft: Draft) -> None:
    wanted = ["tensorboard"]
    if report := draft.take("report_to"):
        wanted = [name.lower() for name in words(report.value)]
        wanted = ["tensorboard", "wandb"] if wanted == ["all"] else [name for name in wanted if name != "none"]
        for name in set(wanted) - {"tensorboard", "wandb"}:
            draft.refuse(report, f"{name} comes in a later version", fix="use tensorboard or wandb")
    owner = report
    for key, name in (("use_tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        if item := draft.take(key):
            owner = item
            wanted = [one for one in wanted if one != name] + ([name] if draft.flag(item) else [])
            draft.mapped.append(draft.entry(item, "trackers"))
    kinds = [name for name in ("tensorboard", "wandb") if name in wanted]
    if owner is not None:
        draft.data["trackers"] = [{"type": kind} for kind in kinds]
        draft.places[("trackers",)] = draft.place(owner)
        if owner is report:
            draft.mapped.append(draft.entry(owner, "trackers"))
    for key, field in (("wandb_project", "project"), ("wandb_run_name", "run_name"), ("wandb_entity", "entity")):
        if item := draft.take(key):
            if "wandb" in kinds:
                draft.set(f"trackers.{kinds.index('wandb')}.{field}", item.value, item)
            else:
                draft.ignore(item, "Weights & Biases is off")


def _hub(draft: Draft) -> None:
    repo, push, resume = (draft.take(name) for name in ("hub_model_id", "push_to_hub", "resume_from_checkpoint"))
    if token := draft.take("hub_token"):
        draft.refuse(token, "a token does not belong in a file", fix="run `hf auth login`, or set HF_TOKEN")
    wanted = draft.flag(push) if push is not None else repo is not None
    if repo is not None and wanted:
        draft.hub_repo = str(repo.value)
        draft.mapped.append(draft.entry(repo, "--hub-model-id"))
    elif repo is not None:
        draft.ignore(repo, "push_to_hub is off")
    if push is not None:
        draft.mapped.append(draft.entry(push, "--push-to-hub"))
        if wanted and repo is None:
            draft.problem(
                push, f"{push.key} is on, but no repository is named", fix="add hub_model_id: name/repository"
            )
    if resume is not None:
        draft.resume = str(resume.value)
        draft.mapped.append(draft.entry(resume, "--resume"))
