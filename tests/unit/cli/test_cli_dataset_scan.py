from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from gesso import cli
from gesso.data.editing.journal import Journal


def scan(*arguments: str) -> int:
    """`gesso dataset scan` in this process; its exit status."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["dataset", "scan", *arguments])
    return caught.value.code if isinstance(caught.value.code, int) else 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    drawn = np.random.default_rng(0)
    for i in range(5):
        cells = drawn.integers(0, 255, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((96, 96), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"sks, number {i}")
    return folder


SMALL = ("--resolution", "96", "--set", "data.buckets.step=8")


def test_a_good_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan(str(folder), *SMALL, "--trigger", "sks") == 0
    out = capsys.readouterr().out
    assert "pictures    5" in out
    assert "captions    5" in out
    assert "96 x 96            5     0.0%" in out
    assert "hint: trigger: 'sks' is in 100.0% of the captions (5 of 5)" in out
    assert out.splitlines()[-1] == "0 errors, 0 warnings, 1 hint"


def test_what_would_stop_a_run_is_the_exit_status(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "2.png").write_bytes(b"broken")
    (folder / "3.txt").unlink()
    assert scan(str(folder), *SMALL) == 2
    out = capsys.readouterr().out
    assert "error: unreadable: 1 picture cannot be used" in out
    assert "  2.png: not a picture" in out
    assert "error: no caption" in out
    assert "  3.png" in out


def test_warnings_alone_are_no_failure(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "copy.png").write_bytes((folder / "1.png").read_bytes())
    (folder / "copy.txt").write_text("sks")
    assert scan(str(folder), *SMALL) == 0
    assert "  1.png  =  copy.png" in capsys.readouterr().out


def test_a_run_file_is_judged_with_its_settings(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        "output: out\ndata:\n  resolution: 64\n  buckets: {step: 8}\n  validation: {fraction: 0.3}\n"
        "  sources:\n    - {path: set, trigger: zzz}\ntraining: {steps: 5}\nmodel: {base: 'micro:sdxl'}\n"
    )
    assert scan(str(run), "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["buckets"] == [{"width": 64, "height": 64, "images": answer["summary"]["training"], "crop_loss": 0.0}]
    assert answer["summary"]["validation"] > 0
    assert answer["captions"]["tokens"]["exact"] is True
    assert {picture["caption"] for picture in answer["pictures"]} == {f"zzz, sks, number {i}" for i in range(5)}


def test_another_tools_dataset_file_is_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "dataset.toml"
    subset = '[[datasets.subsets]]\nimage_dir = "set"\nnum_repeats = 1\ncaption_extension = ".txt"\n'
    file.write_text(f"[[datasets]]\nresolution = 256\nenable_bucket = true\n{subset}")
    assert scan(str(file), "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["summary"]["pictures"], answer["buckets"][0]["width"]) == (5, 256)


def test_json_is_all_that_is_on_stdout(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "2.png").write_bytes(b"broken")
    assert scan(str(folder), *SMALL, "--json") == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert answer["findings"][0]["files"][0]["file"] == "2.png"


def test_a_page_is_never_written_over_unasked(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    page.write_text("mine")
    assert scan(str(folder), *SMALL, "--report", str(page)) == 2
    assert page.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert scan(str(folder), *SMALL, "--report", str(page), "--force") == 0
    assert "<!doctype html>" in page.read_text("utf-8")


def test_fix_says_what_it_would_do_and_asks(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "1.txt").write_bytes("\ufeffsks, café\r\n".encode())
    (folder / "2.png").rename(folder / "2.jpg")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("typer.confirm", lambda *_, **__: (_ for _ in ()).throw(typer.Abort()))
    assert scan(str(folder), *SMALL, "--fix") != 0
    assert "1.txt: UTF-8 with a byte-order mark to UTF-8" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    assert scan(str(folder), *SMALL, "--fix", "--yes") == 0
    out = capsys.readouterr().out
    assert "2.jpg: it is PNG: rename to 2.png" in out
    assert f"gesso dataset undo {folder}" in out
    assert (folder / "1.txt").read_bytes() == "sks, café\n".encode()
    assert "wrong ending" not in out, "judged as it is after the mending"
    Journal(folder).undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_fix_with_json_asks_nobody(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "1.txt").write_bytes(b"\xef\xbb\xbfsks")
    assert scan(str(folder), *SMALL, "--fix", "--json") == 2
    assert (folder / "1.txt").read_bytes().startswith(b"\xef\xbb\xbf")
    capsys.readouterr()
    assert scan(str(folder), *SMALL, "--fix", "--json", "--yes") == 0
    assert [one["kind"] for one in json.loads(capsys.readouterr().out)["mended"]] == ["encoding"]


def test_what_is_no_folder_cannot_be_mended(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    archive = shutil.make_archive(str(tmp_path / "set"), "zip", folder)
    assert scan(archive, *SMALL, "--fix") == 2
    assert "only folders" in capsys.readouterr().err
    assert scan(archive, *SMALL) == 0
    assert "pictures    5" in capsys.readouterr().out


def test_names_that_are_no_text_can_be_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "0.png").rename(folder / "caf\udce9.png")
    (folder / "0.txt").unlink()
    assert scan(str(folder), *SMALL, "--report", str(tmp_path / "page.html")) == 2
    assert "caf\\xe9.png" in capsys.readouterr().out
    assert "caf\\xe9.png" in (tmp_path / "page.html").read_text("utf-8")


def test_it_answers_without_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom gesso.cli import dataset\n"
        f"try:\n    dataset.scan({str(folder)!r}, resolution=96, sets=['data.buckets.step=8'])\n"
        "finally:\n    heavy = {'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
