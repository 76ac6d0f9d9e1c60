"""What a job file of ai-toolkit says beside its images: the network, the training, the model, the previews."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gesso.config.dialects import aitoolkit_tables as tables
from gesso.config.dialects import rules
from gesso.config.dialects.draft import Draft, Entry, Item, number
from gesso.config.dialects.rules import Rule
from gesso.config.document import file_name
from gesso.config.problems import show
from gesso.errors import UserError

_TRAINERS = ("sd_trainer", "diffusion_trainer", "ui_trainer")
_OPTIMIZER = {"weight_decay": "weight_decay", "eps": "eps"}
_PRECISIONS = {"bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16", "fp32": "fp32", "float32": "fp32"}
_KINDS = {"lora": "lora", "locon": "lora", "lokr": "lokr"}
_LOSSES = {"mse": "l2", "l2": "l2", "mae": "l1", "l1": "l1"}
DEFAULT = "the default of ai-toolkit"
_DEFAULTS: dict[str, dict[str, Any]] = {
    "network": {"adapter.rank": 4, "adapter.alpha": 1, "adapter.targets": "attention-mlp"},
    "save": {"checkpoint.every": 1000, "checkpoint.keep_last": 5},
    "train": {
        "training.steps": 1000,
        "training.learning_rate": 1e-6,
        "training.precision": "fp32",
        "training.gradient_checkpointing": True,
    },
    "sample": {
        "preview.every": 100,
        "preview.width": 512,
        "preview.height": 512,
        "preview.seed": 0,
        "preview.inference_steps": 20,
        "preview.guidance": 7,
    },
}
_FLUX = re.compile(r"flux|stable-diffusion-3|sd3", re.IGNORECASE)


def lay(draft: Draft, process: Mapping[str, Any], name: str) -> None:
    """Read what `draft` holds of a job, and fill in what ai-toolkit does where the file says nothing."""
    for part in (_network, _training, _rates, _model, _output):
        part(draft)
    _previews(draft, str(process.get("trigger_word") or ""))
    _defaults(draft, process)
    if "training_folder" in process and name and "output" in draft.data:
        draft.data["output"] = str(Path(str(draft.data["output"]), draft.data["name"]))


def filled(value: Any, words: Mapping[str, str]) -> Any:
    """All text with `[name]` and the like replaced."""
    if isinstance(value, str):
        for word, text in words.items():
            value = value.replace(word, text) if text else value
        return value
    if isinstance(value, Mapping):
        return {key: filled(inner, words) for key, inner in value.items()}
    return [filled(inner, words) for inner in value] if isinstance(value, list) else value


def _network(draft: Draft) -> None:
    kind, more = draft.take("network"), draft.take("network_kwargs")
    lokr = kind is not None and kind.value == "lokr"
    if kind is not None and kind.value in _KINDS:
        draft.set("adapter.type", _KINDS[kind.value], kind)
    elif kind is not None:
        draft.refuse(kind, f"of its networks only {', '.join(_KINDS)} are there", fix="write type: lora")
    for name, native in (("linear", "rank"), ("linear_alpha", "alpha")):
        if item := draft.take(name):
            draft.set(f"adapter.{native}", number(item.value), item)
    convolutions = draft.take("conv")
    for name, native in (("conv", "conv_rank"), ("conv_alpha", "conv_alpha")):
        item = convolutions if name == "conv" else draft.take(name)
        if item is not None and convolutions is not None and number(convolutions.value):
            draft.set(f"adapter.{native}", number(item.value), item)
        elif item is not None:
            draft.ignore(item, "off" if name == "conv" else "belongs to conv")
    whole, factor = draft.take("lokr_full_rank"), draft.take("lokr_factor")
    if whole is not None and lokr and draft.flag(whole):
        draft.set("adapter.rank", 4096, whole, note="so wide that no factor is split")
        draft.set("adapter.alpha", None, whole, note="the strength is 1")
    elif whole is not None:
        draft.ignore(whole, "off" if lokr else "belongs to lokr")
    if factor is not None and lokr:
        draft.set("adapter.factor", number(factor.value), factor)
    elif factor is not None:
        draft.ignore(factor, "belongs to lokr")
    _inside(draft, more, tables.KWARGS)


def _inside(draft: Draft, item: Item | None, table: Mapping[str, Rule]) -> None:
    """Read a section inside a block."""
    if item is not None and isinstance(item.value, Mapping):
        for key, value in item.value.items():
            rules.read(draft, draft.item((*item.path, key), value), table)
        draft.ignore(item, "read key by key")
    elif item is not None:
        draft.problem(item, f"{item.key} must be a section with keys of its own")


def _training(draft: Draft) -> None:
    process = draft.take("process")
    if process is not None and process.value not in _TRAINERS:
        draft.refuse(process, f"of its processes only {', '.join(_TRAINERS)} are read")
    elif process is not None:
        draft.ignore(process, "the usual kind")
    for name, native, choices in (
        ("dtype", "training.precision", _PRECISIONS),
        ("loss_type", "objective.loss_type", _LOSSES),
    ):
        item = draft.take(name)
        if item is not None and str(item.value) in choices:
            draft.set(native, choices[str(item.value)], item)
        elif item is not None:
            draft.refuse(item, "this is not there", fix=f"write one of {', '.join(choices)}")
    item = draft.take("train_unet")
    if item is not None and draft.flag(item) is False:
        draft.refuse(item, "the denoiser always trains")
    elif item is not None:
        draft.ignore(item, "the denoiser always trains")
    if item := draft.take("accumulation"):
        draft.set("training.accumulation", number(item.value), item)
    for name, native, more in (("min_denoising_steps", "timestep_low", 0), ("max_denoising_steps", "timestep_high", 1)):
        if item := draft.take(name):
            value = number(item.value)
            draft.set(f"objective.{native}", (value + more) / 1000 if isinstance(value, int) else value, item)
    _timesteps(draft)
    _inside(draft, draft.take("ema_config"), tables.EMA)
    _optimizer(draft)


def _timesteps(draft: Draft) -> None:
    """Content and style are the place 1 - u^3, or u^3, of ai-toolkit's table of timesteps, noisiest first."""
    item = draft.take("content_or_style")
    # P(1 - u^3 < x) = 1 - (1 - x)^(1/3), which is a beta distribution; from the other end, its mirror image.
    shapes = {"content": (1, 1 / 3), "style": (1 / 3, 1)}
    if item is None:
        return
    if item.value == "balanced":
        draft.ignore(item, "timesteps are drawn evenly")
    elif item.value in shapes:
        note = "beta: more of the noisy timesteps" if item.value == "content" else "beta: more of the clear timesteps"
        draft.set("objective.timesteps.type", "beta", item, note=note)
        for name, value in zip(("alpha", "beta"), shapes[item.value], strict=True):
            draft.set(f"objective.timesteps.{name}", value, item)
    else:
        draft.problem(item, f"{item.key} must be balanced, content or style, not {show(item.value)}")


