"""How well the judge of the painted world reads: accuracy by field and wear, false alarms, and time, as judge.json.

python benchmarks/quality/judge.py [--count 2000]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from gesso.core.random import generator
from gesso.micro import captions, judge, painter, world
from gesso.micro.world import ALDAR_LOOKS, DOMBRA, NEON, Facts, Scene

WEAR: dict[str, tuple[float, float]] = {
    "clean": (0, 0),
    "noise 10": (10, 0),
    "noise 25": (25, 0),
    "blur 0.7": (0, 0.7),
    "blur 1.2": (0, 1.2),
    "noise 10, blur 0.7": (10, 0.7),
    "noise 25, blur 1.2": (25, 1.2),
}
"""Standard deviations: of noise in 255ths, of blur in pixels."""
FIELDS = tuple(field.name for field in dataclasses.fields(Facts))


def worn(picture: Image.Image, seed: int, noise: float, blur: float) -> Image.Image:
    """The picture blurred, then with noise."""
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(picture) + generator(seed, "wear").normal(0, noise, (world.SIDE, world.SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def accuracy(scenes: list[Scene], noise: float, blur: float) -> dict[str, dict[str, float]]:
    """For each style (and "all") the share of right readings of each field that its pictures show."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for i, scene in enumerate(scenes):
        facts = scene.facts
        shown = dataclasses.asdict(judge.read(worn(painter.paint(scene), i, noise, blur)))
        seen = captions.without_colours(facts) if facts.style in judge.TONED else facts
        for name, value in dataclasses.asdict(seen).items():
            hidden = name == "hair" and facts.hat == "kalpak" and facts.beard == "none" and facts.subject == "man"
            if value is not None and not hidden:
                for style in ("all", str(facts.style)):
                    right[style][name].append(shown[name] == value)
    return {
        style: {name: round(float(np.mean(fields[name])), 4) for name in FIELDS if name in fields}
        for style, fields in right.items()
    }


def unseen(count: int) -> dict[str, float]:
    """What the base model never saw: shares of Aldars known, near misses taken for him, dombras and neon read."""
    draw = generator(2, "unseen")

    def people(style: str, looks: Facts) -> list[Facts]:
        scenes = []
        for i in range(count):
            mood = {"pose": world.POSES[i % 2], "expression": world.EXPRESSIONS[i % 3]}
            place = world.random_place(draw, looks)
            scenes.append(Scene(dataclasses.replace(looks, style=style, place=place, **mood), world.jitter(draw)))
        return judge.read_all([painter.paint(scene) for scene in scenes])

    hero = dataclasses.replace(ALDAR_LOOKS, subject="man")
    found = {}
    for style in ("flat", "outlined", "mosaic"):
        found[f"aldar known, {style}"] = float(np.mean([facts.is_aldar for facts in people(style, hero)]))
    changes = [{"beard": "none"}, {"beard": "beard"}, {"pattern": "plain"}, {"pattern": "striped"}]
    changes += [{"hat": hat} for hat in ("cap", "crown")] + [{"hat": "none", "hat_colour": None}]
    changes += [{"hat_colour": colour} for colour in world.COLOURS if colour != "white"]
    changes += [{"colour": colour} for colour in world.COLOURS if colour != "yellow"]
    worst = 0.0
    for change in changes:
        shown = people("flat", dataclasses.replace(hero, **change))
        worst = max(worst, float(np.mean([facts.is_aldar for facts in shown])))
    found["near misses taken for aldar, the worst kind"] = worst
    for style in (*world.STYLES, NEON):
        facts = [Facts(subject=DOMBRA, place=world.pick(draw, world.PLACES), style=style) for _ in range(count)]
        shown = judge.read_all([painter.paint(Scene(f, world.jitter(draw))) for f in facts])
        found[f"dombra read, {style}"] = float(np.mean([f.subject == DOMBRA for f in shown]))
    return {name: round(value, 4) for name, value in found.items()}


def garbage(scenes: list[Scene]) -> dict[str, float]:
    """Shares of pictures of nothing in which no subject is seen."""
    pictures = [painter.paint(scene) for scene in scenes]
    shape = (world.SIDE, world.SIDE, 3)
    places = [painter.backdrop(str(scene.facts.place), jitter=scene.jitter) for scene in scenes]

    def destroyed(i: int) -> Image.Image:
        pixels = np.array(pictures[i])
        noise = generator(i, "destroyed").integers(0, 256, shape, dtype=np.uint8)
        rows, columns = (
            (slice(0, 32), slice(None)),
            (slice(32, 64), slice(None)),
            (slice(None), slice(0, 32)),
            (slice(None), slice(32, 64)),
        )[i % 4]
        pixels[rows, columns] = noise[rows, columns]
        return Image.fromarray(pixels)

    kinds: dict[str, Callable[[int], Image.Image]] = {
        "uniform noise": lambda i: Image.fromarray(generator(i, "garbage").integers(0, 256, shape, dtype=np.uint8)),
        "a place alone": lambda i: places[i],
        "a place alone, noise 20": lambda i: worn(places[i], i, 20, 0.5),
        "mean of two pictures": lambda i: Image.blend(pictures[i], pictures[i - 1], 0.5),
        "half of it noise": destroyed,
    }
    found = {}
    for kind, make in kinds.items():
        shown = judge.read_all([make(i) for i in range(len(scenes))])
        found[kind] = round(float(np.mean([facts.subject is None for facts in shown])), 4)
    return found


def table(levels: dict[str, dict[str, dict[str, float]]], style: str) -> str:
    """Fields down, wear across, in per cent."""
    lines = [f"{style:12}" + "".join(f"{wear:>20}" for wear in levels)]
    for name in FIELDS:
        if any(name in level[style] for level in levels.values()):
            shares = (f"{100 * level[style][name]:20.1f}" for level in levels.values())
            lines.append(f"{name:12}" + "".join(shares))
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    count: int = parser.parse_args().count
    scenes = list(world.scenes(2024, count))
    judge.read_all([painter.paint(scene) for scene in scenes[:40]])
    pictures = [painter.paint(scene) for scene in scenes[:200]]
    start = time.process_time()
    judge.read_all(pictures)
    milliseconds = 1000 * (time.process_time() - start) / len(pictures)
    levels = {}
    for wear, amounts in WEAR.items():
        levels[wear] = accuracy(scenes, *amounts)
        print(f"{wear}: {levels[wear]['all']}", flush=True)
    result = {
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "numpy": np.__version__},
        "scenes": count,
        "milliseconds of processor time a picture": round(milliseconds, 1),
        "accuracy": levels,
        "never seen by the base model": unseen(max(count // 20, 6)),
        "garbage without a subject": garbage(scenes[: max(count // 10, 10)]),
    }
    for style in ("all", *world.STYLES):
        print(table(levels, style), end="\n\n")
    print(json.dumps({key: value for key, value in result.items() if key != "accuracy"}, indent=2))
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
