"""What is found in a folder, and how everything wrong with it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import captioned, solid

from gesso.config.run import Source
from gesso.data.sources import Record, collect, records
from gesso.errors import Problems


def found(path: Path, **fields: object) -> list[Record]:
    return records([Source.model_validate({"path": path} | fields)])[0]


def problems(path: Path, **fields: object) -> str:
    with pytest.raises(Problems) as caught:
        found(path, **fields)
    return str(caught.value)


def notices(path: Path, **fields: object) -> str:
    return "\n".join(records([Source.model_validate({"path": path} | fields)])[1])


def captions(rows: list[Record]) -> dict[str, str]:
    return {r.path.name: r.caption for r in rows}


def jsonl(folder: Path, *rows: object, name: str = "metadata.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return file


class TestSideFiles:
    def test_sub_folders_are_read_and_hidden_files_are_not(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        captioned(tmp_path / "concept", "b.JPG", "two\n")
        captioned(tmp_path / ".thumbs", "c.png", "hidden folder")
        solid(tmp_path / "._a.png")
        assert captions(found(tmp_path)) == {"a.png": "one", "b.JPG": "two"}

    def test_repeats_and_weight_reach_each_record(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        [record] = found(tmp_path, repeats=3, weight=0.5)
        assert (record.repeats, record.weight, record.source_index) == (3, 0.5, 0)

    @pytest.mark.parametrize("extension", [".caption", "caption"])
    def test_caption_extension(self, tmp_path: Path, extension: str) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.caption").write_text("said elsewhere")
        assert captions(found(tmp_path, caption_extension=extension)) == {"a.png": "said elsewhere"}

    def test_the_exact_stem_counts(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "of a")
        solid(tmp_path / "a_b.v2.png")
        (tmp_path / "a_b.v2.txt").write_text("of a_b.v2")
        assert captions(found(tmp_path))["a_b.v2.png"] == "of a_b.v2"

    def test_byte_order_mark_is_no_part_of_a_caption(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa caf\xc3\xa9")
        assert captions(found(tmp_path)) == {"a.png": "a café"}

    def test_lines_are_joined(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "  first line\r\n\nsecond line \n")
        assert captions(found(tmp_path)) == {"a.png": "first line second line"}

    @pytest.mark.parametrize("text", [b"caf\xe9", "café".encode("utf-16")])
    def test_other_encodings_are_refused_by_name(self, tmp_path: Path, text: bytes) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.txt").write_bytes(text)
        message = problems(tmp_path)
        assert "a.txt:1" in message
        assert "not UTF-8" in message

    def test_two_pictures_with_one_stem_are_ambiguous(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "whose?")
        solid(tmp_path / "a.jpg")
        message = problems(tmp_path)
        assert "a.jpg and a.png would share the caption file a.txt" in message

    def test_missing_captions_are_listed(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        captioned(tmp_path, "blank.png", " \n")
        solid(tmp_path / "b.png")
        message = problems(tmp_path)
        assert "2 of 3 pictures have no caption" in message
        assert "b.txt" in message
        assert "blank.txt" in message

    def test_missing_captions_by_policy(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        solid(tmp_path / "b.png")
        assert captions(found(tmp_path, missing_captions="empty", trigger="sks")) == {"a.png": "sks, one", "b.png": ""}
        assert captions(found(tmp_path, missing_captions="trigger", trigger="sks"))["b.png"] == "sks"
        assert "has no trigger" in problems(tmp_path, missing_captions="trigger")

    @pytest.mark.parametrize(
        ("caption", "expected"),
        [
            ("a dog", "sks, a dog"),
            ("a photo of sks dog", "a photo of sks dog"),
            ("Sks dog", "Sks dog"),
            ("she asks a dog", "sks, she asks a dog"),
        ],
    )
    def test_trigger_goes_in_front_unless_it_is_there(self, tmp_path: Path, caption: str, expected: str) -> None:
        captioned(tmp_path, "a.png", caption)
        assert captions(found(tmp_path, trigger="sks")) == {"a.png": expected}

    def test_control_characters_and_giant_captions_are_refused(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "a\x00b")
        captioned(tmp_path, "b.png", "x" * 20_000)
        message = problems(tmp_path)
        assert "U+0000" in message
        assert "20000 characters" in message

    def test_what_is_left_aside_is_noticed(self, tmp_path: Path) -> None:
        captioned(tmp_path / "10_sks dog", "a.png", "one")
        (tmp_path / "10_sks dog" / "lost.txt").write_text("no picture")
        (tmp_path / "b.heic").write_bytes(b"x")
        text = notices(tmp_path)
        assert "lost.txt" in text
        assert "1 .heic" in text
        assert "10_sks dog" in text

    def test_links_out_of_the_folder_are_refused(self, tmp_path: Path) -> None:
        inside, outside = tmp_path / "in", tmp_path / "out"
        captioned(inside, "a.png", "one")
        solid(outside / "secret.png")
        (inside / "link.png").symlink_to(outside / "secret.png")
        assert "link.png: this is a link to a file outside" in problems(inside)


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
        assert [r.path for r in found(tmp_path)] == [tmp_path / "a.png"]

    def test_named_columns_and_file(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        jsonl(tmp_path, {"pic": "a.png", "words": "said", "text": "other"}, name="list.jsonl")
        rows = found(tmp_path, metadata="list.jsonl", image_column="pic", caption_column="words")
        assert captions(rows) == {"a.png": "said"}

    def test_metadata_in_a_sub_folder_may_name_paths_from_the_source(self, tmp_path: Path) -> None:
        solid(tmp_path / "pictures" / "a.png")
        jsonl(tmp_path / "lists", {"file_name": "pictures/a.png", "text": "x"}, name="m.jsonl")
        assert [r.path for r in found(tmp_path, metadata="lists/m.jsonl")] == [tmp_path / "pictures" / "a.png"]

    def test_byte_order_mark_blank_lines_backslashes_and_line_separators(self, tmp_path: Path) -> None:
        solid(tmp_path / "sub" / "a.png")
        line = json.dumps({"file_name": "sub\\a.png", "text": "one\u2028two"}, ensure_ascii=False)
        (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf\r\n" + line.encode() + b"\r\n\r\n")
        assert captions(found(tmp_path)) == {"a.png": "one two"}

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
        jsonl(tmp_path, {"path": "a.png", "words": "x"})
        assert "the columns are: path, words" in problems(tmp_path)
        assert "no column 'file'; the columns are: path, words" in problems(tmp_path, image_column="file")
        assert "no caption column" in problems(tmp_path, image_column="path")
        assert captions(found(tmp_path, image_column="path", missing_captions="empty")) == {"a.png": ""}

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
        assert "must be a .jsonl" in problems(source, metadata="a.csv")

    def test_an_empty_metadata_file(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "metadata.jsonl").write_text("\n")
        assert "has no rows" in problems(tmp_path)


class TestNothing:
    def test_no_pictures_says_what_was_looked_for_and_found_and_where_there_are_some(self, tmp_path: Path) -> None:
        solid(tmp_path / "data" / "photos" / "a.png")
        empty = tmp_path / "data" / "captions"
        empty.mkdir()
        (empty / "a.txt").write_text("x")
        message = problems(empty)
        assert ".webp" in message
        assert "found: 1 .txt" in message
        assert f"{tmp_path / 'data' / 'photos'} holds pictures" in message

    def test_no_such_folder_suggests_a_near_one(self, tmp_path: Path) -> None:
        (tmp_path / "aldar_kose").mkdir()
        assert f"did you mean {tmp_path / 'aldar_kose'}?" in problems(tmp_path / "aldar_cose")

    def test_a_file_is_not_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "x.zip").write_bytes(b"PK")
        assert "unpack it" in problems(tmp_path / "x.zip")


def test_problems_of_all_sources_come_together(tmp_path: Path) -> None:
    solid(tmp_path / "one" / "a.png")
    captioned(tmp_path / "two", "b.png", "fine")
    (tmp_path / "three").mkdir()
    with pytest.raises(Problems) as caught:
        records([Source(path=tmp_path / name) for name in ("one", "two", "three", "four")])
    assert len(caught.value.problems) == 3
    assert not collect(Source(path=tmp_path / "two")).problems
