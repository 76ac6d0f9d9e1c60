"""Job files of ai-toolkit: `config.process[0]` with its blocks, or those blocks alone as guides print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gesso.config.dialects import aitoolkit_run, groups, kohya, rules
from gesso.config.dialects import aitoolkit_tables as tables
from gesso.config.dialects.aitoolkit_run import DEFAULT, filled
from gesso.config.dialects.draft import Converted, Draft, Item, number
from gesso.config.dialects.rules import Alias, Direct, Ignored, Refused, Rule
from gesso.config.document import Document, KeyPath
from gesso.config.problems import show
from gesso.errors import UserError

NAME = "a job file of ai-toolkit"


def score(mapping: Mapping[str, Any]) -> int:
    """How many keys belong to a job file; its blocks also count where they stand alone."""
    config = mapping.get("config")
    if "job" in mapping and isinstance(config, Mapping) and "process" in config:
        return 100
    found = 0
    datasets = mapping.get("datasets")
    for one in datasets if isinstance(datasets, list) else []:
        if isinstance(one, Mapping) and "subsets" not in one:
            found += 1 + sum(key in tables.DATASET for key in one)
    for name in ("train", "sample", "save", "network", "model", "logging"):
        block = mapping.get(name)
        if isinstance(block, Mapping):
            found += (name in ("train", "sample")) + sum(key in tables.BLOCKS[name] for key in block)
    return found + ("trigger_word" in mapping) + ("training_folder" in mapping)


def to_run(document: Document, *, folder: Path) -> Converted:
    """Read a job file as a run file."""
    draft = Draft(NAME, document, folder)
    process, path, name = _process(draft)
    process = filled(process, {"[name]": name})
    _blocks(draft, process, path)
    _datasets(draft, process.get("datasets"), (*path, "datasets"))
    aitoolkit_run.lay(draft, process, name)
    groups.training(draft)
    return draft.finish()


def to_data(document: Document, *, folder: Path) -> Converted:
    """Read the `datasets` of a file, and nothing else of it, as the section `data`."""
    draft = Draft(NAME, document, folder)
    process, path, name = _process(draft)
    process = filled(process, {"[name]": name})
    for key, value in process.items():
        item = draft.item((*path, key), value)
        if key == "trigger_word":
            draft.add("trigger", item)
        elif key != "datasets":
            draft.ignore(item, "only the images are read from this file")
    _datasets(draft, process.get("datasets"), (*path, "datasets"))
    draft.take("trigger")
    return draft.finish()


def _process(draft: Draft) -> tuple[Mapping[str, Any], KeyPath, str]:
    """The one process of the file with the place it stands in, and the job's name."""
    data, config = draft.document.data, draft.document.data.get("config")
    if "job" not in data or not isinstance(config, Mapping):
        return data, (), ""
    known: dict[str, Rule] = {
        "job": Refused("only training jobs are read", off=("extension", "train")),
        "meta": Ignored("notes for nobody here"),
        "config": Ignored(""),
    }
    for key in data:
        if key != "config":
            rules.read(draft, draft.item((key,), data[key]), known)
    inside: dict[str, Rule] = {"name": Alias("name"), "process": Ignored("")}
    for key in config:
        if key != "process":
            rules.read(draft, draft.item(("config", key), config[key]), inside)
    path: KeyPath = ("config", "process")
    item = draft.item(path, config.get("process"))
    found = item.value if isinstance(item.value, list) else [item.value]
    if len(found) > 1:
        draft.problem(item, f"{item.key}: {len(found)} processes, and a run has one", fix="write a file for each")
    first = found[0] if found else None
    if not isinstance(first, Mapping):
        draft.problem(item, f"{item.key} must be a list with one process")
        first = {}
    return first, (*path, 0), str(config.get("name", ""))


def _blocks(draft: Draft, process: Mapping[str, Any], path: KeyPath) -> None:
    for name, block in process.items():
        here = (*path, name)
        if name == "datasets" or (name == "network" and block is None):
            continue
        if name not in tables.BLOCKS:
            rules.read(draft, draft.item(here, block), tables.PROCESS)
        elif block is None:
            draft.ignore(draft.item(here, None), "empty")
        elif isinstance(block, Mapping):
            for key, value in block.items():
                rules.read(draft, draft.item((*here, key), value), tables.BLOCKS[name])
        else:
            draft.problem(draft.item(here, block), f"{name} must be a section with keys of its own")


_REGULARISED = (
    "ai-toolkit takes every other batch from the regularisation images; here each step has as many of them as of the "
    "others, on top"
)


