from __future__ import annotations

import io
import itertools

import numpy as np
from inspect_helpers import discs
from PIL import Image, ImageEnhance

from gesso.data.inspection import near


def again(image: Image.Image, *, quality: int, scale: float) -> Image.Image:
    size = (round(image.width * scale), round(image.height * scale))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def test_copies_in_other_sizes_and_formats_are_near_and_others_are_not() -> None:
    pictures = [discs(seed) for seed in range(30)]
    copies = [again(picture, quality=60, scale=0.5 + seed / 40) for seed, picture in enumerate(pictures)]
    groups = near.near_duplicates([near.fingerprint(picture) for picture in [*pictures, *copies]])
    assert groups == [[i, i + 30] for i in range(30)]


def test_the_same_picture_in_other_colours_is_another_picture() -> None:
    picture = discs(3)
    red, green, blue = picture.split()
    recoloured = Image.merge("RGB", (green, blue, red))
    brighter = ImageEnhance.Brightness(picture).enhance(1.03)
    prints = [near.fingerprint(one) for one in (picture, recoloured, brighter)]
    hashes = [one.hash for one in prints]
    assert near.near_duplicates(prints) == [[0, 2]]
    assert hashes[0] is not None
    assert hashes[2] is not None
    assert (hashes[0] ^ hashes[2]).bit_count() <= 6


def test_pictures_of_one_colour_resemble_none() -> None:
    plain = [near.fingerprint(Image.new("RGB", (50, 50), colour)) for colour in ("red", "red", "blue")]
    assert [one.hash for one in plain] == [None] * 3
    assert near.near_duplicates(plain) == []


def test_pairs_are_those_of_a_comparison_of_all_with_all() -> None:
    drawn = np.random.default_rng(0)
    values = drawn.integers(0, 2**64, 300, dtype=np.uint64)
    for i in range(150):
        flipped = drawn.choice(64, int(drawn.integers(0, 12)), replace=False)
        values[i] = values[150 + i] ^ np.uint64(sum(1 << int(bit) for bit in flipped))
    for distance in (0, 1, 6, 9):
        wanted = {
            (i, j)
            for i, j in itertools.combinations(range(300), 2)
            if (int(values[i]) ^ int(values[j])).bit_count() <= distance
        }
        found = near.near_pairs(values, distance)
        assert {(int(i), int(j)) for i, j in found} == wanted
        assert len(found) == len(wanted) > 5


def test_a_chain_of_small_steps_is_no_group_of_unlike_ends() -> None:
    grey = bytes(192)
    chain = [near.Print((1 << 4 * i) - 1, grey) for i in range(8)]
    groups = near.near_duplicates(chain)
    for first, *others in groups:
        for other in others:
            assert (int(chain[first].hash or 0) ^ int(chain[other].hash or 0)).bit_count() <= near.DISTANCE
    assert sum(map(len, groups)) == len({i for group in groups for i in group})


def test_like_hashes_with_several_kinds_of_colours_make_several_groups() -> None:
    dark, light = bytes(192), bytes([200]) * 192
    prints = [near.Print(5, dark), near.Print(5, light), near.Print(4, dark), near.Print(5, light)]
    assert near.near_duplicates(prints) == [[0, 2], [1, 3]]


def test_a_hundred_thousand_hashes_are_not_compared_with_one_another() -> None:
    values = np.random.default_rng(1).integers(0, 2**64, 100_000, dtype=np.uint64)
    values[::1000] = values[1::1000] ^ np.uint64(0b1001)
    compared = 0

    def counting(band: object, members: np.ndarray, distance: int) -> list[np.ndarray]:
        nonlocal compared
        compared += len(members) ** 2 // 2
        return close(values, members, distance)

    close, near._close = near._close, counting
    try:
        pairs = near.near_pairs(values, near.DISTANCE)
    finally:
        near._close = close
    assert [(int(i), int(j)) for i, j in pairs] == [(i, i + 1) for i in range(0, 100_000, 1000)]
    assert compared < 100_000**2 / 2 / 40
