"""`gesso dataset pairs`: what it writes is what training reads, and what it leaves out is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from gesso import cli
from gesso.cli import dataset_edit, dataset_pairs
from gesso.config.run import Source
from gesso.data.sources import Record, records
from gesso.errors import UserError

app = typer.Typer(rich_markup_mode=None)
app.command("pairs")(dataset_pairs.pairs)
app.command("undo")(dataset_edit.undo)


def call(*arguments: object, code: int = 0) -> str:
    """What a command prints; with an exit code other than 0, its error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, UserError):
        assert result.exception.exit_code == code, result.exception
        return result.output + str(result.exception)
    assert result.exit_code == code, result.output
    return result.output


def picture(path: Path, seed: int, size: tuple[int, int] = (16, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def read(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    """Caption -> both pictures, as training finds them."""
    found: list[Record] = records([Source(path=str(folder))])[0]
    return {r.caption: (r.place.read(), r.rejected.read()) for r in found if r.rejected is not None}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for i in range(4):
        picture(tmp_path / "good" / f"{i}.png", i).with_suffix(".txt").write_text(f"prompt {i}")
        picture(tmp_path / "bad" / f"{i}.png", 100 + i)
    return tmp_path / "good", tmp_path / "bad"


class TestFolders:
    def test_what_is_written_is_what_training_reads(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        good, bad = folders
        said = call("pairs", "--chosen", good, "--rejected", bad, "--output", tmp_path / "set")
        assert f"{tmp_path}/set/metadata.jsonl: 4 pairs; 8 pictures copied into {tmp_path}/set/images" in said
        expected = {
            f"prompt {i}": ((good / f"{i}.png").read_bytes(), (bad / f"{i}.png").read_bytes()) for i in range(4)
        }
        assert read(tmp_path / "set") == expected
        call("undo", tmp_path / "set")
        assert not list((tmp_path / "set").glob("*.jsonl")) + list((tmp_path / "set" / "images").glob("*"))

    def test_pictures_in_the_output_folder_stay_where_they_are(
        self, folders: tuple[Path, Path], tmp_path: Path
    ) -> None:
        good, bad = folders
        assert "copied" not in call("pairs", "--chosen", good, "--rejected", bad, "--output", tmp_path)
        [first, *_] = (tmp_path / "metadata.jsonl").read_text().splitlines()
        assert json.loads(first) == {"chosen": "good/0.png", "rejected": "bad/0.png", "caption": "prompt 0"}
        assert len(read(tmp_path)) == 4

    def test_what_is_left_out_is_counted_with_its_reason(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        good, bad = folders
        (good / "0.txt").unlink()
        (bad / "1.png").unlink()
        picture(bad / "2.png", 7, (24, 16))
        picture(bad / "extra.png", 8)
        (bad / "3.png").write_bytes((good / "3.png").read_bytes())
        arguments = ("pairs", "--chosen", good, "--rejected", bad, "--output", tmp_path / "set")
        said = call(*arguments, code=2)
        for line in (
            "left out, one of the two pictures is missing: 2",
            "left out, the preferred picture has no caption (--prompt gives it one): 1",
            "left out, the two pictures are not of one shape, and neither is ever stretched: 1",
            "left out, both pictures are the same: 1",
            "no pair is left",
        ):
            assert line in said
        assert not (tmp_path / "set").exists()
        assert ": 1 pair;" in call(*arguments, "--prompt", "a thing")
        assert list(read(tmp_path / "set")) == ["a thing"]

    def test_it_does_not_overwrite_unasked(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "metadata.jsonl").write_text("mine")
        arguments = ("pairs", "--chosen", folders[0], "--rejected", folders[1], "--output", tmp_path / "set")
        assert "add --replace" in call(*arguments, code=2)
        assert (tmp_path / "set" / "metadata.jsonl").read_text() == "mine"
        call(*arguments, "--replace")
        assert len(read(tmp_path / "set")) == 4
        call("undo", tmp_path / "set")
        assert (tmp_path / "set" / "metadata.jsonl").read_text() == "mine"

    def test_a_dry_run_writes_nothing(self, folders: tuple[Path, Path], tmp_path: Path) -> None:
        said = call("pairs", "--chosen", folders[0], "--rejected", folders[1], "-o", tmp_path / "set", "--dry-run")
        assert "4 pairs; nothing was written" in said
        assert not (tmp_path / "set").exists()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "give --chosen DIR and --rejected DIR, or --scores FILE"),
            (("--chosen", "good"), "two folders or from scores"),
            (("--chosen", "good", "--rejected", "bad", "--scores", "s.jsonl"), "two folders or from scores"),
            (("--chosen", "good", "--rejected", "bad", "--min-gap", "0.1"), "--min-gap belongs to --scores"),
            (("--chosen", "good", "--rejected", "bad", "--all"), "belongs to --scores"),
            (("--scores", "s.jsonl", "--prompt", "x"), "--prompt belongs to --chosen and --rejected"),
            (("--chosen", "good", "--rejected", "."), "one folder holds the other"),
        ],
    )
    def test_options_that_do_not_go_together(
        self,
        folders: tuple[Path, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: tuple[str, ...],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert message in call("pairs", *arguments, "--output", "set", code=2)


SCORES = {"hare": [0.9, 0.1, 0.5], "fox": [0.3, 0.3], "owl": [0.7], "stag": [0.40, 0.45]}


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    rows = []
    for k, (prompt, values) in enumerate(SCORES.items()):
        for i, value in enumerate(values):
            picture(tmp_path / "drawn" / f"{prompt}{i}.png", 10 * k + i)
            rows.append({"image": f"drawn/{prompt}{i}.png", "prompt": prompt, "score": value})
    file = tmp_path / "scores.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def named(folder: Path) -> list[tuple[str, str, str]]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    return [(r["caption"], r["chosen"].rpartition("/")[2], r["rejected"].rpartition("/")[2]) for r in rows]


class TestScores:
    def test_the_best_against_the_worst(self, scored: Path, tmp_path: Path) -> None:
        said = call("pairs", "--scores", scored, "--output", tmp_path)
        assert named(tmp_path) == [("hare", "hare0.png", "hare1.png"), ("stag", "stag1.png", "stag0.png")]
        assert "left out, neither is preferred (a tie): 1" in said
        assert "left out, there is one picture of this prompt only: 1" in said
        [first, _] = (tmp_path / "metadata.jsonl").read_text().splitlines()
        assert {k: v for k, v in json.loads(first).items() if "score" in k} == {
            "chosen_score": 0.9,
            "rejected_score": 0.1,
        }
        assert len(read(tmp_path)) == 2

    def test_all_pairs_far_enough_apart(self, scored: Path, tmp_path: Path) -> None:
        said = call("pairs", "--scores", scored, "--output", tmp_path, "--all", "--min-gap", "0.35")
        assert named(tmp_path) == [
            ("hare", "hare0.png", "hare2.png"),
            ("hare", "hare0.png", "hare1.png"),
            ("hare", "hare2.png", "hare1.png"),
        ]
        assert "left out, the scores are less than 0.35 apart: 1" in said
        assert "'stag': stag1.png and stag0.png" in said

    def test_another_column_of_scores(self, scored: Path, tmp_path: Path) -> None:
        text = scored.read_text().replace('"score"', '"ugliness"')
        scored.write_text(text)
        assert "there is no column 'score'" in call("pairs", "--scores", scored, "--output", tmp_path, code=2)
        call("pairs", "--scores", scored, "--output", tmp_path, "--score-column", "ugliness")
        assert named(tmp_path)[0] == ("hare", "hare0.png", "hare1.png")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"score": "good"}, "'score' is 'good'"),
            ({"score": None}, "'score' is None"),
            ({"score": float("nan")}, "'score' is nan"),
            ({"image": "drawn/none.png"}, "there is no picture 'drawn/none.png'"),
            ({"prompt": " "}, "'prompt' is empty"),
        ],
    )
    def test_a_row_that_cannot_be_read_is_named(
        self, scored: Path, tmp_path: Path, change: dict[str, object], message: str
    ) -> None:
        lines = scored.read_text().splitlines()
        lines[2] = json.dumps(json.loads(lines[2]) | change)
        scored.write_text("\n".join(lines))
        said = call("pairs", "--scores", scored, "--output", tmp_path / "set", code=2)
        assert message in said
        assert "scores.jsonl:3" in said
        assert not (tmp_path / "set").exists()


def test_check_counts_pairs_and_what_is_left_out(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("pairs", "--scores", scored, "--output", tmp_path / "set")
    with (tmp_path / "set" / "metadata.jsonl").open("a") as file:
        file.write('{"chosen": null, "rejected": null, "caption": "half"}\n')
    run = tmp_path / "run.yaml"
    run.write_text(
        "output: out\nmodel: {base: 'micro:sdxl'}\ntraining: {steps: 2, device: cpu, precision: fp32}\n"
        "objective: {type: dpo}\ndata: {resolution: 16, buckets: {step: 16}, cache: c, sources: [{path: set}]}\n"
    )
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", str(run)])
    said = capsys.readouterr().out
    assert caught.value.code in (0, None), said
    assert "pairs       2 of a preferred picture and another" in said
    assert "1 of 3 pairs left out: one of the two pictures is missing" in said
    assert " rather than " in said
    with pytest.raises(SystemExit):
        cli.main(["check", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["data"]["pairs"] == 2
    run.write_text(run.read_text().replace("dpo", "denoise"))
    with pytest.raises(SystemExit) as caught:
        cli.main(["check", str(run)])
    assert caught.value.code == 2
    assert "2 of 2 samples here are pairs of pictures" in capsys.readouterr().err
