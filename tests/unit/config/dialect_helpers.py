"""Files of other tools, loaded as a run and looked at by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_guides import NESTED

from gesso.config import dialects, document, files
from gesso.config.dialects import DialectReport
from gesso.config.files import Loaded
from gesso.errors import Problems, UserError

NESTED_NAME, FLAT_NAME = "nested SDXL training YAML", "diffusers options"


def load(text: str, folder: Path = Path("/data")) -> Loaded:
    return files.load_text(text, folder=folder)


def merged(fragment: str, *, into: str | None = None) -> str:
    """The minimal nested file with a fragment laid over it; `into` names the section of bare keys."""
    base = document.parse(NESTED, file="x").data
    data = document.parse(fragment, file="x").data
    for section, values in ({into: data} if into else data).items():
        if isinstance(values, dict):
            base.setdefault(section, {}).update(values)
        else:
            base[section] = values
    return document.emit(base)


def lines_of(error: UserError) -> list[str]:
    found = error.problems if isinstance(error, Problems) else (error,)
    return [" ".join(" ".join(problem.lines()).split()) for problem in found]


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text)
    return lines_of(caught.value)


def report(loaded: Loaded) -> DialectReport:
    assert loaded.report is not None
    return loaded.report


def notes(entries: tuple[dialects.Entry, ...]) -> dict[str, str]:
    return {entry.key: entry.note for entry in entries}


def leaves(text: str) -> set[str]:
    """Dotted keys of a file, lists taken as one value."""
    found = set()
    for key, value in document.parse(text, file="x").data.items():
        found |= {f"{key}.{inner}" for inner in value} if isinstance(value, dict) else {key}
    return found


def at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data
