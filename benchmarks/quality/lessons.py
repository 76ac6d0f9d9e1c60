"""What Gesso teaches, measured: a character and an object from twelve pictures each, a style from thirty-six, and one
lesson overdone.

    make quality            # or: python benchmarks/quality/lessons.py

Every figure is read from drawn pictures by the judge of the painted world (`gesso.micro.judge`), which is no trained
network, or is a loss. The thresholds are in `THRESHOLDS`; one that is missed means exit status 1. Trainings and
measurements that are done are kept in the work folder, so that a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mutations import between
from PIL import Image

from gesso import stages
from gesso.config import files
from gesso.core import checkpoints, resolve
from gesso.core.events import Event
from gesso.core.provenance import provenance
from gesso.core.runtime import Runtime
from gesso.evaluation.sample import open_pipeline
from gesso.metrics import CLIPScore, Identity
from gesso.micro import captions, judge, lessons, painter, score, world
from gesso.micro.lessons import CHARACTER, LESSONS, Lesson
from gesso.micro.world import Facts

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "quality.md"
SEED = score.SEED
UNSEEN, PEOPLE, ORDINARY = 64, 64, 48
"""Pictures: of a lesson's prompts, of "a person", and of held-out prompts of the world that every model knows."""
STEPS = CHARACTER.steps
"""Length of the lesson that is overdone; length, rank and rate of all are those of `gesso.micro.lessons`."""
OVERDONE = 10
"""An overdone lesson is this many times as long, with nothing beside the twelve pictures, at a constant rate."""
OVERDONE_RATE = 1e-3
"""A quarter of the lesson's: at the whole of it, held so long, training does not overfit but blows up."""
WATCHED = (1, 3, 10)
"""At these multiples of the usual length the overdone lesson is measured."""
SOURCES = ("captions", "figures", "judge", "lessons", "painter", "score", "templates", "world")
"""Modules of `gesso.micro` that every figure depends on."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Threshold:
    """A figure that must be at least or at most so much."""

    figure: str
    least: float | None = None
    most: float | None = None
    of: tuple[str, ...] = tuple(lesson.name for lesson in LESSONS)
    means: str = ""

    def holds(self, value: float) -> bool:
        """Whether a value is within it; one that is not a number is not."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def text(self) -> str:
        """As people write it."""
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


THRESHOLDS = (
    Threshold("rate_before", most=0.10, means="share of pictures that show it, base model"),
    Threshold("rate", least=0.85, means="share of pictures that show it, after the lesson"),
    Threshold(
        "people_variety", least=0.80, means='attribute entropy of "a person" after the lesson, as a share of before'
    ),
    Threshold("ordinary_fall", most=0.05, means="by how much subject, colour and place of other prompts fall, mean"),
    Threshold("clip_fall", most=1.5, means="by how much the CLIP score of other prompts falls"),
    Threshold("identity_gain", least=0.2, of=(CHARACTER.name,), means="rise of the identity similarity to the twelve"),
    Threshold("validation_rise", least=1.2, of=("overdone",), means="last validation loss over the lowest"),
    Threshold(
        "following_fall",
        least=0.15,
        of=("overdone",),
        means="by how much the share of other prompts that are followed falls",
    ),
)


