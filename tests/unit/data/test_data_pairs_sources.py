"""Pairs of pictures, of which one was preferred, in tables, data sets and folders."""

from __future__ import annotations

import zipfile
from pathlib import Path

import datasets
import pytest
from pair_helpers import contents, noise, parquet, pick, png, sides, table
from pydantic import ValidationError
from source_helpers import found, jsonl, look, notices, problems

from gesso.config.run import Source
from gesso.data.sources.pairs import MISSING, TIE, UNLABELLED

PICKED = {"prompt 0": (0, 100), "prompt 1": (101, 1), "prompt 3": (3, 103)}
"""What the labels of `pick` say; a tie and a pair without a label are left out."""


def paths(folder: Path, *, count: int = 5) -> list[dict[str, object]]:
    """The rows of `pick` with their pictures as files."""
    columns = pick(count)
    rows = []
    for i in range(count):
        for side, name in (("jpg_0", f"a{i}.png"), ("jpg_1", f"b{i}.png")):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(bytes(columns[side][i]))  # type: ignore[arg-type]
        rows.append({"jpg_0": f"a{i}.png", "jpg_1": f"b{i}.png", "label_0": columns["label_0"][i]})
        rows[-1]["caption"] = f"prompt {i}"
    return rows


class TestColumns:
    @pytest.mark.parametrize(("good", "bad"), [("chosen", "rejected"), ("preferred", "rejected"), ("winner", "loser")])
    def test_columns_that_say_which_is_which(self, tmp_path: Path, good: str, bad: str) -> None:
        noise(tmp_path / "a.png", 0)
        noise(tmp_path / "b.png", 1)
        jsonl(tmp_path, {good: "a.png", bad: "b.png", "prompt": "a thing"})
        assert sides(found(tmp_path)) == {"a thing": ("a.png", "b.png")}
        assert not look(tmp_path).notices, "both pictures are used"

    def test_columns_that_are_named(self, tmp_path: Path) -> None:
        noise(tmp_path / "a.png", 0)
        noise(tmp_path / "b.png", 1)
        jsonl(tmp_path, {"better": "a.png", "worse": "b.png", "first": 0, "text": "a thing"})
        named = {"image_column": "better", "rejected_column": "worse"}
        assert sides(found(tmp_path, **named)) == {"a thing": ("a.png", "b.png")}
        assert sides(found(tmp_path, **named, label_column="first")) == {"a thing": ("b.png", "a.png")}

    def test_the_label_decides_and_ties_are_never_trained_on(self, tmp_path: Path) -> None:
        jsonl(tmp_path, *paths(tmp_path))
        seen = look(tmp_path)
        assert contents(seen.records) == PICKED
        assert [(one.why, one.where.rpartition(":")[2]) for one in seen.dropped] == [(TIE, "3"), (UNLABELLED, "5")]
        told = notices(tmp_path)
        assert f"1 of 5 pairs left out: {TIE}: {tmp_path}/metadata.jsonl:3" in told
        assert f"1 of 5 pairs left out: {UNLABELLED}" in told

    @pytest.mark.parametrize("label", ["1", "1.0", 1, True])
    def test_a_label_may_be_written_in_any_way(self, tmp_path: Path, label: object) -> None:
        jsonl(tmp_path, paths(tmp_path, count=1)[0] | {"label_0": label})
        assert contents(found(tmp_path)) == {"prompt 0": (0, 100)}

    def test_csv_labels(self, tmp_path: Path) -> None:
        rows = paths(tmp_path)
        lines = [",".join("" if v is None else str(v) for v in row.values()) for row in rows]
        (tmp_path / "metadata.csv").write_text("\n".join(["jpg_0,jpg_1,label_0,caption", *lines]) + "\n")
        assert contents(found(tmp_path)) == PICKED

    @pytest.mark.parametrize("label", [2, -1, "yes", 0.7, [1]])
    def test_a_label_that_is_none_is_named_with_its_line(self, tmp_path: Path, label: object) -> None:
        first, second = paths(tmp_path, count=2)
        jsonl(tmp_path, first, second | {"label_0": label})
        message = problems(tmp_path)
        assert "metadata.jsonl:2: 'label_0' is" in message
        assert "1 if the first picture is preferred" in message

    def test_a_missing_side_is_left_out_and_counted(self, tmp_path: Path) -> None:
        table(tmp_path, 2)
        row = {"chosen": "good0.png", "caption": "no rival"}
        jsonl(tmp_path, {"caption": "nothing"}, row, {**row, "rejected": None}, {**row, "rejected": ""},
              {"chosen": "good1.png", "rejected": "bad1.png", "caption": "prompt 1"})  # fmt: skip
        seen = look(tmp_path)
        assert sides(seen.records) == {"prompt 1": ("good1.png", "bad1.png")}
        assert [one.why for one in seen.dropped] == [MISSING] * 4
        assert not seen.problems

    def test_a_rival_that_is_not_there_is_a_mistake(self, tmp_path: Path) -> None:
        table(tmp_path, 2)
        (tmp_path / "bad1.png").unlink()
        message = problems(tmp_path)
        assert "metadata.jsonl:2" in message
        assert "there is no picture 'bad1.png'" in message

    def test_a_rival_outside_the_folder_is_refused(self, tmp_path: Path) -> None:
        noise(tmp_path / "secret.png", 1)
        noise(tmp_path / "in" / "a.png", 2)
        for path in ("../secret.png", str(tmp_path / "secret.png")):
            jsonl(tmp_path / "in", {"chosen": "a.png", "rejected": path, "caption": "x"})
            assert "folder" in problems(tmp_path / "in")

    def test_nothing_left_stops_the_run(self, tmp_path: Path) -> None:
        jsonl(tmp_path, paths(tmp_path, count=1)[0] | {"label_0": 0.5})
        assert "no picture is left" in problems(tmp_path)

    def test_names_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        table(tmp_path, 1)
        assert "there is no column 'loser'" in problems(tmp_path, rejected_column="loser")
        assert "there is no column 'who'" in problems(tmp_path, label_column="who")
        same = problems(tmp_path, image_column="chosen", rejected_column="chosen")
        assert "both pictures of a pair are from 'chosen'" in same
        bare = problems(tmp_path, rejected_column="caption")
        assert "a pair needs two columns of pictures" in bare

    def test_settings_without_effect_are_refused(self, tmp_path: Path) -> None:
        noise(tmp_path / "a.png", 1).with_suffix(".txt").write_text("x")
        assert "pairs is set, but no pairs of pictures were found" in problems(tmp_path, pairs="chosen")
        assert "label_column is set, but" in problems(tmp_path, label_column="who")
        with pytest.raises(ValidationError, match="pairs is none"):
            Source(path="x", pairs="none", rejected_column="bad")

    def test_masks_are_refused(self, tmp_path: Path) -> None:
        table(tmp_path, 1)
        assert "pairs of pictures have no masks" in problems(tmp_path, mask="alpha")

    def test_the_preferred_pictures_alone(self, tmp_path: Path) -> None:
        jsonl(tmp_path, *paths(tmp_path))
        seen = look(tmp_path, pairs="chosen")
        assert sides(seen.records) == {
            "prompt 0": ("a0.png", ""),
            "prompt 1": ("b1.png", ""),
            "prompt 3": ("a3.png", ""),
        }
        assert len(seen.dropped) == 2

    def test_no_pairs_where_that_is_not_meant(self, tmp_path: Path) -> None:
        table(tmp_path, 2)
        assert sides(found(tmp_path, image_column="chosen")) == {
            "prompt 0": ("good0.png", ""),
            "prompt 1": ("good1.png", ""),
        }
        assert "no image column" in problems(tmp_path, pairs="none")


