"""One careful look at a picture: whether it can be read, what it is, how sharp it is, and what it resembles."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from gesso.data.images import content_hash, decode_bytes, decode_mask
from gesso.data.inspection import near
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.data.sources import Record

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
"""The endings that fit what a file is, the usual one first."""

SIDE = 512
"""Longer side in pixels to which pictures are reduced before their sharpness is measured."""

_TILES = 8


@dataclass(frozen=True, slots=True)
class Look:
    """What one picture is. Sides in pixels, upright."""

    image: str
    """Hash of the file's content."""
    width: int
    height: int
    format: str
    orientation: int
    """The EXIF orientation as stored; 1 is upright."""
    notes: tuple[str, ...]
    sharpness: float
    """See `sharpness`."""
    contrast: float
    """Standard deviation of the brightness, of 255."""
    print: near.Print


def look(record: Record, *, background: str) -> Look | UserError:
    """What a record's picture is, or what is wrong with it or its mask."""
    try:
        data = record.place.read()
        decoded = decode_bytes(data, path=record.place, background=background)
        if record.mask is not None:
            decode_mask(record.mask.read(), place=record.mask, size=decoded.image.size)
    except UserError as error:
        return error
    with Image.open(io.BytesIO(data)) as opened:
        kind, orientation = opened.format or "", int(opened.getexif().get(ExifTags.Base.Orientation, 1) or 1)
    grey = reduced(decoded.image)
    return Look(
        image=content_hash(data),
        width=decoded.image.width,
        height=decoded.image.height,
        format=kind,
        orientation=orientation,
        notes=decoded.notes,
        sharpness=sharpness(grey),
        contrast=float(grey.std()),
        print=near.fingerprint(decoded.image),
    )


def ending_fits(name: str, kind: str) -> bool:
    """Whether a file's ending is one for what it is; names without an ending always fit."""
    ending = PurePosixPath(name).suffix.lower()
    return not ending or ending in FORMATS.get(kind, (ending,))


def reduced(image: Image.Image) -> NDArray[np.float32]:
    """The brightness [h, w] of a picture whose longer side is at most `SIDE`."""
    scale = SIDE / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(image.convert("L"), np.float32)


def sharpness(grey: NDArray[np.float32]) -> float:
    """The variance of the Laplacian in the sharpest of 8 x 8 tiles, per variance of the brightness there.

    The sharpest tile, as a blurred background is no fault; relative to the contrast, as fog is no blur. Tiles with
    nothing to see count as not sharp. What rounding to 8 bits alone makes (a variance of 20 / 12) is taken off.
    """
    if min(grey.shape) < 3:
        return 0.0
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    edges, brightness = _tiles(laplacian).var(axis=(1, 3)), _tiles(inner).var(axis=(1, 3))
    seen = brightness >= _LEAST_VARIANCE
    return float(np.max((edges - _ROUNDING) / np.maximum(brightness, 1), initial=0.0, where=seen))


_LEAST_VARIANCE = 25.0
_ROUNDING = 20 / 12


def _tiles(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """As [rows, h, columns, w]; what is over at the right and at the bottom is left out."""
    rows, columns = (min(_TILES, side) for side in values.shape)
    high, wide = values.shape[0] // rows, values.shape[1] // columns
    return values[: rows * high, : columns * wide].reshape(rows, high, columns, wide)