def _datasets(draft: Draft, value: Any, path: KeyPath) -> None:
    trigger, weight = draft.items.get("trigger"), draft.take("reg_weight")
    listed = value if isinstance(value, list) else []
    if not listed:
        fix = "add datasets: with folder_path: FOLDER_WITH_IMAGES"
        draft.problems.append(UserError("no training images are named", where=draft.document.file, fix=fix))
    made, shared = [], []
    for i, one in enumerate(listed):
        here = (*path, i)
        if not isinstance(one, Mapping):
            draft.problem(draft.item(here, one), f"datasets.{i} must be a section with keys of its own")
            continue
        items = {}
        for key, inner in one.items():
            item = draft.item((*here, key), inner)
            rule = tables.DATASET.get(key)
            if rule is None:
                rules.unknown(draft, item, tables.DATASET)
            elif inner is None:
                draft.ignore(item, "empty")
            else:
                items[rule.name if isinstance(rule, Alias) else key] = item
        if "folder_path" not in items:
            where = draft.where(draft.item(here, one))
            draft.problems.append(UserError("folder_path is missing", where=where, fix="name the folder of images"))
        made.append(_source(draft, items, trigger, weight))
        shared.append(items)
    if weight is not None and not any(one.prior for one in made):
        draft.ignore(weight, "no data set has is_reg")
    _buckets(draft, shared)
    kohya.write(draft, made, regularised=_REGULARISED)


def _source(draft: Draft, items: Mapping[str, Item], trigger: Item | None, weight: Item | None) -> kohya.Made:
    made = kohya.Made()
    prior = "is_reg" in items and draft.flag(items["is_reg"]) is True
    for key, item in items.items():
        match tables.DATASET.get(key):
            case Direct("objective.unmasked_weight"):
                draft.set("objective.unmasked_weight", number(item.value), item)
            case Direct(native, "flag"):
                made.values[native] = (draft.flag(item) is True, item)
            case Direct(native):
                made.values[native] = (number(item.value), item)
            case Refused() | Ignored() as rule:
                rules.obey(draft, item, rule)
    if "folder_path" in items:
        made.values["path"] = (draft.path(str(items["folder_path"].value)), items["folder_path"])
        made.values["layout"] = ("folder", "folder_path is a folder of images with captions beside them")
    else:
        made.values["path"] = (".", "none is named")
    _caption(draft, made, items, None if prior else items.get("trigger_word", trigger))
    for key, native, on, off in (("is_reg", "role", "prior", "instance"), ("alpha_mask", "mask", "alpha", "none")):
        if key in items:
            made.values[native] = (on if draft.flag(items[key]) else off, items[key])
    if "random_crop" in items:
        made.values["crop"] = ("random" if draft.flag(items["random_crop"]) else "center", items["random_crop"])
    if prior and weight is not None:
        draft.set("objective.prior_weight", number(weight.value), weight)
    if (size := items.get("resolution")) is not None:
        made.sides, made.size = _sides(draft, size), size
    else:
        made.values["resolution"] = (512, DEFAULT)
        made.sides = (512,)
    return made


def _sides(draft: Draft, item: Item) -> tuple[int, ...]:
    """Resolutions: a list means that every image is seen at each."""
    found = [number(one) for one in (item.value if isinstance(item.value, list) else [item.value])]
    if found and all(isinstance(one, int) and not isinstance(one, bool) and one > 0 for one in found):
        return tuple(dict.fromkeys(found))
    draft.problem(item, f"{item.key} must be a whole number or a list of them, not {show(item.value)}")
    return ()


def _caption(draft: Draft, made: kohya.Made, items: Mapping[str, Item], trigger: Item | None) -> None:
    ending, default = items.get("caption_ext"), items.get("default_caption")
    if ending is not None:
        made.values["caption_extension"] = ("." + str(ending.value).lstrip("."), ending)
    else:
        made.values["caption_extension"] = (".txt", DEFAULT)
    word = str(trigger.value) if trigger is not None and trigger.value else ""
    if trigger is not None and word:
        made.values["trigger"] = (word, trigger)
    elif "trigger_word" in items:
        draft.ignore(items["trigger_word"], "regularisation images have no trigger word")
    if default is not None and default.value:
        made.values["concept"] = (filled(default.value, {"[trigger]": word}), default)
        made.values["missing_captions"] = ("concept", "default_caption is the caption of images that have none")
    elif word:
        made.values["missing_captions"] = ("trigger", "as ai-toolkit does")
    else:
        why = "safer than ai-toolkit, which trains images without a caption on an empty one"
        made.values["missing_captions"] = ("error", why)
    made.values["captions.lines"] = ("join", "a caption is its whole file")


def _buckets(draft: Draft, shared: Sequence[Mapping[str, Item]]) -> None:
    for key, native in (("buckets", "data.buckets.enabled"), ("bucket_tolerance", "data.buckets.step")):
        found = [one[key] for one in shared if key in one]
        odd = next((item for item in found if item.value != found[0].value), None)
        if odd is not None or 0 < len(found) < len(shared):
            item = odd or found[0]
            what = f"{item.key}: one value counts for the whole run"
            draft.problem(item, what, fix="write the same for every data set")
            continue
        for item in found:
            draft.set(native, draft.flag(item) if key == "buckets" else number(item.value), item)