class TestTablesWithPictures:
    def test_parquet(self, tmp_path: Path) -> None:
        seen = look(parquet(tmp_path / "pairs.parquet", pick()))
        assert contents(seen.records) == PICKED
        assert [one.why for one in seen.dropped] == [TIE, UNLABELLED]
        assert not seen.problems

    def test_a_label_that_is_not_a_number_is_none(self, tmp_path: Path) -> None:
        seen = look(parquet(tmp_path / "pairs.parquet", pick(2) | {"label_0": [float("nan"), 0.0]}))
        assert contents(seen.records) == {"prompt 1": (101, 1)}
        assert [one.why for one in seen.dropped] == [UNLABELLED]

    def test_parquet_with_named_columns(self, tmp_path: Path) -> None:
        columns = pick()
        renamed = {"chosen": columns["jpg_0"], "rejected": columns["jpg_1"], "caption": columns["caption"]}
        file = parquet(tmp_path / "pairs.parquet", renamed)
        assert contents(found(file)) == {f"prompt {i}": (i, 100 + i) for i in range(5)}

    def test_texts_called_chosen_and_rejected_are_no_pictures(self, tmp_path: Path) -> None:
        answers = {"chosen": ["yes"], "rejected": ["no"], "image": [png(3)], "text": ["a thing"]}
        [record] = found(parquet(tmp_path / "answers.parquet", answers))  # type: ignore[arg-type]
        assert record.rejected is None

    def test_cells_without_a_picture(self, tmp_path: Path) -> None:
        columns = pick(3)
        columns["label_0"], columns["jpg_1"][1] = [1, 1, 0], None
        seen = look(parquet(tmp_path / "pairs.parquet", columns))
        assert contents(seen.records) == {"prompt 0": (0, 100), "prompt 2": (102, 2)}
        assert [(one.why, one.where.rpartition(" ")[2]) for one in seen.dropped] == [(MISSING, "2")]

    def test_cells_with_only_a_path_are_a_mistake(self, tmp_path: Path) -> None:
        columns = pick(2)
        columns["jpg_1"] = [{"bytes": None, "path": "/etc/passwd"}, {"bytes": png(101), "path": None}]
        message = problems(parquet(tmp_path / "pairs.parquet", columns))
        assert "1 row of 2 has no picture in 'jpg_1': row 1 (only the path '/etc/passwd')" in message

    def test_what_datasets_saves(self, tmp_path: Path) -> None:
        columns = pick()
        images = {name: [{"bytes": data, "path": None} for data in columns[name]] for name in ("jpg_0", "jpg_1")}
        features = datasets.Features(
            {"jpg_0": datasets.Image(), "jpg_1": datasets.Image(), "label_0": datasets.Value("float32"),
             "caption": datasets.Value("string")}
        )  # fmt: skip
        saved = datasets.Dataset.from_dict(columns | images, features=features)
        saved.save_to_disk(tmp_path / "saved")
        seen = look(tmp_path / "saved")
        assert contents(seen.records) == PICKED
        assert [one.why for one in seen.dropped] == [TIE, UNLABELLED]

    def test_a_saved_pair_without_one_side(self, tmp_path: Path) -> None:
        columns = pick(2) | {"label_0": [1, 0]}
        columns["jpg_0"][1] = None
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
        seen = look(tmp_path / "saved")
        assert contents(seen.records) == {"prompt 0": (0, 100)}
        assert [one.why for one in seen.dropped] == [MISSING]
        assert not seen.problems


