"""Run files: read with line numbers, presets, other tools' dialects and `--set`; written back in full."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json

from gesso.config import dialects, document, presets, problems, schema
from gesso.config.dialects import DialectReport
from gesso.config.document import Document, KeyPath, dotted
from gesso.config.problems import Place
from gesso.config.run import RunConfig
from gesso.errors import Problems, UserError

_SET = "--set"


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
    return _load(document.read(path), folder=path.absolute().parent, sets=sets)


def load_text(text: str, *, folder: Path, file: str = "run.yaml", sets: Sequence[str] = ()) -> Loaded:
    """As `load`, from text; `folder` is what its relative paths start from."""
    return _load(document.parse(text, file=file), folder=folder, sets=sets)


def dump(run: RunConfig) -> str:
    """The run as YAML with every value written out; the run folder is made absolute."""
    return document.emit({**run.model_dump(mode="json"), "output": str(run.folder.expanduser().absolute())})


@dataclass
class _Layers:
    """Values laid over one another: nested sections are merged, anything else is replaced."""

    file: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)

    def lay(self, data: Mapping[str, Any], place: Callable[[KeyPath], Place]) -> None:
        """Put `data` on top; `place` tells where each of its keys came from."""
        self._merge(self.data, data, (), place)

    def locate(self, path: KeyPath) -> Place:
        """Where a key came from; for one that nobody wrote, where its section stands."""
        if path in self.places:
            return self.places[path]
        for length in range(len(path) - 1, 0, -1):
            if path[:length] in self.places:
                place = self.places[path[:length]]
                key = f"{place.key}.{dotted(path[length:])}" if place.key is not None else None
                return Place(place.where, key)
        return Place(self.file)

    def origin(self, path: KeyPath) -> str | None:
        """Where a value came from, or None if it is a default."""
        value: Any = self.data
        for part in path:
            if not isinstance(value, dict | list):
                break
            inside = part in value if isinstance(value, dict) else isinstance(part, int) and part < len(value)
            if not inside:
                return None
            value = value[part]
        where = self.locate(path).where
        return _SET if where.startswith(_SET) else where

    def put(self, path: KeyPath, value: Any, place: Place) -> None:
        """Set one value, making sections and list items on the way."""
        holder: Any = self.data
        for depth, part in enumerate(path):
            if not isinstance(holder, dict | list):
                raise UserError(f"{dotted(path[:depth])} is a value and has no {part}", where=place.where)
            if isinstance(holder, list):
                part = _position(holder, path[: depth + 1], place)
            if depth == len(path) - 1:
                self._forget(path)
                if isinstance(holder, list) and part == len(holder):
                    holder.append(value)
                else:
                    holder[part] = value
                self.places[path] = place
                return
            empty: Any = [] if isinstance(path[depth + 1], int) else {}
            if isinstance(holder, list) and part == len(holder):
                holder.append(empty)
            elif isinstance(holder, dict) and holder.get(part) is None:
                holder[part] = empty
            holder = holder[part]

    def _merge(self, into: dict[str, Any], data: Mapping[str, Any], at: KeyPath, place: Callable[[KeyPath], Place]) -> None:
        for key, value in data.items():
            path = (*at, key)
            if isinstance(value, Mapping) and isinstance(into.get(key), dict):
                self._merge(into[key], value, path, place)
                self.places[path] = place(path)
                continue
            self._forget(path)
            into[key] = copy.deepcopy(value)
            self._note(value, path, place)

    def _note(self, value: Any, path: KeyPath, place: Callable[[KeyPath], Place]) -> None:
        self.places[path] = place(path)
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            self._note(item, (*path, key), place)

    def _forget(self, path: KeyPath) -> None:
        for old in [old for old in self.places if old[: len(path)] == path]:
            del self.places[old]


def _load(doc: Document, *, folder: Path, sets: Sequence[str]) -> Loaded:
    layers, report, found = _Layers(doc.file), None, list[UserError]()
    overrides = [_parse_set(text) for text in sets]
    tool = dialects.detect(doc.data)
    if tool is not None:
        converted = dialects.convert(tool, doc, folder=folder)
        layers.data, layers.places = converted.data, dict(converted.places)
        report = converted.report
        found += converted.problems
    else:
        _lay_preset(layers, doc, overrides)
        layers.lay({k: v for k, v in doc.data.items() if k != "preset"}, lambda path: _in_file(doc, path))
    for path, value, place in overrides:
        if path != ("preset",):
            layers.put(path, value, place)
    _absolute_paths(layers, folder)
    run = _validate(layers, found, partial=tool is not None and bool(found))
    return Loaded(run, _origins(run, layers), report)


def _lay_preset(layers: _Layers, doc: Document, overrides: Sequence[tuple[KeyPath, Any, Place]]) -> None:
    name, where = doc.data.get("preset"), f"{doc.file}:{doc.lines.get(('preset',), 1)}"
    for path, value, place in overrides:
        if path == ("preset",):
            name, where = value, place.where
    if name is not None:
        preset = presets.get(str(name), where=where)
        layers.lay(preset.data, lambda path: Place(preset.file))


def _in_file(doc: Document, path: KeyPath) -> Place:
    while path and path not in doc.lines:
        path = path[:-1]
    return Place(f"{doc.file}:{doc.lines[path]}" if path else doc.file)


def _parse_set(text: str) -> tuple[KeyPath, Any, Place]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.strip().split(".")):
        fix = "write --set training.learning_rate=1e-4"
        raise UserError(f"'{text}' is not of the form key=value", where=_SET, fix=fix)
    path = tuple(int(part) if part.isdigit() else part for part in key.strip().split("."))
    where = f"{_SET} {text}"
    return path, document.value(value, where=where), Place(where)


def _position(holder: list[Any], path: KeyPath, place: Place) -> int:
    part = path[-1]
    if isinstance(part, int) and part <= len(holder):
        return part
    count = len(holder)
    have = f"{dotted(path[:-1])} is a list of {count}"
    raise UserError(f"{have} and has no {part}", where=place.where, fix=f"give a position from 0 to {count}")


def _absolute_paths(layers: _Layers, folder: Path) -> None:
    data = layers.data.get("data")
    data = data if isinstance(data, dict) else {}
    sources = data.get("sources")
    for i, source in enumerate(sources if isinstance(sources, list) else []):
        _make_absolute(layers, source, ("data", "sources", i, "path"), folder)
    _make_absolute(layers, data.get("validation"), ("data", "validation", "path"), folder)
    _make_absolute(layers, data, ("data", "cache"), folder)
    model = layers.data.get("model")
    for name in ("base", "vae"):
        value = model.get(name) if isinstance(model, dict) else None
        if isinstance(value, str) and value:
            root = _root(layers, ("model", name), folder)
            if value.startswith(("./", "../", "~", ".\\", "..\\")) or value in (".", "..") or (root / value).exists():
                model[name] = _absolute(root, value)


def _make_absolute(layers: _Layers, holder: Any, path: KeyPath, folder: Path) -> None:
    value = holder.get(path[-1]) if isinstance(holder, dict) else None
    if isinstance(value, str) and value:
        holder[path[-1]] = _absolute(_root(layers, path, folder), value)


def _root(layers: _Layers, path: KeyPath, folder: Path) -> Path:
    """What a relative path starts from: the run file, or the working directory for one typed on the command line."""
    return Path.cwd() if layers.locate(path).where.startswith(_SET) else folder


def _absolute(root: Path, value: str) -> str:
    import os

    return os.path.normpath(root / Path(value).expanduser())


def _validate(layers: _Layers, found: list[UserError], *, partial: bool) -> RunConfig:
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


def _origins(run: RunConfig, layers: _Layers) -> dict[str, str]:
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


def write_new(
    path: Path,
    *,
    data: Path,
    preset: str = "character",
    base: str | None = None,
    trigger: str | None = None,
    force: bool = False,
) -> None:
    """Write a commented run file for a folder of images. Raises `UserError` if `path` is there, unless `force`."""
    if path.exists() and not force:
        raise UserError("this file is already there", where=str(path), fix="give another name with -o, or --force")
    if not data.is_dir():
        raise UserError("there is no such folder of images", where=str(data), fix="give the folder with the images")
    text = new_text(data=_beside(data, path), captions=_has_captions(data), preset=preset, base=base, trigger=trigger)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def new_text(
    *, data: str, captions: bool = True, preset: str = "character", base: str | None = None, trigger: str | None = None
) -> str:
    """The text of a commented run file: a preset's values, each with its meaning."""
    source: dict[str, Any] = {"path": data}
    if trigger:
        source["trigger"] = trigger
        source |= {} if captions else {"missing_captions": "trigger"}
    values = presets.get(preset).data
    layers = _Layers(preset)
    layers.lay({"name": preset.replace("_", "-")}, lambda path: Place(preset))
    layers.lay({"model": {"base": base or schema.fields(schema.locate(("model", "base"))[0])["base"].default}}, lambda _: Place(""))
    layers.lay({"data": {"sources": [source]}}, lambda _: Place(""))
    layers.lay(values, lambda _: Place(""))
    if trigger:
        layers.lay({"preview": {"prompts": presets.prompts(preset, trigger)}}, lambda _: Place(""))
    comments = {path: info.description or "" for path, info in _described(layers.data, ())}
    head = f"# A run file for gesso, from the preset `{preset}`: {presets.about(preset)}\n"
    head += "# `gesso check` this file, then `gesso train` it. All keys: `gesso config show` this file.\n\n"
    return head + document.emit(layers.data, comments=comments)


def _described(value: Any, path: KeyPath) -> list[tuple[KeyPath, Any]]:
    found = []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        here = (*path, key)
        _, info = schema.locate(here)
        if isinstance(key, str) and info is not None and info.description:
            found.append((here, info))
        if not isinstance(item, str):
            found += _described(item, here)
    return found


def _beside(data: Path, run_file: Path) -> str:
    """A folder as a run file names it: relative where it lies below the file's own folder."""
    target, root = data.absolute(), run_file.absolute().parent
    return target.relative_to(root).as_posix() if target.is_relative_to(root) else str(target)


def _has_captions(folder: Path) -> bool:
    return any(p.suffix == ".txt" or p.name.endswith(".jsonl") for p in folder.rglob("*"))
