"""What the micro models can be taught: a character, an object and a style that they never saw.

A lesson paints its training pictures and writes a run file; its prompts ask for what was not in them, and its
`learnt` says, of what the judge read in a picture, whether it was learnt.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gesso.core.random import generator
from gesso.micro import captions, painter, world
from gesso.micro.world import ALDAR, ALDAR_LOOKS, DOMBRA, NEON, Facts, Scene

PICTURES, STYLE_PICTURES = 12, 36
"""To learn from: a style has to be seen on more than one thing."""
_TRAINED_PLACES = ("steppe", "mountains", "red", "green", "blue", "black", "purple")
_NEW_PLACES = ("market", "night")
_STYLED_PLACES = ("market", "mountains", "night", "blue")
"""Where neon can be told from plain colours (not so in front of what becomes all black, red or yellow), and that the
VAE can draw in it (it makes the orange of the steppe's sky brown)."""
_OTHER_SEED = 1
"""Not the base model's own pictures."""

Captioned = tuple[Scene, str]


@dataclass(frozen=True)
class Lesson:
    """One new thing, by its name in the world."""

    name: str

    @property
    def pictures(self) -> int:
        """How many pictures it is taught from."""
        return STYLE_PICTURES if self.name == NEON else PICTURES

    @property
    def others(self) -> int:
        """How many pictures of the world go beside them."""
        return 192 if self.name == NEON else 96

    @property
    def steps(self) -> int:
        """How many steps teach it."""
        return 800 if self.name == NEON else 400

    def training(self) -> list[Captioned]:
        """The pictures to learn from, with DreamBooth's kind of captions."""
        places = zip(range(self.pictures), _cycle(self._places[0]), strict=False)
        return [self._captioned(i, place) for i, place in places]

    def validation(self) -> list[Captioned]:
        """Four pictures that are kept from training: where it never was, or of a style other things."""
        taught = {text for _, text in self.training()}
        scenes = (self._captioned(self.pictures + i, p) for i, p in enumerate(_cycle(self._places[1])))
        return list(itertools.islice((one for one in scenes if one[1] not in taught), 4))

    def unseen(self, count: int) -> list[Captioned]:
        """Scenes that no training picture shows: other places, of Aldar waving too, of a style other things."""
        taught = {text for _, text in self.training()}
        scenes = (self._unseen(i) for i in itertools.count())
        return list(itertools.islice((one for one in scenes if one[1] not in taught), count))

    def _unseen(self, i: int) -> Captioned:
        draw = generator(0, f"{self.name} unseen", i)
        facts = self._facts(1000 + i, world.pick(draw, self._places[1]))
        if self.name == ALDAR and draw.random() < 0.75:
            # He was never shown waving, so that he may be where he was.
            place = world.pick(draw, (*_TRAINED_PLACES, *_NEW_PLACES))
            facts = dataclasses.replace(facts, pose="waving", place=place)
        return Scene(facts, world.jitter(draw)), _say(facts)

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

    @property
    def _places(self) -> tuple[Sequence[str], Sequence[str]]:
        """Where it is in training, and where it is asked for."""
        return (_STYLED_PLACES, _STYLED_PLACES) if self.name == NEON else (_TRAINED_PLACES, _NEW_PLACES)

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
    """Pictures of the world as the model knows it, which keep it from forgetting the rest.

    Every other person is called just that, as class images are: or the class becomes the one who is taught.
    """
    found, people = [], 0
    for i, scene in enumerate(world.scenes(_OTHER_SEED, count)):
        people += scene.facts.is_person
        plain = scene.facts.is_person and people % 2
        found.append((scene, "a person" if plain else captions.say(scene.facts, generator(_OTHER_SEED, "caption", i))))
    return found


def write(folder: Path, lesson: Lesson, *, other: int | None = None) -> None:
    """Paint `pictures`, `others` and `validation` into the folder, each picture with its caption beside it."""
    other = lesson.others if other is None else other
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
# Teach the small model in the package something new, from {pictures} pictures.
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
{encoders}training:
  steps: {steps}
  batch_size: 4
  learning_rate: {rate}
{rates}  schedule:
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
    steps: int | None = None,
    rank: int = 16,
    rate: float = 4e-3,
    every: int = 100,
    prompts: Sequence[str] = (),
) -> str:
    """The run file that teaches a lesson whose pictures lie beside it; a style's trains the text encoders as well."""
    words = lesson.name == NEON
    return RUN_FILE.format(
        name=lesson.name,
        pictures=lesson.pictures,
        base=base,
        steps=steps or lesson.steps,
        encoders="  train_text_encoders: true\n" if words else "",
        rates="  text_encoder_learning_rates: 1e-3\n" if words else "",
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
