"""Other tools' configuration files, read as run files, with a report of what became of every key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gesso.config import schema
from gesso.config.dialects import aitoolkit, flat, kohya, kohya_options, nested, toml
from gesso.config.dialects.draft import Converted, DialectReport, Entry
from gesso.config.document import Document

__all__ = ["Converted", "DialectReport", "Entry", "convert", "detect", "foreign_names", "read_data", "read_document"]

_SCORES: dict[str, Callable[[Mapping[str, Any]], int]] = {
    nested.NAME: nested.score,
    flat.NAME: flat.score,
    kohya.NAME: kohya.score,
    kohya_options.NAME: kohya_options.score,
    aitoolkit.NAME: aitoolkit.score,
}
_READERS: dict[str, Callable[..., Converted]] = {
    nested.NAME: nested.to_run,
    flat.NAME: flat.to_run,
    kohya.NAME: kohya.to_run,
    kohya_options.NAME: kohya_options.to_run,
    aitoolkit.NAME: aitoolkit.to_run,
}


def detect(mapping: Mapping[str, Any]) -> str | None:
    """The tool whose keys a file uses, or None for a run file of ours (also when in doubt)."""
    scores = {name: score(mapping) for name, score in _SCORES.items()}
    best = max(scores, key=lambda name: scores[name])
    return best if scores[best] > _native_score(mapping) else None


def convert(name: str, document: Document, *, folder: Path) -> Converted:
    """Read `document` as the named tool would; `folder` is where the file lies."""
    return _READERS[name](document, folder=folder)


def read_document(path: Path, *, what: str = "run file") -> Document:
    """Read a file of any tool: YAML, JSON, or TOML by its ending. Raises `UserError` with the line of a mistake."""
    return toml.read(path, what=what)


def read_data(path: Path) -> Converted:
    """Read a file that only describes images, of sd-scripts (TOML, JSON) or ai-toolkit (`datasets:`).

    The result has the section `data`, and `training.batch_size` where the file says so. Raises `UserError` for a file
    that cannot be read; mistakes in it are among the result's problems.
    """
    document = read_document(path, what="dataset file")
    if aitoolkit.score(document.data) > kohya.score(document.data):
        return aitoolkit.to_data(document, folder=path.absolute().parent)
    return kohya.read(path)


def foreign_names() -> dict[str, str]:
    """Keys of other tools that stand for exactly one of ours: theirs -> ours, dotted."""
    from gesso.config.dialects.rules import DIRECT

    return {alias: DIRECT[name].native for alias, name in flat.KEYS.items() if name in DIRECT}


def _native_score(mapping: Mapping[str, Any]) -> int:
    score = 0
    for key, value in mapping.items():
        _, info = schema.locate((key,))
        if info is None and key != "preset":
            continue
        inside = schema.fields(schema.models_in(info.annotation)) if info is not None else {}
        score += sum(name in inside for name in value) if isinstance(value, Mapping) and inside else 1
    return score
