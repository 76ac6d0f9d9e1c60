"""Captions from a metadata file: its columns, its paths, and every line that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

from data_helpers import captioned, solid
from source_helpers import captions, found, jsonl, notices, problems


class TestMetadata:
    def test_image_path_and_prompt_in_sub_folders(self, tmp_path: Path) -> None:
        solid(tmp_path / "aldar_kose" / "image_001.jpg")
        jsonl(tmp_path, {"image_path": "aldar_kose/image_001.jpg", "prompt": "a photo of sks aldar"})
        assert captions(found(tmp_path)) == {"image_001.jpg": "a photo of sks aldar"}

    def test_file_name_and_text_with_an_images_folder(self, tmp_path: Path) -> None:
        solid(tmp_path / "images" / "image_001.jpg")
        jsonl(tmp_path, {"file_name": "image_001.jpg", "text": "a caption", "license": "CC0"})
        assert captions(found(tmp_path)) == {"image_001.jpg": "a caption"}

    def test_the_folder_itself_goes_before_images(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        solid(tmp_path / "images" / "a.png")
        jsonl(tmp_path, {"file_name": "a.png", "text": "x"})
        assert [r.place.path for r in found(tmp_path)] == [tmp_path / "a.png"]

    def test_named_columns_and_file(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        jsonl(tmp_path, {"pic": "a.png", "words": "said", "text": "other"}, name="list.jsonl")
        rows = found(tmp_path, metadata="list.jsonl", image_column="pic", caption_column="words")
        assert captions(rows) == {"a.png": "said"}

    def test_metadata_in_a_sub_folder_may_name_paths_from_the_source(self, tmp_path: Path) -> None:
        solid(tmp_path / "pictures" / "a.png")
        jsonl(tmp_path / "lists", {"file_name": "pictures/a.png", "text": "x"}, name="m.jsonl")
        assert [r.place.path for r in found(tmp_path, metadata="lists/m.jsonl")] == [tmp_path / "pictures" / "a.png"]

    def test_byte_order_mark_blank_lines_backslashes_and_line_separators(self, tmp_path: Path) -> None:
        solid(tmp_path / "sub" / "a.png")
        line = json.dumps({"file_name": "sub\\a.png", "text": "one\u2028two"}, ensure_ascii=False)
        (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + line.encode() + b"\r\n\r\n")
        assert captions(found(tmp_path)) == {"a.png": "one\u2028two"}

    def test_every_bad_line_is_named(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        solid(tmp_path.parent / "escape.png")
        file = tmp_path / "metadata.jsonl"
        lines = [
            '{"file_name": "a.png", "text": "fine"}',
            '{"file_name": "a.png", "text": ',
            "[1, 2]",
            '{"file_name": "missing.png", "text": "x"}',
            '{"file_name": "../escape.png", "text": "x"}',
            '{"file_name": "/etc/passwd", "text": "x"}',
            '{"file_name": "C:\\\\a.png", "text": "x"}',
            '{"file_name": "a.png", "title": "x"}',
            '{"file_name": 7, "text": "x"}',
            '{"file_name": "a.png", "text": 7}',
        ]
        file.write_text("\n".join(lines))
        message = problems(tmp_path)
        for number, part in {
            2: "not JSON",
            3: "not a JSON object",
            4: "no picture 'missing.png'",
            5: "leads out of the folder",
            6: "not a path relative",
            7: "not a path relative",
            8: "no column 'text'; this row has: file_name, title",
            9: "image path is not text",
            10: "caption is not text",
        }.items():
            assert any(f"{file}:{number}: " in line and part in line for line in message.splitlines()), (number, part)
        assert f"{file}:1:" not in message

    def test_a_missing_column_lists_those_that_are_there(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        jsonl(tmp_path, {"url": "a.png", "words": "x"})
        assert "the columns are: url, words" in problems(tmp_path)
        assert "no column 'file'; the columns are: url, words" in problems(tmp_path, image_column="file")
        assert "no caption column" in problems(tmp_path, image_column="url")
        assert captions(found(tmp_path, image_column="url", missing_captions="empty")) == {"a.png": ""}

    def test_near_names_are_suggested(self, tmp_path: Path) -> None:
        solid(tmp_path / "image_001.jpg")
        jsonl(tmp_path, {"file_name": "image_001.png", "text": "x"})
        assert "did you mean image_001.jpg?" in problems(tmp_path)

    def test_unlisted_pictures_are_noticed(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        solid(tmp_path / "forgotten.png")
        jsonl(tmp_path, {"file_name": "a.png", "text": "x"})
        assert "forgotten.png" in notices(tmp_path)
        assert "a.png" not in notices(tmp_path).replace(str(tmp_path), "")

    def test_null_and_blank_captions_are_missing(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        solid(tmp_path / "b.png")
        jsonl(tmp_path, {"file_name": "a.png", "text": None}, {"file_name": "b.png", "text": " "})
        assert "2 of 2 pictures have no caption" in problems(tmp_path)
        assert captions(found(tmp_path, missing_captions="trigger", trigger="sks")) == {"a.png": "sks", "b.png": "sks"}

    def test_metadata_outside_or_absent_or_of_another_kind(self, tmp_path: Path) -> None:
        source = tmp_path / "in"
        captioned(source, "a.png", "x")
        jsonl(tmp_path, {"file_name": "a.png", "text": "x"})
        jsonl(source, {"file_name": "a.png", "text": "x"}, name="other.jsonl")
        assert "outside the source's folder" in problems(source, metadata="../metadata.jsonl")
        assert "the folder holds: other.jsonl" in problems(source, metadata="nope.jsonl")
        assert "must be a .jsonl, .csv or .parquet" in problems(source, metadata="a.xlsx")

    def test_an_empty_metadata_file(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "metadata.jsonl").write_text("\n")
        assert "has no rows" in problems(tmp_path)
