"""The stamp of a listing: it changes with the files, and is taken without opening one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_helpers import captioned, settle, solid
from source_helpers import jsonl

from gesso.config.run import Source
from gesso.data.sources import listing_stamp


class TestStamps:
    def test_any_change_of_any_file_changes_the_stamp(self, tmp_path: Path) -> None:
        picture = captioned(tmp_path / "sub", "a.png", "one")
        source = Source(path=str(tmp_path))
        assert listing_stamp(source) is None, "written this very moment"
        settle()
        first = listing_stamp(source)
        assert first is not None
        assert listing_stamp(source) == first
        caption, times = picture.with_suffix(".txt"), picture.stat()
        seen = {first}
        for change in (
            lambda: caption.write_text("two"),
            lambda: os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns - 1)),
            lambda: caption.rename(caption.with_suffix(".caption")),
            lambda: solid(tmp_path / "b.png"),
        ):
            change()
            settle()
            stamp = listing_stamp(source)
            assert stamp is not None
            seen.add(stamp)
        assert len(seen) == 5

    def test_hidden_files_of_programs_change_nothing_and_others_are_told(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        settle()
        before = listing_stamp(Source(path=str(tmp_path)))
        solid(tmp_path / ".thumbnails" / "a.png")
        assert listing_stamp(Source(path=str(tmp_path))) == before
        solid(tmp_path / ".old" / "a.png")
        settle()
        assert listing_stamp(Source(path=str(tmp_path))) not in (None, before)

    def test_no_caption_and_no_picture_is_opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        captioned(tmp_path, "a.png", "one")
        settle()

        def refuse(*args: object) -> None:
            raise AssertionError(f"opened {args}")

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr("builtins.open", refuse)
        assert listing_stamp(Source(path=str(tmp_path))) is not None

    @pytest.mark.parametrize("path", ["s3://bucket/x", "hub:a/b", "memory://x"])
    def test_what_cannot_be_known_has_no_stamp(self, path: str) -> None:
        assert listing_stamp(Source(path=path)) is None

    def test_a_table_is_stamped_with_its_folder(self, tmp_path: Path) -> None:
        solid(tmp_path / "a.png")
        table = jsonl(tmp_path, {"file_name": "a.png", "text": "x"}, name="list.jsonl")
        settle()
        before = listing_stamp(Source(path=str(table)))
        solid(tmp_path / "a.png", colour="blue")
        settle()
        assert before is not None
        assert listing_stamp(Source(path=str(table))) not in (None, before)
