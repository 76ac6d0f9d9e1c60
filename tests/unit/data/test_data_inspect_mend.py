from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from inspect_helpers import data_of, discs, inspected, put
from PIL import Image

from gesso.data.editing import mend
from gesso.data.editing.journal import Journal
from gesso.data.images import decode
from gesso.errors import UserError


def turned(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = number
    exif[0x10E] = "what it shows"
    return exif


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and ".gesso" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def mended(folder: Path) -> dict[str, str]:
    """What was done to each file; afterwards there is nothing left to do."""
    plan = mend.plan(folder)
    assert mend.apply(folder, plan.mends) == sum(1 if one.kind != "format" else 2 for one in plan.mends)
    assert mend.plan(folder).mends == ()
    return {one.path.relative_to(folder).as_posix(): one.kind for one in plan.mends}


@pytest.mark.parametrize("number", range(2, 9))
@pytest.mark.parametrize(("ending", "most"), [("png", 0), ("tiff", 0), ("webp", 0), ("jpg", 2.5)])
def test_turned_pictures_become_upright_and_look_the_same(
    tmp_path: Path, number: int, ending: str, most: float
) -> None:
    options = {"lossless": True} if ending == "webp" else {"quality": 90} if ending == "jpg" else {}
    path = put(tmp_path, f"a.{ending}", discs(1, (90, 60)), exif=turned(number), **options)
    before = np.asarray(decode(path), np.float32)
    assert mended(tmp_path) == {f"a.{ending}": "orientation"}
    with Image.open(path) as image:
        assert image.getexif().get(0x112, 1) == 1
        assert image.size == (before.shape[1], before.shape[0]), "the stored pixels are upright"
        if ending != "tiff":
            assert image.getexif()[0x10E] == "what it shows"
    assert np.abs(np.asarray(decode(path), np.float32) - before).mean() <= most


def test_a_colour_profile_survives_the_turning(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    path = put(tmp_path, "a.png", discs(1, (90, 60)), exif=turned(6), icc_profile=profile)
    assert mended(tmp_path) == {"a.png": "orientation"}
    with Image.open(path) as image:
        assert image.info["icc_profile"] == profile


def test_wrong_endings_are_put_right_and_captions_still_belong(tmp_path: Path) -> None:
    put(tmp_path, "a.png", discs(1), "the first").rename(tmp_path / "a.jpg")
    put(tmp_path, "b.jpg", discs(2), "the second").rename(tmp_path / "b.jfif")
    assert mended(tmp_path) == {"a.jpg": "ending", "b.jfif": "ending"}
    found = inspected(data_of(tmp_path))
    assert {picture.name: picture.caption for picture in found.pictures} == {
        "a.png": "the first",
        "b.jpg": "the second",
    }
    assert found.findings == ()


def test_formats_that_are_not_read_are_converted_without_loss(tmp_path: Path) -> None:
    pictures = {"a.tga": discs(1, (60, 40)), "b.jp2": discs(2, (60, 40))}
    for name, picture in pictures.items():
        put(tmp_path, name, picture, "a thing")
    assert mended(tmp_path) == {"a.tga": "format", "b.jp2": "format"}
    for name, picture in pictures.items():
        with Image.open(tmp_path / name.replace(name[-3:], "png")) as converted:
            stored = picture if name == "a.tga" else Image.open(io.BytesIO(_kept(tmp_path, name)))
            assert converted.tobytes() == stored.tobytes()
        assert not (tmp_path / name).exists()


def _kept(folder: Path, name: str) -> bytes:
    [path] = (folder / ".gesso" / "originals").rglob(f"*{name}")
    return path.read_bytes()


def test_heic_without_its_package_is_left_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "a.png", discs(1))
    (tmp_path / "b.heic").write_bytes(b"\x00\x00\x00\x18ftypheic")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan = mend.plan(tmp_path)
    assert plan.mends == ()
    assert [(path.name, "pip install pillow-heif" in why) for path, why in plan.left] == [("b.heic", True)]


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        ("\ufeffa hat".encode(), b"a hat", "encoding"),
        ("a café\r\nby night".encode("utf-16"), "a café\nby night".encode(), "encoding"),
        ("naïve".encode("utf-32"), "naïve".encode(), "encoding"),
        ("a café – “open”".encode("cp1252"), "a café – “open”".encode(), "encoding"),
        (b"a\r\nb\r\n", b"a\nb\n", "line ends"),
        (b"a\rb", b"a\nb", "line ends"),
        (b"  a hat \n\n", b"a hat\n", "line ends"),
    ],
)
def test_caption_files_become_plain_text(tmp_path: Path, before: bytes, after: bytes, kind: str) -> None:
    path = put(tmp_path, "a.png", discs(1)).with_suffix(".txt")
    path.write_bytes(before)
    assert mended(tmp_path) == {"a.txt": kind}
    assert path.read_bytes() == after


