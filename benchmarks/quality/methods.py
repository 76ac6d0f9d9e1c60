"""What each training method does, measured: prior preservation, every kind of adapter, masks, preferences.

    python benchmarks/quality/methods.py                 # everything; writes methods.json and the table in docs/
    python benchmarks/quality/methods.py --only dpo      # prints, writes nothing

The pictures are read by the judge of the painted world, as in `lessons.py`; a threshold that is missed means exit
status 1. Trainings and measurements that are done are kept in the work folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lessons import Bench, Figures, Threshold, drawn_and_read, follows, opened, say, share
from material import (
    LIKED,
    MASKED_PLACE,
    as_dana,
    colourless,
    danas,
    instance,
    is_dana,
    named,
    painted,
    pairs,
    repainted,
    silhouette,
)
from mutations import between

from gesso import stages
from gesso.config import files
from gesso.core import checkpoints, resolve
from gesso.core.provenance import provenance
from gesso.micro import captions, judge, lessons, score, world
from gesso.micro.lessons import CHARACTER

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "quality.md"
UNSEEN, PEOPLE, ORDINARY = 64, 64, 48
CLASS_PROMPT, CLASS_IMAGES, CLASS_GUIDANCE = "a photo of a person", 200, 2.0
"""Little guidance for class images: what is trained on guided pictures and drawn with guidance is guided twice, and
less varied for it."""
LONGER = "training.steps=600"
GENTLY = "training.learning_rate=2.0e-3"
PRESERVED = "objective={type: dreambooth, min_snr_gamma: 5}"

COMMON = """\
name: {name}
model: {{base: "{base}"}}
data:
  sources: {sources}
  resolution: 64
  buckets: {{enabled: false}}
  cache: {cache}
training:
  steps: 400
  batch_size: 4
  learning_rate: 4.0e-3
  schedule: {{type: cosine, warmup: 10}}
  precision: fp32
  device: cpu
  ema: {{enabled: true, decay: 0.98}}
