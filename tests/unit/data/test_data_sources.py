"""What is found in a folder, and how everything wrong with it is said."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from data_helpers import captioned, solid
from source_helpers import captions, found, notices, problems

from gesso.config.run import Source
from gesso.data.sources import collect, records
from gesso.errors import Problems


class TestSideFiles:
    def test_sub_folders_are_read_and_hidden_files_are_not(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        captioned(tmp_path / "concept", "b.JPG", "two\n")
        captioned(tmp_path / ".thumbs", "c.png", "hidden folder")
        solid(tmp_path / "._a.png")
        assert captions(found(tmp_path)) == {"a.png": "one", "b.JPG": "two"}

    def test_repeats_and_source_reach_each_record(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        other = captioned(tmp_path / "other", "a.png", "one").parent
        rows, _ = records([Source(path=str(other)), Source(path=str(other), repeats=2.5)])
        assert [(row.repeats, row.source) for row in rows] == [(1.0, 0), (2.5, 1)]

    def test_the_first_sub_folder_is_the_concept_unless_it_is_named(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        captioned(tmp_path / "dog" / "park", "b.png", "two")
        assert {r.place.name: r.concept for r in found(tmp_path)} == {"a.png": "", "b.png": "dog"}
        assert {r.concept for r in found(tmp_path, concept="pets")} == {"pets"}

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

    def test_lines_are_kept_and_outer_blanks_are_not(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.txt").write_bytes(b"  first line\r\n\nsecond line \n")
        assert captions(found(tmp_path)) == {"a.png": "first line\r\n\nsecond line"}

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ('"a dog"', "a dog"),
            ('{"caption": "a dog", "tags": "cat"}', "a dog"),
            ('{"prompt": "a dog", "width": 3}', "a dog"),
            ('{"tags": ["dog", "grass"]}', "dog, grass"),
            ('{"text": ["one", "two"]}', "one\ntwo"),
        ],
    )
    def test_json_side_files(self, tmp_path: Path, text: str, expected: str) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.json").write_text(text)
        assert captions(found(tmp_path)) == {"a.png": expected}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{\n"caption": }', "a.json:2: not JSON"),
            ('{"width": 3}', "none of the keys caption, text, prompt, tags in it; its keys are: width"),
            ('{"caption": 3}', "the caption is not text: 3"),
            ("[1]", "the caption is not text: [1]"),
        ],
    )
    def test_bad_json_side_files(self, tmp_path: Path, text: str, message: str) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.json").write_text(text)
        assert message in problems(tmp_path)

    def test_the_key_in_json_side_files_can_be_named(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.json").write_text('{"caption": "no", "words": "yes"}')
        assert captions(found(tmp_path, caption_column="words")) == {"a.png": "yes"}

    def test_endings_may_be_in_capitals(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.TXT").write_text("loud")
        assert captions(found(tmp_path)) == {"a.png": "loud"}

    def test_two_caption_files_for_one_picture_are_ambiguous(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        (tmp_path / "a.caption").write_text("two")
        assert "several caption files each: a.png (a.caption, a.txt)" in problems(tmp_path)
        assert captions(found(tmp_path, caption_extension="caption")) == {"a.png": "two"}

    def test_a_caption_file_of_megabytes_is_refused(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        (tmp_path / "a.txt").write_text("x" * (1 << 20) + "y")
        assert "a caption file of more than" in problems(tmp_path)

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
        assert captions(found(tmp_path, missing_captions="empty", trigger="sks")) == {"a.png": "one", "b.png": ""}
        assert captions(found(tmp_path, missing_captions="trigger", trigger="sks"))["b.png"] == "sks"
        assert "has no trigger" in problems(tmp_path, missing_captions="trigger")

    def test_missing_captions_by_concept(self, tmp_path: Path) -> None:
        captioned(tmp_path / "dog", "a.png", "one")
        solid(tmp_path / "cat" / "b.png")
        rows = captions(found(tmp_path, missing_captions="concept"))
        assert rows == {"a.png": "one", "b.png": "cat"}
        solid(tmp_path / "c.png")
        assert "nothing names the concept of c.png" in problems(tmp_path, missing_captions="concept")
        assert captions(found(tmp_path, missing_captions="concept", concept="pet"))["c.png"] == "pet"

    def test_pictures_without_captions_are_dropped_by_name(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        solid(tmp_path / "b.png")
        assert captions(found(tmp_path, missing_captions="drop")) == {"a.png": "one"}
        assert "1 of 2 pictures has no caption; left out" in notices(tmp_path, missing_captions="drop")
        assert "b.png" in notices(tmp_path, missing_captions="drop")
        (tmp_path / "a.txt").unlink()
        assert "no picture is left" in problems(tmp_path, missing_captions="drop")

    def test_allowed_missing_captions_are_still_told(self, tmp_path: Path) -> None:
        solid(tmp_path / "b.png")
        assert "1 of 1 picture has no caption; trained on with no text: b.png" in notices(
            tmp_path, missing_captions="empty"
        )

    def test_the_caption_stays_as_it_was_written(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "a {red|blue} dog")
        assert captions(found(tmp_path, trigger="sks")) == {"a.png": "a {red|blue} dog"}

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
        (tmp_path / "more.zip").write_bytes(b"x")
        (tmp_path / "list.csv").write_text("x")
        text = notices(tmp_path, layout="folder")
        assert "lost.txt" in text
        assert "1 .heic (b.heic)" in text
        assert "folder names with a number in front do not set repeats here (10_sks dog)" in text
        assert "archives beside the pictures are not read: more.zip" in text
        assert "tables that are not read, name one with `metadata`: list.csv" in text

    def test_links_out_of_the_folder_are_refused(self, tmp_path: Path) -> None:
        inside, outside = tmp_path / "in", tmp_path / "out"
        captioned(inside, "a.png", "one")
        solid(outside / "secret.png")
        (inside / "link.png").symlink_to(outside / "secret.png")
        assert "link.png: this is a link to a file outside" in problems(inside)

    def test_links_inside_the_folder_are_read_and_links_to_nothing_are_not(self, tmp_path: Path) -> None:
        captioned(tmp_path / "one", "a.png", "one")
        (tmp_path / "two").mkdir()
        (tmp_path / "two" / "b.png").symlink_to(tmp_path / "one" / "a.png")
        (tmp_path / "two" / "b.txt").symlink_to(tmp_path / "one" / "a.txt")
        assert captions(found(tmp_path)) == {"a.png": "one", "b.png": "one"}
        (tmp_path / "c.png").symlink_to(tmp_path / "gone.png")
        assert "c.png: this is a link to nothing" in problems(tmp_path)

    def test_linked_folders_are_not_followed_and_this_is_told(self, tmp_path: Path) -> None:
        folder, texts = tmp_path / "in", tmp_path / "texts"
        captioned(folder / "one", "a.png", "one")
        texts.mkdir()
        (texts / "notes.txt").write_text("no picture")
        for name, target in (("again", folder / "one"), ("loop", folder), ("up", tmp_path), ("texts", texts)):
            (folder / name).symlink_to(target)
        assert captions(found(folder)) == {"a.png": "one"}
        assert "links to folders are not followed: again, loop, texts, up" in notices(folder)

    def test_a_linked_folder_outside_with_pictures_is_a_problem(self, tmp_path: Path) -> None:
        captioned(tmp_path / "in", "a.png", "one")
        captioned(tmp_path / "out" / "deep", "b.png", "two")
        (tmp_path / "in" / "more").symlink_to(tmp_path / "out")
        said = problems(tmp_path / "in")
        assert f"in/more: this is a link to a folder outside, with pictures that are not read: {tmp_path}/out" in said
        assert "give that folder as a source of its own, or copy it here" in said

    def test_hidden_pictures_are_told_once_and_those_of_programs_are_not(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        for name in (".b.png", ".old/c.png", ".old/deep/d.png", "sub/.e/f.png"):
            solid(tmp_path / name)
        for name in ("._a.png", ".gesso/g.png", ".git/h.png", "__MACOSX/i.png", ".old/.thumbnails/j.png"):
            solid(tmp_path / name)
        (tmp_path / ".hidden.txt").write_text("no picture")
        assert captions(found(tmp_path)) == {"a.png": "one"}
        assert notices(tmp_path) == f"{tmp_path}: hidden, not read: .b.png, .old/ (2), sub/.e/ (1)"

    def test_captions_under_an_ending_that_is_not_read_are_told(self, tmp_path: Path) -> None:
        for name, ending in (("a", ".tags"), ("b", ".txt"), ("c", ".npz")):
            solid(tmp_path / f"{name}.png")
            (tmp_path / f"{name}{ending}").write_text("a caption")
        said = problems(tmp_path)
        assert (
            "2 of 3 pictures have no caption (not read: a.tags; if captions are in them, set caption_extension" in said
        )
        assert "set caption_extension to tags)" in said
        assert ".npz" not in said
        assert "(not read: b.txt; " in problems(tmp_path, caption_extension="tags")

    def test_folders_that_cannot_be_read_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        captioned(tmp_path, "a.png", "one")
        captioned(tmp_path / "locked", "b.png", "two")
        scan = os.scandir

        def refuse(path: str) -> object:
            if "locked" in path:
                raise PermissionError(13, "Permission denied")
            return scan(path)

        monkeypatch.setattr(os, "scandir", refuse)
        assert f"{tmp_path}/locked/: this folder cannot be read: Permission denied" in problems(tmp_path)

    def test_names_that_are_not_utf8_are_refused(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        with open(os.fsencode(tmp_path) + b"/b\xff.png", "wb") as file:
            file.write(b"x")
        assert "b\\xff.png: the file's name is not UTF-8" in problems(tmp_path)


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

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("x.rar", "unpack it and name the folder"),
            ("x.png", "this is one picture"),
            ("x.md", "a source is a folder, a .zip or .tar"),
        ],
    )
    def test_files_that_are_no_source(self, tmp_path: Path, name: str, message: str) -> None:
        (tmp_path / name).write_bytes(b"PK")
        assert message in problems(tmp_path / name)

    def test_only_kinds_that_are_not_read(self, tmp_path: Path) -> None:
        (tmp_path / "a.heic").write_bytes(b"x")
        assert "convert these to PNG or JPEG: a.heic" in problems(tmp_path)

    def test_an_archive_in_the_folder(self, tmp_path: Path) -> None:
        (tmp_path / "set.zip").write_bytes(b"x")
        message = problems(tmp_path)
        assert "found: 1 .zip" in message
        assert f"name the archive itself: {tmp_path}/set.zip" in message

    def test_masks_without_pictures(self, tmp_path: Path) -> None:
        solid(tmp_path / "a-masklabel.png")
        assert "these are masks, not pictures: a-masklabel.png" in problems(tmp_path)

    def test_pictures_in_a_hidden_folder(self, tmp_path: Path) -> None:
        solid(tmp_path / ".cache" / "a.png")
        assert f"{tmp_path}/.cache holds pictures, but hidden folders are not read" in problems(tmp_path)

    def test_a_layout_that_does_not_fit(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        for layout in ("parquet", "webdataset"):
            message = problems(tmp_path, layout=layout)
            assert "found: 1 .png, 1 .txt" in message
            assert "it holds 1 picture: set layout to folder" in message
        assert "there is no metadata.jsonl" in problems(tmp_path, layout="metadata")

    def test_a_name_of_the_hub_is_recognised(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert "is written hub:someone/dogs" in problems("someone/dogs")

    def test_commands_are_never_run(self, tmp_path: Path) -> None:
        marker = tmp_path / "ran"
        assert "commands are never run" in problems(f"pipe:touch {marker}")
        assert not marker.exists()


def test_looking_needs_neither_torch_nor_datasets(tmp_path: Path) -> None:
    captioned(tmp_path, "a.png", "one")
    code = (
        "import sys; from gesso.config.run import Source; from gesso.data.sources import collect;"
        f"assert len(collect(Source(path={str(tmp_path)!r})).records) == 1;"
        "print([m for m in ('torch', 'datasets', 'pandas', 'fsspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_problems_of_all_sources_come_together(tmp_path: Path) -> None:
    solid(tmp_path / "one" / "a.png")
    captioned(tmp_path / "two", "b.png", "fine")
    (tmp_path / "three").mkdir()
    with pytest.raises(Problems) as caught:
        records([Source(path=str(tmp_path / name)) for name in ("one", "two", "three", "four")])
    assert len(caught.value.problems) == 3
    assert not collect(Source(path=str(tmp_path / "two"))).problems
