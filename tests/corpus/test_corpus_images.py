"""Pictures, good and bad: what each becomes, by name, before a run starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpus_helpers import (
    COLOURS,
    Bad,
    Case,
    Good,
    cases,
    data_of,
    examine,
    linear_profile,
    link,
    near,
    noise,
    picture,
    pixel,
    png_file,
    put,
    put_files,
    run_of,
)
from PIL import Image

from gesso.data import images
from gesso.data.index import build
from gesso.data.plan import Plan
from gesso.data.preflight import preflight
from gesso.errors import UserError


def one(name: str, content: bytes, caption: str = "it") -> Any:
    """A maker of a set of a good picture and the one in question."""

    def make(folder: Path) -> None:
        put(folder, fine="all well red")
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text(caption)

    return make


def good(name: str, content: bytes, caption: str, size: tuple[int, int] = (40, 32), **more: Any) -> Good:
    return Good({"fine.png": "all well red", name: caption}, {name: size}, **more)


def case(name: str, file: str, content: bytes, caption: str, *, size: tuple[int, int] = (40, 32), **more: Any) -> Case:
    settings = more.pop("data", {})
    return Case(name, one(file, content, caption), good(file, content, caption, size, **more), settings)


def bad(name: str, file: str, content: bytes, reason: str) -> Case:
    return Case(name, one(file, content), Bad({file: reason}, good=("fine.png",)))


def frames(kind: str) -> bytes:
    first, second = (Image.new("RGB", (40, 32), colour) for colour in ("red", "blue"))
    return picture(first, kind=kind, save_all=True, append_images=[second])


S = (40, 32)
CMYK_CYAN = Image.new("CMYK", S, (255, 0, 0, 0))
PALETTE = Image.new("P", S, 1)
PALETTE.putpalette([255, 255, 0, 0, 0, 255])
CLEAR_RED = Image.new("RGBA", S, (255, 0, 0, 0))
RAMP = np.linspace(0, 1, 40 * 32, dtype=np.float32).reshape(32, 40)
EARLY_END = noise()[: len(noise()) // 2] + b"\xff\xd9"

GOOD = [
    case("jpeg", "x.jpg", picture("blue", S, "JPEG"), "blue"),
    case("progressive jpeg", "x.jpg", picture("blue", S, "JPEG", progressive=True), "blue"),
    case("ending in capitals", "x.JPG", picture("blue", S, "JPEG"), "blue"),
    case("jpeg named .jpeg", "x.jpeg", picture("blue", S, "JPEG"), "blue"),
    case("webp", "x.webp", picture("blue", S, "WEBP"), "blue"),
    case("bmp", "x.bmp", picture("blue", S, "BMP"), "blue"),
    case("tiff", "x.tiff", picture("blue", S, "TIFF"), "blue"),
    case("still gif", "x.gif", picture("blue", S, "GIF"), "blue"),
    case("png named jpg", "x.jpg", picture("blue", S), "blue"),
    case("jpeg named png", "x.png", picture("blue", S, "JPEG"), "blue"),
    case("16-bit grey png", "x.png", png_file(40, 32, depth=16, colour_type=0, rows=b"\x80\x80" * 1280), "grey"),
    case(
        "16-bit rgb png", "x.png", png_file(40, 32, depth=16, colour_type=2, rows=b"\0\0\x80\x80\0\0" * 1280), "green"
    ),
    case("dark 16-bit grey png", "x.png", png_file(40, 32, depth=16, colour_type=0, rows=b"\x01\0" * 1280), "black"),
    case("grey", "x.png", picture(Image.new("L", S, 128)), "grey"),
    case("one bit", "x.png", picture(Image.new("1", S, 1)), "white"),
    case("palette", "x.png", picture(PALETTE), "blue"),
    case("palette with a clear entry", "x.png", picture(PALETTE, transparency=1), "white", notices=("transparen",)),
    case("clear colour of an rgb png", "x.png", picture("red", S, transparency=(255, 0, 0)), "white"),
    case("cmyk", "x.jpg", picture(CMYK_CYAN, kind="JPEG"), "cyan", notices=("cmyk",)),
    case("cmyk tiff", "x.tif", picture(CMYK_CYAN, kind="TIFF"), "cyan", notices=("cmyk",)),
    case("alpha", "x.png", picture(CLEAR_RED), "white", notices=("transparen",)),
    case("alpha on blue", "x.png", picture(CLEAR_RED), "blue", data={"background": "#0000ff"}),
    case("alpha webp", "x.webp", picture(CLEAR_RED, kind="WEBP", lossless=True, exact=True), "white"),
    case("grey with alpha", "x.png", picture(Image.new("LA", S, (0, 0))), "white"),
    case("half transparent", "x.png", picture(Image.new("RGBA", S, (0, 0, 0, 127))), "grey"),
    case("profile", "x.png", picture((55, 0, 0), S, icc_profile=linear_profile()), "it", notices=("profile|srgb",)),
    case("a name in other letters", "Käthe 写真 №1.png", picture("blue", S), "blue"),
    case("a long name", "n" * 245 + ".png", picture("blue", S), "blue"),
    case("dots in the name", "a.b.c.png", picture("blue", S), "blue"),
]

BAD = [
    bad("truncated jpeg", "x.jpg", noise()[:-2000], "truncated|cut|incomplete|damaged|broken"),
    bad("truncated png", "x.png", noise(kind="PNG")[:-9000], "truncated|cut|incomplete|damaged|broken"),
    bad("truncated webp", "x.webp", noise(kind="WEBP")[:-900], "truncated|cut|incomplete|damaged|broken|decode"),
    bad("png damaged in the middle", "x.png", noise(kind="PNG").replace(b"IDAT", b"IDAT\1", 1), "damaged|broken"),
    bad("jpeg that ends in the middle", "x.jpg", EARLY_END, "truncated|cut|incomplete|damaged|broken|end"),
    bad("bomb png", "x.png", png_file(60000, 60000, depth=1, colour_type=0, rows=None), "pixels|large|big"),
    bad("bomb with the largest sides", "x.png", png_file(2**31 - 1, 2**31 - 1, depth=8, colour_type=2, rows=None), "."),
    bad("float tiff", "x.tif", picture(Image.fromarray(RAMP), kind="TIFF"), "float|range"),
    bad("integer tiff", "x.tif", picture(Image.fromarray((RAMP * 2**20).astype(np.int32)), kind="TIFF"), "32|range"),
    bad("animated gif", "x.gif", frames("GIF"), "frames|animat"),
    bad("animated webp", "x.webp", frames("WEBP"), "frames|animat"),
    bad("animated png", "x.png", frames("PNG"), "frames|animat"),
    bad("pages of a tiff", "x.tif", frames("TIFF"), "frames|pages|pictures|animat"),
    bad("empty file", "x.png", b"", "empty"),
    bad("text named png", "x.png", b"this is no picture", "not a picture|not an image"),
    bad("page of a server named jpg", "x.jpg", b"<!DOCTYPE html><html>404</html>", "not a picture|not an image"),
    bad("pdf named jpg", "x.jpg", b"%PDF-1.4\n1 0 obj", "not a picture|not an image|pdf"),
    bad("signature alone", "x.png", b"\x89PNG\r\n\x1a\n", "."),
    bad("postscript named png", "x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "picture|image"),
]


@cases(GOOD)
def test_good_pictures(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


@cases(BAD)
def test_bad_pictures(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


def link_out(folder: Path) -> None:
    put(folder, fine="all well red")
    (folder.parent / "outside.png").write_bytes(picture("blue"))
    link(folder.parent / "outside.png", folder / "x.png")
    (folder / "x.txt").write_text("blue")


def link_to_folder(folder: Path) -> None:
    put(folder, fine="all well red")
    put(folder.parent / "elsewhere", secret="blue")
    link(folder.parent / "elsewhere", folder / "linked")


def link_to_nothing(folder: Path) -> None:
    put(folder, fine="all well red")
    link("nowhere.png", folder / "x.png")
    (folder / "x.txt").write_text("blue")


def pipe(folder: Path) -> None:
    put(folder, fine="all well red")
    os.mkfifo(folder / "x.png")
    (folder / "x.txt").write_text("blue")


LINKS = [
    Case("link out of the folder", link_out, Bad({"x.png": "outside|out of|leads"}, good=("fine.png",))),
    Case("folder linked from outside", link_to_folder, Bad({"linked": "outside|out of|leads"}, good=("fine.png",))),
    Case("link to nothing", link_to_nothing, Bad({"x.png": "nothing|no file|not there|no such|broken|link"})),
    Case("pipe named png", pipe, Good({"fine.png": "all well red"}, notices=(r"x\.png",))),
]


@cases(LINKS)
def test_what_is_no_plain_file(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


def beside(name: str, content: bytes | None = None) -> Any:
    def make(folder: Path) -> None:
        put(folder, fine="all well red")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture("blue") if content is None else content)

    return make


def loop(folder: Path) -> None:
    put(folder, fine="all well red")
    (folder / "sub").mkdir()
    link(folder, folder / "sub" / "again")


ASIDE = [
    Case("hidden picture", beside(".secret.png"), Good({"fine.png": "all well red"}, left_out=(".secret.png",))),
    Case("picture in a hidden folder", beside(".old/b.png"), Good({"fine.png": "all well red"}, left_out=(".old",))),
    Case("heic", beside("b.heic", b"\0\0\0\x18ftypheic"), Good({"fine.png": "all well red"}, left_out=("b.heic",))),
    Case("photoshop", beside("b.psd", b"8BPS"), Good({"fine.png": "all well red"}, left_out=("b.psd",))),
    Case("finder's file", beside("._fine.png", b"\0\5\x16\7"), Good({"fine.png": "all well red"}, pictures=1)),
    Case("video", beside("b.mp4", b"\0\0\0\x18ftypmp42"), Good({"fine.png": "all well red"})),
    Case("folder in a loop", loop, Good({"fine.png": "all well red"})),
]


@cases(ASIDE)
def test_what_lies_beside_is_used_or_named(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


def test_a_profile_changes_the_numbers_to_srgb(tmp_path: Path) -> None:
    """Linear 0.5 is 0.735 in sRGB (IEC 61966-2-1)."""
    (tmp_path / "x.png").write_bytes(picture((128, 128, 128), S, icc_profile=linear_profile()))
    assert near(images.decode(tmp_path / "x.png").getpixel((3, 3)), (188, 188, 188), by=2)  # type: ignore[arg-type]


UNDO = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What a camera does to an upright picture before it writes the tag (EXIF 2.3, 4.6.4)."""


