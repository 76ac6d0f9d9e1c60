"""Visits of pictures, caches filled with a stand-in family, and damage done to entries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from data_helpers import CPU, PoolingFamily, folder_of
from PIL import Image

from gesso.core.events import Event
from gesso.data.buckets import assign
from gesso.data.cache import LatentCache, TextCache
from gesso.data.filling import Filled
from gesso.data.images import content_hash, decode, fit
from gesso.data.places import Place
from gesso.data.plan import Visit
from gesso.data.rows import Row
from gesso.data.store import Store

SQUARE = [(64, 64)]


def ignore(_event: Event) -> None:
    pass


def visit_of(path: Path, caption: str = "", sizes: Sequence[tuple[int, int]] = SQUARE, **changes: Any) -> Visit:
    """A visit of a picture file, fitted to the nearest of `sizes`."""
    with Image.open(path) as image:
        width, height = image.size
    name = content_hash(path.read_bytes())
    row = Row(id=name, image=name, place=Place(str(path)), width=width, height=height, caption=caption)
    planned = assign(width, height, sizes=list(sizes), step=16)
    return Visit(row=replace(row, **changes), id=name, epoch=0, repeat=0, fit=planned, caption=caption)


def visits_of(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> list[Visit]:
    folder_of(folder, count, tuple(sizes))
    return [visit_of(path, sizes=sizes) for path in sorted(folder.glob("*.png"))]


def latents(folder: Path, **changes: Any) -> LatentCache:
    facts: dict[str, Any] = {"fingerprint": "vae", "dtype": torch.float32, "background": "white"}
    return LatentCache(Store(folder), **(facts | changes))


def fill(cache: LatentCache, visits: Sequence[Visit], family: PoolingFamily, **changes: Any) -> Filled:
    options: dict[str, Any] = {"device": CPU, "emit": ignore}
    return cache.fill(visits, family=family, parts=None, **(options | changes))  # type: ignore[arg-type]


def fill_text(cache: TextCache, captions: Sequence[str], family: PoolingFamily, **changes: Any) -> Filled:
    return cache.fill(captions, family=family, parts=None, **({"emit": ignore} | changes))  # type: ignore[arg-type]


def encoding(visit: Visit) -> torch.Tensor:
    """What the stand-in family makes of a visit's picture."""
    pixels, _ = fit(decode(visit.row.place.path), visit.fit)
    return PoolingFamily().encode_images(None, torch.from_numpy(pixels)[None])[0]


def harm(store: Store, key: str, other: str, how: str) -> None:
    path = store.path(key)
    content = bytearray(path.read_bytes())
    match how:
        case "truncate":
            path.write_bytes(content[:-5])
        case "flip":
            content[-3] ^= 1
            path.write_bytes(content)
        case "empty":
            path.write_bytes(b"")
        case "swap":
            aside = path.with_suffix(".aside")
            path.rename(aside)
            store.path(other).rename(path)
            aside.rename(store.path(other))