def _optimizer(draft: Draft) -> None:
    params = draft.take("optimizer_params")
    given = params.value if params is not None else {}
    if params is not None and not isinstance(given, Mapping):
        draft.problem(params, f"{params.key} must be a section with keys of its own")
        return
    for key, value in given.items():
        assert params is not None
        item = draft.item((*params.path, key), value)
        if key in _OPTIMIZER:
            draft.set(f"training.optimizer.{_OPTIMIZER[key]}", number(value), item)
        elif key == "betas" and isinstance(value, list) and len(value) == 2:
            draft.set("training.optimizer.beta1", number(value[0]), item)
            draft.set("training.optimizer.beta2", number(value[1]), item)
        else:
            draft.refuse(item, "the optimizers here have no such setting", fix=f"take {key} out")
    if params is not None:
        draft.ignore(params, "read key by key")


def _rates(draft: Draft) -> None:
    rate, unet, text, end = (draft.take(name) for name in ("lr", "unet_lr", "te_lr", "lr_end"))
    main = unet if unet is not None else rate
    if main is not None:
        draft.set("training.learning_rate", number(main.value), main)
    if rate is not None and main is not rate and text is None:
        text, rate = rate, None
    elif rate is not None and main is not rate:
        draft.ignore(rate, "unet_lr and text_encoder_lr are given")
    trained = draft.data.get("adapter", {}).get("train_text_encoders") is True
    if text is not None and trained:
        draft.set("training.text_encoder_learning_rates", [number(text.value)], text)
    elif text is not None:
        draft.ignore(text, "the text encoders do not train")
    elif trained and unet is not None:
        draft.assume("training.text_encoder_learning_rates", [1e-6], DEFAULT)
    params, warmup = draft.take("lr_scheduler_params"), draft.take("warmup_steps")
    if params is not None:
        rules.refused(draft, params, "schedules have no settings of this form", fix="write warmup_steps instead")
    if warmup is not None:
        draft.add("lr_warmup_steps", warmup)
    start = number(main.value) if main is not None else None
    if end is not None and isinstance(start, int | float) and isinstance(number(end.value), int | float) and start > 0:
        draft.set("training.schedule.floor", round(number(end.value) / start, 9), end)
    elif end is not None:
        draft.problem(end, f"{end.key} must be a number, and lr be given, not {show(end.value)}")