def upright() -> Image.Image:
    """A colour in each quarter, so that each of the eight ways to hold it shows."""
    image = Image.new("RGB", (96, 64), "red")
    for colour, corner in (("green", (48, 0)), ("blue", (0, 32)), ("yellow", (48, 32))):
        image.paste(colour, (*corner, corner[0] + 48, corner[1] + 32))
    return image


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("tag", range(1, 9))
def test_pictures_are_turned_upright_once_and_sdxl_is_told_the_upright_size(
    tmp_path: Path, tag: int, kind: str
) -> None:
    folder = put(tmp_path / "set")
    exif = Image.Exif()
    exif[0x0112] = tag
    turn = UNDO[tag]
    stored = upright() if turn is None else upright().transpose(turn)
    options: Any = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    (folder / f"x.{kind.lower()}").write_bytes(picture(stored, kind=kind, exif=exif.tobytes(), **options))
    (folder / "x.txt").write_text("it")
    data = data_of(folder)
    (row,) = index = build(data).rows
    assert (row.width, row.height) == (96, 64)
    image = images.decode(folder / f"x.{kind.lower()}")
    for at, colour in (((24, 16), "red"), ((72, 16), "green"), ((24, 48), "blue"), ((72, 48), "yellow")):
        assert near(image.getpixel(at), COLOURS[colour], by=12), (at, colour)  # type: ignore[arg-type]
    (visit,) = Plan(index, data=data, batch_size=1).window(0)
    assert (visit.geometry.original_width, visit.geometry.original_height) == (96, 64)
    width, height = visit.fit.bucket
    assert width > height
    pixels = images.prepare(row, visit.fit, background="white").image
    assert near(tuple(pixels[:, 4, 4]), (1, -1, -1), by=1)
    assert pixels.shape == (3, height, width)
    # Bottom right is yellow: red and green are high, blue is low.
    assert pixels[0, -5, -5] > 0.8
    assert pixels[1, -5, -5] > 0.8
    assert pixels[2, -5, -5] < -0.8


