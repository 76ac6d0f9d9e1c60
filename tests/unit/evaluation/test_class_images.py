"""Class images: only what is missing is drawn, nothing is overwritten, and a broken-off drawing goes on as it began."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gesso.config.run import Data, Source
from gesso.core.events import Event, Progress
from gesso.data.sources import collect
from gesso.errors import Interrupted, UserError
from gesso.evaluation import class_images
from gesso.evaluation.class_images import Wanted, fill
from gesso.evaluation.pictures import read_settings
from gesso.evaluation.sample import Shot, draw
from gesso.families.sdxl import SDXL
from gesso.objectives import DreamBooth

PIPELINE = SimpleNamespace(default_sample_size=8, vae_scale_factor=8, scheduler=object())


class Drawn:
    """Stands in for drawing: a picture tells its seed by its pixels. `broken` stops after so many batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[Shot]] = []
        self.opened, self.broken = 0, -1
        monkeypatch.setattr(class_images, "draw", self.draw)

    def open(self) -> tuple[Any, str]:
        self.opened += 1
        return PIPELINE, "a model"

    def draw(self, _pipeline: Any, shots: list[Shot], *, batch: int) -> list[Image.Image]:
        assert len(shots) <= batch
        if len(self.batches) == self.broken:
            raise Interrupted("stopped")
        self.batches.append(shots)
        return [Image.new("RGB", (shot.width, shot.height), (shot.seed, 1, 2)) for shot in shots]

    @property
    def seeds(self) -> list[int]:
        return [shot.seed for batch in self.batches for shot in batch]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


def run(wanted: Wanted, drawn: Drawn) -> tuple[int, list[Event]]:
    told: list[Event] = []
    return fill(wanted, open_pipeline=drawn.open, emit=told.append), told


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_folder_is_filled_and_is_a_source_as_it_is(tmp_path: Path, drawn: Drawn) -> None:
    wanted = Wanted(tmp_path / "class", "a photo of a person", 5, seed=30, width=64, height=48, batch=2)
    count, told = run(wanted, drawn)
    assert count == 5
    assert drawn.seeds == [30, 31, 32, 33, 34]
    assert [len(batch) for batch in drawn.batches] == [2, 2, 1]
    assert [e.done for e in told if isinstance(e, Progress)] == [0, 2, 4, 5]
    found = collect(Source(path=str(wanted.folder), role="prior"))
    assert not found.problems
    assert [record.caption for record in found.records] == ["a photo of a person"] * 5
    made = read_settings(wanted.folder / "class-00003.png")
    assert (made["prompt"], made["seed"], made["width"], made["model"]) == ("a photo of a person", 33, 64, "a model")


def test_broken_off_it_goes_on_to_the_same_folder(tmp_path: Path, drawn: Drawn) -> None:
    whole, part = (Wanted(tmp_path / name, "a dog", 7, batch=2) for name in ("whole", "part"))
    run(whole, drawn)
    drawn.batches.clear()
    drawn.broken = 2
    with pytest.raises(Interrupted):
        run(part, drawn)
    kept = contents(part.folder)
    assert len([name for name in kept if name.endswith(".png")]) == 4
    (part.folder / "class-00004.txt").write_text("half")  # its picture is missing
    drawn.broken = -1
    assert run(part, drawn)[0] == 3
    assert contents(part.folder) == contents(whole.folder)
    assert drawn.seeds == list(range(7)), "none is drawn twice"


def test_asked_to_stop_it_stops_between_two_batches(tmp_path: Path, drawn: Drawn) -> None:
    wanted = Wanted(tmp_path, "a dog", 5, batch=2)
    with pytest.raises(Interrupted, match="1 class images are still to be drawn"):
        fill(wanted, open_pipeline=drawn.open, emit=lambda _: None, stopping=lambda: len(drawn.batches) == 2)
    assert drawn.seeds == [0, 1, 2, 3]
    assert run(wanted, drawn)[0] == 1


def test_nothing_missing_opens_no_model(tmp_path: Path, drawn: Drawn) -> None:
    wanted = Wanted(tmp_path, "a dog", 2)
    run(wanted, drawn)
    before = contents(tmp_path)
    assert run(wanted, drawn) == (0, [])
    assert run(Wanted(tmp_path, "a dog", 1), drawn)[0] == 0
    assert drawn.opened == 1
    assert contents(tmp_path) == before


def test_pictures_that_are_there_count_and_gaps_are_filled(tmp_path: Path, drawn: Drawn) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "mine.jpg")
    run(Wanted(tmp_path, "a dog", 4), drawn)
    assert drawn.seeds == [0, 1, 2]
    (tmp_path / "class-00001.png").unlink()
    drawn.batches.clear()
    before = contents(tmp_path)
    run(Wanted(tmp_path, "a dog", 5), drawn)
    assert drawn.seeds == [1, 3]
    after = contents(tmp_path)
    assert {name: after[name] for name in before} == before


def test_folders_that_will_not_do_are_explained(tmp_path: Path, drawn: Drawn) -> None:
    run(Wanted(tmp_path / "dogs", "a dog", 2), drawn)
    with pytest.raises(UserError, match="class images of 'a dog', and these are to be of 'a cat'"):
        run(Wanted(tmp_path / "dogs", "a cat", 3), drawn)
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "metadata.jsonl").write_text(json.dumps({"file_name": "x.png", "text": "x"}))
    with pytest.raises(UserError, match="none that is drawn now would be seen"):
        run(Wanted(tmp_path / "listed", "a dog", 1), drawn)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this is a file"):
        run(Wanted(tmp_path / "file", "a dog", 1), drawn)
    assert drawn.opened == 1


