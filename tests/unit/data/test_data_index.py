"""The index: all bad files at once, stable splits, identity by content, and a scan that remembers."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from data_helpers import captioned, data_for, folder_of, row, settle, solid
from PIL import Image

from gesso.config.run import Holdout, Source
from gesso.data import index as index_module
from gesso.data import places, scans
from gesso.data.images import content_hash
from gesso.data.index import Index, build, cache_folder
from gesso.data.rows import Row, Rows
from gesso.data.sources import Record, local
from gesso.errors import Problems, UserError


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really decoded."""
    names: list[str] = []
    original = scans._decode

    def spy(record: Record, source: Source, background: str, stamp: str) -> object:
        names.append(record.place.name)
        return original(record, source, background, stamp)

    monkeypatch.setattr(scans, "_decode", spy)
    return names


def by_name(index: Index) -> dict[str, Row]:
    return {row.place.name: row for row in index.rows}


class TestRows:
    def test_sizes_are_upright_and_ids_are_content(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 3, ((64, 64), (80, 48)))
        index = build(data_for(folder, cache=tmp_path / "cache"))
        rows = by_name(index)
        assert (rows["001.png"].width, rows["001.png"].height) == (80, 48)
        assert rows["002.png"].caption == "picture 2"
        assert len({row.id for row in index.rows}) == 3
        (folder / "000.png").rename(folder / "moved.png")
        (folder / "000.txt").rename(folder / "moved.txt")
        again = build(data_for(folder, cache=tmp_path / "cache"))
        assert by_name(again)["moved.png"].id == rows["000.png"].id
        assert again.fingerprint == index.fingerprint

    @pytest.mark.parametrize("change", ["content", "caption", "weight", "repeats", "added", "split"])
    def test_the_fingerprint_sees_every_change(self, tmp_path: Path, change: str) -> None:
        folder = folder_of(tmp_path / "a", 4)
        data = data_for(folder, cache=tmp_path / "cache")
        before = build(data).fingerprint
        source = data.sources[0]
        match change:
            case "content":
                solid(folder / "001.png", (64, 64), (9, 9, 9))
            case "caption":
                (folder / "001.txt").write_text("another")
            case "added":
                captioned(folder, "new.png", "new", colour="blue")
            case "split":
                data = data.model_copy(update={"validation": Holdout(fraction=0.3)})
            case field:
                value = 2 if field == "repeats" else 0.5
                data = data.model_copy(update={"sources": (source.model_copy(update={field: value}),)})
        assert build(data).fingerprint != before

    def test_equal_pictures_are_noticed_and_kept_apart(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        captioned(folder, "one.png", "first")
        captioned(folder, "two.png", "second")
        captioned(folder, "three.png", "second")
        plain = captioned(folder, "four.png", "alone", colour="blue")
        index = build(data_for(folder, cache=tmp_path / "cache"))
        rows = by_name(index)
        assert len({row.id for row in index.rows}) == 4
        assert rows["one.png"].image == rows["two.png"].image == rows["three.png"].image
        assert rows[plain.name].id == rows[plain.name].image
        assert any("the same picture 3 times" in notice for notice in index.notices)

    def test_conversions_are_counted(self, tmp_path: Path) -> None:
        for name in ("a", "b"):
            Image.new("RGBA", (32, 32), (1, 2, 3, ord(name))).save(tmp_path / f"{name}.png")
            (tmp_path / f"{name}.txt").write_text("x")
        data = data_for(tmp_path, cache=tmp_path / ".cache")
        for _ in range(2):
            assert "2 pictures: transparency put on white" in build(data).notices
            settle()


class TestBadPictures:
    def test_all_are_named_together_with_the_other_problems(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 3)
        for name in ("cut", "text"):
            captioned(folder, f"{name}.png", "x", (64, 64), "blue")
        (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:60])
        (folder / "text.png").write_text("not a picture")
        solid(tmp_path / "b" / "uncaptioned.png")
        with pytest.raises(Problems) as caught:
            build(data_for(folder, tmp_path / "b", cache=tmp_path / "cache"))
        message = str(caught.value)
        assert all(name in message for name in ("cut.png", "text.png", "uncaptioned.txt"))
        assert caught.value.exit_code == 2

    def test_skip_bad_goes_on_and_says_so(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 3)
        (folder / "001.png").write_bytes(b"junk")
        index = build(data_for(folder, cache=tmp_path / "cache", skip_bad=True))
        assert sorted(by_name(index)) == ["000.png", "002.png"]
        text = "\n".join(index.notices)
        assert "1 unreadable picture left out" in text
        assert "001.png" in text

    def test_skip_bad_does_not_excuse_missing_captions(self, tmp_path: Path) -> None:
        solid(tmp_path / "a" / "x.png")
        with pytest.raises(Problems, match="no caption"):
            build(data_for(tmp_path / "a", cache=tmp_path / "cache", skip_bad=True))

    def test_all_bad(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 1)
        (folder / "000.png").write_bytes(b"junk")
        with pytest.raises(UserError, match="no picture is left"):
            build(data_for(folder, cache=tmp_path / "cache", skip_bad=True))

    def test_a_wrong_colour_is_one_mistake(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 3)
        with pytest.raises(UserError, match=r"data\.background") as caught:
            build(data_for(folder, cache=tmp_path / "cache", background="whiet"))
        assert not isinstance(caught.value, Problems)


