"""The rules about the sources of a run's images, and what they are to the objective."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from gesso.config import class_images, schema
from gesso.config.findings import Finding, error, warning
from gesso.config.forecast import images_in
from gesso.config.run import RunConfig
from gesso.objectives import DreamBooth


def sources(run: RunConfig) -> Iterator[Finding]:
    """Each source, and the validation folder, for itself."""
    shared, drawn = {source.role for source in run.data.sources if source.share is not None}, class_images.folder(run)
    for i, source in enumerate(run.data.sources):
        key = f"data.sources.{i}"
        if Path(source.path).is_absolute() and not (drawn is not None and source.role == "prior"):
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


def priors(run: RunConfig) -> Iterator[Finding]:
    """The sources against what the objective does with prior images."""
    objective, listed = run.objective, run.data.sources
    prior = [i for i, source in enumerate(listed) if source.role == "prior"]
    if len(prior) == len(listed):
        yield error("data.sources", "every source has role: prior, so nothing is taught", "add one with what to learn")
    if not isinstance(objective, DreamBooth):
        for i in prior:
            fix = "write objective: {type: dreambooth}, or take role out: its images then count like any others"
            yield error(f"data.sources.{i}.role", f"prior images mean nothing to objective {objective.type}", fix)
        return
    for i in prior if objective.prior == "model" else ():
        fix = "take the source out, or write objective.prior: images"
        yield error(f"data.sources.{i}.role", "objective.prior is model, which takes no prior images", fix)
    if objective.prior == "images" and not prior:
        fix = "add one: {path: class_images, role: prior}; or write objective.prior: model and a class_prompt"
        yield error("objective.prior", "no source has role: prior, so there are no prior images", fix)
    if not objective.prior_weight:
        what = "prior samples count nothing, and take as long as the others"
        yield warning("objective.prior_weight", what, "write 1, or objective: {type: denoise}")
    if not objective.wanted or not prior:
        return
    for i in (i for i in range(len(listed)) if i not in prior):
        own, drawn = Path(listed[i].path), Path(listed[prior[0]].path)
        if own.is_relative_to(drawn) or drawn.is_relative_to(own):
            what = f"the class images go to {drawn}, and would be taken for instances (or these for class images)"
            yield error(f"data.sources.{i}.path", what, "give the class images a folder of their own")
    first = listed[prior[0]]
    if len(prior) > 1:
        what = f"{len(prior)} sources have role: prior, and it is not clear which of them is to be filled"
        yield error("objective.class_prompt", what, "take it out, and fill them with: gesso class-images")
    elif "://" in first.path or first.path.startswith("hub:") or Path(first.path).suffix in _HOLDERS:
        what = f"class images are drawn into a folder, and {first.path} is none"
        yield error("objective.class_prompt", what, "name a folder on this machine, or take class_prompt out")


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


_HOLDERS = (".zip", ".tar", ".parquet", ".jsonl", ".csv")


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
        files = {p.name: p for p in start.iterdir() if p.suffix.lower() in _HOLDERS}
        near = schema.nearest(missing, useful | files)
        if near:
            return f"did you mean {(useful | files)[near]}?"
        if useful:
            return f"folders with images there: {', '.join(str(useful[name]) for name in sorted(useful)[:3])}"
        if next((p for p in images_in(start) if p.parent == start), None) is not None:
            return f"there are images in {start}"
    return "paths in a run file start from the folder of that file"


RULES: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (sources, pairs, priors)