def test_class_images_of_another_prompt_are_no_reason_to_draw_nothing(tmp_path: Path, drawn: Drawn) -> None:
    """A full folder would otherwise make a changed prompt do nothing."""
    run(Wanted(tmp_path, "a dog", 2), drawn)
    with pytest.raises(UserError, match="class images of 'a dog', and these are to be of 'a cat'"):
        run(Wanted(tmp_path, "a cat", 2), drawn)


class Model:
    """Stands in for the run's model, and counts how often it is opened."""

    base = "a model"

    def __init__(self) -> None:
        self.loaded = 0

    def load(self, parts: set[str], **_: Any) -> set[str]:
        self.loaded += 1
        return parts

    def pipeline(self, _parts: set[str]) -> Any:
        return PIPELINE


def two_classes(tmp_path: Path, **second: Any) -> tuple[Any, Model]:
    """A run with a class of its own for each of two sources, and its model."""
    men = Source(path=str(tmp_path / "men"), role="prior", class_prompt="a man")
    fields: dict[str, Any] = {"path": str(tmp_path / "dogs"), "role": "prior", "class_prompt": "a dog"}
    data = Data(sources=(Source(path="x"), men, Source.model_validate(fields | second)), resolution=64)
    objective, model = DreamBooth(class_images=5), Model()
    return SimpleNamespace(data=data, objective=objective, model=model, seed=20), model


def completed(run: Any, stopping: Any = class_images.never) -> list[Event]:
    told: list[Event] = []
    runtime = SimpleNamespace(dtype=None, device=None, release=lambda: None)
    class_images.complete(run, runtime, told.append, stopping)  # type: ignore[arg-type]
    return told


def test_each_class_of_a_run_is_drawn_from_its_prompt_into_its_folder(tmp_path: Path, drawn: Drawn) -> None:
    run, model = two_classes(tmp_path, class_images=3)
    completed(run)
    assert [(shot.prompt, shot.seed) for batch in drawn.batches for shot in batch] == [
        *(("a man", 20 + i) for i in range(5)),
        *(("a dog", 20 + i) for i in range(3)),
    ]
    assert model.loaded == 1, "one model for both"
    for name, prompt, count in (("men", "a man", 5), ("dogs", "a dog", 3)):
        found = collect(Source(path=str(tmp_path / name), role="prior"))
        assert [record.caption for record in found.records] == [prompt] * count
    before = contents(tmp_path / "men"), contents(tmp_path / "dogs")
    assert completed(run) == []
    assert (model.loaded, len(drawn.seeds)) == (1, 8)
    assert (contents(tmp_path / "men"), contents(tmp_path / "dogs")) == before


def test_broken_off_between_two_classes_each_goes_on_where_it_was(tmp_path: Path, drawn: Drawn) -> None:
    whole, _ = two_classes(tmp_path / "whole")
    completed(whole)
    part, _ = two_classes(tmp_path / "part")
    drawn.batches.clear()
    (tmp_path / "part" / "dogs").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "part" / "dogs" / "mine.png")
    with pytest.raises(Interrupted, match="4 class images"):
        completed(part, lambda: len(drawn.seeds) >= 5)
    assert len(list((tmp_path / "part" / "dogs").iterdir())) == 1
    completed(part)
    assert contents(tmp_path / "part" / "men") == contents(tmp_path / "whole" / "men")
    theirs, mine = contents(tmp_path / "whole" / "dogs"), contents(tmp_path / "part" / "dogs")
    assert {name: theirs[name] for name in mine if name != "mine.png"} == {
        name: content for name, content in mine.items() if name != "mine.png"
    }
    assert len(drawn.seeds) == 9, "none is drawn twice, and the picture that was there counts"


def test_what_is_wrong_with_the_last_folder_is_said_before_the_first_is_drawn(tmp_path: Path, drawn: Drawn) -> None:
    run(Wanted(tmp_path / "dogs", "a wolf", 1), drawn)
    drawn.batches.clear()
    made, model = two_classes(tmp_path)
    with pytest.raises(UserError, match="class images of 'a wolf'"):
        completed(made)
    assert (model.loaded, drawn.batches) == (0, [])


def test_pictures_of_a_batch_are_those_drawn_one_by_one(base: Path) -> None:
    """The same noise and prompt for each, whatever is drawn beside it; only the last bits of the sums may differ."""
    family = SDXL(base=str(base))
    pipeline = family.pipeline(
        family.load(("denoiser", "vae", "text"), dtype=torch.float32, device=torch.device("cpu"))
    )
    shots = [Shot(f"a thing {i % 2}", seed=i, steps=2, guidance=4.0, width=64, height=64) for i in range(3)]
    shots += [Shot("a thing", "bad", seed=9, steps=2, guidance=4.0, width=64, height=48)]
    told: list[tuple[int, int]] = []
    alone = draw(pipeline, shots)
    together = draw(pipeline, shots, batch=3, progress=lambda *step: told.append(step))
    assert told == [(3, 4), (4, 4)]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max() <= 1
    assert np.asarray(alone[0]).tobytes() != np.asarray(alone[2]).tobytes()