class TestDamageInTheMiddle:
    """Row 2: a JPEG whose entropy-coded data is damaged still decodes, to another picture."""

    def damaged(self) -> bytes:
        data = bytearray(noise())
        middle = len(data) // 2
        data[middle : middle + 200] = bytes(200)
        return bytes(data)

    def test_after_the_audit_it_is_refused_by_name(self, tmp_path: Path) -> None:
        folder = put(tmp_path / "set")
        (folder / "x.jpg").write_bytes(noise())
        (folder / "x.txt").write_text("noise")
        data = data_of(folder)
        index = build(data)
        (visit,) = Plan(index.rows, data=data, batch_size=1).window(0)
        images.prepare(visit.row, visit.fit, background="white")
        (folder / "x.jpg").write_bytes(self.damaged())
        with pytest.raises(UserError, match=r"(?s)x\.jpg.*chang|chang.*x\.jpg") as caught:
            images.prepare(visit.row, visit.fit, background="white")
        assert caught.value.exit_code == 2
        assert caught.value.fix

    def test_before_the_audit_it_is_refused_where_the_data_end_too_early(self, tmp_path: Path) -> None:
        folder = put(tmp_path / "set", fine="red")
        whole = bytearray(picture(Image.linear_gradient("L").convert("RGB"), kind="JPEG"))
        middle = len(whole) // 2
        (folder / "x.jpg").write_bytes(whole[:middle] + b"\xff\xd9")
        (folder / "x.txt").write_text("ramp")
        with pytest.raises(UserError, match=r"x\.jpg.*end before") as caught:
            build(data_of(folder))
        assert "fine.png" not in str(caught.value)

    def test_the_limit_other_damage_before_the_audit_is_not_seen(self, tmp_path: Path) -> None:
        """No checksum, and a decoder that does not tell: where enough data follow, another picture is trained on."""
        folder = put(tmp_path / "set", fine="red")
        (folder / "x.jpg").write_bytes(self.damaged())
        (folder / "x.txt").write_text("noise")
        index = build(data_of(folder))
        assert sorted(row.place.name for row in index.rows) == ["fine.png", "x.jpg"]
        seen = images.decode(folder / "x.jpg").tobytes()
        (folder / "x.jpg").write_bytes(noise())
        assert images.decode(folder / "x.jpg").tobytes() != seen

    def test_many_a_wrong_byte_never_passes_in_silence_where_the_format_has_checksums(self, tmp_path: Path) -> None:
        whole = noise((24, 24), "PNG")
        for position in range(45, len(whole) - 16, 97):
            folder = put(tmp_path / f"set{position}")
            damaged = bytearray(whole)
            damaged[position] ^= 0x55
            (folder / "x.png").write_bytes(damaged)
            (folder / "x.txt").write_text("noise")
            with pytest.raises(UserError, match=r"x\.png"):
                build(data_of(folder))


