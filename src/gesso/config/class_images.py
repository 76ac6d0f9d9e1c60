"""The class images that a DreamBooth run draws before training: where they go, and how many are missing."""

from __future__ import annotations

from pathlib import Path

from gesso.config.forecast import images_in
from gesso.config.run import RunConfig
from gesso.objectives import DreamBooth


def folder(run: RunConfig) -> Path | None:
    """The folder that the run fills with class images; None where it draws none."""
    if not isinstance(run.objective, DreamBooth) or not run.objective.wanted:
        return None
    return next((Path(source.path).expanduser() for source in run.data.sources if source.role == "prior"), None)


def missing(run: RunConfig) -> int:
    """How many class images the run will draw before training."""
    place = folder(run)
    if place is None or not isinstance(run.objective, DreamBooth):
        return 0
    return max(0, run.objective.wanted - sum(1 for _ in images_in(place)))


def without_missing(run: RunConfig) -> RunConfig:
    """The run on the pictures that are there: without the folder of class images while that is empty."""
    place = folder(run)
    if place is None or next(images_in(place), None) is not None:
        return run
    sources = tuple(source for source in run.data.sources if source.role != "prior")
    return run.model_copy(update={"data": run.data.model_copy(update={"sources": sources})})
