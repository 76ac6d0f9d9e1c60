"""Turned, recoloured and masked pictures: what reaches the VAE, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_helpers import coordinates, solid
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gesso.data.buckets import Fit
from gesso.data.images import content_hash, fit, prepare
from gesso.data.places import Place
from gesso.data.rows import ALPHA, Row
from gesso.errors import UserError


def a_fit(bucket: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int] = (0, 0), **changes: object) -> Fit:
    return Fit(bucket, resized, crop, **changes)  # type: ignore[arg-type]


def levels(pixels: np.ndarray) -> np.ndarray:
    """Back from [-1, 1] to 0..255."""
    return (pixels + 1) * 127.5


class TestTurning:
    @settings(max_examples=60)
    @given(st.floats(-45, 45), st.integers(0, 40), st.integers(0, 24), st.booleans())
    def test_no_corner_is_ever_empty(self, angle: float, left: int, top: int, flip: bool) -> None:
        white = Image.new("RGB", (104, 72), "white")
        plan = a_fit((64, 48), (104, 72), (left, top), angle=angle, flip=flip)
        pixels, _ = fit(white, plan)
        assert pixels.shape == (3, 48, 64)
        assert pixels.min() > 0.99

    def test_the_middle_stays_and_right_goes_up_counter_clockwise(self) -> None:
        picture = coordinates(200, 200)
        plan = a_fit((64, 64), (200, 200), (68, 68), angle=10.0)
        turned, geometry = fit(picture, plan)
        straight, same = fit(picture, a_fit((64, 64), (200, 200), (68, 68)))
        column, line = levels(turned)[0], levels(turned)[1]
        assert abs(column[31:33, 31:33].mean() - levels(straight)[0][31:33, 31:33].mean()) < 1
        # The right edge of the crop shows what was lower in the picture: the content has turned to the left.
        assert line[32, 60] - line[32, 4] == pytest.approx(56 * np.sin(np.radians(10)), abs=1.5)
        assert column[32, 60] - column[32, 4] == pytest.approx(56 * np.cos(np.radians(10)), abs=1.5)
        assert geometry == same

    def test_a_crop_without_room_is_enlarged_and_not_filled(self) -> None:
        turned, _ = fit(coordinates(64, 64), a_fit((64, 64), (64, 64), angle=10.0))
        spread = np.ptp(levels(turned)[0][32])
        assert spread < 64 / (np.cos(np.radians(10)) + np.sin(np.radians(10))) + 2
        assert levels(turned)[:2].min() >= 0


class TestColours:
    def test_each_factor_does_what_its_name_says(self) -> None:
        picture = Image.new("RGB", (16, 16), (100, 50, 50))
        picture.paste((200, 100, 100), (0, 0, 8, 16))
        plain = levels(fit(picture, a_fit((16, 16), (16, 16)))[0])
        light = levels(fit(picture, a_fit((16, 16), (16, 16), colour=(1.2, 1, 1)))[0])
        flat = levels(fit(picture, a_fit((16, 16), (16, 16), colour=(1, 0.5, 1)))[0])
        grey = levels(fit(picture, a_fit((16, 16), (16, 16), colour=(1, 1, 0)))[0])
        assert light.mean() == pytest.approx(1.2 * plain.mean(), rel=0.01)
        assert np.ptp(flat[0]) == pytest.approx(0.5 * np.ptp(plain[0]), abs=1.5)
        assert np.abs(grey[0] - grey[1]).max() < 1

    def test_factors_of_one_change_nothing(self) -> None:
        picture = coordinates(40, 40)
        one = fit(picture, a_fit((32, 32), (40, 40), colour=(1.0, 1.0, 1.0)))[0]
        assert np.array_equal(one, fit(picture, a_fit((32, 32), (40, 40)))[0])


class TestMasks:
    def row(self, path: Path, mask: Path | None = None, mask_hash: str = "") -> Row:
        with Image.open(path) as image:
            width, height = image.size
        hash_ = content_hash(mask.read_bytes()) if mask else mask_hash
        place = Place(str(mask)) if mask else None
        name = content_hash(path.read_bytes())
        return Row(name, name, Place(str(path)), width, height, "", mask=place, mask_hash=hash_)

    def halves(self, path: Path, size: tuple[int, int] = (96, 64)) -> Path:
        """White on the left."""
        mask = Image.new("L", size, 0)
        mask.paste(255, (0, 0, size[0] // 2, size[1]))
        mask.save(path)
        return path

    def test_a_mask_is_cropped_and_flipped_with_its_picture(self, tmp_path: Path) -> None:
        picture = tmp_path / "a.png"
        Image.open(self.halves(tmp_path / "b.png")).convert("RGB").save(picture)
        row = self.row(picture, self.halves(tmp_path / "a-masklabel.png"))
        for plan in (
            a_fit((64, 64), (96, 64), (10, 0)),
            a_fit((64, 64), (96, 64), (32, 0), flip=True),
            a_fit((64, 64), (144, 96), (40, 16), angle=7.0, flip=True),
        ):
            pixels = prepare(row, plan, background="white")
            assert pixels.mask is not None
            assert pixels.mask.shape == (1, 64, 64)
            assert np.abs(pixels.mask[0] - (pixels.image[0] + 1) / 2).mean() < 0.02

    def test_a_mask_of_another_size_is_scaled_and_of_another_shape_refused(self, tmp_path: Path) -> None:
        picture = solid(tmp_path / "a.png", (96, 64))
        scaled = prepare(
            self.row(picture, self.halves(tmp_path / "m.png", (48, 32))),
            a_fit((96, 64), (96, 64)),
            background="white",
        ).mask
        assert scaled is not None
        assert scaled[0, :, :44].min() == 1
        assert scaled[0, :, 52:].max() == 0
        with pytest.raises(UserError, match=r"m2\.png.*64 x 96 and its picture 96 x 64"):
            prepare(
                self.row(picture, self.halves(tmp_path / "m2.png", (64, 96))),
                a_fit((96, 64), (96, 64)),
                background="white",
            )

    def test_transparency_as_a_mask(self, tmp_path: Path) -> None:
        image = Image.new("RGBA", (64, 64), (200, 10, 10, 255))
        image.paste((0, 0, 0, 0), (32, 0, 64, 64))
        image.save(tmp_path / "a.png")
        pixels = prepare(self.row(tmp_path / "a.png", mask_hash=ALPHA), a_fit((64, 64), (64, 64)), background="white")
        assert pixels.mask is not None
        assert pixels.mask[0, :, :32].min() == 1
        assert pixels.mask[0, :, 32:].max() == 0
        opaque = prepare(
            self.row(solid(tmp_path / "b.png"), mask_hash=ALPHA), a_fit((64, 64), (64, 64)), background="white"
        )
        assert opaque.mask is not None
        assert opaque.mask.min() == 1

    def test_a_mask_that_changed_after_it_was_indexed_is_refused(self, tmp_path: Path) -> None:
        row = self.row(solid(tmp_path / "a.png", (96, 64)), self.halves(tmp_path / "m.png"))
        Image.new("L", (96, 64), 255).save(tmp_path / "m.png")
        with pytest.raises(UserError, match=r"m\.png.*changed after it was indexed"):
            prepare(row, a_fit((96, 64), (96, 64)), background="white")