@pytest.mark.parametrize("size", [(5, 4), (1, 1), (3000, 20), (16, 2400)])
def test_tiny_and_extreme_pictures_are_named(tmp_path: Path, size: tuple[int, int]) -> None:
    folder = put_files(tmp_path / "set", {"fine": "red", "other": "blue"})
    (folder / "odd.png").write_bytes(picture("green", size))
    (folder / "odd.txt").write_text("green")
    try:
        said = "\n".join(preflight(run_of(data_of(folder))).notices)
    except UserError as error:
        said = str(error)
    assert "odd.png" in said
    assert "fine.png" not in said


def test_pictures_too_small_for_any_bucket_are_refused_where_none_is_enlarged(tmp_path: Path) -> None:
    folder = put_files(tmp_path / "set", {"fine": "red"})
    for name in ("tiny", "small"):
        (folder / f"{name}.png").write_bytes(picture("green", (12, 9)))
        (folder / f"{name}.txt").write_text("green")
    with pytest.raises(UserError) as caught:
        preflight(run_of(data_of(folder, buckets={"step": 16, "upscale": False})))
    assert caught.value.exit_code == 2
    assert "tiny.png" in str(caught.value)
    assert "small.png" in str(caught.value)


def test_transparency_as_a_mask(tmp_path: Path) -> None:
    """The left half is clear: no loss there, and the hidden colour does not show."""
    folder = put(tmp_path / "set")
    image = Image.new("RGBA", (64, 64), (0, 0, 255, 255))
    image.paste((255, 0, 0, 0), (0, 0, 32, 64))
    (folder / "x.png").write_bytes(picture(image))
    (folder / "x.txt").write_text("half")
    data = data_of(folder, {"mask": "alpha"})
    (visit,) = Plan(build(data).rows, data=data, batch_size=1).window(0)
    pixels = images.prepare(visit.row, visit.fit, background="white")
    assert pixels.mask is not None
    assert pixels.mask.shape == (1, 64, 64)
    assert pixels.mask[0, :, :28].max() < 0.02
    assert pixels.mask[0, :, 36:].min() > 0.98
    assert np.allclose(pixels.image[:, 32, 4], 1, atol=0.02)
    assert np.allclose(pixels.image[:, 32, 60], (-1, -1, 1), atol=0.02)