class TestFolders:
    @pytest.mark.parametrize(("good", "bad"), [("chosen", "rejected"), ("Winner", "loser"), ("preferred", "rejected")])
    def test_two_folders_with_equal_stems(self, tmp_path: Path, good: str, bad: str) -> None:
        for i in range(3):
            noise(tmp_path / good / f"{i}.png", i).with_suffix(".txt").write_text(f"prompt {i}")
            noise(tmp_path / bad / f"{i}.webp", 100 + i, lossless=True)
        assert sides(found(tmp_path)) == {f"prompt {i}": (f"{i}.png", f"{i}.webp") for i in range(3)}
        assert {record.concept for record in found(tmp_path)} == {""}

    def test_what_has_no_rival_is_left_out_and_counted(self, tmp_path: Path) -> None:
        noise(tmp_path / "chosen" / "cats" / "a.png", 1).with_suffix(".txt").write_text("both")
        noise(tmp_path / "rejected" / "cats" / "a.png", 2).with_suffix(".txt").write_text("not read")
        noise(tmp_path / "chosen" / "b.png", 3)
        noise(tmp_path / "rejected" / "c.png", 4)
        noise(tmp_path / "rejected" / "a.png", 5)
        noise(tmp_path / "other" / "d.png", 6)
        seen = look(tmp_path)
        assert sides(seen.records) == {"both": ("a.png", "a.png")}
        assert [record.concept for record in seen.records] == ["cats"]
        assert sorted(one.where.removeprefix(f"{tmp_path}/") for one in seen.dropped) == [
            "chosen/b.png",
            "rejected/a.png",
            "rejected/c.png",
        ]
        told = "\n".join(seen.notices)
        assert "pictures outside of chosen/ and rejected/ are not used: other/d.png" in told
        assert "1 caption file in rejected/ not read" in told
        assert not seen.problems, "a picture without a rival needs no caption"

    def test_two_rivals_of_one_stem_are_a_mistake(self, tmp_path: Path) -> None:
        noise(tmp_path / "chosen" / "a.png", 1).with_suffix(".txt").write_text("x")
        noise(tmp_path / "rejected" / "a.png", 2)
        noise(tmp_path / "rejected" / "a.webp", 3)
        assert "several pictures of one stem" in problems(tmp_path)

    def test_in_an_archive(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
            packed.writestr("set/chosen/a.png", png(1))
            packed.writestr("set/chosen/a.txt", "x")
            packed.writestr("set/rejected/a.png", png(101))
        assert contents(found(tmp_path / "set.zip")) == {"x": (1, 101)}

    def test_as_plain_pictures(self, tmp_path: Path) -> None:
        noise(tmp_path / "chosen" / "a.png", 1).with_suffix(".txt").write_text("x")
        noise(tmp_path / "rejected" / "a.png", 2).with_suffix(".txt").write_text("y")
        plain = found(tmp_path, pairs="none")
        assert sides(plain) == {"x": ("a.png", ""), "y": ("a.png", "")}
        assert {record.concept for record in plain} == {"chosen", "rejected"}
        assert sides(found(tmp_path, pairs="chosen")) == {"x": ("a.png", "")}
