"""Pictures that say how they were made, and contact sheets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gesso.errors import ResourceError, UserError
from gesso.evaluation.sample import grid, read_settings, save_png, unused

SETTINGS = {
    "prompt": "Aldar Köse, 帽子",
    "negative": "blurry",
    "seed": 42,
    "steps": 25,
    "guidance": 7.0,
    "width": 64,
    "height": 48,
    "sampler": "EulerDiscreteScheduler",
    "model": "runs/a, checkpoint-5",
    "step": 5,
}


def test_settings_survive_the_file(tmp_path: Path) -> None:
    image = Image.effect_noise((64, 48), 90).convert("RGB")
    path = save_png(image, tmp_path / "new" / "a.png", SETTINGS)
    found = read_settings(path)
    assert found.items() >= SETTINGS.items()
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(opened), np.asarray(image))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_parameters_are_in_the_form_that_web_uis_read(tmp_path: Path) -> None:
    with Image.open(save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", SETTINGS)) as opened:
        prompt, negative, line = opened.text["parameters"].split("\n")
    assert prompt == "Aldar Köse, 帽子"
    assert negative == "Negative prompt: blurry"
    pairs = dict(part.split(": ", 1) for part in line.split(", "))
    assert pairs.pop("Version").startswith("gesso ")
    assert pairs == {
        "Steps": "25",
        "Sampler": "EulerDiscreteScheduler",
        "CFG scale": "7.0",
        "Seed": "42",
        "Size": "64x48",
        "Model": "runs/a; checkpoint-5",
    }


def test_no_negative_prompt_leaves_no_line(tmp_path: Path) -> None:
    with Image.open(save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {"prompt": "x", "negative": ""})) as opened:
        assert "Negative" not in opened.text["parameters"]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    for name in ("plain.png", "a.jpg"):
        with pytest.raises(UserError, match="does not say how it was made"):
            read_settings(tmp_path / name)
    (tmp_path / "text.png").write_text("x")
    for name in ("text.png", "absent.png"):
        with pytest.raises(UserError, match="not a readable picture"):
            read_settings(tmp_path / name)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "file" / "a.png", {})


def test_grid_holds_every_picture_whole_and_in_order() -> None:
    colours = ["red", "lime", "blue", "black", "yellow"]
    images = [Image.new("RGB", (40, 30), colour) for colour in colours]
    sheet = grid(images, columns=3, gap=4)
    assert sheet.size == (4 + 3 * 44, 4 + 2 * 34)
    for i, image in enumerate(images):
        left, top = 4 + (i % 3) * 44, 4 + (i // 3) * 34
        assert np.array_equal(np.asarray(sheet.crop((left, top, left + 40, top + 30))), np.asarray(image))


def test_grid_labels_stay_in_their_cells() -> None:
    images = [Image.new("RGB", (60, 20), "red") for _ in range(2)]
    bare = np.asarray(grid(images, columns=2, labels=["", ""]))
    labelled = np.asarray(grid(images, columns=2, labels=["a very long label, Köse \n that cannot fit in", ""]))
    changed = np.argwhere((bare != labelled).any(axis=2))
    assert changed.size, "no label was written"
    rows, columns = changed[:, 0], changed[:, 1]
    assert rows.min() >= 8 + 20, "the label covers the picture"
    assert columns.min() >= 8
    assert columns.max() < 8 + 60, "the label runs into the next cell"


@pytest.mark.parametrize("letter", ["ö", "ş", "Қ", "ң"])
def test_grid_labels_have_the_letters_of_names(letter: str) -> None:
    image = Image.new("RGB", (40, 10), "white")
    blank = grid([image], columns=1, labels=["\uffff"])  # the box that stands for a letter the font lacks
    assert not np.array_equal(np.asarray(grid([image], columns=1, labels=[letter])), np.asarray(blank))


def test_grid_with_fewer_pictures_than_columns_is_not_padded() -> None:
    assert grid([Image.new("RGB", (10, 10))], columns=4, gap=0).size == (10, 10)


def test_no_picture_is_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    assert unused(out, 1) == [out]
    out.touch()
    assert unused(out, 1) == [tmp_path / "out-2.png"]
    assert unused(out, 2) == [tmp_path / name for name in ("out-2-00.png", "out-2-01.png", "out-2.png")]
    (tmp_path / "out-2-01.png").touch()
    assert unused(out, 2)[-1] == tmp_path / "out-3.png"
