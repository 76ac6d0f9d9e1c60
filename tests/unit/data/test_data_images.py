"""Decoding odd pictures, and fitting: the crop that SDXL is told is the crop that was made."""

from __future__ import annotations

import io
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import coordinates, solid
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from gesso.data import images
from gesso.data.buckets import Fit, assign
from gesso.data.decoder_warnings import heard
from gesso.data.images import decode, decode_bytes, fit, probe
from gesso.errors import UserError

ORIENTATION = 0x0112
# How a camera stores an upright picture under each orientation: the transform that its tag says to undo.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


class TestOrientation:
    @pytest.mark.parametrize("kind", ["png", "tiff", "webp", "jpg"])
    @pytest.mark.parametrize("tag", range(1, 9))
    def test_applied_once(self, tmp_path: Path, kind: str, tag: int) -> None:
        upright = coordinates(48, 32)
        stored = upright if STORED[tag] is None else upright.transpose(STORED[tag])
        exif = Image.Exif()
        exif[ORIENTATION] = tag
        path = tmp_path / f"a.{kind}"
        options = {"png": {}, "tiff": {}, "webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}[kind]
        stored.save(path, exif=exif, **options)
        decoded = decode(path)
        assert decoded.size == probe(path) == (48, 32)
        assert np.abs(pixels(decoded) - pixels(upright)).max() <= (12 if kind == "jpg" else 0)


class TestDepth:
    @pytest.mark.parametrize("kind", ["png", "tiff"])
    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path: Path, kind: str) -> None:
        values = np.array([[0, 257, 32768, 65535]], np.uint16)
        Image.fromarray(values).save(tmp_path / f"a.{kind}")
        assert pixels(decode(tmp_path / f"a.{kind}"))[0, :, 0].tolist() == [0, 1, 128, 255]

    @pytest.mark.parametrize("dtype", [np.float32, np.int32])
    def test_unknown_ranges_are_refused_by_name(self, tmp_path: Path, dtype: type) -> None:
        Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "deep.tiff")
        with pytest.raises(UserError, match=r"deep\.tiff: a (floating-point|32-bit integer) picture"):
            decode(tmp_path / "deep.tiff")


class TestColour:
    def test_transparency_shows_the_background(self, tmp_path: Path) -> None:
        image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
        image.putpixel((1, 0), (255, 0, 0, 255))
        image.putpixel((2, 0), (255, 0, 0, 128))
        image.save(tmp_path / "a.png")
        got = pixels(decode(tmp_path / "a.png", background="#0000ff"))[0]
        assert got[0].tolist() == [0, 0, 255]
        assert got[1].tolist() == [255, 0, 0]
        assert np.abs(got[2] - [128, 0, 127]).max() <= 1

    def test_palette_and_grey_transparency(self, tmp_path: Path) -> None:
        palette = Image.new("P", (2, 1))
        palette.putpalette([10, 20, 30, 200, 100, 50])
        palette.putpixel((1, 0), 1)
        palette.save(tmp_path / "p.png", transparency=0)
        assert pixels(decode(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [200, 100, 50]]]
        grey = Image.new("LA", (2, 1), (7, 255))
        grey.putpixel((1, 0), (7, 0))
        grey.save(tmp_path / "g.png")
        assert pixels(decode(tmp_path / "g.png")).tolist() == [[[7, 7, 7], [255, 255, 255]]]

    def test_one_bit_and_grey(self, tmp_path: Path) -> None:
        Image.new("1", (1, 1), 1).save(tmp_path / "1.png")
        Image.new("L", (1, 1), 90).save(tmp_path / "l.png")
        assert pixels(decode(tmp_path / "1.png")).ravel().tolist() == [255, 255, 255]
        assert pixels(decode(tmp_path / "l.png")).ravel().tolist() == [90, 90, 90]

    def test_cmyk(self, tmp_path: Path) -> None:
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
        got = pixels(decode(tmp_path / "a.jpg"))[4, 4]
        assert got[0] > 240
        assert got[1:].max() < 15

    def test_a_profile_is_converted_to_srgb(self, tmp_path: Path) -> None:
        # A profile with red and blue channels exchanged would be exotic; XYZ-as-RGB is at hand and far from sRGB.
        image = Image.new("RGB", (4, 4), (120, 120, 120))
        icc = _swapped_profile()
        image.putpixel((0, 0), (250, 10, 20))
        image.save(tmp_path / "a.png", icc_profile=icc)
        got = pixels(decode(tmp_path / "a.png"))[0, 0]
        assert got[2] > 200, "the profile says that the first channel is blue"
        assert got[0] < 60
        notes = decode_bytes((tmp_path / "a.png").read_bytes(), path=tmp_path / "a.png").notes
        assert notes == ("colour profile converted to sRGB",)

    def test_srgb_and_foreign_profiles_leave_the_pixels(self, tmp_path: Path) -> None:
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        for name, icc, mode in (("s", srgb, "RGB"), ("junk", b"nonsense", "RGB"), ("other", _swapped_profile(), "L")):
            image = Image.new("RGB", (2, 1), (11, 22, 33)).convert(mode)
            image.save(tmp_path / f"{name}.png", icc_profile=icc)
            expected = pixels(image.convert("RGB"))
            path = tmp_path / f"{name}.png"
            decoded = decode_bytes(path.read_bytes(), path=path)
            assert (pixels(decoded.image) == expected).all(), name
            assert bool(decoded.notes) == (name != "s")

    def test_a_wrong_background_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"data\.background: 'whiet' is not a colour"):
            decode(solid(tmp_path / "a.png"), background="whiet")