def test_masks_in_files(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", x="blue", y="green")
    for name, left in (("x", 255), ("y", 0)):
        mask = Image.new("L", Image.open(folder / f"{name}.png").size, 255 - left)
        mask.paste(left, (0, 0, 40, 64))
        (folder / f"{name}-masklabel.png").write_bytes(picture(mask))
    data = data_of(folder, {"mask": "file"})
    index = build(data)
    assert sorted(row.caption for row in index.rows) == ["blue", "green"]
    for visit in Plan(index.rows, data=data, batch_size=2).window(0):
        mask = images.prepare(visit.row, visit.fit, background="white").mask
        assert mask is not None
        left, right = mask[0, :, :20].mean(), mask[0, :, -20:].mean()
        assert (left > 0.98 and right < 0.02) if visit.caption == "blue" else (left < 0.02 and right > 0.98)
    (folder / "y-masklabel.png").unlink()
    with pytest.raises(UserError, match=r"y\.png") as caught:
        build(data)
    assert "x.png" not in str(caught.value)
    (folder / "y-masklabel.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"y-masklabel\.png"):
        build(data)


def test_pixels_are_the_same_after_every_way_of_reading(tmp_path: Path) -> None:
    """`decode`, `decode_bytes` and what a batch gets agree."""
    folder = put(tmp_path / "set", x="green")
    (row,) = build(data_of(folder)).rows
    assert images.decode(folder / "x.png").getpixel((9, 9)) == pixel(row.place) == COLOURS["green"]
