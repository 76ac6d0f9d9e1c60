"""The demo from one end to the other, in miniature."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gesso.config import files
from gesso.core.events import Event, Finished, Progress
from gesso.core.folder import RunFolder
from gesso.errors import UserError
from gesso.micro import demo, world
from gesso.micro.recipe import BASE, Recipe

SMALL = Recipe(
    size=replace(BASE, unet_channels=(8, 16), unet_heads=(1, 2), vae_channels=(4, 8, 8), text_widths=(8, 8)),
    pictures=12,
    vae_steps=2,
    vae_batch=2,
    steps=2,
    batch=4,
)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Event]]:
    folder, told = tmp_path_factory.mktemp("demo") / "demo", list[Event]()
    return folder, demo.run(folder, emit=told.append, recipe=SMALL, steps=3), told


def test_the_grid_shows_every_prompt_before_during_and_after(done: tuple[Path, Path, list[Event]]) -> None:
    folder, picture, _ = done
    assert picture == folder / "before_after.png"
    columns, side = 4, 4 * world.SIDE
    with Image.open(picture) as grid:
        pixels = np.asarray(grid.convert("RGB"))
    assert pixels.shape == (40 + len(demo.PROMPTS) * (side + 8), 190 + columns * (side + 8), 3)
    for row in range(len(demo.PROMPTS)):
        for column in range(columns):
            top, left = 40 + row * (side + 8), 190 + column * (side + 8)
            cell = Image.fromarray(pixels[top : top + side, left : left + side])
            file = folder / "run" / "samples" / f"step-{column:08d}" / f"{row:02d}.png"
            with Image.open(file) as preview:
                expected = preview.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            assert np.array_equal(np.asarray(cell), np.asarray(expected))
    heads, names = pixels[:40, 190:], pixels[40:, :190]
    assert (heads < 128).any()
    assert (names < 128).any()


def test_everything_the_text_promises_is_there(done: tuple[Path, Path, list[Event]]) -> None:
    folder, _, told = done
    text = (folder / "README.md").read_text()
    for name in ("before_after.png", "loss.png", "pictures", "others", "run.yaml", "base", "run/aldar.safetensors"):
        assert Path(name).name in text
        assert (folder / name).exists()
    with Image.open(folder / "loss.png") as curve:
        assert curve.size == (960, 540)
        assert len(curve.convert("RGB").getcolors(1 << 20) or []) > 10
    assert "training the base model" in {e.task for e in told if isinstance(e, Progress)}
    assert isinstance(told[-1], Finished)


def test_the_run_file_is_an_ordinary_one(done: tuple[Path, Path, list[Event]]) -> None:
    folder = done[0]
    run = files.load(folder / "run.yaml").run
    assert Path(run.model.base) == folder / "base"
    assert [source.path.name for source in run.data.sources] == ["pictures", "others"]
    assert run.preview.prompts == demo.PROMPTS
    assert run.training.ema.enabled


def test_the_pictures_are_of_aldar_and_no_validation_picture_is_trained_on(
    done: tuple[Path, Path, list[Event]],
) -> None:
    folder = done[0]
    captions = {name: texts(folder / name) for name in ("pictures", "validation", "others")}
    assert [len(captions[name]) for name in captions] == [12, 2, 24]
    assert all(text.startswith("a photo of sks aldar") for text in captions["pictures"] + captions["validation"])
    assert not any("aldar" in text for text in captions["others"])
    assert not any("night" in text or "purple" in text for text in captions["pictures"])
    images = [path.read_bytes() for path in sorted(folder.glob("*/??.png"))]
    assert len(set(images)) == len(images) == 38


def test_the_curve_takes_all_losses(done: tuple[Path, Path, list[Event]]) -> None:
    events = [json.loads(line) for line in RunFolder(done[0] / "run").events.read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "StepDone"] == [1, 2, 3]
    assert [e["step"] for e in events if e["event"] == "Validated"] == [0, 1, 2, 3]


def test_a_second_demo_takes_the_model_that_is_there(done: tuple[Path, Path, list[Event]]) -> None:
    folder, picture, _ = done
    first, told = picture.read_bytes(), list[Event]()
    assert demo.run(folder, emit=told.append, recipe=SMALL, steps=3).read_bytes() == first
    assert not any(isinstance(e, Progress) and e.task == "training the base model" for e in told)


def test_a_folder_with_other_things_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="not from a demo"):
        demo.run(tmp_path, emit=lambda event: None, recipe=SMALL, steps=3)
    assert (tmp_path / "run" / "mine.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_the_running_mean_is_over_the_last_values() -> None:
    assert demo._running_mean([2.0, 4.0, 6.0, 8.0], width=2) == [2.0, 3.0, 5.0, 7.0]


def texts(folder: Path) -> list[str]:
    return [path.read_text().strip() for path in sorted(folder.glob("*.txt"))]