def main() -> int:
    """Measure all of it, write the results, and say which thresholds were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="micro:sdxl", help="another SDXL folder for the painted world")
    parser.add_argument("--work", type=Path, default=resolve.cache_root() / "quality", help="where trainings are kept")
    parser.add_argument("--output", type=Path, default=HERE, help="where lessons.json and overtraining.png go")
    args = parser.parse_args()
    bench = Bench(args.base, args.work)
    with score.one_thread():
        figures = {lesson.name: bench.lesson(lesson) for lesson in LESSONS}
        figures["overdone"] = bench.overdone()
    missed = [
        f"{name}: {threshold.figure} is {figures[name][threshold.figure]:.3g}, not {threshold.text}"
        for threshold in THRESHOLDS
        for name in threshold.of
        if not threshold.holds(figures[name][threshold.figure])
    ]
    record = {
        "provenance": provenance(),
        "base": {"name": args.base, "sha256": bench.base_hash},
        "settings": {
            "pictures": {"unseen": UNSEEN, "people": PEOPLE, "ordinary": ORDINARY},
            "drawn": {"steps": score.STEPS, "guidance": score.GUIDANCE, "seed": SEED},
            "run_files": {lesson.name: bench.run_file(lesson) for lesson in LESSONS},
            "overdone": {"times": OVERDONE, "others": 0, "schedule": "constant", "rate": OVERDONE_RATE},
        },
        "thresholds": [dataclasses.asdict(threshold) for threshold in THRESHOLDS],
        "figures": figures,
        "missed": missed,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "lessons.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(figures["overdone"], args.output / "overtraining.png")
    print("\n".join(table(figures)))
    if args.output == HERE:
        between(PAGE, "lessons", "\n".join(table(figures)))
    print("\n".join(f"MISSED {line}" for line in missed) or "every threshold is met")
    return 1 if missed else 0


class Bench:
    """Trains and measures, and keeps what is done by the hash of all that it depends on."""

    def __init__(self, base: str, work: Path) -> None:
        self.base, self.work = base, work
        folder = resolve.locate(base)
        self.base_hash = resolve.fingerprint(sorted(p for p in folder.rglob("*") if p.is_file()))
        sources = [Path(world.__file__).with_name(f"{name}.py").read_text() for name in SOURCES]
        self._key = [self.base_hash, *(str(count) for count in (UNSEEN, PEOPLE, ORDINARY)), *sources]
        ordinary = world.held_out_scenes(SEED, ORDINARY)
        self.ordinary = [captions.caption(scene.facts) for scene in ordinary]
        self._taught = [painter.paint(scene) for scene, _ in CHARACTER.training()]

    def lesson(self, lesson: Lesson) -> Figures:
        """Teach it, and compare the base model with the trained one (its averaged weights)."""
        run, seconds = self.train(lesson.name, lesson, sets=())
        before = self.kept(f"before-{lesson.name}", "", lambda: self.of_lesson(lesson, score.open_model(self.base)))
        common = self.kept("before-all", "", lambda: self.of_others(score.open_model(self.base)))
        text = (run / "run.yaml").read_text()
        after = self.kept(f"after-{lesson.name}", text, lambda: self.of_lesson(lesson, opened(run)))
        others = self.kept(f"after-{lesson.name}-all", text, lambda: self.of_others(opened(run)))
        figures = {
            "rate_before": before["rate"],
            "rate": after["rate"],
            "people_variety": others["people_entropy"] / common["people_entropy"],
            "ordinary_fall": float(
                np.mean([common["ordinary"][k] - others["ordinary"][k] for k in others["ordinary"]])
            ),
            "clip_fall": common["clip_score"] - others["clip_score"],
            "training_seconds": seconds,
            "before": {**before, **common},
            "after": {**after, **others},
        }
        if lesson is CHARACTER:
            figures["identity_gain"] = after["identity_similarity"] - before["identity_similarity"]
        return figures

    def overdone(self) -> Figures:
        """The character lesson far too long: the validation loss and how prompts are followed, on the way."""
        sets = [
            f"training.steps={OVERDONE * STEPS}",
            "training.schedule={type: constant, warmup: 10}",
            f"training.learning_rate={OVERDONE_RATE}",
            f"checkpoint={{every: {STEPS}, keep_last: {OVERDONE}}}",
        ]
        run, seconds = self.train("overdone", CHARACTER, sets=sets, alone=True)
        text = (run / "run.yaml").read_text()
        followed = {0: self.kept("overdone-0", "", lambda: self.followed(score.open_model(self.base)))}
        for times in WATCHED:
            step = times * STEPS
            place = run / f"checkpoint-{step}"
            followed[step] = self.kept(f"overdone-{step}", text, lambda place=place: self.followed(opened(place)))
        events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
        validated = {e["step"]: e["loss"] for e in events if e["event"] == "Validated"}
        losses = [validated[step] for step in sorted(validated)]
        return {
            "validation_rise": losses[-1] / min(losses),
            "following_fall": followed[STEPS]["ordinary"] - followed[OVERDONE * STEPS]["ordinary"],
            "training_seconds": seconds,
            "followed": followed,
            "validation_loss": [[step, round(validated[step], 5)] for step in sorted(validated)],
            "loss": running_mean({e["step"]: e["loss"] for e in events if e["event"] == "StepDone"}),
        }

    def train(self, name: str, lesson: Lesson, *, sets: Sequence[str], alone: bool = False) -> tuple[Path, float]:
        """Teach a lesson in a folder of its own; returns the run folder and the seconds of its steps."""
        text = self.run_file(lesson)
        folder = self.work / f"{name}-{self.key(text, *sets)}"
        lessons.write(folder, lesson)
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        chosen = [*sets, f"output={json.dumps(str((folder / 'run').absolute()))}"]
        if alone:
            chosen.append(f"data.sources=[{{path: {json.dumps(str((folder / 'pictures').absolute()))}}}]")
        run = files.load(folder / "run.yaml", sets=chosen).run
        saved = checkpoints.listed(run.folder) if run.folder.is_dir() else {}
        total = run.training.steps or 0
        if max(saved, default=0) < total:
            say(f"{name}: {total} steps")
            stages.train(run, resume="latest" if saved else None)
        lines = (run.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        steps = {e["step"]: e["seconds"] for e in map(json.loads, lines) if e["event"] == "StepDone"}
        return run.folder, round(sum(steps.values()), 1)

    def run_file(self, lesson: Lesson) -> str:
        """The run file of a lesson at its usual length."""
        return lessons.run_file(lesson, base=self.base, every=lesson.steps // 2)

    def of_lesson(self, lesson: Lesson, pipeline: Any) -> Figures:
        """The share of pictures of its unseen prompts that show what it teaches."""
        drawn, shown = drawn_and_read(pipeline, lesson.prompts(UNSEEN))
        figures: Figures = {"rate": share([lesson.learnt(facts) for facts in shown])}
        if lesson is CHARACTER:
            figures["identity_similarity"] = float(np.mean(Identity().scores(drawn, self._taught)))
        return figures

    def of_others(self, pipeline: Any) -> Figures:
        """What has to stay: people of all sorts for "a person", and ordinary prompts."""
        _, people = drawn_and_read(pipeline, ["a person"] * PEOPLE)
        drawn, shown = drawn_and_read(pipeline, self.ordinary)
        return {
            "people_entropy": judge.entropy(people),
            "people": share([facts.is_person for facts in people]),
            "people_who_are_aldar": share([facts.is_aldar for facts in people]),
            "ordinary": score.rates(shown, [captions.parse(text) for text in self.ordinary]),
            "clip_score": float(np.mean(CLIPScore().scores(drawn, self.ordinary))),
        }

    def followed(self, pipeline: Any) -> Figures:
        """The share of prompts that are followed in all they say: ordinary ones, and for Aldar his place and pose."""
        scenes, texts = CHARACTER.unseen(UNSEEN), CHARACTER.prompts(UNSEEN)
        _, him = drawn_and_read(pipeline, texts)
        _, shown = drawn_and_read(pipeline, self.ordinary)
        placed = [facts.place == scene.facts.place and facts.pose == scene.facts.pose
                  for facts, (scene, _) in zip(him, scenes, strict=True)]  # fmt: skip
        ordinary = [follows(facts, captions.parse(text)) for facts, text in zip(shown, self.ordinary, strict=True)]
        return {
            "rate": share([facts.is_aldar for facts in him]),
            "aldar": share(placed),
            "ordinary": share(ordinary),
        }

    def kept(self, name: str, text: str, make: Callable[[], Figures]) -> Figures:
        """The figures from the work folder, or made and put there."""
        file = self.work / f"{name}-{self.key(text)}.json"
        if not file.is_file():
            say(f"measuring {name}")
            found = make()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found, indent=1), encoding="utf-8")
        figures: Figures = json.loads(file.read_text(encoding="utf-8"))
        return figures

    def key(self, *parts: str) -> str:
        """Changes with the base model, the painted world, the judge, the counts, and the parts."""
        text = "\x1f".join([*self._key, *parts])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def opened(target: Path) -> Any:
    """A run or checkpoint as its own pictures are drawn: with the averaged weights."""
    return open_pipeline(str(target), runtime=Runtime.detect("fp32", "cpu"))[0]


def drawn_and_read(pipeline: Any, texts: Sequence[str]) -> tuple[list[Image.Image], list[Facts]]:
    """A picture of each text, and what it shows."""
    drawn = score.draw(pipeline, texts, seed=SEED, emit=quiet)
    return drawn, judge.read_all(drawn)


def follows(shown: Facts, wanted: Facts) -> bool:
    """Whether subject, colour and place are as asked for, where they are asked for."""
    verdict = judge.compare(shown, wanted)
    return all(answer is not False for answer in (verdict.subject, verdict.colour, verdict.place))


def share(answers: Sequence[bool]) -> float:
    """How many of the answers are yes, in [0, 1]."""
    return sum(answers) / len(answers)


def running_mean(losses: dict[int, float], *, width: int = 50) -> list[list[float]]:
    """[step, mean loss of the `width` steps up to it], a point every `width` steps."""
    steps = sorted(losses)
    return [
        [steps[i + width - 1], round(float(np.mean([losses[s] for s in steps[i : i + width]])), 5)]
        for i in range(0, len(steps) - width + 1, width)
    ]


def table(figures: Figures) -> list[str]:
    """The figures and their thresholds, in Markdown."""
    lines = ["| | figure | measured | threshold |", "|---|---|---|---|"]
    for name in figures:
        for threshold in THRESHOLDS:
            if name in threshold.of:
                value = figures[name][threshold.figure]
                mark = "" if threshold.holds(value) else " **missed**"
                lines.append(f"| {name} | {threshold.means} | {value:.3g}{mark} | {threshold.text} |")
    return lines


def plot(overdone: Figures, path: Path) -> None:
    """Loss and validation loss over the steps of the overdone lesson, and how prompts are followed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6), sharex=True, constrained_layout=True)
    top.plot(*zip(*overdone["loss"], strict=True), label="training loss (mean of 50)", color="tab:blue", alpha=0.6)
    top.plot(*zip(*overdone["validation_loss"], strict=True), label="validation loss", color="tab:red")
    top.set_ylabel("loss")
    top.set_ylim(bottom=0)
    top.legend()
    top.set_title("Over-training: the character lesson, ten times as long")
    steps = sorted(overdone["followed"], key=int)
    for key, label in (
        ("rate", "pictures of Aldar that show him"),
        ("aldar", "prompts of Aldar: place and pose followed"),
        ("ordinary", "other prompts followed"),
    ):
        rates = [100 * overdone["followed"][step][key] for step in steps]
        bottom.plot([int(step) for step in steps], rates, "o-", label=label)
    bottom.set_ylabel("%")
    bottom.set_ylim(-3, 103)
    bottom.set_xlabel("step")
    bottom.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def quiet(event: Event) -> None:
    """Drop an event."""


def say(text: str) -> None:
    """A line of progress, with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
