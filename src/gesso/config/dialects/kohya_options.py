"""Options of sd-scripts' SDXL trainers: `--config_file` TOML, or the same keys in YAML; sections carry no meaning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gesso.config.dialects import (
    flat,
    groups,
    kohya,
    kohya_losses,
    kohya_network,
    kohya_tables,
    rules,
    sample_prompts,
    toml,
)
from gesso.config.dialects.draft import Converted, Draft, Item, number, words
from gesso.config.document import Document, file_name
from gesso.config.problems import show
from gesso.errors import UserError

NAME = "options of sd-scripts"

KEYS = kohya_tables.KEYS
_OWN = {key for key in KEYS if key not in flat.KEYS and key not in ("batch_size", "steps", "loss_type")}
_NO_WORDS = (None, "", "none", "None")
_OPTIMIZER = {"weight_decay": "weight_decay", "eps": "eps"}


def score(mapping: Mapping[str, Any]) -> int:
    """How many keys, inside sections or not, are options of sd-scripts; 0 if none is its alone."""
    names = [key for key, _, _ in _flat(mapping)]
    return sum(name in KEYS for name in names) if any(name in _OWN for name in names) else 0


def to_run(document: Document, *, folder: Path) -> Converted:
    """Read the options as a run file."""
    draft = Draft(NAME, document, folder)
    pictures: dict[str, Item] = {}
    for key, path, value in _flat(document.data):
        item = Item(path, value, document.lines.get(path))
        name = kohya_tables.PICTURES.get(key)
        if name is None:
            rules.read(draft, item, KEYS)
        elif value is None:
            draft.ignore(item, "empty")
        elif name not in pictures:
            pictures[name] = item
        elif pictures[name].value != value:
            other = pictures[name]
            what = f"{item.key} is {show(value)} but {other.key} (line {other.line}) is {show(other.value)}"
            draft.problem(item, what, fix="keep one of them")
        else:
            draft.ignore(item, f"says the same as {pictures[name].key}")
    _pictures(draft, pictures)
    for part in (_length, _network, _rates, _model, _optimizer, _losses, _saving, _previews):
        part(draft)
    groups.training(draft)
    return draft.finish()


def _flat(mapping: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str | int, ...], Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from ((inner, (key, inner), v) for inner, v in value.items())
        else:
            yield key, (key,), value


def _pictures(draft: Draft, options: dict[str, Item]) -> None:
    weight = draft.take("prior_loss_weight")
    listed, train, prior = (draft.take(name) for name in ("dataset_config", "train_data_dir", "reg_data_dir"))
    if weight is not None:
        options["prior_loss_weight"] = weight
    if listed is not None:
        for item in (train, prior):
            if item is not None:
                draft.ignore(item, "dataset_config says what the images are")
        path = Path(draft.path(str(listed.value)))
        if not path.is_file():
            draft.problem(listed, f"dataset_config: there is no file {path}")
            return
        document = toml.read(path, what="dataset file")
        kohya.lay(draft, document, options, folder=path.parent)
        draft.mapped.append(draft.entry(listed, "data"))
        if weight is not None and all(entry.key != weight.key for entry in draft.mapped):
            draft.ignore(weight, "no subset has is_reg")
        return
    if train is None:
        fix = "add train_data_dir (with folders such as 10_sks aldar inside) or dataset_config"
        draft.problems.append(UserError("no training images are named", where=draft.document.file, fix=fix))
    if "resolution" not in options:
        what = "resolution is missing, and sd-scripts has no default"
        draft.problems.append(UserError(what, where=draft.document.file, fix="write resolution = 1024"))
    made = []
    for item, role in ((train, "instance"), (prior, "prior")):
        if item is not None:
            made.append(_tree(draft, options, item, role))
    if weight is not None and prior is None:
        draft.ignore(weight, "there are no regularisation images (reg_data_dir)")
    kohya.finish(draft, made, [{k: v for k, v in options.items() if k in kohya.DATASET}])


def _tree(draft: Draft, options: Mapping[str, Item], item: Item, role: str) -> kohya.Made:
    """The folders REPEATS_WORDS inside `train_data_dir` or `reg_data_dir`."""
    weight = options.get("prior_loss_weight")
    own = {k: v for k, v in options.items() if k not in kohya.DATASET and k != "prior_loss_weight"}
    made = kohya.source(draft, own, options)
    why = "images without a caption file have their folder's words"
    made.values |= {"path": (draft.path(str(item.value)), item), "layout": ("kohya", "it holds REPEATS_WORDS folders")}
    made.values["missing_captions"] = ("concept", why)
    if role == "prior":
        made.values["role"] = (role, item)
        if weight is not None:
            draft.set("objective.prior_weight", number(weight.value), weight)
    return made


def _length(draft: Draft) -> None:
    steps, epochs = draft.items.get("max_train_steps"), draft.items.get("num_train_epochs")
    if epochs is not None and epochs.value is not None and steps is not None:
        del draft.items["max_train_steps"]
        draft.ignore(steps, f"{epochs.key} wins over it, as in sd-scripts")
    elif steps is None and epochs is None:
        draft.assume("training.steps", 1600, "the default of sd-scripts")


def _network(draft: Draft) -> None:
    kohya_network.lay(draft, _pairs(draft, draft.take("network_args")))


def _pairs(draft: Draft, item: Item | None) -> list[tuple[str, Item]]:
    """`["a=1", "b=2"]`, as these options write a mapping."""
    found = []
    values = (words(item.value) if isinstance(item.value, str) else item.value) if item is not None else []
    for text in values if isinstance(values, list) else [values]:
        word, equals, value = str(text).partition("=")
        assert item is not None
        if not equals:
            draft.problem(item, f"{item.key}: {show(text)} is not of the form name=value")
            continue
        found.append((word.strip(), Item((*item.path, word.strip()), value.strip(), item.line)))
    return found


def _rates(draft: Draft) -> None:
    rate, unet, text = (draft.take(name) for name in ("learning_rate", "unet_lr", "text_encoder_lr"))
    only = draft.take("network_train_unet_only")
    cached = draft.take("cache_text_encoder_outputs")
    main = unet if unet is not None else rate
    if main is not None:
        draft.set("training.learning_rate", number(main.value), main)
    else:
        draft.assume("training.learning_rate", 2e-6, "the default of sd-scripts")
    trained = True
    for item, note in ((only, ""), (cached, "what they say is cached, so they do not train")):
        if item is not None and draft.flag(item):
            trained = False
            draft.set("adapter.train_text_encoders", False, item, note=note)
        elif item is not None:
            draft.ignore(item, "off")
    if trained:
        why = "sd-scripts trains the text encoders unless network_train_unet_only; here their attention alone"
        draft.assume("adapter.train_text_encoders", True, why)
        own = text if text is not None else rate
        if own is None and unet is not None:
            draft.assume("training.text_encoder_learning_rates", [2e-6], "the default of sd-scripts")
        elif own is not None and own is not main:
            many = own.value if isinstance(own.value, list) else [own.value]
            draft.set("training.text_encoder_learning_rates", [number(one) for one in many], own)
    elif text is not None:
        draft.ignore(text, "the text encoders do not train")
    if rate is not None and unet is not None and (not trained or text is not None):
        draft.ignore(rate, "unet_lr and text_encoder_lr are given")


def _model(draft: Draft) -> None:
    sdxl, second, length = (draft.take(name) for name in ("sdxl", "v2", "max_token_length"))
    if sdxl is not None and not draft.flag(sdxl):
        draft.refuse(sdxl, "SDXL is the only model so far")
    elif sdxl is not None:
        draft.set("model.family", "sdxl", sdxl)
    if second is not None and draft.flag(second) and (sdxl is None or sdxl.value is not True):
        draft.refuse(second, "this is for Stable Diffusion 2; SDXL is the only model so far")
    elif second is not None:
        draft.ignore(second, "SDXL is meant")
    if length is not None and number(length.value) in (150, 225):
        draft.set("model.long_prompts", "chunk", length)
        draft.set("model.max_chunks", number(length.value) // 75, length)
    elif length is not None and number(length.value) == 75:
        draft.ignore(length, "longer captions are cut, which is the default here")
    elif length is not None:
        draft.problem(length, f"{length.key} must be 75, 150 or 225, not {show(length.value)}")
    item = draft.take("v_parameterization")
    if item is not None and draft.flag(item):
        draft.set("model.prediction", "v_prediction", item)
    elif item is not None:
        draft.ignore(item, "what the model predicts is read from it")
    item = draft.take("weighted_captions")
    if item is not None:
        draft.set("model.prompt_weights", draft.flag(item) is True, item)


def _optimizer(draft: Draft) -> None:
    for word, item in _pairs(draft, draft.take("optimizer_args")):
        if word in _OPTIMIZER:
            draft.set(f"training.optimizer.{_OPTIMIZER[word]}", number(item.value), item)
        elif word == "betas":
            found = [number(part) for part in re.split(r"[,\s]+", str(item.value).strip("()[] ")) if part]
            if len(found) != 2:
                draft.problem(item, f"{item.key} must be two numbers, not {show(item.value)}")
                continue
            for name, value in zip(("beta1", "beta2"), found, strict=True):
                draft.set(f"training.optimizer.{name}", value, item)
        else:
            draft.refuse(item, "the optimizers here have no such setting", fix=f"take {word} out")
    norm = draft.take("max_grad_norm")
    if norm is not None:
        draft.set("training.clip", number(norm.value) or None, norm)
    precision = draft.items.get("mixed_precision")
    if precision is None:
        draft.assume("training.precision", "fp32", "the default of sd-scripts")


def _losses(draft: Draft) -> None:
    kohya_losses.lay(draft, predicts_v=draft.data.get("model", {}).get("prediction") == "v_prediction")


def _saving(draft: Draft) -> None:
    folder, name = draft.take("output_dir"), draft.take("output_name")
    word = file_name(str(name.value)) if name is not None else ""
    if name is not None:
        draft.set("name", word or name.value, name)
    if folder is not None:
        draft.set("output", str(Path(str(folder.value), word)) if word else folder.value, folder)
    every, last = draft.take("checkpointing_steps"), draft.take("save_last_n_steps")
    step = number(every.value) if every is not None else 500
    if every is not None:
        draft.set("checkpoint.every", step, every)
    if last is not None and isinstance(step, int) and isinstance(number(last.value), int) and step > 0:
        draft.set("checkpoint.keep_last", max(1, number(last.value) // step), last)
    else:
        if last is not None:
            draft.problem(last, f"{last.key} must be a whole number, not {show(last.value)}")
        draft.assume("checkpoint.keep_every", step, "without a limit every checkpoint is kept")
    resume = draft.take("resume")
    if resume is not None:
        draft.refuse(resume, "the state that sd-scripts saves cannot be continued here")


def _previews(draft: Draft) -> None:
    item, every = draft.take("sample_prompts"), draft.take("sample_every_n_steps")
    if item is not None and item.value not in _NO_WORDS:
        sample_prompts.lay(draft, item)
    elif item is not None:
        draft.ignore(item, "empty")
    if every is not None:
        rules.obey(draft, every, rules.Direct("preview.every"))
