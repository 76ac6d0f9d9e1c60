"""`concepts_list` of DreamBooth scripts that teach several subjects: a JSON file with folders and prompts of each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gesso.config import document
from gesso.config.dialects import rules
from gesso.config.dialects.draft import Draft, Item, number
from gesso.config.dialects.rules import Alias
from gesso.errors import UserError

OF_ONE = ("train_data_dir", "instance_prompt", "class_data_dir", "class_prompt")
"""What says of a single subject what the list says of each."""
_KEYS = {
    name: Alias(name)
    for name in ("instance_data_dir", "instance_prompt", "class_data_dir", "class_prompt", "num_class_images")
}
_SHARED = {
    "image_column": "image_column",
    "caption_column": "caption_column",
    "dataset_split_name": "split",
    "metadata_file": "metadata",
    "repeats": "repeats",
}
"""What counts for the images of every concept."""
_OWN = ("instance_data_dir", "instance_prompt")
_SWITCH = "with_prior_preservation"


def lay(draft: Draft) -> None:
    """Write the sources of a list of concepts, if there is one; prior preservation has to be switched on for all."""
    listed = draft.take("concepts_list")
    if listed is None:
        return
    for name in OF_ONE:
        if item := draft.take(name):
            draft.ignore(item, f"{listed.key} says it of each concept")
    if dataset := draft.take("dataset_name"):
        draft.problem(dataset, f"{dataset.key} and {listed.key} both name the images", fix="keep one of them")
    on, weight, count = (draft.take(name) for name in (_SWITCH, "prior_loss_weight", "num_class_images"))
    prior = on is not None and draft.flag(on) is True
    concepts = _concepts(draft, listed)
    for i, concept in enumerate(concepts):
        _instances(draft, i, concept)
    if part := draft.take("dataset_config_name"):
        draft.ignore(part, "a folder has no configurations")
    for name, native in _SHARED.items():
        if item := draft.take(name):
            for i in range(len(concepts)):
                draft.set(f"data.sources.{i}.{native}", number(item.value), item)
    if not prior:
        off = f"prior preservation is off; {_SWITCH} turns it on"
        given = (concept[key] for concept in concepts for key in concept if key not in _OWN)
        for item in (weight, count, *given):
            if item is not None:
                draft.ignore(item, off)
        if on is not None:
            draft.ignore(on, "off")
        return
    assert on is not None
    draft.set("objective.type", "dreambooth", on)
    if weight is not None:
        draft.set("objective.prior_weight", number(weight.value), weight)
    uncounted = _classes(draft, concepts)
    if count is not None and uncounted:
        draft.set("objective.class_images", number(count.value), count)
    elif count is not None:
        draft.ignore(count, "every class has a number of its own")
    elif uncounted:
        draft.assume("objective.class_images", 100, "the default of the diffusers scripts")


def _concepts(draft: Draft, listed: Item) -> list[dict[str, Item]]:
    """The entries of the file, each with those of its keys that say something."""
    path = Path(draft.path(str(listed.value)))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        what = f"{listed.key}: there is no file {path} that could be read"
        draft.problem(listed, what, fix="name the JSON file of the concepts")
        return []
    # A JSON list as the value of a key, so that every line is known.
    read = document.parse(f'{{"concepts": {text}\n}}', file=str(path))
    value: Any = read.data["concepts"]
    draft.mapped.append(draft.entry(listed, "data.sources"))
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        fix = 'write [{"instance_data_dir": ..., "instance_prompt": ...}, ...]'
        draft.problems.append(UserError("this is no list of concepts", where=str(path), fix=fix))
        return []
    found = []
    for i, one in enumerate(value):
        items = {}
        for key, inner in one.items():
            item = Item((i, key), inner, read.lines.get(("concepts", i, key)), str(path))
            if key not in _KEYS:
                rules.unknown(draft, item, _KEYS)
            elif inner in (None, ""):
                draft.ignore(item, "empty")
            else:
                items[key] = item
        found.append(items)
        if "instance_data_dir" not in items:
            where = f"{path}:{read.lines.get(('concepts', i), 1)}"
            fix = "name the folder of its images"
            draft.problems.append(UserError("instance_data_dir is missing", where=where, fix=fix))
    return found


def _instances(draft: Draft, i: int, concept: Mapping[str, Item]) -> None:
    folder, prompt = (concept.get(key) for key in _OWN)
    key = f"data.sources.{i}"
    if folder is not None:
        draft.set(f"{key}.path", draft.path(str(folder.value)), folder)
    else:
        draft.assume(f"{key}.path", ".", "none is named")
    if prompt is not None:
        draft.set(f"{key}.concept", prompt.value, prompt)
        draft.set(f"{key}.trigger", prompt.value, prompt)
        why = "the instance prompt is the caption of every image that has none"
        draft.assume(f"{key}.missing_captions", "trigger", why)


def _classes(draft: Draft, concepts: list[dict[str, Item]]) -> bool:
    """A source for each folder of class images; concepts of one class share theirs. Whether one has no number."""
    made: dict[str, Item] = {}
    uncounted = False
    for concept in concepts:
        folder, prompt, count = (concept.get(key) for key in ("class_data_dir", "class_prompt", "num_class_images"))
        if folder is None or prompt is None:
            name = "class_data_dir" if folder is None else "class_prompt"
            some = next(iter(concept.values()), None)
            where = draft.where(some) if some is not None else draft.document.file
            what = f"prior preservation is on, but this concept has no {name}"
            draft.problems.append(UserError(what, where=where, fix=f"add {name}, or take {_SWITCH} out"))
            for item in (folder, prompt, count):
                if item is not None:
                    draft.ignore(item, "see the problems")
            continue
        path = draft.path(str(folder.value))
        if path in made:
            if made[path].value != prompt.value:
                what = f"{folder.value} holds the class images of '{made[path].value}' already"
                draft.problem(prompt, what, fix="name a folder for each class")
            for item in (folder, prompt, count):
                if item is not None:
                    draft.ignore(item, "an earlier concept has the same class images")
            continue
        made[path] = prompt
        key = f"data.sources.{len(concepts) + len(made) - 1}"
        draft.set(f"{key}.path", path, folder)
        draft.assume(f"{key}.role", "prior", "it holds class images")
        draft.set(f"{key}.class_prompt", prompt.value, prompt)
        draft.set(f"{key}.concept", prompt.value, prompt)
        draft.assume(f"{key}.missing_captions", "concept", "the class prompt is the caption of every class image")
        if count is not None:
            draft.set(f"{key}.class_images", number(count.value), count)
        uncounted = uncounted or count is None
    return uncounted
