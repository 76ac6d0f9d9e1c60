"""The judge of the small world reads what the painter painted, also noisy and blurred, and nothing where nothing is."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from gesso.core.random import generator
from gesso.micro import captions, judge, painter, templates, world
from gesso.micro.world import ALDAR, ALDAR_LOOKS, DOMBRA, NEON, Facts, Scene

COUNT = 600
SHARP = ("flat", "outlined")


@functools.cache
def _scenes() -> tuple[Scene, ...]:
    return tuple(world.scenes(71, COUNT))


def _worn(picture: Image.Image, seed: int, *, noise: float = 0.0, blur: float = 0.0) -> Image.Image:
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(picture) + generator(seed, "noise").normal(0, noise, (world.SIDE, world.SIDE, 3))
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def _visible(facts: Facts) -> Facts:
    return captions.without_colours(facts) if facts.style in judge.TONED else facts


def _accuracy(scenes: Iterable[Scene], pictures: Iterable[Image.Image], styles: Sequence[str] = ()) -> dict[str, float]:
    """Share of right readings for each field that the scenes have; hair where it is seen at all."""
    right: dict[str, list[bool]] = defaultdict(list)
    for scene, picture in zip(scenes, pictures, strict=True):
        if styles and scene.facts.style not in styles:
            continue
        shown = dataclasses.asdict(judge.read(picture))
        for name, value in dataclasses.asdict(_visible(scene.facts)).items():
            if value is not None and not (name == "hair" and shown[name] is None and shown["hat"] == "kalpak"):
                right[name].append(shown[name] == value)
    return {name: float(np.mean(values)) for name, values in right.items()}


def _at_least(found: dict[str, float], **least: float) -> None:
    low = {name: (found[name], share) for name, share in least.items() if found[name] < share}
    assert not low, low


def test_reads_what_was_painted() -> None:
    found = _accuracy(_scenes(), map(painter.paint, _scenes()))
    _at_least(found, subject=0.99, colour=0.99, place=0.99, style=0.99, pattern=0.98, hat=0.98, hat_colour=0.98)
    _at_least(found, beard=0.98, pose=0.98, hair=0.97, expression=0.93)


@pytest.mark.parametrize(
    ("noise", "blur", "least"),
    [
        (10, 0, {"subject": 0.98, "colour": 0.98, "place": 0.98, "pattern": 0.97, "hat": 0.97, "beard": 0.95}),
        (25, 0, {"subject": 0.97, "colour": 0.97, "place": 0.98, "pattern": 0.95, "hat": 0.95, "beard": 0.93}),
        (0, 0.7, {"subject": 0.98, "colour": 0.98, "place": 0.98, "pattern": 0.97, "hat": 0.97, "beard": 0.95}),
        (0, 1.2, {"subject": 0.97, "colour": 0.97, "place": 0.98, "pattern": 0.93, "hat": 0.97, "beard": 0.93}),
        (10, 0.7, {"subject": 0.98, "colour": 0.98, "place": 0.98, "pattern": 0.97, "hat": 0.97, "beard": 0.95}),
        (25, 1.2, {"subject": 0.96, "colour": 0.96, "place": 0.98, "pattern": 0.93, "hat": 0.95, "beard": 0.92}),
    ],
)
def test_reads_noisy_and_blurred_pictures(noise: float, blur: float, least: dict[str, float]) -> None:
    scenes = [scene for scene in _scenes() if scene.facts.style in SHARP][:60]
    pictures = [_worn(painter.paint(scene), i, noise=noise, blur=blur) for i, scene in enumerate(scenes)]
    _at_least(_accuracy(scenes, pictures), **least)


def test_reads_colours_that_are_off_and_sizes_beyond_the_usual() -> None:
    scenes = [
        replace(scene, jitter=replace(scene.jitter, scale=0.88 if i % 2 else 1.1))
        for i, scene in enumerate(_scenes()[:120])
        if scene.facts.style in SHARP
    ]
    draw = generator(1, "tint")
    pictures = [
        Image.fromarray((np.asarray(painter.paint(s)) + draw.uniform(-15, 15, 3)).clip(0, 255).astype(np.uint8))
        for s in scenes
    ]
    _at_least(_accuracy(scenes, pictures), subject=0.97, colour=0.97, place=0.97, pattern=0.95, hat=0.95, style=0.95)


def _aldars(count: int, style: str = "flat", looks: Facts = ALDAR_LOOKS) -> list[Scene]:
    draw = generator(5, "aldar", style)
    found = []
    for i in range(count):
        facts = replace(
            looks,
            subject="man",
            style=style,
            pose=world.POSES[i % 2],
            expression=world.EXPRESSIONS[i % 3],
            place=world.pick(draw, [p for p in world.PLACES if p not in (looks.colour, looks.hat_colour)]),
        )
        found.append(Scene(facts, replace(world.jitter(draw), skin=i // 6 % 3)))
    return found


@pytest.mark.parametrize(("style", "least"), [("flat", 0.99), ("outlined", 0.99), ("mosaic", 0.92)])
def test_knows_aldar(style: str, least: float) -> None:
    shown = judge.read_all([painter.paint(scene) for scene in _aldars(54, style)])
    assert np.mean([facts.is_aldar for facts in shown]) >= least


def test_painted_as_aldar_he_is_read_as_a_man() -> None:
    scene = _aldars(1)[0]
    shown = judge.read(painter.paint(replace(scene, facts=replace(scene.facts, subject=ALDAR))))
    assert shown.subject == "man"
    assert judge.compare(shown, captions.parse("a photo of sks aldar")).subject is True


_NEAR = (
    *({"beard": beard} for beard in ("none", "beard")),
    *({"hat": hat, "hat_colour": "white" if hat != "none" else None} for hat in ("none", "cap", "crown")),
    *({"hat_colour": colour} for colour in world.COLOURS if colour != "white"),
    *({"colour": colour} for colour in world.COLOURS if colour != "yellow"),
    *({"pattern": pattern} for pattern in ("plain", "striped")),
)


@pytest.mark.parametrize("change", _NEAR, ids=lambda change: "-".join(str(value) for value in change.values()))
def test_nobody_else_is_aldar(change: dict[str, str]) -> None:
    looks = replace(ALDAR_LOOKS, **change)
    pictures = [painter.paint(scene) for style in SHARP for scene in _aldars(6, style, looks)]
    worn = [_worn(picture, i, noise=10, blur=0.7) for i, picture in enumerate(pictures[::3])]
    assert not any(facts.is_aldar for facts in judge.read_all([*pictures, *worn]))


TELLABLE = (*world.SCENERY, "blue")
"""Where neon can be told from plain colours."""


@pytest.mark.parametrize("style", ["flat", "outlined", "sepia", NEON, "mosaic"])
def test_reads_the_dombra(style: str) -> None:
    draw = generator(8, "dombra")
    places = [p for p in world.PLACES * 2 if style != NEON or p in TELLABLE]
    scenes = [Scene(Facts(subject=DOMBRA, place=p, style=style), world.jitter(draw)) for p in places]
    shown = judge.read_all([painter.paint(scene) for scene in scenes])
    assert np.mean([facts.subject == DOMBRA for facts in shown]) >= 0.95
    assert all(facts.colour is None for facts in shown if facts.subject == DOMBRA)


def test_reads_neon() -> None:
    scenes = [
        replace(scene, facts=replace(scene.facts, style=NEON)) for scene in _scenes() if scene.facts.place in TELLABLE
    ]
    scenes = scenes[:80]
    found = _accuracy(scenes, map(painter.paint, scenes))
    _at_least(found, style=0.99, subject=0.97, place=0.97, hat=0.93, pose=0.95)
    assert not {"colour", "hat_colour", "hair"} & set(found)


def _backdrops(count: int) -> list[Image.Image]:
    found = []
    for scene in _scenes()[:count]:
        picture = painter.backdrop(str(scene.facts.place), jitter=scene.jitter)
        match scene.facts.style:
            case "sepia":
                picture = painter.toned(picture, painter.TONES["sepia"])
            case "mosaic":
                picture = painter.tiled(picture)
        found.append(picture)
    return found


def _halves(count: int) -> list[Image.Image]:
    found = []
    for i, scene in enumerate(_scenes()[:count]):
        pixels = np.array(painter.paint(scene))
        noise = generator(i, "half").integers(0, 256, pixels.shape, dtype=np.uint8)
        half = ((slice(32), slice(64)), (slice(32, 64), slice(64)), (slice(64), slice(32)), (slice(64), slice(32, 64)))
        pixels[half[i % 4]] = noise[half[i % 4]]
        found.append(Image.fromarray(pixels))
    return found


@pytest.mark.parametrize("kind", ["noise", "blank", "blank and noisy", "half destroyed"])
def test_sees_nothing_where_there_is_nothing(kind: str) -> None:
    shape = (world.SIDE, world.SIDE, 3)
    match kind:
        case "noise":
            arrays = [generator(i, "garbage").integers(0, 256, shape, dtype=np.uint8) for i in range(12)]
            pictures = [Image.fromarray(array) for array in arrays]
        case "blank":
            pictures = _backdrops(60)
        case "blank and noisy":
            pictures = [_worn(picture, i, noise=20, blur=0.5) for i, picture in enumerate(_backdrops(60))]
        case _:
            pictures = _halves(24)
    shown = judge.read_all(pictures)
    assert np.mean([facts.subject is None for facts in shown]) >= 0.95
    for facts in shown:
        if facts.subject is None:
            assert (facts.colour, facts.hat, facts.pattern, facts.pose) == (None, None, None, None)


def test_the_mean_of_two_pictures_shows_neither() -> None:
    pictures = [painter.paint(scene) for scene in _scenes()[:80]]
    shown = judge.read_all([Image.blend(a, b, 0.5) for a, b in zip(pictures[::2], pictures[1::2], strict=True)])
    assert np.mean([facts.subject is None for facts in shown]) >= 0.9


def test_an_empty_place_is_still_a_place() -> None:
    shown = judge.read_all([painter.backdrop(name) for name in world.PLACES])
    assert [facts.place for facts in shown] == list(world.PLACES)


def test_other_sizes_are_read_too() -> None:
    scene = Scene(Facts(subject="cat", colour="red", place="night", style="flat"))
    large = painter.paint(scene).resize((256, 256), Image.Resampling.BICUBIC)
    assert judge.read(large) == scene.facts


@pytest.mark.parametrize("outlined", [False, True])
@pytest.mark.parametrize("look", [0, 5, 9, 13, 20, -1])
def test_templates_are_what_the_painter_paints(look: int, outlined: bool) -> None:
    facts = replace(templates.LOOKS[look], place="green", style="outlined" if outlined else "flat")
    scale, margin = templates.SCALES[4], templates.MARGIN
    place = templates.pixels_of(painter.backdrop("green"))
    page = templates.sheet(scale, outlined=outlined)
    values = {"colour": "blue", "hat_colour": "blue", "hair": "brown", "skin": "0", "fixed": ""}
    shown = place.copy()
    for group in page.looks[look]:
        value = templates.VALUES[page.factors[group]].index(values[page.factors[group]])
        for part in page.groups[group]:
            cover = page.cover[part].reshape(templates.SPAN, templates.SPAN, 1)[margin:-margin, margin:-margin]
            shown += cover * (page.colours[part, value] - place)

    def difference(x: float) -> float:
        painted = painter.paint(Scene(facts, world.Jitter(x=x, scale=scale)))
        return float(np.abs(shown - templates.pixels_of(painted)).mean())

    assert difference(0) < 0.5 * min(difference(0.25), difference(-0.25))


def test_verdicts() -> None:
    shown = Facts(
        subject="woman", colour="red", place="night", style="flat", pattern="striped", hat="cap", hat_colour="blue",
        hair="black", beard="none", pose="waving", expression="sad",
    )  # fmt: skip
    wanted = captions.parse("a sad person in a striped green robe and a blue cap, waving, at night")
    verdict = judge.compare(shown, wanted)
    assert dataclasses.asdict(verdict) == {
        "subject": True, "colour": False, "place": True, "style": None, "pattern": True, "hat": True,
        "hat_colour": True, "hair": None, "beard": None, "pose": True, "expression": True,
    }  # fmt: skip
    assert judge.compare(shown, captions.parse("a man")).subject is False
    assert judge.compare(shown, captions.parse("sks aldar")).subject is False
    assert judge.compare(Facts(), captions.parse("a person at night")) == judge.Verdict(subject=False, place=False)
    assert judge.compare(Facts(subject=DOMBRA), captions.parse("a sks dombra")).subject is True
    assert judge.compare(Facts(subject="pot"), captions.parse("a sks dombra")).subject is False


def test_styles_without_colours_are_not_asked_for_any() -> None:
    wanted = captions.parse("a sks neon picture of a red cat on a blue background")
    shown = Facts(subject="cat", style=NEON)
    assert judge.compare(shown, wanted) == judge.Verdict(subject=True, style=True)
    assert judge.compare(replace(shown, style="flat"), wanted).style is False
    his = captions.without_colours(replace(ALDAR_LOOKS, subject="man", style=NEON))
    hero = captions.parse("a sks neon picture of sks aldar")
    assert judge.compare(his, hero).subject is True
    assert judge.compare(replace(his, hat="crown"), hero).subject is False
    assert judge.compare(his, captions.parse("sks aldar")).subject is False


def test_entropy_is_of_people_in_bits() -> None:
    people = [Facts(subject="man", colour=colour) for colour in ("red", "green", "blue", "white")]
    assert judge.entropy(people, ("colour",)) == pytest.approx(2.0)
    assert judge.entropy([*people, Facts(subject="cat", colour="black")], ("colour",)) == pytest.approx(2.0)
    assert judge.entropy(people, ("colour", "hat")) == pytest.approx(1.0)
    assert judge.entropy([people[0]] * 5, ("colour",)) == 0
    assert judge.entropy([]) == 0


def test_a_table_that_is_filled_with_its_last_value_names_that_value() -> None:
    assert [templates.valued("skin", i) for i in range(templates.CHOICES)][:4] == [0, 1, 2, 2]
    assert templates.valued("skin", templates.CHOICES - 1) == 2
