"""Writes a commented run file to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gesso.config import document, presets, schema
from gesso.config.document import KeyPath
from gesso.config.layers import Layers
from gesso.config.problems import Place
from gesso.config.run import RunConfig
from gesso.errors import UserError


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
    captions = any(p.suffix == ".txt" or p.name.endswith(".jsonl") for p in data.rglob("*"))
    name = document.file_name(data.absolute().name) or "run"
    text = new_text(data=_beside(data, path), name=name, captions=captions, preset=preset, base=base, trigger=trigger)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def new_text(
    *, data: str, name: str, captions: bool, preset: str, base: str | None = None, trigger: str | None = None
) -> str:
    """The text of a commented run file: a preset's values, each with its meaning.

    `captions` says whether the folder has any; without them the trigger word alone is every image's caption.
    """
    source: dict[str, Any] = {"path": data}
    if trigger:
        source["trigger"] = trigger
    if trigger and not captions:
        source["missing_captions"] = "trigger"
    start = {
        "name": name,
        "model": {"base": base or RunConfig.model_fields["model"].default.base},
        "data": {"sources": [source]},
    }
    layers = Layers(preset)
    for values in (start, presets.get(preset).data):
        layers.lay(values, lambda _: Place(preset))
    if trigger:
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
