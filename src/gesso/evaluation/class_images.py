"""Class images for prior preservation: drawn by the base model, and only those that are missing.

Picture i of a folder is a function of prompt, model, settings and seed + i, so a broken-off drawing goes on where it
stopped. (Batches change the last bits of a picture, as everywhere on a GPU.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from gesso.config import class_images
from gesso.config.image_files import images_in
from gesso.config.run import RunConfig
from gesso.core.events import Progress
from gesso.core.folder import write_atomic
from gesso.core.runtime import Runtime
from gesso.core.seams import Emit
from gesso.errors import Interrupted, UserError
from gesso.evaluation.sample import Shot, draw, save_png, settings

_STEM = "class-"
_LISTINGS = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Wanted:
    """How many pictures of what a folder is to hold. Width and height in pixels, empty: what the model was made for."""

    folder: Path
    prompt: str
    count: int
    seed: int = 0
    steps: int = 25
    guidance: float = 7.0
    width: int | None = None
    height: int | None = None
    batch: int = 4


Opened = tuple[Any, str]
"""A pipeline, and what its model is called."""


def never() -> bool:
    """Nobody asks to stop."""
    return False


def fill(
    wanted: Wanted, *, open_pipeline: Callable[[], Opened], emit: Emit, stopping: Callable[[], bool] = never
) -> int:
    """Draw what is missing from the folder, each picture with its caption beside it; returns how many were drawn.

    Any pictures that are there count, and none is overwritten. The model is opened only if something is missing. Raises
    `UserError` for a folder that holds class images of another prompt, or is to be filled though a file lists its
    pictures, and `Interrupted` between two batches once `stopping()` says so.
    """
    numbers = _numbers(wanted)
    if not numbers:
        return 0
    missing = len(numbers)
    pipeline, model = open_pipeline()
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    wanted.folder.mkdir(parents=True, exist_ok=True)
    emit(Progress(0, "drawing class images", 0, missing))
    for start in range(0, missing, wanted.batch):
        if stopping():
            what = f"stopped as asked; {missing - start} class images are still to be drawn"
            raise Interrupted(what, where=str(wanted.folder), fix="start again: those that are there are kept")
        part = numbers[start : start + wanted.batch]
        shots = [
            Shot(
                prompt=wanted.prompt,
                seed=wanted.seed + number,
                steps=wanted.steps,
                guidance=wanted.guidance,
                width=wanted.width or side,
                height=wanted.height or side,
            )
            for number in part
        ]
        pictures = draw(pipeline, shots, batch=wanted.batch)
        for number, shot, picture in zip(part, shots, pictures, strict=True):
            path = wanted.folder / f"{_STEM}{number:05d}.png"
            # The caption comes first: a picture that is there has one, whenever the drawing was broken off.
            write_atomic(path.with_suffix(".txt"), (wanted.prompt + "\n").encode(), durable=False)
            save_png(picture, path, settings(shot, pipeline=pipeline, model=model) | {"class_image": True})
        emit(Progress(0, "drawing class images", start + len(part), missing))
    return missing


def complete(run: RunConfig, runtime: Runtime, emit: Emit, stopping: Callable[[], bool] = never) -> None:
    """Draw the class images that a run asks for and that its folders lack, with the run's own model, opened once."""

    @cache
    def open_pipeline() -> Opened:
        parts = run.model.load({"denoiser", "vae", "text"}, dtype=runtime.dtype, device=runtime.device)
        return run.model.pipeline(parts), run.model.base

    side = run.data.resolution // 8 * 8
    asked = [
        Wanted(one.path, one.prompt, one.count, seed=run.seed, width=side, height=side)
        for one in class_images.folders(run)
    ]
    for wanted in asked:
        _numbers(wanted)  # what is wrong with the last folder is said before the first is drawn
    if sum([fill(wanted, open_pipeline=open_pipeline, emit=emit, stopping=stopping) for wanted in asked]):
        open_pipeline.cache_clear()
        runtime.release()


def _numbers(wanted: Wanted) -> list[int]:
    """Of the pictures that are missing; raises where they would not be seen, or be mixed with another class's."""
    folder = wanted.folder
    if folder.exists() and not folder.is_dir():
        raise UserError("this is a file, and class images go into a folder", where=str(folder), fix="name a folder")
    there = list(images_in(folder))
    _refuse_others(wanted, there)
    missing = max(0, wanted.count - len(there))
    for name in _LISTINGS if missing else ():
        if (folder / name).is_file():
            raise UserError(
                f"{name} says which pictures of this folder count, so none that is drawn now would be seen",
                where=str(folder),
                fix=f"name another folder, or write the captions beside the pictures and remove {name}",
            )
    taken = {path.stem for path in there}
    free = (number for number in count() if f"{_STEM}{number:05d}" not in taken)
    return list(islice(free, missing))


def _refuse_others(wanted: Wanted, there: Sequence[Path]) -> None:
    for path in there:
        prompt = _prompt_of(path) if path.stem.startswith(_STEM) else None
        if prompt is not None and prompt != wanted.prompt:
            raise UserError(
                f"this folder holds class images of '{prompt}', and these are to be of '{wanted.prompt}'",
                where=str(path),
                fix="name another folder, or remove those",
            )


def _prompt_of(path: Path) -> str | None:
    """What a class image was drawn from, by its own record; None for other pictures."""
    try:
        with Image.open(path) as image:
            told = json.loads(str(image.info.get("gesso", "{}")))
    except (OSError, UnidentifiedImageError, ValueError):
        return None
    return str(told["prompt"]) if isinstance(told, dict) and told.get("class_image") else None
