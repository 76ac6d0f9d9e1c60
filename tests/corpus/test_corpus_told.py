"""What `gesso check` and `gesso dataset scan` tell of captions and pictures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_helpers import (
    call,
    data_of,
    noise,
    picture,
    put,
    put_files,
    run_file,
    run_of,
)
from PIL import Image

from gesso.data.index import build
from gesso.data.plan import Plan
from gesso.data.preflight import preflight

FINE = {"fine0": "a thing in red", "fine1": "a thing in green", "fine2": "a thing in blue"}


class TestDryRun:
    """users-pains 5: the exact text, and its tokens, of random pictures is seen before a run."""

    def test_check_shows_the_text_that_pictures_are_trained_with(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = put_files(tmp_path / "set", FINE)
        data = data_of(folder, {"trigger": "sks", "captions": {"prefix": "photo of ", "suffix": ", sharp"}})
        plan = Plan(build(data).rows, data=data, batch_size=1)
        texts = [visit.caption for step in range(3) for visit in plan.window(step)]
        assert call("check", str(run_file(data))) == 0
        shown = capsys.readouterr().out
        assert [text for text in texts if text not in shown] == []
        assert all(f"{name}.png" in shown for name in FINE)

    def test_and_so_as_json(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = put_files(tmp_path / "set", FINE)
        data = data_of(folder, {"trigger": "sks"})
        plan = Plan(build(data).rows, data=data, batch_size=1)
        texts = [visit.caption for step in range(3) for visit in plan.window(step)]
        assert call("check", str(run_file(data)), "--json") == 0
        answer = json.dumps(json.loads(capsys.readouterr().out)["data"])
        assert [text for text in texts if text not in answer] == []

    def test_missing_captions_stop_it_unless_allowed_by_name(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = put_files(tmp_path / "set", FINE)
        (folder / "fine1.txt").unlink()
        assert call("check", str(run_file(data_of(folder)))) == 2
        shown = capsys.readouterr()
        assert "missing_captions" in shown.out + shown.err
        assert call("check", str(run_file(data_of(folder, {"missing_captions": "empty"})))) == 0
        assert "fine1" in re.sub(r"\s", "", capsys.readouterr().out)


class TestScan:
    """users-pains 24: one look reports all that is odd about a set."""

    @pytest.fixture
    def answer(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
        folder = put(tmp_path / "set")
        drawn = np.random.default_rng(0)
        for i in range(6):
            cells = drawn.integers(0, 255, (12, 12, 3), dtype=np.uint8)
            big = Image.fromarray(cells).resize((96, 96), Image.Resampling.NEAREST)
            (folder / f"p{i}.png").write_bytes(picture(big))
            (folder / f"p{i}.txt").write_text("sks, outdoors, hare" if i < 4 else "sks, teapot")
        (folder / "twin.png").write_bytes((folder / "p0.png").read_bytes())
        exif = Image.Exif()
        exif[0x0112] = 6
        other = Image.fromarray(drawn.integers(0, 255, (96, 64, 3), dtype=np.uint8))
        (folder / "turned.jpg").write_bytes(picture(other, kind="JPEG", exif=exif.tobytes()))
        clear = Image.fromarray(drawn.integers(0, 255, (96, 96, 4), dtype=np.uint8))
        (folder / "clear.png").write_bytes(picture(clear))
        (folder / "tiny.png").write_bytes(picture(Image.fromarray(drawn.integers(0, 255, (9, 9, 3), dtype=np.uint8))))
        (folder / "corrupt.jpg").write_bytes(noise()[:-2000])
        (folder / "long.png").write_bytes(noise(kind="PNG"))
        for name in ("twin", "turned", "clear", "tiny", "corrupt"):
            (folder / f"{name}.txt").write_text("sks, thing")
        (folder / "long.txt").write_text("sks, " + "word, " * 120)
        (folder / "bidi.png").write_bytes(noise((97, 96), "PNG"))
        (folder / "bidi.txt").write_text("sks \u202etext", "utf-8")

        def look(*options: str) -> dict[str, Any]:
            arguments = ("--resolution", "96", "--set", "data.buckets.step=8", "--json", *options)
            assert call("dataset", "scan", str(folder), *arguments) == 2
            return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]

        return look

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("turned.jpg", "orient|exif|turned|upright"),
            ("clear.png", "alpha|transparen"),
            ("corrupt.jpg", "unreadable|truncated|cannot"),
            ("twin.png", "duplicate|same|equal|copies"),
            ("tiny.png", "tiny|small"),
            ("long", "long|token"),
            ("bidi", "invisible|control|odd|character"),
        ],
    )
    def test_what_it_reports(self, answer: Callable[..., dict[str, Any]], name: str, words: str) -> None:
        findings = [json.dumps(finding) for finding in answer()["findings"]]
        assert any(name in text and re.search(words, text, re.IGNORECASE) for text in findings), findings

    def test_good_pictures_are_not_spoken_of(self, answer: Callable[..., dict[str, Any]]) -> None:
        for finding in answer()["findings"]:
            if finding["severity"] in ("error", "warning"):
                assert not re.search(r"\bp[1-5]\.png", json.dumps(finding)), finding

    def test_tags_are_counted(self, answer: Callable[..., dict[str, Any]]) -> None:
        counts = json.dumps(answer()["captions"])
        for tag, count in (("outdoors", 4), ("hare", 4), ("teapot", 2)):
            assert re.search(rf'"{tag}"[^\d]*{count}\b', counts), counts[:500]

    def test_the_trigger_is_looked_for(self, answer: Callable[..., dict[str, Any]]) -> None:
        found = [f for f in answer("--trigger", "teapot")["findings"] if "teapot" in json.dumps(f)]
        assert any("p1" in json.dumps(f) for f in found), found

    def test_its_buckets_are_those_of_a_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = put(tmp_path / "good", a="red", b="green", c="blue")
        (folder / "d.png").write_bytes(picture("cyan", (64, 128)))
        (folder / "d.txt").write_text("cyan")
        options = ("--resolution", "64", "--set", "data.buckets.step=16", "--set", f"data.cache={tmp_path / 'cache'}")
        call("dataset", "scan", str(folder), *options, "--json")
        table = json.loads(capsys.readouterr().out)["buckets"]
        seen = preflight(run_of(data_of(folder)))
        assert {(b["width"], b["height"]): b["images"] for b in table} == {size: n for size, n, _ in seen.buckets}


def test_over_long_captions_are_counted_by_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Row 20: what the text encoder will not read is told before a run, with the picture's name."""
    folder = put_files(tmp_path / "set", FINE)
    (folder / "fine1.txt").write_text("word " * 200)
    call("check", str(run_file(data_of(folder))))
    shown = capsys.readouterr().out
    assert "token" in shown
    assert re.search(r"(?m)^.*fine1.*token|^.*token.*fine1", shown)
