"""What a run says of its classes: the folders that are filled with class images, and the prompts of the model's own
prior. A source's own `class_prompt` and `class_images` go before those of the objective."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from gesso.config.image_files import images_in
from gesso.config.run import RunConfig
from gesso.errors import UserError
from gesso.objectives import DreamBooth

CLASS_IMAGES = 200
"""How many class images a folder is to have where a run does not say."""


@dataclass(frozen=True)
class ClassFolder:
    """A folder that a run fills with class images before training."""

    source: int
    """Position in `data.sources`."""
    path: Path
    prompt: str
    count: int

    @property
    def missing(self) -> int:
        """How many are yet to be drawn; any pictures that are there count."""
        return max(0, self.count - sum(1 for _ in images_in(self.path)))


def folders(run: RunConfig) -> tuple[ClassFolder, ...]:
    """The folders that the run fills: those of the sources with `role: prior` that a class prompt holds for."""
    objective = run.objective
    if not isinstance(objective, DreamBooth) or objective.prior != "images":
        return ()
    found = []
    for i, source in enumerate(run.data.sources):
        prompt = source.class_prompt or objective.class_prompt
        if source.role == "prior" and prompt is not None:
            count = source.class_images or objective.class_images or CLASS_IMAGES
            found.append(ClassFolder(i, Path(source.path).expanduser(), prompt, count))
    return tuple(found)


def empty(run: RunConfig) -> frozenset[int]:
    """Positions of the sources that the run fills and that hold no picture yet."""
    return frozenset(one.source for one in folders(run) if next(images_in(one.path), None) is None)


def without(run: RunConfig, sources: Collection[int]) -> RunConfig:
    """The run without these sources."""
    kept = tuple(source for i, source in enumerate(run.data.sources) if i not in sources)
    return run.model_copy(update={"data": run.data.model_copy(update={"sources": kept})}) if sources else run


def prompts(run: RunConfig) -> tuple[str, ...]:
    """Under which prompt the pictures of each source are seen again; none unless the model itself is the prior.

    Raises `UserError` for a source that has none.
    """
    objective = run.objective
    if not isinstance(objective, DreamBooth) or objective.prior != "model":
        return ()
    found = []
    for i, source in enumerate(run.data.sources):
        prompt = source.class_prompt or objective.class_prompt
        if prompt is None:
            what = "objective.prior is model, and it is not said what the class of these pictures is called"
            fix = "write class_prompt: a photo of a person, here or, for all sources, under objective"
            raise UserError(what, where=f"data.sources.{i}.class_prompt", fix=fix)
        found.append(prompt)
    return tuple(found)
