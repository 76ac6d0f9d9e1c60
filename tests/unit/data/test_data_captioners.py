"""Captions by models: the run over a folder, and functions of one's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from captioning_helpers import COLOURS, picture
from PIL import Image

from gesso.data.captioning import plugins as captioners
from gesso.data.captioning.plugins import Settings, Wanted, load, pending
from gesso.data.editing.collection import Library
from gesso.data.editing.journal import Journal
from gesso.errors import ResourceError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for colour in COLOURS:
        picture(colour).save(folder / f"{colour}.png")
    (folder / "red.txt").write_text("mine")
    return folder


class Namer:
    """Says the colour; fails, or dies, where it is told to."""

    def __init__(self, *, fail: Sequence[str] = (), die: str = "") -> None:
        self.fail, self.die, self.seen = fail, die, []

    def caption(self, pictures: Sequence[Image.Image]) -> list[str | UserError]:
        answers: list[str | UserError] = []
        for one in pictures:
            value = one.getpixel((0, 0))
            name = next(c for c in COLOURS if picture(c).getpixel((0, 0)) == value)
            if name == self.die:
                raise ResourceError("out of memory")
            self.seen.append(name)
            answers.append(UserError("no idea") if name in self.fail else f"a {name}\npicture")
        return answers


def run(folder: Path, captioner: Any, *, mode: str = "missing", batch_size: int = 2, **wanted: str) -> Any:
    library = Library(folder)
    how = Wanted(mode=mode, **wanted)
    command = f"caption {mode}"
    items = pending(library, how, command=command)
    return captioners.run(library, captioner, items, wanted=how, batch_size=batch_size, command=command)


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def test_pictures_with_a_caption_are_passed_over_and_undo_takes_the_others_away(folder: Path) -> None:
    report = run(folder, Namer(), prefix="sks, ", suffix=".")
    assert (report.written, report.skipped, report.failed) == (4, 1, [])
    written = {name: f"sks, a {name} picture.\n" for name in COLOURS if name != "red"}
    assert texts(folder) == written | {"red": "mine"}
    Journal(folder).undo()
    assert texts(folder) == {"red": "mine"}


def test_overwrite_and_append(folder: Path) -> None:
    run(folder, Namer(), mode="append")
    assert texts(folder)["red"] == "mine, a red picture"
    run(folder, Namer(), mode="overwrite", prefix="new ")
    assert texts(folder)["red"] == "new a red picture"
    assert texts(folder)["blue"] == "new a blue picture\n"
    Journal(folder).undo(last=2)
    assert texts(folder) == {"red": "mine"}


@pytest.mark.parametrize("mode", ["missing", "overwrite", "append"])
def test_a_run_that_died_goes_on_where_it_stopped(folder: Path, mode: str) -> None:
    first, second = Namer(die="red"), Namer()
    if mode == "missing":
        (folder / "red.txt").unlink()
    with pytest.raises(ResourceError, match="out of memory"):
        run(folder, first, mode=mode)
    run(folder, second, mode=mode)
    assert sorted(first.seen[:2] + second.seen) == sorted(COLOURS)
    expected = {name: f"a {name} picture\n" for name in COLOURS}
    endings = {"missing": "a red picture\n", "overwrite": "a red picture", "append": "mine, a red picture"}
    assert texts(folder) == expected | {"red": endings[mode]}


def test_each_failure_is_named_and_the_rest_is_written(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"not a picture")
    report = run(folder, Namer(fail=["lime"]), batch_size=3)
    assert report.written == 3
    assert sorted(Path(error.where).name for error in report.failed) == ["bad.png", "lime.png"]
    assert set(texts(folder)) == {"red", "blue", "white", "black"}


def test_captions_go_into_the_table_where_there_is_one(folder: Path) -> None:
    rows = [{"file_name": "red.png", "text": "mine"}, {"file_name": "blue.png", "text": None, "k": 1}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(folder, Namer())
    assert (report.written, report.skipped) == (4, 1)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert lines[:2] == [rows[0], {"file_name": "blue.png", "text": "a blue picture", "k": 1}]
    assert {row["file_name"]: row["text"] for row in lines[2:]} == {
        f"{name}.png": f"a {name} picture" for name in ("lime", "white", "black")
    }


def test_an_empty_answer_is_a_failure_and_no_caption(folder: Path) -> None:
    report = run(folder, Own(lambda _: " \n\x00 "))
    assert report.written == 0
    assert len(report.failed) == 4
    assert texts(folder) == {"red": "mine"}


@dataclass
class Own:
    function: Callable[[Image.Image], Any]

    def caption(self, pictures: Sequence[Image.Image]) -> list[Any]:
        return [self.function(one) for one in pictures]


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_captions.py").write_text(
        "def size(picture):\n    return f'{picture.width} wide'\n\n"
        "def bad(picture):\n    return 1 / 0\n\ndef number(picture):\n    return 7\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load("my_captions:size", Settings()).caption([picture("red")] * 2) == ["40 wide"] * 2
    (failed,) = load("my_captions:bad", Settings()).caption([picture("red")])
    assert isinstance(failed, UserError)
    assert "ZeroDivisionError" in failed.what
    (number,) = load("my_captions:number", Settings()).caption([picture("red")])
    assert isinstance(number, UserError)
    for name in ("my_captions:nothing", "no_such_module:x"):
        with pytest.raises(UserError, match="cannot be used"):
            load(name, Settings())
    with pytest.raises(UserError, match="there is no captioner 'blib'"):
        load("blib", Settings())
