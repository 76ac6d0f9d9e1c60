"""Run files: read with line numbers, presets, other tools' dialects and `--set`; written back in full."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from gesso.config import dialects, document, presets, problems, schema
from gesso.config.dialects import DialectReport, flat
from gesso.config.document import Document, KeyPath, dotted
from gesso.config.layers import SET, Layers
from gesso.config.new import write_new
from gesso.config.problems import Place
from gesso.config.run import RunConfig
from gesso.errors import Problems, UserError

__all__ = ["Loaded", "dump", "load", "load_options", "load_text", "write_new"]


@dataclass(frozen=True)
class Loaded:
    """A run with the origin of every value: a file and line, `--set`, `preset NAME`, a dialect, or `default`."""

    run: RunConfig
    origins: dict[str, str]
    report: DialectReport | None = None


def load(path: str | Path, *, sets: Sequence[str] = ()) -> Loaded:
    """Read a run file, in our format or in a dialect; `sets` are `a.b=c` in our names.

    Raises `Problems` with everything that is wrong at once, or one `UserError` where the file cannot be read.
    """
    path = Path(path)
    return _load(dialects.read_document(path), folder=path.absolute().parent, sets=sets)


def load_text(text: str, *, folder: Path, file: str = "run.yaml", sets: Sequence[str] = ()) -> Loaded:
    """As `load`, from text; `folder` is what its relative paths start from."""
    return _load(document.parse(text, file=file), folder=folder, sets=sets)


def load_options(options: Mapping[str, Any], *, folder: Path, sets: Sequence[str] = ()) -> Loaded:
    """As `load`, from options of the diffusers scripts by their names; `folder` is what relative paths start from."""
    return _load(Document(dict(options), {}, "command line"), folder=folder, sets=sets, tool=flat.NAME)


def dump(run: RunConfig) -> str:
    """The run as YAML with every value written out; the run folder is made absolute."""
    return document.emit({**run.model_dump(mode="json"), "output": str(run.folder.expanduser().absolute())})


def _load(doc: Document, *, folder: Path, sets: Sequence[str], tool: str | None = None) -> Loaded:
    layers, report, found = Layers(doc.file), None, list[UserError]()
    overrides = [_parse_set(text) for text in sets]
    tool = tool or dialects.detect(doc.data)
    if tool is not None:
        converted = dialects.convert(tool, doc, folder=folder)
        layers.data, layers.places = converted.data, dict(converted.places)
        report = converted.report
        found += converted.problems
    else:
        _lay_preset(layers, doc, overrides)
        _choose_length(layers, doc.data.get("training"))
        layers.lay({k: v for k, v in doc.data.items() if k != "preset"}, lambda path: _in_file(doc, path))
        if isinstance(layers.data.get("data"), str):
            converted = _lay_data_file(layers, doc, folder)
            report, found = converted.report, [*converted.problems]
    for path, value, place in overrides:
        if path != ("preset",):
            layers.put(path, value, place)
    _absolute_paths(layers, folder)
    _drop_of_other_types(layers)
    run = _validate(layers, found, partial=report is not None and bool(found))
    return Loaded(run, _origins(run, layers), report)


def _lay_data_file(layers: Layers, doc: Document, folder: Path) -> dialects.Converted:
    """Put what another tool's dataset file says in the place of its name under `data`."""
    place = layers.locate(("data",))
    path = Path(_absolute(folder, layers.data["data"]))
    if not path.is_file():
        fix = "write a section, or the name of a dataset file of sd-scripts or ai-toolkit beside the run file"
        raise UserError(f"data: there is no file {path}", where=place.where, fix=fix)
    converted = dialects.read_data(path)
    layers.data["data"] = converted.data.pop("data", {})
    layers.places.update({key: where for key, where in converted.places.items() if key[0] == "data"})
    # The few settings of such a file that have their place elsewhere, such as the batch size.
    for section, values in converted.data.items():
        for name, value in values.items():
            key, there = (section, name), converted.places[(section, name)]
            if key not in doc.lines:
                layers.put(key, value, there)
            elif doc.data[section][name] != value:
                what = f"{dotted(key)} is {value} in {there.where}, and not the same here"
                raise UserError(what, where=_in_file(doc, key).where, fix="keep one of them")
    return converted


def _lay_preset(layers: Layers, doc: Document, overrides: Sequence[tuple[KeyPath, Any, Place]]) -> None:
    name, where = doc.data.get("preset"), f"{doc.file}:{doc.lines.get(('preset',), 1)}"
    for path, value, place in overrides:
        if path == ("preset",):
            name, where = value, place.where
    if name is not None:
        preset = presets.get(str(name), where=where)
        layers.lay(preset.data, lambda _: Place(preset.file))
        layers.preset = preset.file


