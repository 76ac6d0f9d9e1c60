"""What is said of a whole set before a run: every bad file in one go, and what is left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import (
    call,
    data_of,
    link,
    noise,
    picture,
    pictures_in,
    png_file,
    put,
    put_files,
    run_file,
    run_of,
)
from PIL import Image

from gesso.data.index import build
from gesso.data.plan import Plan
from gesso.data.preflight import preflight
from gesso.errors import Problems, UserError

FRAMES = [Image.new("RGB", (40, 32), colour) for colour in ("red", "blue")]
RAMP = np.linspace(0, 1, 1280, dtype=np.float32).reshape(32, 40)


def animated(kind: str) -> bytes:
    return picture(FRAMES[0], kind=kind, save_all=True, append_images=FRAMES[1:])


PICTURES: dict[str, bytes] = {
    "b00.jpg": noise()[:-2000],
    "b01.png": noise(kind="PNG")[:-9000],
    "b02.webp": noise(kind="WEBP")[:-900],
    "b03.png": noise(kind="PNG").replace(b"IDAT", b"IDAT\1", 1),
    "b04.png": png_file(60000, 60000, depth=1, colour_type=0, rows=None),
    "b05.tif": picture(Image.fromarray(RAMP), kind="TIFF"),
    "b06.tif": picture(Image.fromarray(RAMP.astype(np.int32)), kind="TIFF"),
    "b07.gif": animated("GIF"),
    "b08.webp": animated("WEBP"),
    "b09.png": animated("PNG"),
    "b10.png": b"",
    "b11.jpg": b"<html>404</html>",
    "b12.png": b"\x89PNG\r\n\x1a\n",
    "b13.jpg": b"\xff\xd8\xff",
}
"""Pictures that cannot be used, each in its own way."""
CAPTIONS: dict[str, bytes] = {
    "c00": "Käthe".encode("latin-1"),
    "c01": "in red".encode("utf-16"),
    "c02": b"in \0 red",
    "c03": b"red " * 260_000,
    "c04": b"",
    "c05": b" \n\t ",
}
"""Captions that cannot."""
FINE = {"fine0": "a thing in red", "fine1": "a thing in green", "fine2": "a thing in blue"}


@pytest.fixture
def bad_pictures(tmp_path: Path) -> Path:
    folder = put_files(tmp_path / "set", FINE)
    for name, content in PICTURES.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a caption")
    return folder


@pytest.fixture
def bad(bad_pictures: Path) -> Path:
    folder = bad_pictures
    for name, text in CAPTIONS.items():
        (folder / f"{name}.png").write_bytes(picture("red"))
        (folder / f"{name}.txt").write_bytes(text)
    (folder / "c06.png").write_bytes(picture("red"))
    (folder.parent / "outside.png").write_bytes(picture("blue"))
    link(folder.parent / "outside.png", folder / "l00.png")
    (folder / "l00.txt").write_text("a caption")
    return folder


def names_of(folder: Path) -> set[str]:
    return {file.stem for file in folder.iterdir() if not file.stem.startswith("fine")}


class TestAllThatIsBad:
    def test_every_file_is_named_in_one_go(self, bad: Path) -> None:
        assert len(names_of(bad)) == 22
        with pytest.raises(Problems) as caught:
            preflight(run_of(data_of(bad)))
        said = "\n".join(caught.value.lines())
        assert [name for name in sorted(names_of(bad)) if f"/{name}." not in said] == []
        assert "fine" not in said
        assert caught.value.exit_code == 2
        assert all(problem.what and problem.fix for problem in caught.value.problems)

    def test_so_does_the_command_line(self, bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = run_file(data_of(bad))
        assert call("check", str(file)) == 2
        shown = capsys.readouterr()
        said = re.sub(r"\s", "", shown.out + shown.err)
        assert [name for name in sorted(names_of(bad)) if f"/{name}." not in said] == []

    def test_so_does_its_json(self, bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("check", str(run_file(data_of(bad))), "--json") == 2
        answer = json.loads(capsys.readouterr().out)
        assert not answer["ok"]
        said = json.dumps(answer["errors"])
        assert [name for name in sorted(names_of(bad)) if f"/{name}." not in said] == []
        assert "fine" not in said

    def test_sources_are_looked_at_together(self, bad: Path) -> None:
        other = bad.parent / "other"
        other.mkdir()
        (other / "z.png").write_bytes(b"broken")
        (other / "z.txt").write_text("z")
        held = bad.parent / "held"
        held.mkdir()
        (held / "v.png").write_bytes(b"broken")
        (held / "v.txt").write_text("v")
        sources = [{"path": str(bad)}, {"path": str(other)}, {"path": str(bad.parent / "nowhere")}]
        with pytest.raises(Problems) as caught:
            preflight(run_of(data_of(bad, sources=sources, validation={"path": str(held)})))
        said = str(caught.value)
        assert all(part in said for part in ("b00.jpg", "z.png", "nowhere", "v.png"))

    def test_nothing_is_changed_by_looking(self, bad: Path) -> None:
        before = {file: file.lstat().st_mtime_ns for file in bad.iterdir()}
        with pytest.raises(Problems):
            preflight(run_of(data_of(bad)))
        assert {file: file.lstat().st_mtime_ns for file in bad.iterdir()} == before


class TestSkipBad:
    def test_the_rest_trains_and_each_that_is_left_out_is_named(self, bad_pictures: Path) -> None:
        data = data_of(bad_pictures, skip_bad=True)
        index = build(data)
        assert sorted(row.caption for row in index.rows) == sorted(FINE.values())
        said = "\n".join(index.notices)
        assert [name for name in PICTURES if name not in said] == []
        assert "fine" not in said
        assert pictures_in(bad_pictures) == len(index.rows) + len(PICTURES)
        seen = preflight(run_of(data))
        assert seen.counted.images == (3,)
        assert [name for name in PICTURES if name not in "\n".join(seen.notices)] == []

    def test_the_command_line_says_so(self, bad_pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert call("check", str(run_file(data_of(bad_pictures, skip_bad=True)))) == 0
        said = re.sub(r"\s", "", capsys.readouterr().out)
        assert [name for name in PICTURES if name not in said] == []

    def test_it_forgives_pictures_and_not_captions(self, bad: Path) -> None:
        with pytest.raises(UserError) as caught:
            build(data_of(bad, skip_bad=True))
        said = str(caught.value)
        assert all(f"/{name}." in said for name in (*CAPTIONS, "c06"))

    def test_a_set_of_nothing_else_stops(self, tmp_path: Path) -> None:
        folder = put(tmp_path / "set")
        (folder / "a.png").write_bytes(b"broken")
        (folder / "a.txt").write_text("a")
        with pytest.raises(UserError, match=r"a\.png|no picture"):
            build(data_of(folder, skip_bad=True))


class TestTooFew:
    @pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
    def test_a_set_smaller_than_a_step_is_refused_with_the_sum(
        self, tmp_path: Path, batch: int, accumulation: int
    ) -> None:
        folder = put_files(tmp_path / "set", FINE)
        with pytest.raises(UserError) as caught:
            preflight(run_of(data_of(folder), batch_size=batch, accumulation=accumulation))
        said = str(caught.value)
        assert caught.value.exit_code == 2
        assert caught.value.fix
        numbers = [int(n) for n in re.findall(r"\b\d+\b", said)]
        assert {3, 4, batch, accumulation} <= set(numbers), said

    def test_repeats_make_up_for_it(self, tmp_path: Path) -> None:
        folder = put_files(tmp_path / "set", FINE)
        seen = preflight(run_of(data_of(folder, {"repeats": 2}), batch_size=4))
        assert (seen.counted.samples_per_epoch, seen.counted.steps_per_epoch) == (6, 2)

    def test_a_bucket_with_less_than_a_batch_is_trained_all_the_same(self, tmp_path: Path) -> None:
        folder = put(tmp_path / "set", a="red", b="green", c="blue")
        (folder / "d.png").write_bytes(picture("cyan", (64, 128)))
        (folder / "d.txt").write_text("cyan")
        data = data_of(folder)
        plan = Plan(build(data).rows, data=data, batch_size=2)
        seen = Counter(v.caption for step in range(plan.steps_per_epoch) for v in plan.window(step))
        assert seen == {"red": 1, "green": 1, "blue": 1, "cyan": 1}
