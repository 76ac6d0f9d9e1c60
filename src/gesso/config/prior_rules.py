"""The rules about prior samples: who has class images, what they are drawn from, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from gesso.config import class_images
from gesso.config.findings import Finding, error, warning
from gesso.config.image_files import HOLDERS
from gesso.config.run import RunConfig
from gesso.objectives import DreamBooth

_EXAMPLE = "a photo of a person"


def roles(run: RunConfig) -> Iterator[Finding]:
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


def settings(run: RunConfig) -> Iterator[Finding]:
    """Class prompts and numbers of class images that would do nothing, or that are missing."""
    objective = run.objective
    if not isinstance(objective, DreamBooth):
        for i, source in enumerate(run.data.sources):
            for name in ("class_prompt", "class_images"):
                if source.model_dump()[name] is not None:
                    what = f"it means nothing to objective {objective.type}"
                    yield error(f"data.sources.{i}.{name}", what, "write objective: {type: dreambooth}, or take it out")
    elif objective.prior == "model":
        yield from _of_model(run, objective)
    else:
        yield from _of_images(run, objective)


def _of_model(run: RunConfig, objective: DreamBooth) -> Iterator[Finding]:
    listed = run.data.sources
    for i, source in enumerate(listed):
        if source.class_images is not None:
            what = "objective.prior is model, which takes no class images"
            yield error(f"data.sources.{i}.class_images", what, "take it out, or write objective.prior: images")
    own = [source.class_prompt is not None for source in listed]
    if objective.class_prompt is None and not all(own):
        # One place to write it where no source says anything, else the first that is left out.
        key = f"data.sources.{own.index(False)}.class_prompt" if any(own) else "objective.class_prompt"
        what = "objective.prior is model, which needs to know what the class is called"
        yield error(key, what, f"write class_prompt: {_EXAMPLE}")
    elif objective.class_prompt is not None and all(own):
        yield error("objective.class_prompt", "every source has one of its own, so it has no effect", "take it out")


def _of_images(run: RunConfig, objective: DreamBooth) -> Iterator[Finding]:
    listed, filled = run.data.sources, class_images.folders(run)
    drawing = {folder.source for folder in filled}
    for i, source in enumerate(listed):
        if source.role == "instance":
            for name in ("class_prompt", "class_images"):
                if source.model_dump()[name] is not None:
                    what = "class images go into a source with role: prior, and this has role: instance"
                    fix = "move it to the source of its class images, or write objective.prior: model"
                    yield error(f"data.sources.{i}.{name}", what, fix)
        elif source.class_images is not None and i not in drawing:
            yield error(f"data.sources.{i}.class_images", *_UNNAMED)
    bare = [i for i, source in enumerate(listed) if source.role == "prior" and source.class_prompt is None]
    if objective.class_prompt is not None and len(bare) > 1:
        what = f"{len(bare)} sources with role: prior have no class_prompt, and it is not clear which is to be filled"
        yield error("objective.class_prompt", what, "write it into the one that is; the others are taken as they are")
    elif objective.class_prompt is not None and drawing and not bare:
        what = "every source with role: prior has one of its own, so it has no effect"
        yield error("objective.class_prompt", what, "take it out")
    if objective.class_images is not None and not drawing:
        yield error("objective.class_images", *_UNNAMED)
    elif objective.class_images is not None and all(listed[i].class_images is not None for i in drawing):
        what = "every source that is filled has a number of its own, so it has no effect"
        yield error("objective.class_images", what, "take it out")


_UNNAMED = "class images are drawn from a class_prompt, and there is none", f"add class_prompt: {_EXAMPLE}"


def folders(run: RunConfig) -> Iterator[Finding]:
    """Where class images are drawn to, and that no two sources come to hold the same ones."""
    listed, filled = run.data.sources, class_images.folders(run)
    for folder in filled:
        source, key = listed[folder.source], f"data.sources.{folder.source}"
        prompt = f"{key}.class_prompt" if source.class_prompt is not None else "objective.class_prompt"
        if "://" in source.path or source.path.startswith("hub:") or folder.path.suffix in HOLDERS:
            what = f"class images are drawn into a folder, and {source.path} is none"
            yield error(prompt, what, "name a folder on this machine, or take class_prompt out")
        if source.layout not in ("auto", "folder") or source.metadata is not None:
            name = "layout" if source.metadata is None else "metadata"
            what = "class images are drawn with caption files beside them, and would not be seen"
            yield error(f"{key}.{name}", what, f"take it out, or take {prompt} out")
        if (source.caption_extension or ".txt").lstrip(".") != "txt":
            what = "class images are drawn with their captions in .txt files"
            yield error(f"{key}.caption_extension", what, f"take it out, or take {prompt} out")
    for n, folder in enumerate(filled):
        earlier = {other.source for other in filled[:n]}
        for i in (i for i in range(len(listed)) if i != folder.source and i not in earlier):
            own = Path(listed[i].path).expanduser()
            if own.is_relative_to(folder.path) or folder.path.is_relative_to(own):
                there = "instances" if listed[i].role == "instance" else "those of another class"
                what = f"the class images go to {folder.path}, and would be taken for {there} (or these for them)"
                yield error(f"data.sources.{i}.path", what, "give the class images a folder of their own")
        twin = next((other for other in filled[:n] if other.prompt == folder.prompt), None)
        # Where both have the objective's, `settings` has asked which of them is meant.
        if twin is not None and any(listed[one.source].class_prompt is not None for one in (twin, folder)):
            what = f"'{folder.prompt}' already fills {twin.path}, and would give the same pictures here"
            fix = "write another class_prompt, or keep one of the two sources"
            yield error(f"data.sources.{folder.source}.class_prompt", what, fix)


RULES: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (roles, settings, folders)