class TestMemory:
    def test_only_touched_pictures_are_decoded_again(self, tmp_path: Path, decoded: list[str]) -> None:
        folder = folder_of(tmp_path / "a", 5)
        data = data_for(folder, cache=tmp_path / "cache")
        settle()
        first = build(data)
        assert len(decoded) == 5
        decoded.clear()
        assert build(data) == first
        assert decoded == []
        solid(folder / "003.png", (48, 48), "blue")
        assert by_name(build(data))["003.png"].width == 48
        assert decoded == ["003.png"]

    def test_an_edit_of_equal_size_and_time_is_seen(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 2)
        data = data_for(folder, cache=tmp_path / "cache")
        settle()
        first = build(data)
        path = folder / "000.png"
        status = path.stat()
        solid(path, (64, 64), (1, 0, 40))
        assert path.stat().st_size == status.st_size
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert build(data).fingerprint != first.fingerprint

    def test_fresh_files_are_not_trusted(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 2)
        data = data_for(folder, cache=tmp_path / "cache")
        path = folder / "000.png"
        for value in range(5):
            solid(path, (64, 64), (value, 0, 0))
            assert by_name(build(data))["000.png"].image == content_hash(path.read_bytes())

    def test_files_written_this_moment_are_read_again(
        self, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = folder_of(tmp_path / "a", 2)
        monkeypatch.setattr(places, "RACY_NS", 3_600_000_000_000)
        monkeypatch.setattr(local, "RACY_NS", 3_600_000_000_000)
        for _ in range(2):
            build(data_for(folder, cache=tmp_path / "cache"))
        assert len(decoded) == 4

    def test_a_broken_memory_is_only_slow(self, tmp_path: Path, decoded: list[str]) -> None:
        folder = folder_of(tmp_path / "a", 2)
        data = data_for(folder, cache=tmp_path / "cache")
        settle()
        first = build(data)
        [file] = (tmp_path / "cache" / "scans").iterdir()
        file.write_bytes(file.read_bytes()[:20])
        decoded.clear()
        assert build(data) == first
        assert len(decoded) == 2

    def test_progress_counts_to_the_end(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 4)
        seen: list[tuple[int, int]] = []
        build(data_for(folder, cache=tmp_path / "cache"), progress=lambda done, total: seen.append((done, total)))
        assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]

    def test_where_the_cache_is(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = data_for(tmp_path, cache=tmp_path / "here")
        assert cache_folder(data) == tmp_path / "here"
        nowhere = data.model_copy(update={"cache": None})
        monkeypatch.setenv("GESSO_CACHE", str(tmp_path / "env"))
        assert cache_folder(nowhere) == tmp_path / "env"
        monkeypatch.delenv("GESSO_CACHE")
        assert cache_folder(nowhere) == Path.home() / ".cache" / "gesso"


def held(index: Index) -> set[str]:
    return {row.image for row in index.validation}


class TestHoldout:
    def test_adding_pictures_moves_no_other_across(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 40)
        data = data_for(folder, cache=tmp_path / "cache", validation=Holdout(fraction=0.2))
        before = build(data)
        assert 2 <= len(before.validation) <= 16
        for i in range(40):
            captioned(folder, f"new{i}.png", "new", (64, 48), (0, i, 255))
        after = build(data)
        assert held(before) == held(after) & {row.image for row in before.rows}
        assert len(after.train) + len(after.validation) == 80

    def test_each_picture_is_placed_by_its_own_content(self) -> None:
        rows = [row(hash_, caption="x") for hash_ in range(200)]

        def side(some: list[Row], split: str) -> set[str]:
            table = index_module._split(Rows.of(some).table, 0.25, held=1)
            return {r.image for r in Rows(table) if r.split == split}

        everywhere = side(rows, "validation")
        assert 30 < len(everywhere) < 70
        for count in range(20, 200, 7):
            assert side(rows[:count], "validation") == everywhere & {r.image for r in rows[:count]}
        renamed = [replace(r, caption=f"another {r.id}") for r in rows]
        assert side(renamed, "validation") == everywhere

    def test_at_least_one_each(self, tmp_path: Path) -> None:
        for count in range(2, 8):
            folder = folder_of(tmp_path / f"few{count}", count)
            for fraction in (0.001, 0.999):
                data = data_for(folder, cache=tmp_path / "cache", validation=Holdout(fraction=fraction))
                index = build(data)
                assert index.train
                assert index.validation
                assert len(index.validation) == (1 if fraction < 0.5 else count - 1)

    def test_one_picture_cannot_be_split(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 1)
        with pytest.raises(UserError, match=r"data\.validation\.fraction: one picture"):
            build(data_for(folder, cache=tmp_path / "cache", validation=Holdout(fraction=0.5)))

    def test_copies_of_a_picture_stay_on_one_side(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 12)
        for i in range(12):
            shutil.copy(folder / f"{i:03}.png", folder / f"copy{i}.png")
            (folder / f"copy{i}.txt").write_text(f"another caption {i}")
        index = build(data_for(folder, cache=tmp_path / "cache", validation=Holdout(fraction=0.4)))
        assert not held(index) & {row.image for row in index.train}
        assert len(index.validation) % 2 == 0

    def test_a_folder_of_its_own(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "train", 3)
        captioned(tmp_path / "val", "v.png", "a dog", colour="blue")
        shutil.copy(folder / "000.png", tmp_path / "val" / "leak.png")
        (tmp_path / "val" / "leak.txt").write_text("sks leak")
        data = data_for(folder, cache=tmp_path / "cache", validation=Holdout(path=tmp_path / "val"))
        sources = (Source(path=folder, trigger="sks", repeats=5),)
        index = build(data.model_copy(update={"sources": sources}))
        assert {(r.place.name, r.caption, r.repeats) for r in index.validation} == {
            ("v.png", "a dog", 1),
            ("leak.png", "sks leak", 1),
        }
        assert len(index.train) == 3
        assert any("both trained on and held out" in n and "leak.png" in n for n in index.notices)