def _drop_of_other_types(layers: Layers) -> None:
    """Drop what a preset says of one type of section where another was chosen: a rank, where all weights train."""
    for name, info in RunConfig.model_fields.items():
        models, section = schema.models_in(info.annotation), layers.data.get(name)
        if len(models) < 2 or not isinstance(section, dict):
            continue
        kinds = [m for m in models if section.get("type") in schema.choices(m.model_fields["type"].annotation)]
        for key in [key for kind in kinds for key in section if key not in kind.model_fields]:
            if layers.locate((name, key)).where == layers.preset:
                del section[key]


def _choose_length(layers: Layers, training: Any) -> None:
    """A file that says how long to train replaces the preset's length, in whichever unit."""
    if isinstance(training, dict) and {"steps", "epochs"} & set(training):
        for name in ("steps", "epochs"):
            layers.data.get("training", {}).pop(name, None)


def _in_file(doc: Document, path: KeyPath) -> Place:
    while path and path not in doc.lines:
        path = path[:-1]
    return Place(f"{doc.file}:{doc.lines[path]}" if path else doc.file)


def _parse_set(text: str) -> tuple[KeyPath, Any, Place]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        fix = "write --set training.learning_rate=1e-4"
        raise UserError(f"'{text}' is not of the form key=value", where=SET, fix=fix)
    path = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
    where = f"{SET} {text}"
    return path, document.value(value, where=where), Place(where)


def _absolute_paths(layers: Layers, folder: Path) -> None:
    data = layers.data.get("data")
    data = data if isinstance(data, dict) else {}
    sources = data.get("sources")
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        _make_absolute(layers, source, ("data", "sources", i, "path"), folder)
    _make_absolute(layers, data.get("validation"), ("data", "validation", "path"), folder)
    _make_absolute(layers, data, ("data", "cache"), folder)
    places = [("model", "base"), ("model", "vae"), ("model", "config"), ("adapter", "init_from")]
    for section, name in places:
        _make_absolute_if_there(layers, layers.data.get(section), (section, name), folder)
    model = layers.data.get("model")
    fused = model.get("fuse") if isinstance(model, dict) else None
    for i, one in enumerate(fused if isinstance(fused, list) else []):
        _make_absolute_if_there(layers, one, ("model", "fuse", i, "path"), folder)


def _make_absolute_if_there(layers: Layers, holder: Any, path: KeyPath, folder: Path) -> None:
    """A model's name may be a hub id: it is a path if it looks like one, or if there is something."""
    value = holder.get(path[-1]) if isinstance(holder, dict) else None
    if not isinstance(value, str) or not value:
        return
    root = _root(layers, path, folder)
    if value.startswith(("./", "../", "~", ".\\", "..\\")) or value in (".", "..") or (root / value).exists():
        holder[path[-1]] = _absolute(root, value)


def _make_absolute(layers: Layers, holder: Any, path: KeyPath, folder: Path) -> None:
    value = holder.get(path[-1]) if isinstance(holder, dict) else None
    # URLs and names of data sets on the hub are no paths; the braces of shard patterns survive being joined.
    if isinstance(value, str) and value and "://" not in value and not value.startswith("hub:"):
        holder[path[-1]] = _absolute(_root(layers, path, folder), value)


def _root(layers: Layers, path: KeyPath, folder: Path) -> Path:
    """What a relative path starts from: the run file, or the working directory for one typed on the command line."""
    return Path.cwd() if layers.locate(path).where.startswith(SET) else folder


def _absolute(root: Path, value: str) -> str:
    return os.path.normpath(root / Path(value).expanduser())


def _validate(layers: Layers, found: list[UserError], *, partial: bool) -> RunConfig:
    if partial:
        # What a dialect lacks is already among the problems; what it has is still checked.
        layers.data.setdefault("data", {}).setdefault("sources", [{"path": "."}])
        if not {"steps", "epochs"} & set(layers.data.setdefault("training", {})):
            layers.data["training"]["steps"] = 1
    try:
        # Strict, and through JSON: text is not taken for a number nor true for 1, yet lists serve as tuples.
        run = RunConfig.model_validate_json(to_json(layers.data, inf_nan_mode="constants"), strict=True)
    except ValidationError as error:
        found = found + problems.translate(error, locate=layers.locate, foreign=dialects.foreign_names())
    if found:
        raise Problems(sorted(found, key=_line))
    return run


def _line(problem: UserError) -> tuple[str, int]:
    file, _, line = problem.where.rpartition(":")
    return (file, int(line)) if line.isdigit() else (problem.where, 0)


def _origins(run: RunConfig, layers: Layers) -> dict[str, str]:
    origins: dict[str, str] = {}

    def walk(value: Any, path: KeyPath) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(item, (*path, key))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                walk(item, (*path, i))
        else:
            origins[dotted(path)] = layers.origin(path) or "default"

    walk(run.model_dump(mode="json"), ())
    return origins
