"""Dataset files of sd-scripts: [general], [[datasets]], [[datasets.subsets]]; the nearest level wins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isqrt
from pathlib import Path
from typing import Any

from gesso.config.dialects import rules, toml
from gesso.config.dialects.draft import Converted, Draft, Item, number
from gesso.config.dialects.rules import Alias, Direct, Ignored, Refused, Rule
from gesso.config.document import Document
from gesso.config.image_files import images_in
from gesso.config.problems import show
from gesso.errors import UserError

NAME = "a dataset file of sd-scripts"
MIXED = (
    "sd-scripts averages over batches of images and regularisation images, half and half; here each step has as many "
    "of these on top and adds up the two means, so that a learning rate there corresponds to half of it here"
)
SEVERAL = (
    "; of several sets of them each gives in proportion to its images and their repeats, whatever set the other images "
    "of a step come from"
)

_NO_CONTROL = "ControlNet training comes in a later version"
_CUT = "cropping to faces comes in a later version"

DATASET: dict[str, Rule] = {
    "resolution": Alias("resolution"),
    "batch_size": Direct("training.batch_size"),
    "enable_bucket": Direct("data.buckets.enabled", "flag"),
    "min_bucket_reso": Direct("data.buckets.smallest"),
    "max_bucket_reso": Direct("data.buckets.largest"),
    "bucket_reso_steps": Direct("data.buckets.step"),
    "bucket_no_upscale": Alias("bucket_no_upscale"),
    "network_multiplier": Refused("the adapter has one strength in training", off=(1,)),
    "validation_split": Direct("data.validation.fraction"),
    "validation_seed": Ignored("images are held out by their content, so that adding some moves no other"),
    "resize_interpolation": Refused("pictures are resized with Lanczos", off=("lanczos", "lanczos4")),
}
"""Keys of a data set as a whole; here they count for the whole run."""

SUBSET: dict[str, Rule] = {
    "num_repeats": Direct("repeats"),
    "shuffle_caption": Direct("captions.shuffle", "flag"),
    "keep_tokens": Direct("captions.keep"),
    "keep_tokens_separator": Direct("captions.keep_separator", "text"),
    "secondary_separator": Refused("tags are not grouped by a second separator"),
    "caption_separator": Direct("captions.separator", "text"),
    "caption_prefix": Alias("caption_prefix"),
    "caption_suffix": Alias("caption_suffix"),
    "enable_wildcard": Alias("enable_wildcard"),
    "color_aug": Refused("colours are changed in another way", fix="take it out, and set data.colour: 0.1"),
    "flip_aug": Direct("flip", "flag"),
    "face_crop_aug_range": Refused(_CUT),
    "random_crop": Alias("random_crop"),
    "caption_dropout_rate": Direct("captions.dropout"),
    "caption_dropout_every_n_epochs": Refused("captions are dropped at random", fix="set caption_dropout_rate"),
    "caption_tag_dropout_rate": Direct("captions.tag_dropout"),
    "token_warmup_min": Ignored("belongs to token_warmup_step"),
    "token_warmup_step": Refused("captions that grow during training come in a later version"),
    "caption_extension": Direct("caption_extension", "text"),
    "cache_info": Ignored("what was learnt of the files is always kept"),
}
"""Keys of a subset that may stand at any level."""

OWN: dict[str, Rule] = {
    "image_dir": Alias("image_dir"),
    "is_reg": Alias("is_reg"),
    "class_tokens": Alias("class_tokens"),
    "alpha_mask": Alias("alpha_mask"),
    "metadata_file": Refused("a JSON file of captions is not read", fix="write it as metadata.jsonl into the folder"),
    "conditioning_data_dir": Refused(_NO_CONTROL),
    "custom_attributes": Ignored("notes for nobody here"),
}
"""Keys that only a subset has."""

ANYWHERE = {**DATASET, **SUBSET}


@dataclass
class Made:
    """A source under construction: our key inside a source -> value with the key it came from, or why it is so."""

    values: dict[str, tuple[Any, Item | str]] = field(default_factory=dict)
    sides: tuple[int, ...] = ()
    size: Item | None = None
    """The key that says the resolution."""

    @property
    def prior(self) -> bool:
        """Whether it holds regularisation images."""
        return self.values.get("role", ("",))[0] == "prior"

    def same(self, other: Made) -> bool:
        """Whether only the resolution differs: one set, seen at several resolutions."""
        return _facts(self) == _facts(other) and not set(self.sides) & set(other.sides)


def _facts(made: Made) -> str:
    return json.dumps({key: value for key, (value, _) in made.values.items()}, sort_keys=True, default=str)


def score(mapping: Mapping[str, Any]) -> int:
    """How many keys a dataset file of sd-scripts would have: datasets with subsets, and what may stand in general."""
    general, datasets = mapping.get("general"), mapping.get("datasets")
    found = sum(key in ANYWHERE for key in general) + 1 if isinstance(general, Mapping) else 0
    for dataset in datasets if isinstance(datasets, list) else []:
        if isinstance(dataset, Mapping):
            found += 2 * ("subsets" in dataset) + sum(key in ANYWHERE for key in dataset)
    return found


def read(path: Path) -> Converted:
    """Read a dataset file (TOML or JSON): the section `data`, and `training.batch_size` where the file says so.

    Raises `UserError` for a file that cannot be read; mistakes in it are among the result's problems.
    """
    document = toml.read(path, what="dataset file")
    draft = Draft(NAME, document, path.absolute().parent)
    lay(draft, document, {})
    return draft.finish()


def to_run(document: Document, *, folder: Path) -> Converted:
    """Read a dataset file that was given as a run file: it says nothing of the length, which is a problem."""
    draft = Draft(NAME, document, folder)
    lay(draft, document, {})
    fix = f"write a run file with `data: {Path(document.file).name}` in it"
    draft.problems.append(UserError("this file only describes images, not a run", where=document.file, fix=fix))
    return draft.finish()


def lay(draft: Draft, document: Document, options: Mapping[str, Item], *, folder: Path | None = None) -> None:
    """Put what a dataset file says into `draft`; `options` are those of the command line, which it overrules."""
    file = None if document is draft.document else document.file
    for key in document.data:
        if key not in ("general", "datasets"):
            item = Item((key,), document.data[key], document.lines.get((key,)), file)
            rules.unknown(draft, item, {"general": None, "datasets": None})
    general = dict(_section(draft, document, ("general",), document.data.get("general", {}), ANYWHERE, file))
    levels = [options, general]
    made: list[Made] = []
    shared: list[dict[str, Item]] = []
    datasets = document.data.get("datasets", [])
    used: set[Any] = set()
    outer = [*options.values(), *general.values()]
    for i, dataset in enumerate(_tables(draft, document, ("datasets",), datasets, file)):
        own = dict(_section(draft, document, ("datasets", i), dataset, {**ANYWHERE, "subsets": Ignored("")}, file))
        subsets = own.pop("subsets", None)
        outer += own.values()
        inside = subsets.value if subsets is not None else []
        for n, table in enumerate(_tables(draft, document, ("datasets", i, "subsets"), inside, file)):
            here = ("datasets", i, "subsets", n)
            last = dict(_section(draft, document, here, table, {**SUBSET, **OWN}, file))
            merged = {key: item for level in (*levels, own, last) for key, item in level.items()}
            used.update(item.at for item in merged.values())
            made.append(source(draft, {k: v for k, v in merged.items() if k not in DATASET}, merged, folder=folder))
            if "image_dir" not in merged:
                where = f"{document.file}:{document.lines.get(here, 1)}"
                draft.problems.append(UserError("image_dir is missing", where=where, fix="name the folder of images"))
        shared.append({key: item for level in (*levels, own) for key, item in level.items() if key in DATASET})
        used.update(item.at for item in shared[-1].values())
    if not made:
        fix = "add [[datasets]] with [[datasets.subsets]] and image_dir"
        draft.problems.append(UserError("no training images are named", where=document.file, fix=fix))
    for item in outer:
        if item.at not in used:
            draft.ignore(item, "what is nearer to the images says otherwise")
    finish(draft, made, shared)


def finish(draft: Draft, made: Sequence[Made], shared: Sequence[Mapping[str, Item]]) -> None:
    """Write the sources, and what counts for the whole run; what differs between data sets there is a problem."""
    _whole(draft, shared, largest=max((side for one in made for side in one.sides), default=0))
    write(draft, made, regularised=MIXED)


def write(draft: Draft, made: Sequence[Made], *, regularised: str) -> None:
    """Write the sources; equal ones at several resolutions become one, and captions that all share stand once.

    `regularised` tells what the tool does with regularisation images that is not quite what is done here."""
    if priors := sum(one.prior for one in made):
        draft.assume("objective.type", "dreambooth", regularised + (SEVERAL if priors > 1 else ""))
    sources: list[list[Made]] = []
    for one in made:
        twin = next((group for group in sources if all(one.same(other) for other in group)), None)
        if twin is not None and one.sides:
            twin.append(one)
        else:
            sources.append([one])
    texts = [{k: v for k, (v, _) in group[0].values.items() if k.startswith("captions.")} for group in sources]
    alike = all(text == texts[0] for text in texts)
    sizes = [tuple(side for one in group for side in one.sides) for group in sources]
    uniform = len(set(sizes)) == 1 and len(sizes[0]) == 1
    for i, (group, sides) in enumerate(zip(sources, sizes, strict=True)):
        for key, (value, origin) in group[0].values.items():
            native = f"data.{key}" if alike and key.startswith("captions.") else f"data.sources.{i}.{key}"
            if isinstance(origin, Item):
                draft.set(native, value, origin)
            else:
                draft.assume(native, value, origin)
        for one in group:
            if one.size is not None and sides and uniform:
                draft.set("data.resolution", sides[0], one.size)
            elif one.size is not None and sides:
                draft.set(f"data.sources.{i}.resolution", sides[0] if len(sides) == 1 else list(sides), one.size)
    if made and not uniform:
        largest = max((side for one in sizes for side in one), default=1024)
        draft.assume("data.resolution", largest, "previews, and images that no resolution is named for, have it")


def source(draft: Draft, options: Mapping[str, Item], sized: Mapping[str, Item], *, folder: Path | None = None) -> Made:
    """One subset as a source; `options` are its keys, `sized` those of its data set."""
    made = Made()
    for key, item in options.items():
        match ANYWHERE.get(key) or OWN.get(key):
            case _ if item.value is None:
                draft.ignore(item, "empty")
            case Direct(native, "flag"):
                if (on := draft.flag(item)) is not None:
                    made.values[native] = (on, item)
            case Direct(native):
                made.values[native] = (number(item.value), item)
            case Refused(why, off, fix):
                rules.refused(draft, item, why, off=off, fix=fix)
            case Ignored(why):
                draft.ignore(item, why)
    split = options.get("keep_tokens_separator")
    if split is not None and split.value == "":
        del made.values["captions.keep_separator"]
        draft.ignore(split, "empty")
    elif split is not None and "captions.keep" in made.values:
        del made.values["captions.keep"]
        draft.ignore(options["keep_tokens"], f"{split.key} says what is kept")
    _captions(draft, made, options)
    _folder(draft, made, options, folder)
    _extras(draft, made, options)
    if (size := sized.get("resolution")) is not None:
        made.sides, made.size = sides(draft, size), size
    return made


def _captions(draft: Draft, made: Made, options: Mapping[str, Item]) -> None:
    for key, before, after in (("prefix", "", " "), ("suffix", " ", "")):
        item = options.get(f"caption_{key}")
        if item is not None and item.value not in (None, ""):
            made.values[f"captions.{key}"] = (f"{before}{item.value}{after}", item)
        elif item is not None:
            draft.ignore(item, "empty")
    wildcard = options.get("enable_wildcard")
    if wildcard is not None and draft.flag(wildcard):
        made.values["captions.wildcards"] = (True, wildcard)
        made.values["captions.lines"] = ("choose", "with enable_wildcard one line of a caption is drawn")
    else:
        if wildcard is not None:
            made.values["captions.wildcards"] = (False, wildcard)
        made.values["captions.lines"] = ("first", "sd-scripts reads the first line of a caption")
    if "captions.separator" in made.values and made.values["captions.separator"][0] == "":
        made.values.pop("captions.separator")
        draft.problem(options["caption_separator"], "caption_separator must not be empty")
    if "caption_extension" not in options:
        made.values["caption_extension"] = (".caption", "the default of sd-scripts")


def _folder(draft: Draft, made: Made, options: Mapping[str, Item], folder: Path | None) -> None:
    item = options.get("image_dir")
    if item is None:
        made.values["path"] = (".", "none is named")
    else:
        path = draft.path(str(item.value), folder=folder)
        made.values["path"] = (path, item)
        made.values["layout"] = ("folder", "image_dir is a folder of images")
        deeper = _deeper(path)
        if deeper is not None:
            what = (
                f"image_dir: {item.value} has images in folders inside, such as {deeper}, which sd-scripts leaves out"
            )
            draft.problem(item, what, fix="move them elsewhere, or name each folder as a subset of its own")
    tokens = options.get("class_tokens")
    if tokens is not None and tokens.value:
        made.values["concept"] = (tokens.value, tokens)
        made.values["missing_captions"] = ("concept", "class_tokens is the caption of images that have none")
    else:
        if tokens is not None:
            draft.ignore(tokens, "empty")
        why = "safer than sd-scripts, which trains images without a caption on an empty one"
        made.values["missing_captions"] = ("error", why)


def _extras(draft: Draft, made: Made, options: Mapping[str, Item]) -> None:
    crop, prior, alpha = (options.get(key) for key in ("random_crop", "is_reg", "alpha_mask"))
    if crop is not None:
        made.values["crop"] = ("random" if draft.flag(crop) else "center", crop)
    if prior is not None:
        made.values["role"] = ("prior" if draft.flag(prior) else "instance", prior)
    if alpha is not None:
        made.values["mask"] = ("alpha" if draft.flag(alpha) else "none", alpha)
    weight = options.get("prior_loss_weight")
    if weight is not None and made.prior:
        draft.set("objective.prior_weight", number(weight.value), weight)


def sides(draft: Draft, item: Item) -> tuple[int, ...]:
    """What `resolution` means: a side, a pair of width and height, or (as only guides write) several sides."""
    value = item.value.split(",") if isinstance(item.value, str) else item.value
    found = [number(part) for part in (value if isinstance(value, list) else [value])]
    if not found or not all(isinstance(part, int) and not isinstance(part, bool) and part > 0 for part in found):
        draft.problem(item, f"{item.key} must be one whole number, or width and height, not {show(item.value)}")
        return ()
    if len(found) != 2 or found[0] == found[1]:
        return tuple(dict.fromkeys(found))
    root = isqrt(found[0] * found[1])
    if root * root == found[0] * found[1]:
        return (root,)
    what = f"{item.key}: {found[0]} x {found[1]} is no square, and buckets have the area of one"
    draft.problem(item, what, fix=f"write resolution = {round((found[0] * found[1]) ** 0.5 / 64) * 64}")
    return ()


def _whole(draft: Draft, shared: Sequence[Mapping[str, Item]], *, largest: int) -> None:
    """What is per data set there and for the whole run here."""
    on = [one["enable_bucket"].value for one in shared if "enable_bucket" in one]
    for key, rule in DATASET.items():
        items = list({one[key].at: one[key] for one in shared if key in one}.values())
        if key == "resolution" or not items:
            continue
        first = items[0]
        other = next((item for item in items if item.value != first.value), None)
        if other is not None:
            what = f"{other.key} is {show(other.value)} but {first.key} (line {first.line}) is {show(first.value)}"
            draft.problem(other, f"{what}, and one value counts for the whole run", fix="make them the same")
        elif any(key not in one for one in shared) and not isinstance(rule, Ignored | Refused):
            what = f"{first.key} is for some of the data sets, and here one value counts for the whole run"
            draft.problem(first, what, fix="move it into [general]")
        elif key in ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps") and not any(on):
            draft.ignore(first, "enable_bucket is off")
        elif key == "bucket_no_upscale":
            draft.set("data.buckets.upscale", draft.flag(first) is not True, first)
        else:
            for item in items:
                rules.obey(draft, item, rule)
    _buckets(draft, shared, on=any(on), largest=largest)


def _buckets(draft: Draft, shared: Sequence[Mapping[str, Item]], *, on: bool, largest: int) -> None:
    keys = {key for one in shared for key in one}
    if not on:
        if "enable_bucket" not in keys:
            draft.assume("data.buckets.enabled", False, "sd-scripts crops to a square unless enable_bucket is on")
        return
    if "min_bucket_reso" not in keys:
        draft.assume("data.buckets.smallest", 256, "the default of sd-scripts")
    if "max_bucket_reso" not in keys:
        why = "the default of sd-scripts, or the resolution where that is more"
        draft.assume("data.buckets.largest", max(1024, largest), why)


def _tables(draft: Draft, document: Document, path: tuple[str | int, ...], value: Any, file: str | None) -> list[Any]:
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return value
    item = Item(path, value, document.lines.get(path), file)
    draft.problem(item, f"{item.key} must be a list of tables", fix=f"write [[{path[-1]}]] above each")
    return []


def _section(
    draft: Draft,
    document: Document,
    path: tuple[str | int, ...],
    value: Any,
    known: Mapping[str, Rule],
    file: str | None,
) -> Iterator[tuple[str, Item]]:
    if not isinstance(value, Mapping):
        draft.problem(Item(path, value, document.lines.get(path), file), f"{path[-1]} must be a table")
        return
    for key, inner in value.items():
        item = Item((*path, key), inner, document.lines.get((*path, key)), file)
        if key in known:
            yield key, item
        elif key in DATASET:
            draft.problem(item, f"{key} belongs to the data set, not to one subset", fix="move it to [[datasets]]")
        elif key in OWN:
            draft.problem(item, f"{key} belongs to one subset", fix="move it to [[datasets.subsets]]")
        else:
            rules.unknown(draft, item, known)


def _deeper(path: str) -> Path | None:
    """An image in a folder inside `path`, if there is one."""
    return next((file.relative_to(path) for file in images_in(Path(path)) if file.parent != Path(path)), None)