@pytest.mark.parametrize(
    "content",
    [b"a hat", b"a hat\n", b"two\nlines\n", "café, 日本, привет".encode(), b""],
)
def test_good_caption_files_stay_as_they_are(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, "a.png", discs(1)).with_suffix(".txt").write_bytes(content)
    assert mend.plan(tmp_path) == mend.Plan((), ())


@pytest.mark.parametrize(
    "text", ["привет, мир".encode("cp1251"), "日本の猫".encode("shift-jis"), "日本".encode("euc-jp")]
)
def test_an_encoding_that_can_only_be_guessed_is_left_and_said(tmp_path: Path, text: bytes) -> None:
    path = put(tmp_path, "a.png", discs(1)).with_suffix(".txt")
    path.write_bytes(text)
    plan = mend.plan(tmp_path)
    assert plan.mends == ()
    assert [(left, "encoding" in why) for left, why in plan.left] == [(path, True)]


def test_tables_lose_their_mark_and_keep_their_line_ends(tmp_path: Path) -> None:
    put(tmp_path, "a.png", discs(1), None)
    table = tmp_path / "metadata.csv"
    table.write_bytes("\ufefffile_name,text\r\na.png,café\r\n".encode())
    assert mended(tmp_path) == {"metadata.csv": "encoding"}
    assert table.read_bytes() == "file_name,text\r\na.png,café\r\n".encode()


def test_text_that_is_no_caption_is_not_touched(tmp_path: Path) -> None:
    put(tmp_path, "a.png", discs(1))
    (tmp_path / "README.txt").write_bytes(b"\xef\xbb\xbf hello \r\n")
    (tmp_path / "notes.csv").write_bytes(b"\xef\xbb\xbfhello")
    assert mend.plan(tmp_path).mends == ()


def test_a_rename_that_would_break_something_is_left_and_said(tmp_path: Path) -> None:
    put(tmp_path, "there.png", discs(1))
    put(tmp_path, "there.bmp", discs(2)).rename(tmp_path / "there.jpg")
    put(tmp_path, "listed.png", discs(3), None).rename(tmp_path / "listed.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "listed.jpg", "text": "x"}\n')
    plan = mend.plan(tmp_path)
    assert plan.mends == ()
    assert {path.name: why for path, why in plan.left} == {
        "there.jpg": "another picture has the same name with another ending",
        "listed.jpg": "a table names it: it would not find it again",
    }


def test_all_of_it_can_be_taken_back_to_the_byte(tmp_path: Path) -> None:
    put(tmp_path / "deep", "turned.jpg", discs(1, (90, 60)), exif=turned(8))
    put(tmp_path, "wrong.png", discs(2)).rename(tmp_path / "wrong.bmp")
    put(tmp_path, "old.tga", discs(3))
    (tmp_path / "old.txt").write_bytes("\ufeffcafé\r\n".encode())
    before = snapshot(tmp_path)
    done = mended(tmp_path)
    assert sorted(done.values()) == ["encoding", "ending", "format", "orientation"]
    assert snapshot(tmp_path).keys() == {
        *("deep/turned.jpg", "deep/turned.txt", "wrong.png", "wrong.txt", "old.png", "old.txt"),
    }
    Journal(tmp_path).undo()
    assert snapshot(tmp_path) == before


def test_a_plan_changes_nothing(tmp_path: Path) -> None:
    put(tmp_path, "turned.jpg", discs(1, (90, 60)), exif=turned(3))
    before = snapshot(tmp_path)
    assert len(mend.plan(tmp_path).mends) == 1
    assert snapshot(tmp_path) == before
    assert not (tmp_path / ".gesso").exists()


def test_a_turned_picture_with_a_wrong_ending_is_both_mended(tmp_path: Path) -> None:
    put(tmp_path, "a.png", discs(1, (90, 60)), exif=turned(6)).rename(tmp_path / "a.jpg")
    plan = mend.plan(tmp_path)
    mend.apply(tmp_path, plan.mends)
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (60, 90)
    assert mend.plan(tmp_path).mends == ()


def test_only_folders_are_mended(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="folder on this disk"):
        mend.plan(tmp_path / "set.zip")