adapter: {{rank: 16, targets: all-linear}}
objective: {{min_snr_gamma: 5}}
checkpoint: {{every: 400, keep_last: 1}}
trackers: []
"""
LEARNERS: dict[str, list[str]] = {
    "lora": [],
    "dora": ["adapter={type: lora, rank: 16, targets: all-linear, dora: true}"],
    "lokr": [
        "adapter={type: lokr, rank: 16, factor: 2, targets: all-linear}",
        "training.learning_rate=1.0e-2",
        "training.steps=800",
    ],
    "full": ["adapter={type: full}", "training.learning_rate=2.0e-3", "training.steps=600"],
    "textual inversion": [
        "adapter={type: embedding, tokens: [{token: <aldar>, initial: man, vectors: 4}]}",
        "training.learning_rate=2.0e-2",
        "training.steps=800",
    ],
    "pivotal": ["adapter={type: lora, rank: 16, targets: all-linear, tokens: [{token: <aldar>, initial: man}]}"],
}
"""The settings with which each kind of adapter is taught the character."""

LEARNT = ("lora", "dora", "lokr", "full", "pivotal")
THRESHOLDS = (
    Threshold("entropy", most=0.70, of=("without prior",), means="attribute entropy of the class, of the base model's"),
    Threshold("entropy", least=0.90, of=("with prior",), means="attribute entropy of the class, of the base model's"),
    Threshold("rate", least=0.85, of=("without prior", "with prior"), means="share of pictures that show him"),
    Threshold("rate", least=0.85, of=LEARNT, means="share of pictures that show the character"),
    Threshold("rate", least=0.75, of=("textual inversion",), means="share of pictures that show the character"),
    Threshold("place", least=0.80, of=("without a mask",), means="share of pictures with the place that was masked"),
    Threshold("place", most=0.30, of=("with a mask",), means="share of pictures with the place that was masked"),
    Threshold("rate", least=0.85, of=("with a mask",), means="share of pictures that show the character"),
    Threshold(
        "rate", least=0.85, of=("two characters",), means="share of pictures that show who was asked for, the worse"
    ),
    Threshold("mixed", most=0.05, of=("two characters",), means="share of pictures that show the other one"),
    Threshold("win_rate", least=0.75, of=("dpo",), means="share of prompts won against the base model, ties half"),
    Threshold("following_fall", most=0.03, of=("dpo",), means="by how much the share of followed prompts falls"),
    Threshold("win_rate", most=0.45, of=("dpo, labels reversed",), means="share of prompts won, ties half"),
)


class Methods(Bench):
    """`Bench` with the lessons of each method."""

    def measure(self, only: Sequence[str]) -> dict[str, Figures]:
        """The figures of every part, or of some, by name."""
        parts: dict[str, Callable[[], Figures]] = {
            "without prior": lambda: self.prior("without prior", [GENTLY]),
            "with prior": lambda: self.prior("with prior", [GENTLY, PRESERVED]),
            **{name: (lambda name=name: self.adapter(name)) for name in LEARNERS},
            "without a mask": lambda: self.mask("without a mask", "none"),
            "with a mask": lambda: self.mask("with a mask", "file"),
            "two characters": self.two_characters,
            "dpo": lambda: self.preference("dpo"),
            "dpo, labels reversed": lambda: self.preference("dpo, labels reversed"),
        }
        return {name: make() for name, make in parts.items() if not only or any(one in name for one in only)}

    def prior(self, name: str, sets: list[str]) -> Figures:
        """DreamBooth with the class's own word: does "a person" stay a class of people?"""
        folder = self.folder(name)
        rows = [(scene, instance(text)) for scene, text in CHARACTER.training()]
        sources = [painted(folder / "pictures", rows)]
        if PRESERVED in sets:
            sources.append({"path": str(self.class_images()), "role": "prior"})
        figures = self.trained(name, sources, sets, self.of_prior)
        base = self.kept("base-prior", "", lambda: self.of_prior(score.open_model(self.base)))
        return {**figures, "entropy": figures["people_entropy"] / base["people_entropy"], "base": base}

    def of_prior(self, pipeline: Any) -> Figures:
        """Of his prompts the share that shows him, and how varied people are."""
        texts = [instance(text) for text in CHARACTER.prompts(UNSEEN)]
        _, shown = drawn_and_read(pipeline, texts)
        _, people = drawn_and_read(pipeline, [CLASS_PROMPT] * PEOPLE)
        return {
            "rate": share([facts.is_aldar for facts in shown]),
            "people_entropy": judge.entropy(people),
            "people_who_are_aldar": share([facts.is_aldar for facts in people]),
        }

    def class_images(self) -> Path:
        """Pictures of the class that the base model draws."""
        folder = self.work / f"class-{self.key(CLASS_PROMPT, str(CLASS_IMAGES), str(CLASS_GUIDANCE))}"
        if not (folder / "done").is_file():
            say(f"drawing {CLASS_IMAGES} class images")
            pipeline = score.open_model(self.base)
            side = {"width": world.SIDE, "height": world.SIDE, "num_inference_steps": score.STEPS}
            drawn = []
            for start in range(0, CLASS_IMAGES, 50):
                seeds = [torch.Generator().manual_seed(999 + start + i) for i in range(50)]
                drawn += pipeline([CLASS_PROMPT] * 50, guidance_scale=CLASS_GUIDANCE, generator=seeds, **side).images
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(drawn):
                picture.save(folder / f"{i:03d}.png")
                (folder / f"{i:03d}.txt").write_text(f"{CLASS_PROMPT}\n", encoding="utf-8")
            (folder / "done").touch()
        return folder

    def adapter(self, name: str) -> Figures:
        """The character by one kind of adapter, beside pictures of the world."""
        token = "tokens" in " ".join(LEARNERS[name])
        rows = [(scene, named(text, token)) for scene, text in CHARACTER.training()]
        folder = self.folder(name)
        sources = [{**painted(folder / "pictures", rows), "repeats": 4}]
        sources.append(painted(folder / "others", lessons.others(CHARACTER.others)))
        if name == "textual inversion":
            sources = sources[:1]  # the network stands still, so that there is nothing to keep
        texts = [named(text, token) for text in CHARACTER.prompts(UNSEEN)]

        def figures(pipeline: Any) -> Figures:
            _, shown = drawn_and_read(pipeline, texts)
            return {"rate": share([facts.is_aldar for facts in shown])}

        return self.trained(name, sources, LEARNERS[name], figures)

    def mask(self, name: str, kind: str) -> Figures:
        """Pictures that all have one background, which the mask leaves out: is it learnt?"""
        rows = [(repainted(scene, place=MASKED_PLACE), "a photo of sks aldar") for scene, _ in CHARACTER.training()]
        folder = self.folder(name)
        source = painted(folder / "pictures", rows)
        for i, (scene, _) in enumerate(rows, start=1):
            silhouette(scene).save(folder / "pictures" / f"{i:02d}-masklabel.png")
        sources = [{**source, "repeats": 4, "mask": kind}, painted(folder / "others", lessons.others(96))]
        texts = CHARACTER.prompts(UNSEEN)

        def figures(pipeline: Any) -> Figures:
            _, plain = drawn_and_read(pipeline, ["a photo of sks aldar"] * PEOPLE)
            _, shown = drawn_and_read(pipeline, texts)
            return {
                "place": share([facts.place == MASKED_PLACE for facts in plain]),
                "rate": share([facts.is_aldar for facts in shown]),
            }

        return self.trained(name, sources, [LONGER], figures)

    def two_characters(self) -> Figures:
        """Two people in one adapter, each by a word of their own: is each learnt, and neither like the other?"""
        folder = self.folder("two characters")
        rows = {
            "aldar": CHARACTER.training(),
            "dana": [(as_dana(scene), danas(t)) for scene, t in CHARACTER.training()],
        }
        sources = [{**painted(folder / who, of), "repeats": 4} for who, of in rows.items()]
        sources.append(painted(folder / "others", lessons.others(2 * CHARACTER.others)))
        prompts = CHARACTER.prompts(UNSEEN)

        def figures(pipeline: Any) -> Figures:
            his, hers = (drawn_and_read(pipeline, texts)[1] for texts in (prompts, list(map(danas, prompts))))
            return {
                "aldar": share([facts.is_aldar for facts in his]),
                "dana": share([is_dana(facts) for facts in hers]),
                "mixed": share([is_dana(f) for f in his] + [f.is_aldar for f in hers]),
            }

        found = self.trained("two characters", sources, ["training.steps=800"], figures)
        return {**found, "rate": min(found["aldar"], found["dana"])}

    def preference(self, name: str) -> Figures:
        """Pairs that differ in the colour alone, of which one is always preferred."""
        folder = self.folder(name) / "pairs"
        reversed_ = "reversed" in name
        pairs(folder, reverse=reversed_)
        sets = [
            "adapter={rank: 16, targets: all-linear}",
            "objective={type: dpo, beta: 2000}",
            "training.learning_rate=2.0e-4",
            "training.steps=150",
            "training.ema={enabled: false}",
            "data.validation={fraction: 0.05}",
            "validation={every: 25, timesteps: 8}",
        ]
        before = self.kept("base-dpo", "", lambda: self.of_preference(score.open_model(self.base)))
        after = self.trained(name, [{"path": str(folder)}], sets, self.of_preference)
        wins = [0.5 if a == b else float(a) for a, b in zip(after["liked"], before["liked"], strict=True)]
        return {
            "win_rate": float(np.mean(wins)),
            "liked": [share(before["liked"]), share(after["liked"])],
            "following_fall": before["followed"] - after["followed"],
            "followed": [before["followed"], after["followed"]],
            "held_out": after["held_out"],
            "training_seconds": after["training_seconds"],
        }

    def of_preference(self, pipeline: Any) -> Figures:
        """Which of the unseen prompts' pictures have the colour, and the share of other prompts that are followed."""
        _, shown = drawn_and_read(pipeline, colourless(UNSEEN))
        _, other = drawn_and_read(pipeline, self.ordinary)
        wanted = [captions.parse(text) for text in self.ordinary]
        return {
            "liked": [facts.colour == LIKED for facts in shown],
            "followed": share([follows(facts, want) for facts, want in zip(other, wanted, strict=True)]),
        }

    def folder(self, name: str) -> Path:
        """Where a part's pictures and run lie."""
        plain = name.replace(" ", "-").replace(",", "")
        return self.work / f"{plain}-{self.key(COMMON, *LEARNERS.get(name, []))}"

    def trained(
        self, name: str, sources: list[dict[str, Any]], sets: Sequence[str], figures: Callable[[Any], Figures]
    ) -> Figures:
        """Train what is not trained yet, and measure what is not measured."""
        folder = self.folder(name)
        cache = json.dumps(str(self.work / "cache"))
        text = COMMON.format(name=name.replace(",", ""), base=self.base, sources=json.dumps(sources), cache=cache)
        place = folder / f"run-{self.key(text, *sets)}"
        output = f"output={json.dumps(str(place.absolute()))}"
        run = files.load_text(text, folder=Path.cwd(), file=name, sets=[*sets, output]).run
        saved = checkpoints.listed(run.folder) if run.folder.is_dir() else {}
        if max(saved, default=0) < (run.training.steps or 0):
            say(f"{name}: {run.training.steps} steps")
            stages.train(run, resume="latest" if saved else None)
        found = self.kept(f"after-{name}", text + "".join(sets), lambda: figures(opened(run.folder)))
        lines = (run.folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = {e["step"]: e["seconds"] for e in map(json.loads, lines) if e["event"] == "StepDone"}
        told = [e for e in map(json.loads, lines) if e["event"] == "Validated"]
        held_out = [[e["step"], round(e["loss"], 4), e["measures"]] for e in told]
        return {**found, "training_seconds": round(sum(seconds.values()), 1), "held_out": held_out}


def table(figures: dict[str, Figures]) -> list[str]:
    """The figures and their thresholds, in Markdown."""
    lines = ["| | figure | measured | threshold |", "|---|---|---|---|"]
    for threshold in THRESHOLDS:
        for name in threshold.of:
            if name in figures:
                value = figures[name][threshold.figure]
                mark = "" if threshold.holds(value) else " **missed**"
                lines.append(f"| {name} | {threshold.means} | {value:.3g}{mark} | {threshold.text} |")
    return lines


def main() -> int:
    """Measure, write, and say which thresholds were missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="micro:sdxl", help="another SDXL folder for the painted world")
    parser.add_argument("--work", type=Path, default=resolve.cache_root() / "methods", help="where trainings are kept")
    parser.add_argument("--only", action="append", default=[], help="parts whose names hold this; repeatable")
    args = parser.parse_args()
    bench = Methods(args.base, args.work)
    with score.one_thread():
        figures = bench.measure(args.only)
    print("\n".join(table(figures)))
    missed = [
        f"{name}: {threshold.figure} is {figures[name][threshold.figure]:.3g}, not {threshold.text}"
        for threshold in THRESHOLDS
        for name in threshold.of
        if name in figures and not threshold.holds(figures[name][threshold.figure])
    ]
    if not args.only:
        record = {
            "provenance": provenance(),
            "base": {"name": args.base, "sha256": bench.base_hash},
            "run_file": COMMON,
            "learners": LEARNERS,
            "thresholds": [dataclasses.asdict(threshold) for threshold in THRESHOLDS],
            "figures": figures,
            "missed": missed,
        }
        (HERE / "methods.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        between(PAGE, "methods", "\n".join(table(figures)))
    print("\n".join(f"MISSED {line}" for line in missed) or "every threshold is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
