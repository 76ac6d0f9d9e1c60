"""The rules about the sources of a run's images, and what they are to the objective."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from gesso.config import class_images, prior_rules, schema
from gesso.config.findings import Finding, error
from gesso.config.image_files import HOLDERS, images_in
from gesso.config.run import RunConfig


def sources(run: RunConfig) -> Iterator[Finding]:
    """Each source, and the validation folder, for itself."""
    shared = {source.role for source in run.data.sources if source.share is not None}
    filled = {folder.source for folder in class_images.folders(run)}
    for i, source in enumerate(run.data.sources):
        key = f"data.sources.{i}"
        if Path(source.path).is_absolute() and i not in filled:
            yield from _place(f"{key}.path", Path(source.path))
        if run.folder.expanduser().absolute().is_relative_to(Path(source.path)):
            what = f"the run folder {run.folder} lies inside it, so previews would be trained on"
            yield error(f"{key}.path", what, "put the images into a folder of their own, or set output")
        if source.missing_captions == "trigger" and not source.trigger:
            yield error(f"{key}.trigger", "missing_captions is trigger, and there is no trigger word", "give one")
        if source.role in shared and source.share is None:
            yield error(f"{key}.share", "other sources have a share, and this one has none", "give it one")
    held = run.data.validation.path
    if held is not None:
        yield from _place("data.validation.path", held)
        for source in run.data.sources:
            if held.is_relative_to(source.path):
                what = f"lies inside {source.path}, so its images are trained on too and the loss says nothing"
                yield error("data.validation.path", what, "move it beside the training folder")


def pairs(run: RunConfig) -> Iterator[Finding]:
    """The sources against an objective that compares pairs of pictures, or that does not."""
    compares = "pair" in run.objective.needs
    for i, source in enumerate(run.data.sources):
        key, columns = f"data.sources.{i}", source.rejected_column or source.label_column
        if compares and source.pairs != "auto":
            what = f"the objective {run.objective.type} compares pairs of pictures, and this reads none"
            yield error(f"{key}.pairs", what, "take it out")
        if compares and source.mask != "none":
            yield error(f"{key}.mask", "pairs of pictures have no masks", "set mask to none")
        if columns and not compares and source.pairs == "auto":
            what = f"'{columns}' is of pairs of pictures, which the objective {run.objective.type} does not compare"
            fix = "choose an objective that does, such as dpo, or set pairs: chosen"
            yield error(f"{key}.{'rejected' if source.rejected_column else 'label'}_column", what, fix)


def _place(key: str, path: Path) -> Iterator[Finding]:
    if "{" not in path.name and not path.exists():
        yield error(key, f"there is no {path}", _nearest_folder(path))


def _nearest_folder(path: Path) -> str:
    """The most similar folder with images, or file that may hold some, near a wrong path."""
    start = path.parent
    missing = path.name
    while not start.is_dir() and start != start.parent:
        start, missing = start.parent, start.name
    if not start.is_dir():
        return "give a folder with images"
    with contextlib.suppress(OSError):
        folders = [p for p in start.iterdir() if p.is_dir() and p != path and not p.name.startswith(".")]
        useful = {p.name: p for p in folders[:200] if next(images_in(p), None) is not None}
        files = {p.name: p for p in start.iterdir() if p.suffix.lower() in HOLDERS}
        near = schema.nearest(missing, useful | files)
        if near:
            return f"did you mean {(useful | files)[near]}?"
        if useful:
            return f"folders with images there: {', '.join(str(useful[name]) for name in sorted(useful)[:3])}"
        if next((p for p in images_in(start) if p.parent == start), None) is not None:
            return f"there are images in {start}"
    return "paths in a run file start from the folder of that file"


RULES: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (sources, pairs, *prior_rules.RULES)
