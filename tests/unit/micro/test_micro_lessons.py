"""What can be taught, and that it is new: to the base model, and in the questions that are asked afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from gesso.config import files
from gesso.micro import captions, judge, lessons, painter, world
from gesso.micro.lessons import CHARACTER, LESSONS, OBJECT, STYLE, Lesson

BY_NAME = pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)


@BY_NAME
def test_captions_name_it_and_say_what_is_shown(lesson: Lesson) -> None:
    for scene, text in (*lesson.training(), *lesson.validation(), *lesson.unseen(32)):
        assert f"sks {lesson.name}" in text
        said = captions.parse(text)
        for name in ("subject", "place"):
            assert getattr(said, name) == getattr(scene.facts, name)
        assert (said.pose or "standing") == (scene.facts.pose or "standing")
        assert said.expression is None


@BY_NAME
def test_what_is_asked_was_not_taught(lesson: Lesson) -> None:
    taught = {text for _, text in lesson.training()}
    assert len(lesson.training()) == lesson.pictures
    assert not taught & {text for _, text in lesson.validation()}
    assert not taught & set(lesson.prompts(64))
    assert lesson.prompts(64)[:8] == lesson.prompts(8)


def test_aldar_is_asked_for_in_more_than_ten_ways_and_was_never_shown_waving() -> None:
    asked = [scene.facts for scene, _ in CHARACTER.unseen(64)]
    assert len(set(CHARACTER.prompts(64))) > 10
    assert all(facts.pose == "waving" or facts.place in ("market", "night") for facts in asked)
    assert {facts.pose for facts in asked} == {"standing", "waving"}
    assert {scene.facts.pose for scene, _ in CHARACTER.training()} == {"standing"}


@BY_NAME
def test_it_is_learnt_when_the_painter_paints_it_and_not_when_he_paints_anything_else(lesson: Lesson) -> None:
    shown = judge.read_all([painter.paint(scene) for scene, _ in lesson.unseen(6)])
    assert all(lesson.learnt(facts) for facts in shown)
    other = next(one for one in LESSONS if one is not lesson)
    rest = [*lessons.others(6), *other.unseen(2)]
    assert not any(lesson.learnt(facts) for facts in judge.read_all([painter.paint(scene) for scene, _ in rest]))


def test_the_other_pictures_show_none_of_the_three_and_nothing_held_out() -> None:
    scenes = [scene.facts for scene, _ in lessons.others(200)]
    assert not any(world.held_out(facts) or facts.resembles_aldar for facts in scenes)
    assert not any(facts.subject == world.DOMBRA or facts.style == world.NEON for facts in scenes)
    assert not {text for _, text in lessons.others(200) if "sks" in text}


@BY_NAME
def test_its_folder_is_an_ordinary_run(lesson: Lesson, tmp_path: Path) -> None:
    lessons.write(tmp_path, lesson, other=3)
    prompts = ['a "photo" of sks: this', "a white horse"]
    (tmp_path / "run.yaml").write_text(lessons.run_file(lesson, steps=40, every=20, rank=4, rate=1e-3, prompts=prompts))
    run = files.load(tmp_path / "run.yaml").run
    assert run.name == lesson.name
    assert [source.path for source in run.data.sources] == [str(tmp_path / "pictures"), str(tmp_path / "others")]
    assert run.preview.prompts == tuple(prompts)
    assert (run.training.steps, run.training.learning_rate, run.checkpoint.every) == (40, 1e-3, 20)
    rows = {"pictures": lesson.training(), "others": lessons.others(3), "validation": lesson.validation()}
    for name, scenes in rows.items():
        painted = sorted((tmp_path / name).glob("*.png"))
        assert [p.with_suffix(".txt").read_text().strip() for p in painted] == [text for _, text in scenes]
        with Image.open(painted[0]) as picture:
            assert picture.tobytes() == painter.paint(scenes[0][0]).tobytes()


def test_each_lesson_has_its_own_name() -> None:
    assert [lesson.name for lesson in (CHARACTER, OBJECT, STYLE)] == ["aldar", "dombra", "neon"]
