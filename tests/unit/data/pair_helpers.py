"""Pairs of pictures in each layout that holds them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from source_helpers import jsonl

from gesso.data.sources import Record


def noise(path: Path, seed: int, size: tuple[int, int] = (64, 64), **options: object) -> Path:
    """A picture that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, size).save(path, **options)
    return path


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def table(folder: Path, count: int, *, swapped: bool = False, sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> Path:
    """A metadata.jsonl of pairs: picture i is preferred to picture 100 + i; or, swapped, the other way round."""
    rows = []
    for i in range(count):
        size = sizes[i % len(sizes)]
        good, bad = noise(folder / f"good{i}.png", i, size), noise(folder / f"bad{i}.png", 100 + i, size)
        good, bad = (bad, good) if swapped else (good, bad)
        rows.append({"chosen": good.name, "rejected": bad.name, "caption": f"prompt {i}"})
    jsonl(folder, *rows)
    return folder


def png(seed: int, size: tuple[int, int] = (16, 16)) -> bytes:
    file = io.BytesIO()
    picture(seed, size).save(file, "PNG")
    return file.getvalue()


LABELS = (1.0, 0.0, 0.5, 1.0, None)
"""Of the pairs of `pick`: the first picture, the second, neither, the first, unknown."""


def pick(count: int = 5) -> dict[str, list[object]]:
    """Columns as Pick-a-Pic has them: pair i is of the pictures i and 100 + i."""
    return {
        "jpg_0": [png(i) for i in range(count)],
        "jpg_1": [png(100 + i) for i in range(count)],
        "label_0": list(LABELS[:count]),
        "caption": [f"prompt {i}" for i in range(count)],
    }


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def sides(records: Sequence[Record]) -> dict[str, tuple[str, str]]:
    """Caption -> the names of both pictures."""
    return {r.caption: (r.place.name, r.rejected.name if r.rejected is not None else "") for r in records}


def contents(records: Sequence[Record]) -> dict[str, tuple[int, int]]:
    """Caption -> the seeds of both pictures, of those that `pick` makes."""
    seeds = {png(seed): seed for seed in (*range(10), *range(100, 110))}
    return {r.caption: (seeds[r.place.read()], seeds[r.rejected.read()]) for r in records if r.rejected is not None}
