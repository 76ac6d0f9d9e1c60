"""Tables that list pictures, and tables that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import captioned, solid
from source_helpers import BLUE, RED, captions, colours, found, jsonl, look, notices, png, problems

from gesso.data.places import Place
from gesso.errors import Problems, UserError


def csv(folder: Path, text: str, name: str = "metadata.csv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, "utf-8", newline="")
    return folder / name


def parquet(path: Path, columns: dict[str, object], *, rows_per_group: int = 2, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group, **options)
    return path


class TestCsv:
    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_quotes_commas_and_lines_in_cells(self, tmp_path: Path, separator: str) -> None:
        solid(tmp_path / "a.png")
        rows = [["file_name", "text"], ["a.png", '"red, ""very""; red\nsecond"']]
        csv(tmp_path, "\ufeff" + "\r\n".join(separator.join(row) for row in rows) + "\r\n")
        assert captions(found(tmp_path)) == {"a.png": 'red, "very"; red\nsecond'}

    def test_ragged_lines_are_named_by_line(self, tmp_path: Path) -> None:
        for name in ("a", "b", "d"):
            solid(tmp_path / f"{name}.png")
        file = csv(tmp_path, 'file_name,text\na.png,"one\nand"\nb.png,two, too\n\nd.png\nd.png,three\n')
        message = problems(tmp_path)
        assert f"{file}:4: 3 cells, but 2 columns (file_name, text)" in message
        assert f"{file}:6: 1 cell, but 2 columns" in message
        assert f"{file}:2" not in message
        assert f"{file}:7" not in message

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "has no rows"),
            ("file_name,text\n", "has no rows"),
            ("file_name,text,text\na.png,x,y\n", "two columns of one name"),
            ("pic,words\na.png,x\n", "the columns are: pic, words"),
            ('file_name,text\na.png,"open\n', ":2: not CSV"),
        ],
    )
    def test_tables_that_cannot_be_used(self, tmp_path: Path, text: str, message: str) -> None:
        solid(tmp_path / "a.png")
        csv(tmp_path, text)
        assert message in problems(tmp_path)

    def test_other_encodings_are_refused_by_name_and_line(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,caf\xe9\n")
        assert "metadata.csv:2: the text is not UTF-8" in problems(tmp_path)

    def test_a_near_column_is_suggested(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        csv(tmp_path, "picture,words\na.png,x\n")
        assert "set image_column to picture" in problems(tmp_path, image_column="pictures")


class TestLists:
    def test_a_list_is_several_lines(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        jsonl(tmp_path, {"file_name": "a.png", "captions": ["one", "two"]})
        assert captions(found(tmp_path)) == {"a.png": "one\ntwo"}
        jsonl(tmp_path, {"file_name": "a.png", "captions": ["one", 2]})
        assert "metadata.jsonl:1: the caption is not text: ['one', 2]" in problems(tmp_path)

    @pytest.mark.parametrize("name", ["list.jsonl", "list.csv", "list.parquet"])
    def test_the_path_may_be_the_table(self, tmp_path: Path, name: str) -> None:
        solid(tmp_path / "sub" / "a.png")
        if name.endswith("jsonl"):
            jsonl(tmp_path, {"path": "sub/a.png", "caption": "x"}, name=name)
        elif name.endswith("csv"):
            csv(tmp_path, "path,caption\nsub/a.png,x\n", name)
        else:
            parquet(tmp_path / name, {"path": ["sub/a.png"], "caption": ["x"]})
        assert captions(found(tmp_path / name)) == {"a.png": "x"}
        assert captions(found(tmp_path, metadata=name)) == {"a.png": "x"}

    def test_parquet_rows_are_named(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        names = ["a.png", None, "gone.png", "../x.png"]
        file = parquet(tmp_path / "metadata.parquet", {"file_name": names, "text": list("abcd")})
        message = problems(tmp_path)
        assert f"{file} row 2: the image path is not text: None" in message
        assert f"{file} row 3: there is no picture 'gone.png'" in message
        assert f"{file} row 4: '../x.png' leads out of the folder" in message
        assert "row 1:" not in message

    def test_a_listed_picture_that_is_refused_is_one_problem(self, tmp_path: Path) -> None:
        folder, out = tmp_path / "in", tmp_path / "out"
        for file in (folder / "near.png", out / "a.png"):
            solid(file)
        (folder / "link.png").symlink_to(out / "a.png")
        (folder / "more").symlink_to(out)
        names = ("near.png", "link.png", "./link.png", "more/a.png", "gone.png")
        jsonl(folder, *({"file_name": name, "text": "x"} for name in names))
        with pytest.raises(Problems) as caught:
            found(folder)
        assert [problem.where.rpartition("/")[2] for problem in caught.value.problems] == [
            "link.png",
            "more",
            "metadata.jsonl:5",
        ]

    @pytest.mark.parametrize("name", ["/a.png", "\\\\host\\a.png", "C:a.png", "file:///a.png", "https://x.org/a.png"])
    def test_paths_that_are_not_relative(self, tmp_path: Path, name: str) -> None:
        solid(tmp_path / "a.png")
        jsonl(tmp_path, {"file_name": name, "text": "x"})
        assert "is not a path relative to the folder" in problems(tmp_path)

    def test_a_path_may_go_up_inside_the_folder(self, tmp_path: Path) -> None:
        solid(tmp_path / "pictures" / "a.png")
        jsonl(tmp_path / "lists", {"file_name": "../pictures/./a.png", "text": "x"}, name="m.jsonl")
        assert captions(found(tmp_path, metadata="lists/m.jsonl")) == {"a.png": "x"}

    def test_tables_in_sub_folders_go_with_side_files_elsewhere(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            solid(tmp_path / name / "a.png")
            jsonl(tmp_path / name, {"file_name": "a.png", "text": name})
        solid(tmp_path / "two" / "lost.png")
        captioned(tmp_path / "three", "b.png", "three")
        assert {(r.caption, r.concept) for r in found(tmp_path)} == {(n, n) for n in ("one", "two", "three")}
        text = notices(tmp_path)
        assert "captions come from one/metadata.jsonl, two/metadata.jsonl" in text
        assert "does not list are not used: two/lost.png" in text

    def test_side_files_that_a_table_overrules_are_told(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "beside")
        jsonl(tmp_path, {"file_name": "a.png", "text": "listed"})
        assert captions(found(tmp_path)) == {"a.png": "listed"}
        assert "1 caption files beside the pictures are not read" in notices(tmp_path)
        assert captions(found(tmp_path, layout="folder")) == {"a.png": "beside"}
        assert "not read, because layout is 'folder': metadata.jsonl" in notices(tmp_path, layout="folder")

    def test_of_two_tables_at_the_root_one_is_read_and_this_is_told(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        jsonl(tmp_path, {"file_name": "a.png", "text": "json"})
        csv(tmp_path, "file_name,text\na.png,csv\n")
        assert captions(found(tmp_path)) == {"a.png": "json"}
        assert "metadata.jsonl: read, and not metadata.csv" in notices(tmp_path)

    def test_a_thousand_missing_pictures_are_all_named(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        jsonl(tmp_path, *({"file_name": f"{i}.png", "text": "x"} for i in range(1000)))
        assert len(look(tmp_path).problems) == 1000


class TestPicturesInTables:
    def test_bytes_and_structs_of_bytes_in_row_groups(self, tmp_path: Path) -> None:
        cells = [png("red"), png("blue"), png("red"), png("blue"), png("red")]
        texts = ["r1", "b1", "r2", "b2", "r3"]
        structs = [{"bytes": cell, "path": "x.png"} for cell in cells]
        for name, column in (("plain", cells), ("struct", structs)):
            file = parquet(tmp_path / f"{name}.parquet", {"image": column, "text": texts})
            rows = found(file)
            assert colours(rows) == {text: RED if text[0] == "r" else BLUE for text in texts}
            assert rows[4].place == Place(str(file), "parquet", "image", 4)

    def test_a_folder_of_them_by_split(self, tmp_path: Path) -> None:
        for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
            parquet(tmp_path / "data" / f"{name}.parquet", {"image": [png()], "caption": [name]})
        assert {r.caption[:5] for r in found(tmp_path)} == {"train"}
        assert len(found(tmp_path)) == 2
        assert "not read, because split is 'train': data/test-00000-of-00001.parquet" in notices(tmp_path)
        assert [r.caption for r in found(tmp_path, split="test")] == ["test-00000-of-00001"]
        assert "no file of the split 'validation'; the files' names say: test, train" in problems(
            tmp_path, split="validation"
        )

    def test_paths_in_tables_are_never_followed(self, tmp_path: Path) -> None:
        secret = solid(tmp_path / "secret.png")
        cells = [{"bytes": png(), "path": None}, {"bytes": None, "path": str(secret)}, None]
        file = parquet(tmp_path / "in" / "x.parquet", {"image": cells, "text": list("abc")})
        message = problems(file)
        assert f"2 rows of 3 have no picture in 'image': row 2 (only the path '{secret}'), row 3" in message
        with pytest.raises(UserError, match="only the path"):
            Place(str(file), "parquet", "image", 1).read()
        with pytest.raises(UserError, match=r"x\.parquet row 4: cannot be read: the table has no such row"):
            Place(str(file), "parquet", "image", 3).read()

    def test_rows_are_named_from_one_and_read_from_their_group(self, tmp_path: Path) -> None:
        file = tmp_path / "x.parquet"
        colours = ["red", "green", "blue", "white", "black"]
        pq.write_table(pa.table({"image": [png(c) for c in colours], "text": colours}), file, row_group_size=2)
        rows = found(file)
        assert [str(row.place) for row in rows] == [f"{file} row {i}" for i in range(1, 6)]
        assert [row.place.name for row in rows] == [f"row {i}" for i in range(1, 6)]
        assert [row.place.read() for row in rows] == [png(row.caption) for row in rows]
        assert f"1 of 5 pictures has no caption: {file} row 3" in problems(
            parquet(file, {"image": [png(c) for c in colours], "text": ["a", "b", "", "d", "e"]})
        )

    def test_without_statistics_the_same_is_found(self, tmp_path: Path) -> None:
        cells = [{"bytes": png(), "path": None}, {"bytes": None, "path": "x.png"}]
        columns = {"image": cells, "text": list("ab")}
        file = parquet(tmp_path / "x.parquet", columns, write_statistics=False)
        assert "1 row of 2 has no picture in 'image': row 2 (only the path 'x.png')" in problems(file)

    def test_pictures_are_not_read_while_rows_are_listed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = {"image": [png()] * 5, "text": list("abcde")}
        file = parquet(tmp_path / "x.parquet", columns)
        read, asked = pq.ParquetFile.read_row_group, []

        def watched(self: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
            asked.append(columns)
            return read(self, group, columns=columns)

        monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
        assert len(found(file)) == 5
        assert asked == [["text"]] * 3

    @pytest.mark.parametrize(
        ("columns", "fields", "message"),
        [
            ({"a": [b"x"], "b": [b"x"], "text": ["t"]}, {}, "several columns may hold the pictures: a, b"),
            ({"image": [b"x"], "label": [3]}, {}, "no caption column"),
            ({"image": [b"x"], "text": [3]}, {}, "the caption column 'text' holds int64, not text"),
            ({"url": ["http://x"], "text": ["t"]}, {"layout": "parquet"}, "no column of pictures (bytes)"),
            ({"image": [b"x"], "text": ["t"]}, {"image_column": "pic"}, "the column 'pic' is not there"),
            ({"image": [b"x"], "text": ["t"]}, {"caption_column": "texts"}, "set caption_column to text"),
            ({"image": [b"x"], "text": ["t"]}, {"mask": "file"}, "tables have no mask files"),
        ],
    )
    def test_tables_that_cannot_be_used(
        self, tmp_path: Path, columns: dict[str, object], fields: dict[str, object], message: str
    ) -> None:
        file = parquet(tmp_path / "x.parquet", columns)
        assert message in problems(file, **({"layout": "parquet"} | fields))

    def test_a_damaged_table_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
        assert f"{tmp_path}/x.parquet: cannot be read as Parquet" in problems(tmp_path)

    def test_a_table_with_pictures_may_be_called_metadata(self, tmp_path: Path) -> None:
        parquet(tmp_path / "metadata.parquet", {"image": [png("blue")], "text": ["b"]})
        assert colours(found(tmp_path)) == {"b": BLUE}

    def test_a_table_written_anew_is_read_anew(self, tmp_path: Path) -> None:
        file = parquet(tmp_path / "x.parquet", {"image": [png("red")], "text": ["x"]})
        assert colours(found(file)) == {"x": RED}
        parquet(file, {"image": [png("blue", (9, 9))], "text": ["x"]})
        assert colours(found(file)) == {"x": BLUE}

    def test_several_caption_lines(self, tmp_path: Path) -> None:
        file = parquet(tmp_path / "x.parquet", {"image": [png()], "captions": [["one", "two"]]})
        assert [r.caption for r in found(file)] == ["one\ntwo"]


def test_json_lines_with_bad_json_only(tmp_path: Path) -> None:
    solid(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("{\n" + json.dumps("x"))
    message = problems(tmp_path)
    assert "metadata.jsonl:1: not JSON" in message
    assert "metadata.jsonl:2: not a JSON object" in message
