"""What the micro models can be taught: a character, an object and a style that they never saw.

A lesson paints its twelve training pictures and writes a run file; its prompts ask for what was not in them, and its
`learnt` says, of what the judge read in a picture, whether it was learnt.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gesso.core.random import generator
from gesso.micro import captions, painter, world
from gesso.micro.world import ALDAR, ALDAR_LOOKS, DOMBRA, NEON, Facts, Scene

PICTURES = 12
_TRAINED_PLACES = ("steppe", "mountains", "red", "green", "blue", "black", "purple")
_NEW_PLACES = ("market", "night")
_OTHER_SEED = 1
"""Not the base model's own pictures."""

Captioned = tuple[Scene, str]


@dataclass(frozen=True)
class Lesson:
    """One new thing, by its name in the world."""

    name: str

    def training(self) -> list[Captioned]:
        """The twelve pictures to learn from, with DreamBooth's kind of captions."""
        return [self._captioned(i, place) for i, place in zip(range(PICTURES), _cycle(_TRAINED_PLACES), strict=False)]

    def validation(self) -> list[Captioned]:
        """Four pictures that are kept from training, where it never was."""
        return [self._captioned(PICTURES + i, place) for i, place in zip(range(4), _cycle(_NEW_PLACES), strict=False)]

    def unseen(self, count: int) -> list[Captioned]:
        """Scenes that none of the training pictures shows: other places, and of Aldar waving too."""
        found = []
        for i in range(count):
            draw = generator(0, f"{self.name} unseen", i)
            facts = self._facts(1000 + i, world.pick(draw, _NEW_PLACES))
            if self.name == ALDAR and draw.random() < 0.75:
                # He was never shown waving, so that he may be where he was.
                place = world.pick(draw, (*_TRAINED_PLACES, *_NEW_PLACES))
                facts = dataclasses.replace(facts, pose="waving", place=place)
            found.append((Scene(facts, world.jitter(draw)), _say(facts)))
        return found

    def prompts(self, count: int) -> list[str]:
        """What the trained model is asked for: the captions of `unseen`."""
        return [text for _, text in self.unseen(count)]

    def learnt(self, shown: Facts) -> bool:
        """Whether a picture with these facts shows it."""
        match self.name:
            case world.ALDAR:
                return shown.is_aldar
            case world.DOMBRA:
                return shown.subject == DOMBRA
        return shown.style == NEON

    def _captioned(self, i: int, place: str) -> Captioned:
        facts = self._facts(i, place)
        return Scene(facts, world.jitter(generator(0, self.name, i))), _say(facts)

    def _facts(self, i: int, place: str) -> Facts:
        draw = generator(0, f"{self.name} facts", i)
        match self.name:
            case world.ALDAR:
                mood = world.pick(draw, world.EXPRESSIONS)
                return dataclasses.replace(ALDAR_LOOKS, place=place, style="flat", expression=mood, pose="standing")
            case world.DOMBRA:
                return Facts(subject=DOMBRA, place=place, style="flat")
        while True:
            facts = world.random_facts(draw)
            if not facts.resembles_aldar:
                return dataclasses.replace(facts, place=place, style=NEON)


CHARACTER, OBJECT, STYLE = Lesson(ALDAR), Lesson(DOMBRA), Lesson(NEON)
LESSONS = (CHARACTER, OBJECT, STYLE)


def others(count: int) -> list[Captioned]:
    """Pictures of the world as the model knows it, which keep it from forgetting the rest."""
    return [
        (scene, captions.say(scene.facts, generator(_OTHER_SEED, "caption", i)))
        for i, scene in enumerate(world.scenes(_OTHER_SEED, count))
    ]


def write(folder: Path, lesson: Lesson, *, other: int = 48) -> None:
    """Paint `pictures`, `others` and `validation` into the folder, each picture with its caption beside it."""
    for name, rows in {
        "pictures": lesson.training(),
        "others": others(other),
        "validation": lesson.validation(),
    }.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, (scene, text) in enumerate(rows, start=1):
            painter.paint(scene).save(folder / name / f"{i:02d}.png")
            (folder / name / f"{i:02d}.txt").write_text(text + "\n", encoding="utf-8")


RUN_FILE = """\
# Teach the small model in the package something new, from twelve pictures.
name: {name}
model:
  base: {base}
data:
  sources:
    - path: pictures
      repeats: 4
    # The world as the model knows it, so that it learns without forgetting the rest.
    - path: others
  validation:
    path: validation
  resolution: 64
  buckets:
    enabled: false
  cache: cache
adapter:
  rank: {rank}
  targets: all-linear
training:
  steps: {steps}
  batch_size: 4
  learning_rate: {rate}
  schedule:
    type: cosine
    warmup: 10
  precision: fp32
  device: cpu
  ema:
    enabled: true
    decay: 0.98
objective:
  min_snr_gamma: 5
validation:
  every: {validate}
  timesteps: 8
preview:
  every: {every}
  seed: 1
  inference_steps: 20
  guidance: 4
  prompts: {prompts}
checkpoint:
  every: {every}
  keep_last: 10
"""


def run_file(
    lesson: Lesson,
    *,
    base: str = "micro:sdxl",
    steps: int = 400,
    rank: int = 16,
    rate: float = 4e-3,
    every: int = 100,
    prompts: Sequence[str] = (),
) -> str:
    """The run file that teaches a lesson whose pictures lie beside it."""
    return RUN_FILE.format(
        name=lesson.name,
        base=base,
        steps=steps,
        rank=rank,
        rate=rate,
        every=every,
        validate=max(every // 5, 1),
        prompts=json.dumps(list(prompts)),
    )


def _say(facts: Facts) -> str:
    """A caption without the mood, which the name of a character has no place for."""
    return captions.caption(dataclasses.replace(facts, expression=None), prefix="a photo of ")


def _cycle(places: Sequence[str]) -> Iterator[str]:
    while True:
        yield from places