def _swapped_profile() -> bytes:
    """sRGB with its red and blue primaries exchanged: tag table entries rXYZ and bXYZ swap names."""
    icc = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = icc.index(b"rXYZ"), icc.index(b"bXYZ")
    icc[red : red + 4], icc[blue : blue + 4] = b"bXYZ", b"rXYZ"
    text = bytes(icc)
    return text.replace("sRGB".encode("utf-16-be"), "sXXX".encode("utf-16-be")).replace(
        b"sRGB built-in", b"sXXX built-in"
    )


class TestRefusals:
    @pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
    def test_truncated_files_are_named(self, tmp_path: Path, kind: str) -> None:
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, {"jpg": "JPEG"}.get(kind, kind))
        path = tmp_path / f"cut.{kind}"
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
        with pytest.raises(UserError, match=rf"cut\.{kind}"):
            decode(path)

    @pytest.mark.parametrize("options", [{}, {"optimize": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}])
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_a_jpeg_cut_and_closed_is_refused_and_grey_ones_are_not(self, mode: str, options: dict[str, Any]) -> None:
        def jpeg(image: Image.Image) -> bytes:
            buffer = io.BytesIO()
            image.convert(mode).save(buffer, "JPEG", **options)
            return buffer.getvalue()

        noise = np.random.default_rng(0).integers(0, 255, (77, 61, 3), np.uint8)
        whole = jpeg(Image.fromarray(noise))
        assert decode_bytes(whole, path=Path("x.jpg")).image.size == (61, 77)
        for cut in (0.5, 0.7, 0.9):
            with pytest.raises(UserError, match=r"x\.jpg: the picture is damaged: its data end before its pixels do"):
                decode_bytes(whole[: int(len(whole) * cut)] + b"\xff\xd9", path=Path("x.jpg"))
        grey = jpeg(Image.new("RGB", (77, 61), (128, 128, 128)))
        for data in (grey, grey + bytes(9), grey + b"\xff\xd9", grey + b"of the camera\xff\xd9"):
            assert decode_bytes(data, path=Path("x.jpg")).image.getpixel((70, 60)) == (128, 128, 128)

    @pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
    def test_animations_are_refused(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / f"moving.{kind}"
        frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
        frames[0].save(path, save_all=True, append_images=frames[1:])
        with pytest.raises(UserError, match=rf"moving\.{kind}: an animated"):
            decode(path)

    def test_a_still_gif_is_fine(self, tmp_path: Path) -> None:
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "still.gif")
        assert pixels(decode(tmp_path / "still.gif"))[0, 0].tolist() == [255, 0, 0]

    def test_a_jpeg_with_a_second_view_gives_the_first(self, tmp_path: Path) -> None:
        first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second])
        assert pixels(decode(tmp_path / "phone.jpg"))[0, 0, 0] > 200

    def test_empty_and_foreign_files(self, tmp_path: Path) -> None:
        (tmp_path / "empty.png").write_bytes(b"")
        (tmp_path / "text.png").write_text("<html>not found</html>")
        (tmp_path / "vector.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        for name, words in (("empty", "is empty"), ("text", "not a picture"), ("vector", "not a picture")):
            with pytest.raises(UserError, match=words):
                decode(tmp_path / f"{name}.png")
            with pytest.raises(UserError, match=words):
                probe(tmp_path / f"{name}.png")
        with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
            decode(tmp_path / "gone.png")

    def test_the_content_decides_not_the_name(self, tmp_path: Path) -> None:
        Image.new("RGB", (4, 2), (1, 2, 3)).save(tmp_path / "a.png")
        (tmp_path / "a.png").rename(tmp_path / "a.jpg")
        assert pixels(decode(tmp_path / "a.jpg"))[0, 0].tolist() == [1, 2, 3]

    def test_too_many_pixels_are_refused_before_decoding(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = solid(tmp_path / "big.png", (64, 64))
        monkeypatch.setattr(images, "MAX_PIXELS", 64 * 64 - 1)
        with pytest.raises(UserError, match=r"big\.png: the picture is too large"):
            decode(path)

    def test_a_real_bomb_header(self, tmp_path: Path) -> None:
        data = bytearray(solid(tmp_path / "bomb.bmp", (8, 8)).read_bytes())
        data[18:26] = (60_000).to_bytes(4, "little") * 2
        (tmp_path / "bomb.bmp").write_bytes(data)
        with pytest.raises(UserError, match=r"bomb\.bmp: the picture is too large"):
            decode(tmp_path / "bomb.bmp")

    @given(
        position=st.integers(0, 2000),
        value=st.integers(0, 255),
        kind=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]),
    )
    def test_damaged_bytes_give_a_picture_or_a_user_error(self, position: int, value: int, kind: str) -> None:
        buffer = io.BytesIO()
        coordinates(24, 16).save(buffer, kind)
        data = bytearray(buffer.getvalue())
        data[position % len(data)] = value
        try:
            image = decode_bytes(bytes(data), path=Path("x")).image
        except UserError:
            return
        assert image.mode == "RGB"


