"""Writes a commented run file to start from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gesso.config import dialects, document, presets, schema
from gesso.config.dialects import DialectReport
from gesso.config.document import KeyPath
from gesso.config.layers import Layers
from gesso.config.problems import Place
from gesso.config.run import RunConfig
from gesso.errors import Problems, UserError

_DATA_FILES = (".toml", ".json", ".yaml", ".yml")


def write_new(
    path: Path,
    *,
    data: str | Path,
    preset: str = "character",
    base: str | None = None,
    trigger: str | None = None,
    force: bool = False,
) -> DialectReport | None:
    """Write a commented run file for a set of images: anything that a source's `path` takes, or another tool's file.

    Returns how that file was read. Raises `UserError` if `path` is there, unless `force`.
    """
    if path.exists() and not force:
        raise UserError("this file is already there", where=str(path), fix="give another name with -o, or --force")
    data = os.fspath(data)
    local, report = Path(data).expanduser(), None
    name = document.file_name(local.absolute().stem) or "run"
    sections: dict[str, Any] = {"data": {"sources": [{"path": data}]}}
    if local.is_dir():
        captions = any(p.suffix in (".txt", ".caption") or p.stem == "metadata" for p in local.rglob("*"))
        name = document.file_name(local.absolute().name) or "run"
        sections = {"data": {"sources": [{"path": _beside(local, path)}]}}
        if trigger and not captions:
            sections["data"]["sources"][0]["missing_captions"] = "trigger"
    elif local.is_file() and local.suffix.lower() in _DATA_FILES:
        converted = dialects.read_data(local)
        if converted.problems:
            raise Problems(converted.problems)
        sections, report = converted.data, converted.report
    elif local.is_file():
        sections = {"data": {"sources": [{"path": _beside(local, path)}]}}
    elif "://" not in data and not data.startswith("hub:") and "{" not in data:
        raise UserError("there is no such folder of images", where=data, fix="give the folder with the images")
    text = new_text(sections, name=name, preset=preset, base=base, trigger=trigger)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return report


def new_text(
    sections: Mapping[str, Any], *, name: str, preset: str, base: str | None = None, trigger: str | None = None
) -> str:
    """The text of a commented run file: what is given in `sections`, a preset's values, each with its meaning."""
    start = {"name": name, "model": {"base": base or RunConfig.model_fields["model"].default.base}}
    layers = Layers(preset)
    # What is given stands first in the file and wins over the preset.
    for values in (start, sections, presets.get(preset).data, sections):
        layers.lay(values, lambda _: Place(preset))
    if trigger:
        for source in layers.data["data"]["sources"]:
            if source.get("role") != "prior":
                source.setdefault("trigger", trigger)
        layers.lay({"preview": {"prompts": presets.prompts(preset, trigger)}}, lambda _: Place(preset))
    head = f"# A run file from the preset `{preset}`.\n# {presets.about(preset)}\n"
    head += "# Next: `gesso check` this file, then `gesso train` it. `gesso config show` lists every key there is.\n\n"
    return head + document.emit(layers.data, comments=_comments(layers.data, ()))


def _comments(value: Any, path: KeyPath) -> dict[KeyPath, str]:
    found: dict[KeyPath, str] = {}
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        here = (*path, key)
        _, info = schema.locate(here)
        if isinstance(key, str) and info is not None and info.description:
            found[here] = info.description
        found |= _comments(item, here)
    return found


def _beside(data: Path, run_file: Path) -> str:
    """A folder as a run file names it: relative where it lies below the file's own folder."""
    target, root = data.absolute(), run_file.absolute().parent
    return target.relative_to(root).as_posix() if target.is_relative_to(root) else str(target)