def _model(draft: Draft) -> None:
    if fused := draft.take("lora_path"):
        draft.set("model.fuse", [{"path": draft.path(str(fused.value))}], fused, note="merged into the model")
    arch, xl, v = (draft.take(name) for name in ("arch", "is_xl", "is_v_pred"))
    base = draft.data.get("model", {}).get("base")
    fix = "name a model of SDXL, and write arch: sdxl"
    if arch is not None and str(arch.value) not in ("sdxl", "xl"):
        draft.refuse(arch, "SDXL is the only model so far", fix=fix)
    elif arch is not None or (xl is not None and draft.flag(xl)):
        for item in (arch, xl):
            if item is not None:
                draft.set("model.family", "sdxl", item)
        arch = xl = None
    elif base is not None and not any(entry.key.rpartition(".")[2].startswith("is_") for entry in draft.refused):
        place = draft.places[("model", "base")]
        what = f"{place.key}: {show(base)}: " + (
            "this looks like FLUX or SD 3, and SDXL is the only model so far"
            if _FLUX.search(str(base))
            else "no arch is named, which ai-toolkit takes for Stable Diffusion 1; SDXL is the only model so far"
        )
        draft.problems.append(UserError(what, where=place.where, fix=fix))
    if xl is not None:
        draft.ignore(xl, "off")
    if v is not None and draft.flag(v):
        draft.set("model.prediction", "v_prediction", v)
    elif v is not None:
        draft.ignore(v, "what the model predicts is read from it")


def _output(draft: Draft) -> None:
    name, folder = draft.take("name"), draft.take("training_folder")
    trigger = draft.take("trigger")
    if trigger is not None and all(entry.key != trigger.key for entry in draft.mapped):
        draft.ignore(trigger, "empty, or every data set says otherwise")
    if name is not None:
        draft.set("name", file_name(str(name.value)) or name.value, name)
    if folder is not None:
        draft.set("output", folder.value, folder)
    if "hub_model_id" in draft.items and "push_to_hub" not in draft.items:
        draft.ignore(draft.items.pop("hub_model_id"), "push_to_hub is off")


def _previews(draft: Draft, trigger: str) -> None:
    prompts, samples, off = (draft.take(name) for name in ("prompts", "samples", "disable_sampling"))
    silent = off is not None and draft.flag(off) is True
    if off is not None:
        draft.ignore(off, "no previews are drawn" if silent else "off")
    if prompts is not None and samples is not None:
        draft.problem(samples, f"{samples.key} and {prompts.key} both name the previews", fix="keep one of them")
        return
    item = prompts if prompts is not None else samples
    if item is None:
        return
    found = item.value if isinstance(item.value, list) else [item.value]
    texts = [_sample(draft, item, i, one) if isinstance(one, Mapping) else one for i, one in enumerate(found)]
    if silent:
        draft.ignore(item, "disable_sampling is on")
    else:
        draft.set("preview.prompts", filled(texts, {"[trigger]": trigger}), item)


def _sample(draft: Draft, item: Item, index: int, sample: Mapping[str, Any]) -> Any:
    """The prompt of one sample; what it says beside that must be what all have."""
    for key, value in sample.items():
        inner = draft.item((*item.path, index, key), value)
        same = {"neg": "negative"}.get(key, key)
        if key == "network_multiplier":
            rules.refused(draft, inner, "previews have the adapter at its full strength", off=(1,))
        elif key in tables.ONE_SAMPLE and (index == 0 or draft.data.get("preview", {}).get(same) == value):
            draft.set(f"preview.{same}", value, inner)
        elif key in tables.ONE_SAMPLE:
            draft.ignore(inner, "all previews have the settings of the first; picture i has seed + i")
        elif key != "prompt":
            rules.unknown(draft, inner, dict.fromkeys(("prompt", "network_multiplier", *tables.ONE_SAMPLE)))
    return sample.get("prompt", "")


def _defaults(draft: Draft, process: Mapping[str, Any]) -> None:
    """What ai-toolkit does where the file says nothing."""
    if process.get("network") is None:
        draft.assume("adapter.type", "full", "without a network, ai-toolkit trains the whole model")
    for block, values in _DEFAULTS.items():
        if block in ("network", "sample") and not isinstance(process.get(block), Mapping):
            continue
        for native, value in values.items():
            section, name = native.split(".")
            if name not in draft.data.get(section, {}):
                draft.assume(native, value, DEFAULT)
    save = process.get("save")
    if not isinstance(save, Mapping) or "dtype" not in save:
        why = "float16 there; what was trained is kept in float32, and gesso export writes other precisions"
        draft.assumed.append(Entry("save.dtype", None, why))
