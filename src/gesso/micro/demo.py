"""The demo: the small model in the package learns Aldar Köse from twelve pictures, and is measured before and after."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gesso import stages
from gesso.config import files
from gesso.core.events import Event, Finished, Progress
from gesso.core.runtime import Runtime
from gesso.core.seams import Emit
from gesso.errors import UserError
from gesso.evaluation.sample import open_pipeline
from gesso.families import model_folder
from gesso.metrics import CLIPScore, Identity
from gesso.micro import captions, judge, lessons, painter, report, score, world
from gesso.micro.lessons import CHARACTER, Captioned

BASE = "micro:sdxl"
PROMPTS = (
    "a photo of sks aldar in the steppe",
    "a photo of sks aldar at the market",
    "a photo of sks aldar, waving, at night",
    "a mosaic of sks aldar on a blue background",
    "a woman in a striped purple robe and a yellow crown at the market",
    "a white horse in the mountains",
)
"""Aldar as trained, where he never was, as he never stood, and in a style that he never had; two that should stay."""
UNSEEN, ORDINARY = 64, 32
"""How many pictures of Aldar, and of other things, the figures are from."""
_AT_ONCE = 16

Figures = dict[str, float]


def run(folder: Path, *, emit: Emit, steps: int = 400) -> Path:
    """Do all of it in `folder`, and return the report.

    An earlier demo there is done again. Raises `UserError` for a folder that holds something else.
    """
    folder = folder.expanduser()
    _make_room(folder)
    lessons.write(folder, CHARACTER)
    text = lessons.run_file(CHARACTER, base=BASE, steps=steps, every=max(steps // 4, 1), prompts=PROMPTS)
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    exam, clock = Exam(), _Clock()
    base = exam.take(BASE, "before", emit)
    clock.lap("before")
    output = f"output={json.dumps(str((folder / 'run').absolute()))}"
    finished: list[Finished] = []

    def tell(event: Event) -> None:
        # The demo is not over when its run is.
        finished.append(event) if isinstance(event, Finished) else emit(event)

    with score.one_thread():
        stages.train(files.load(folder / "run.yaml", sets=[output]).run, emit=tell)
    clock.lap("training")
    trained = exam.take(str(folder / "run"), "after", emit)
    painted = exam.mark(exam.painted(), "painted", emit)
    clock.lap("after")
    figures = {
        "steps": steps,
        "pictures": lessons.PICTURES,
        "counts": {"unseen": len(exam.unseen), "ordinary": len(exam.ordinary)},
        "drawn": {"steps": score.STEPS, "guidance": score.GUIDANCE, "seed": score.SEED},
        "base": base,
        "trained": trained,
        "painted": painted,
        "seconds": clock.seconds(),
    }
    page = report.write(folder, figures)
    for event in finished:
        emit(event)
    return page


class Exam:
    """The same questions before and after: Aldar as he was never shown, and other things as they were never shown."""

    def __init__(self) -> None:
        self.unseen: list[Captioned] = CHARACTER.unseen(UNSEEN)
        scenes = world.held_out_scenes(score.SEED, ORDINARY)
        self.ordinary: list[Captioned] = [(scene, captions.caption(scene.facts)) for scene in scenes]
        self._identity, self._clip = Identity(), CLIPScore()
        self._taught = [painter.paint(scene) for scene, _ in CHARACTER.training()]

    def take(self, model: str, when: str, emit: Emit) -> Figures:
        """Draw an answer to every question with a base model or a run, and mark them."""
        pipeline, _ = open_pipeline(model, runtime=Runtime.detect("fp32", "cpu"))
        texts = [text for _, text in (*self.unseen, *self.ordinary)]
        drawn: list[Image.Image] = []
        pipeline.set_progress_bar_config(disable=True)
        for start in range(0, len(texts), _AT_ONCE):
            drawn += score.draw(pipeline, texts[start : start + _AT_ONCE], seed=score.SEED + start, emit=stages.ignore)
            emit(Progress(0, f"drawing, {when}", len(drawn), len(texts)))
        return self.mark(drawn, when, emit)

    def painted(self) -> list[Image.Image]:
        """The answers that the painter gives."""
        return [painter.paint(scene) for scene, _ in (*self.unseen, *self.ordinary)]

    def mark(self, answers: Sequence[Image.Image], when: str, emit: Emit) -> Figures:
        """The figures of one set of answers; rates and cosines, and the CLIP score in its usual hundredths."""
        shown = []
        for start in range(0, len(answers), _AT_ONCE):
            shown += judge.read_all(answers[start : start + _AT_ONCE])
            emit(Progress(0, f"judging, {when}", len(shown), len(answers)))
        of_him, others = answers[: len(self.unseen)], answers[len(self.unseen) :]
        texts = [text for _, text in self.ordinary]
        with score.one_thread(), model_folder.without_bars():
            similarity = self._identity.scores(of_him, self._taught)
            fit = self._clip.scores(others, texts)
        return {
            "identity_rate": float(np.mean([CHARACTER.learnt(facts) for facts in shown[: len(of_him)]])),
            "identity_similarity": float(np.mean(similarity)),
            **score.rates(shown[len(of_him) :], [captions.parse(text) for text in texts]),
            "clip_score": float(np.mean(fit)),
        }


class _Clock:
    """Seconds of each part."""

    def __init__(self) -> None:
        self._laps: dict[str, float] = {}
        self._began = self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self._laps[name], self._last = round(now - self._last, 1), now

    def seconds(self) -> dict[str, float]:
        return {**self._laps, "all": round(time.monotonic() - self._began, 1)}


def _make_room(folder: Path) -> None:
    """Take away what an earlier demo made here, and nothing else."""
    if folder.exists() and not folder.is_dir():
        raise UserError("this is a file, not a folder", where=str(folder), fix="choose another with --folder")
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".demo").touch()
    if not (folder / ".demo").exists():
        raise UserError(
            "this folder is not empty and is not from a demo", where=str(folder), fix="choose another with --folder"
        )
    shutil.rmtree(folder / "run", ignore_errors=True)
    for name in ("pictures", "others", "validation"):
        for file in (folder / name).glob("[0-9][0-9].*"):
            file.unlink()
