"""The demo from one end to the other, with the model in the package and few steps and pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gesso.config import files
from gesso.core.events import Event, Finished, Progress
from gesso.core.folder import RunFolder
from gesso.errors import UserError
from gesso.micro import captions, demo, lessons, painter, report, score, world

Done = tuple[Path, Path, list[Event]]
ASKED = [captions.parse(prompt) for prompt in demo.PROMPTS]


@pytest.fixture(scope="module")
def short() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "UNSEEN", 3)
        patch.setattr(demo, "ORDINARY", 4)
        patch.setattr(demo, "PROMPTS", demo.PROMPTS[2:5:2])
        patch.setattr(score, "STEPS", 3)
        yield patch


@pytest.fixture(scope="module")
def done(short: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder, told = tmp_path_factory.mktemp("demo") / "demo", list[Event]()
    return folder, demo.run(folder, emit=told.append, steps=3), told


def test_everything_the_report_promises_is_there(done: Done) -> None:
    folder, page, _ = done
    assert page == folder / "report.html"
    notes, shown = (folder / "README.md").read_text(), page.read_text()
    for name, text in report.CONTENTS:
        assert f"`{name}`: {text}." in notes
        assert f"<code>{name}</code>" in shown
        assert (folder / name).exists()
    assert (folder / "run" / "aldar.safetensors").exists()
    with Image.open(folder / "curves.png") as curve:
        assert len(curve.convert("RGB").getcolors(1 << 20) or []) > 10


def test_the_figures_are_of_the_base_and_of_what_was_trained(done: Done) -> None:
    figures = json.loads((done[0] / "figures.json").read_text())
    assert figures["counts"] == {"unseen": 3, "ordinary": 4}
    assert figures["steps"] == 3
    base, trained, painted = figures["base"], figures["trained"], figures["painted"]
    assert set(base) == set(trained) == set(painted) == {row.key for row in (*report.LEARNT, *report.KEPT)}
    assert base["identity_rate"] == 0
    assert [painted[key] for key in ("identity_rate", "subject", "colour", "place")] == [1, 1, 1, 1]
    assert painted["identity_similarity"] > base["identity_similarity"]
    assert base["identity_similarity"] != trained["identity_similarity"]
    parts = figures["seconds"]
    assert parts["all"] >= parts["before"] + parts["training"] + parts["after"] - 0.2


def test_nothing_measured_was_trained_on(done: Done) -> None:
    exam = demo.Exam()
    taught = lessons.CHARACTER.training()
    assert not {text for _, text in exam.unseen} & {text for _, text in taught}
    assert all("sks aldar" in text for _, text in exam.unseen)
    assert all("aldar" not in text for _, text in exam.ordinary)
    learnt_from = {text for _, text in lessons.others(100)}
    assert not any(text in learnt_from for _, text in exam.ordinary)
    assert all(world.held_out(scene.facts) for scene, _ in exam.ordinary)


def test_progress_is_told_while_measuring_and_the_end_comes_last(done: Done) -> None:
    told = done[2]
    tasks = list(dict.fromkeys(e.task for e in told if isinstance(e, Progress)))
    first, last = ["drawing, before", "judging, before"], ["drawing, after", "judging, after", "judging, painted"]
    assert tasks[:2] == first
    assert tasks[-3:] == last
    for task in (*first, *last):
        steps = [(e.done, e.total) for e in told if isinstance(e, Progress) and e.task == task]
        assert steps[-1] == (7, 7)
    assert [isinstance(event, Finished) for event in told].index(True) == len(told) - 1


def test_the_run_file_is_an_ordinary_one(done: Done) -> None:
    folder = done[0]
    run = files.load(folder / "run.yaml").run
    assert run.model.base == "micro:sdxl"
    assert [source.path for source in run.data.sources] == [str(folder / "pictures"), str(folder / "others")]
    assert run.preview.prompts == demo.PROMPTS
    assert run.training.device == "cpu"
    events = [json.loads(line) for line in RunFolder(folder / "run").events.read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "StepDone"] == [1, 2, 3]
    assert [e["step"] for e in events if e["event"] == "Validated"] == [0, 1, 2, 3]


def test_the_pictures_are_of_aldar_and_no_validation_picture_is_trained_on(done: Done) -> None:
    folder = done[0]
    said = {name: texts(folder / name) for name in ("pictures", "validation", "others")}
    assert len(said["pictures"]) == 12
    assert len(said["validation"]) == 4
    assert all(text.startswith("a photo of sks aldar") for text in said["pictures"] + said["validation"])
    assert not any("aldar" in text for text in said["others"])
    assert not any("night" in text or "market" in text or "waving" in text for text in said["pictures"])
    images = [path.read_bytes() for name in said for path in sorted((folder / name).glob("*.png"))]
    assert len(set(images)) == len(images) == sum(len(rows) for rows in said.values())


def test_a_second_demo_leaves_nothing_of_the_first_and_all_that_is_not_its_own(
    short: pytest.MonkeyPatch, done: Done, tmp_path: Path
) -> None:
    folder = shutil.copytree(done[0], tmp_path / "demo")
    stale, own = folder / "others" / "99.png", folder / "pictures" / "mine.txt"
    painter.paint(next(world.scenes(9, 1))).save(stale)
    own.write_text("not of the demo")
    before = json.loads((folder / "figures.json").read_text())
    demo.run(folder, emit=lambda event: None, steps=1)
    after = json.loads((folder / "figures.json").read_text())
    assert after["base"] == before["base"]
    assert after["trained"] != before["trained"]
    assert sorted(path.name for path in (folder / "run").glob("checkpoint-*")) == ["checkpoint-1"]
    assert not stale.exists()
    assert own.exists()


def test_a_folder_with_other_things_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not from a demo"):
        demo.run(tmp_path, emit=lambda event: None, steps=3)
    assert (tmp_path / "run" / "mine.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("precious")
    with pytest.raises(UserError, match="a file, not a folder"):
        demo.run(tmp_path / "demo", emit=lambda event: None, steps=3)
    assert (tmp_path / "demo").read_text() == "precious"


def test_the_grid_shows_every_prompt_before_during_and_after(done: Done) -> None:
    folder, side = done[0], 3 * world.SIDE
    with Image.open(folder / "before_after.png") as grid:
        pixels = np.asarray(grid.convert("RGB"))
    left, top = pixels.shape[1] - 4 * (side + 8), pixels.shape[0] - len(demo.PROMPTS) * (side + 8)
    for row in range(len(demo.PROMPTS)):
        for column in range(4):
            y, x = top + row * (side + 8), left + column * (side + 8)
            with Image.open(folder / "run" / "samples" / f"step-{column:08d}" / f"{row:02d}.png") as preview:
                expected = preview.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            assert np.array_equal(pixels[y : y + side, x : x + side], np.asarray(expected))
        assert (pixels[top + row * (side + 8) : top + row * (side + 8) + side, :left] < 128).any()
    assert (pixels[top - 32 : top, left:] < 128).any()


def test_the_grid_asks_for_him_in_four_ways_and_for_two_others() -> None:
    him = [facts for facts in ASKED if facts.subject == "aldar"]
    assert len(him) == 4
    assert len(ASKED) == 6
    taught = [scene.facts for scene, _ in lessons.CHARACTER.training()]
    assert him[0].place in {facts.place for facts in taught}
    assert him[1].place not in {facts.place for facts in taught}
    assert him[2].pose not in {facts.pose for facts in taught}
    assert him[3].style not in {facts.style for facts in taught}


def texts(folder: Path) -> list[str]:
    return [path.read_text().strip() for path in sorted(folder.glob("*.txt"))]
