"""Files that break readers: none crashes, hangs or passes unnoticed; what changes after the look is refused."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_helpers import (
    Bad,
    Case,
    Good,
    cases,
    data_of,
    deadline,
    examine,
    linear_profile,
    members,
    near,
    noise,
    picture,
    png_file,
    put,
    run_of,
    tarred,
    zipped,
)
from PIL import Image

from gesso.data import images
from gesso.data.index import build
from gesso.data.plan import Plan
from gesso.data.preflight import preflight
from gesso.errors import UserError

S = (40, 32)
FINE = {"fine.png": "all well red"}


def beside_fine(content: dict[str, bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        put(folder, fine="all well red")
        for name, data in content.items():
            (folder / name).write_bytes(data)

    return make


def captioned(name: str, content: bytes, caption: str) -> Callable[[Path], None]:
    return beside_fine({name: content, f"{name.rpartition('.')[0]}.txt": caption.encode()})


def good(name: str, file: str, content: bytes, caption: str, **more: Any) -> Case:
    return Case(name, captioned(file, content, caption), Good(FINE | {file: caption}, **more))


def with_tag(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return picture("blue", S, exif=exif.tobytes())


def damaged_exif() -> bytes:
    return picture("blue", S, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")


BLUE_16 = b"\0\0\0\0\xff\xff"
ODD = [
    good("16-bit rgba", "x.png", png_file(40, 32, depth=16, colour_type=6, rows=(BLUE_16 + b"\0\0") * 1280), "white"),
    good("16-bit grey and alpha", "x.png", png_file(40, 32, depth=16, colour_type=4, rows=bytes(4 * 1280)), "white"),
    good("2-bit grey", "x.png", png_file(40, 32, depth=2, colour_type=0, rows=b"\xff" * 320), "white"),
    good("avif", "x.avif", picture("blue", S, "AVIF", quality=100), "it"),
    good("orientation 0", "x.png", with_tag(0), "blue", sizes={"x.png": S}),
    good("orientation 9", "x.png", with_tag(9), "blue", sizes={"x.png": S}),
    good("damaged exif", "x.png", damaged_exif(), "blue", sizes={"x.png": S}),
    good("a line end in the name", "a\nb.png", picture("blue", S), "blue"),
    good("a name of one blank", " .png", picture("blue", S), "blue"),
    good("percent and braces", "50% {0..3} *[a].png", picture("blue", S), "blue"),
    good("a profile for grey", "x.png", picture("blue", S, icc_profile=b"rubbish" * 30), "blue", notices=("profile",)),
    good(
        "cmyk with a profile for rgb",
        "x.jpg",
        picture(Image.new("CMYK", S, (255, 0, 0, 0)), kind="JPEG", icc_profile=linear_profile()),
        "cyan",
    ),
]


@cases(ODD)
def test_odd_pictures(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


def test_a_name_that_is_no_text_is_refused_in_words_that_can_be_shown(tmp_path: Path) -> None:
    """File systems of Linux take any bytes; archives made elsewhere unpack to such names."""
    folder = put(tmp_path / "set", fine="all well red")
    for name, content in ((b"k\xe4the.png", picture("blue")), (b"k\xe4the.txt", b"in blue")):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(content)
    with pytest.raises(UserError) as caught:
        build(data_of(folder))
    said = str(caught.value).encode().decode()
    assert "the.png" in said
    assert "UTF-8" in said
    assert "fine.png" not in said


def test_a_folder_named_like_a_picture_is_a_folder(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", fine="all well red")
    put(folder / "album.png", inner="in blue")
    assert sorted(row.caption for row in build(data_of(folder)).rows) == ["all well red", "in blue"]


def line(**row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def listed(rows: bytes, name: str = "metadata.jsonl") -> Callable[[Path], None]:
    return beside_fine({name: rows})


DEEP = b'{"file_name": "fine.png", "text": "x", "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
LONG_NUMBER = b'{"file_name": "fine.png", "text": "x", "n": ' + b"1" * 6000 + b"}\n"
J, C = "metadata.jsonl", "metadata.csv"
HOSTILE = [
    Case("json a hundred thousand deep", listed(DEEP), Bad({J: r":1\b"})),
    Case("json with a number of 6000 digits", listed(LONG_NUMBER), Bad({J: r":1\b"})),
    Case("half a surrogate pair", listed(b'{"file_name": "fine.png", "text": "a \\ud800"}\n'), Bad({J: r":1\b"})),
    Case("half a surrogate pair in a name", listed(b'{"file_name": "\\ud800.png", "text": "a"}\n'), Bad({J: r":1\b"})),
    Case("NUL in a name", listed(b'{"file_name": "a\\u0000.png", "text": "a"}\n'), Bad({J: r":1\b"})),
    Case("a name of 5000 letters", listed(line(file_name="a" * 5000 + ".png", text="a")), Bad({J: r":1\b"})),
    Case("an empty name", listed(line(file_name="", text="a")), Bad({J: r":1\b"})),
    Case("a number for a name", listed(line(file_name=7, text="a")), Bad({J: r":1\b"})),
    Case("an object for a caption", listed(line(file_name="fine.png", text={"a": 1})), Bad({J: r":1\b"})),
    Case("a cell of a megabyte", listed(b"file_name,text\nfine.png," + b"x" * 1_100_000 + b"\n", C), Bad({C: r":2\b"})),
    Case(
        "a quote that is not closed",
        listed(b'file_name,text\nfine.png,"red\n' + b"x,y\n" * 50_000, C),
        Bad({C: r":\d"}),
    ),
    Case("NUL in csv", listed(b"file_name,text\nfine.png,a\0b\n", C), Bad({C: r":2\b"})),
    Case("two columns of one name", listed(b"file_name,text,text\nfine.png,in red,in blue\n", C), Bad({C: "text"})),
    Case(
        "side file a hundred thousand deep",
        beside_fine({"x.png": picture("blue"), "x.json": b"[" * 100_000}),
        Bad({"x.json": "."}),
    ),
    Case(
        "side file with a long number",
        beside_fine({"x.png": picture("blue"), "x.json": b"1" * 6000}),
        Bad({"x.json": "."}),
    ),
    Case(
        "side file with half a surrogate pair",
        beside_fine({"x.png": picture("blue"), "x.json": b'"\\udc00"'}),
        Bad({"x.json": "."}),
    ),
]


@cases(HOSTILE)
def test_tables_that_break_readers(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


def metadata_parquet(columns: dict[str, Any]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        put(folder, a="in red", b="in blue")
        for name in "ab":
            (folder / f"{name}.txt").unlink()
        pq.write_table(pa.table(columns), folder / "metadata.parquet")

    return make


NAMES = ["a.png", "b.png"]
TEXTS = ["in red", "in blue"]
TYPES = [
    Case(
        "dictionaries",
        metadata_parquet({"file_name": pa.array(NAMES), "text": pa.array(TEXTS).dictionary_encode()}),
        Good(dict(zip(NAMES, TEXTS, strict=True))),
    ),
    Case(
        "large strings",
        metadata_parquet({"file_name": pa.array(NAMES, pa.large_string()), "text": pa.array(TEXTS, pa.large_string())}),
        Good(dict(zip(NAMES, TEXTS, strict=True))),
    ),
    Case(
        "no caption in one row",
        metadata_parquet({"file_name": NAMES, "text": ["in red", None]}),
        Bad({"metadata.parquet": r"(?s)caption.*(2\b|b\.png)"}),
    ),
]


@cases(TYPES)
def test_types_of_parquet(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


PARTS = {"a": "in red", "b": "in green", "c": "in blue"}


def packed(folder: Path, kind: str, content: dict[str, bytes]) -> Path:
    """The pictures and captions in a file of this kind."""
    folder.mkdir(exist_ok=True)
    path = folder / f"s.{kind}"
    if kind == "zip":
        return zipped(path, content)
    if kind == "parquet":
        rows = [{"image": content[f"{name}.png"], "text": content[f"{name}.txt"].decode()} for name in PARTS]
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    tarred(path, content, "w:gz" if kind == "tgz" else "w")
    return path


KINDS = pytest.mark.parametrize("kind", ["zip", "tar", "tgz", "parquet"])


class TestPacked:
    @KINDS
    def test_the_rest_trains_where_bad_pictures_are_skipped(self, tmp_path: Path, kind: str) -> None:
        content = members(PARTS) | {"b.png": b"broken"}
        path = packed(tmp_path / "set", kind, content)
        index = build(data_of(path.parent, {"path": str(path)}, skip_bad=True))
        assert sorted(row.caption for row in index.rows) == ["in blue", "in red"]
        named = r"row 2" if kind == "parquet" else "b.png"
        assert any(path.name in notice and named in notice for notice in index.notices), index.notices

    @KINDS
    def test_what_changes_after_the_look_is_refused_by_name(self, tmp_path: Path, kind: str) -> None:
        path = packed(tmp_path / "set", kind, members(PARTS))
        data = data_of(path.parent, {"path": str(path)})
        visits = Plan(build(data).rows, data=data, batch_size=3).window(0)
        for visit in visits:
            images.prepare(visit.row, visit.fit, background="white")
        packed(path.parent, kind, members(PARTS) | {"b.png": picture("yellow", (81, 64))})
        refused = []
        for visit in visits:
            try:
                images.prepare(visit.row, visit.fit, background="white")
            except UserError as error:
                refused.append((visit.row.caption, path.name in str(error)))
        assert ("in green", True) in refused
        assert all(named for _, named in refused)

    @KINDS
    def test_what_vanishes_after_the_look_is_named(self, tmp_path: Path, kind: str) -> None:
        path = packed(tmp_path / "set", kind, members(PARTS))
        data = data_of(path.parent, {"path": str(path)})
        visits = Plan(build(data).rows, data=data, batch_size=3).window(0)
        path.unlink()
        for visit in visits:
            with pytest.raises(UserError, match=path.name):
                images.prepare(visit.row, visit.fit, background="white")

    @KINDS
    def test_a_second_look_sees_what_changed(self, tmp_path: Path, kind: str) -> None:
        path = packed(tmp_path / "set", kind, members(PARTS))
        data = data_of(path.parent, {"path": str(path)})
        before = {row.caption: row.image for row in build(data).rows}
        packed(path.parent, kind, members(PARTS) | {"b.png": picture("yellow", (81, 64))})
        after = {row.caption: row.image for row in build(data).rows}
        assert [caption for caption in before if before[caption] != after[caption]] == ["in green"]


def test_every_cut_of_a_picture_is_refused_by_name(tmp_path: Path) -> None:
    """A download may stop anywhere; only the checksums at the end of a PNG can go without a pixel being lost."""
    whole = {"jpg": noise((48, 48)), "png": noise((24, 24), "PNG"), "webp": noise((48, 48), "WEBP")}
    for kind, data in whole.items():
        for cut in np.linspace(1, len(data) - (25 if kind == "png" else 2), 25).astype(int):
            path = tmp_path / f"x.{kind}"
            path.write_bytes(data[:cut])
            with pytest.raises(UserError, match=path.name):
                images.decode(path)


def test_random_bytes_never_crash_the_look(tmp_path: Path) -> None:
    """Any damage gives a picture or a problem that names the file."""
    drawn = np.random.default_rng(7)
    files = {kind: noise((24, 24), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")}
    path = tmp_path / "x.png"
    for kind, data in files.items():
        for _ in range(40):
            damaged = bytearray(data)
            for at in drawn.integers(0, min(len(data), 400), 4):
                damaged[at] = drawn.integers(256)
            path.write_bytes(damaged)
            with deadline(20):
                try:
                    said = images.decode(path).mode
                except UserError as error:
                    said = str(error)
            assert said == "RGB" or "x.png" in said, kind


def test_what_a_decoder_warns_of_is_said_with_the_name_and_not_past_us(tmp_path: Path) -> None:
    """Row 2: its warnings are reported, not printed in a programmer's words that name no file."""
    folder = put(tmp_path / "set", fine="all well red")
    (folder / "x.png").write_bytes(damaged_exif())
    (folder / "x.txt").write_text("blue")
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        notices = build(data_of(folder)).notices
    assert [str(one.message) for one in leaked] == []
    assert any("x.png" in notice for notice in notices)


def test_letters_in_capitals_are_other_letters(tmp_path: Path) -> None:
    """A.png and a.png are two pictures wherever they are read."""
    content = members({"a": "in red"}) | {"A.png": picture("blue", (70, 64)), "A.txt": b"in blue"}
    path = zipped(tmp_path / "s.zip", content)
    rows = build(data_of(tmp_path / "set", {"path": str(path)})).rows
    assert sorted(row.caption for row in rows) == ["in blue", "in red"]
    for row in rows:
        colour = {"in red": (255, 0, 0), "in blue": (0, 0, 255)}[row.caption]
        image = images.decode_bytes(row.place.read(), path=row.place).image
        assert near(image.getpixel((5, 5)), colour)  # type: ignore[arg-type]


def test_one_extreme_picture_does_not_stop_or_hide_the_others(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", a="red", b="green", c="blue")
    (folder / "wide.png").write_bytes(picture("cyan", (9000, 3)))
    (folder / "wide.txt").write_text("cyan")
    with deadline(20):
        seen = preflight(run_of(data_of(folder)))
    assert seen.counted.samples_per_epoch == 4
    assert any("wide.png" in notice for notice in seen.notices)
