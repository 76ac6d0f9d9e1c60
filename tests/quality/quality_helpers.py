"""Teaching the packaged model in a minute, and reading what it draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gesso import stages
from gesso.config import files
from gesso.core.runtime import Runtime
from gesso.evaluation.sample import open_pipeline
from gesso.micro import judge, lessons, score
from gesso.micro.lessons import Lesson
from gesso.micro.world import ALDAR_LOOKS, Facts

BASE = "micro:sdxl"
OTHERS = 12
"""Pictures of the world beside the twelve: few, so that little time is enough."""
RANK, ALPHA = 8, 16
"""Alpha is not the rank, so that a reader that takes no notice of it draws something else."""
WEIGHTS = "pytorch_lora_weights.safetensors"


def teach(folder: Path, lesson: Lesson, *, steps: int, sets: Sequence[str] = ()) -> Path:
    """Write a lesson into the folder and train on it; returns the run folder."""
    if not (folder / "pictures").is_dir():
        lessons.write(folder, lesson, other=OTHERS)
    text = lessons.run_file(lesson, base=BASE, steps=steps, rank=RANK, every=steps)
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    always = [f"adapter.alpha={ALPHA}", f"output={folder}/run", "validation.every=10000"]
    with score.one_thread():
        return stages.train(files.load(folder / "run.yaml", sets=[*always, *sets]).run)


def opened(target: Path) -> Any:
    """A run as its own pictures are drawn."""
    pipeline = open_pipeline(str(target), runtime=Runtime.detect("fp32", "cpu"))[0]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompts: Sequence[str]) -> list[Image.Image]:
    """A picture of each prompt; the same seeds for every pipeline."""
    return score.draw(pipeline, prompts, seed=score.SEED, emit=stages.ignore)


def share(learnt: Callable[[Facts], bool], pictures: Sequence[Image.Image]) -> float:
    """How many of the pictures show it, by the judge."""
    return sum(learnt(facts) for facts in judge.read_all(pictures)) / len(pictures)


def difference(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> float:
    """Mean difference of two sets of pictures, of 255."""
    pairs = zip(one, other, strict=True)
    return float(np.mean([np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]))


def much_like_aldar(facts: Facts) -> bool:
    """Whether a person has at least three of his five looks: the first things that a short lesson teaches."""
    his = [facts.colour == ALDAR_LOOKS.colour, facts.pattern == ALDAR_LOOKS.pattern, facts.hat == ALDAR_LOOKS.hat,
           facts.hat_colour == ALDAR_LOOKS.hat_colour, facts.beard == ALDAR_LOOKS.beard]  # fmt: skip
    return facts.is_person and sum(his) >= 3