class TestWarnings:
    """What Pillow warns of is told with the file's name by the thread that decoded it, and by no other."""

    @staticmethod
    def odd() -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
        return buffer.getvalue()

    def test_it_becomes_a_note_of_each_picture(self) -> None:
        with warnings.catch_warnings(record=True) as leaked:
            warnings.simplefilter("default")
            notes = [decode_bytes(self.odd(), path=Path(name)).notes for name in ("a.png", "b.png")]
            warnings.warn("of somebody else", UserWarning, stacklevel=1)
        assert [[note.partition(": ")[0] for note in each] for each in notes] == [
            ["the decoder warns of a.png"],
            ["the decoder warns of b.png"],
        ]
        assert all("Corrupt EXIF data" in note for each in notes for note in each)
        assert [str(one.message) for one in leaked] == ["of somebody else"]

    def test_threads_hear_only_their_own(self) -> None:
        fine = io.BytesIO()
        Image.new("RGB", (8, 8)).save(fine, "PNG")
        files = {f"{i}.png": self.odd() if i % 3 == 0 else fine.getvalue() for i in range(120)}
        with warnings.catch_warnings(record=True) as leaked, ThreadPoolExecutor(8) as pool:
            decoded = list(pool.map(lambda name: decode_bytes(files[name], path=Path(name)).notes, files))
        for i, notes in enumerate(decoded):
            assert [f"warns of {i}.png:" in note for note in notes] == ([True] if i % 3 == 0 else [])
        assert leaked == []

    def test_two_that_decode_at_the_same_moment_do_not_hear_each_other(self) -> None:
        inside = threading.Barrier(2, timeout=10)

        def hear(name: str) -> list[str]:
            with heard() as told:
                inside.wait()
                warnings.warn(f"of {name}", UserWarning, stacklevel=1)
                inside.wait()
            return told

        with warnings.catch_warnings(record=True) as leaked, ThreadPoolExecutor(2) as pool:
            warnings.simplefilter("always")
            assert list(pool.map(hear, ["one", "two"])) == [["of one"], ["of two"]]
        assert leaked == []


class TestFit:
    @given(
        width=st.integers(20, 255),
        height=st.integers(20, 255),
        across=st.floats(0, 1),
        down=st.floats(0, 1),
        flip=st.booleans(),
    )
    def test_the_geometry_is_the_crop_that_the_pixels_show(
        self, width: int, height: int, across: float, down: float, flip: bool
    ) -> None:
        bucket = (width - 12, height - 4)
        left, top = round(12 * across), round(4 * down)
        image = coordinates(width, height)
        array, geometry = fit(image, Fit(bucket, (width, height), (left, top), flip))
        assert array.shape == (3, bucket[1], bucket[0])
        assert array.dtype == np.float32
        seen = np.round((array + 1) * 127.5)
        assert tuple(geometry) == (height, width, geometry.crop_top, geometry.crop_left, bucket[1], bucket[0])
        # Decode the crop from the colours of the corner that the model sees at the top left.
        column, line = seen[0, 0, 0], seen[1, 0, 0]
        in_this_frame = width - 1 - column if flip else column
        assert (geometry.crop_top, geometry.crop_left) == (line, in_this_frame)
        assert seen[0, 0, -1] == (column - bucket[0] + 1 if flip else column + bucket[0] - 1)

    def test_resizing_keeps_the_picture_in_place(self) -> None:
        # 250 x 125 into 64 x 64: scaled by 0.512 to 128 x 64, the middle cropped: columns 32..95 of 128.
        plan = assign(250, 125, sizes=[(64, 64)], step=16)
        assert plan == Fit((64, 64), (128, 64), (32, 0))
        array, geometry = fit(coordinates(250, 125), plan)
        assert tuple(geometry) == (125, 250, 0, 32, 64, 64)
        columns = (array[0, 32] + 1) * 127.5
        expected = (np.arange(32, 96) + 0.5) / 0.512 - 0.5
        assert np.abs(columns - expected).max() < 1

    def test_range(self) -> None:
        image = Image.new("RGB", (2, 1), (0, 0, 0))
        image.putpixel((1, 0), (255, 255, 255))
        array, _ = fit(image, Fit((2, 1), (2, 1), (0, 0)))
        assert array[:, 0].tolist() == [[-1, 1]] * 3
