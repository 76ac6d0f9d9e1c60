"""Pictures: file bytes -> upright sRGB pixels -> a bucket's tensor. What is odd is converted knowingly or refused."""

from __future__ import annotations

import functools
import hashlib
import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from gesso.core.batch import Geometry
from gesso.data.buckets import Fit
from gesso.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
"""File endings that count as pictures in a folder; what a file really is, is read from its content."""

MAX_PIXELS = 170_000_000
"""Largest picture that is decoded; bigger headers are taken for decompression bombs."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
_TRANSPOSED = (5, 6, 7, 8)
_GREY = ("1", "L", "LA", "La")
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}

# Pillow loads its rarer formats on first use, which is not safe when several threads are first.
Image.init()
# Our own cap above is an error, so Pillow's earlier warning would only be noise.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Decoded(NamedTuple):
    """An upright RGB picture, and what had to be done to get it, one phrase each."""

    image: Image.Image
    notes: tuple[str, ...]


def content_hash(data: bytes) -> str:
    """Identity of a picture: the first 32 hex digits of the SHA-256 of its file."""
    return hashlib.sha256(data).hexdigest()[:32]


def read(path: Path) -> bytes:
    """The bytes of a file; an unreadable one is a `UserError` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the file") from error


def background_colour(name: str) -> tuple[int, int, int]:
    """The RGB value of a CSS colour name or #rrggbb."""
    try:
        red, green, blue, *_ = ImageColor.getrgb(name)
    except ValueError as error:
        raise UserError(
            f"'{name}' is not a colour", where="data.background", fix="use a name such as white, or #rrggbb"
        ) from error
    return red, green, blue


def decode(path: Path, *, background: str = "white") -> Image.Image:
    """The picture in `path`, upright, in RGB (sRGB, 8 bits).

    EXIF orientation is applied once, transparency composited on `background`, an ICC profile converted to sRGB,
    16-bit grey scaled (not clipped). Refused by name: animations, float and 32-bit pictures, truncated or unknown
    files, more than `MAX_PIXELS` pixels.
    """
    return decode_bytes(read(path), path=path, background=background).image


def decode_bytes(data: bytes, *, path: Path, background: str = "white") -> Decoded:
    """As `decode`, from the file's bytes; `path` is only for messages."""
    colour = background_colour(background)
    notes: list[str] = []
    try:
        with _open(data, path) as opened:
            _refuse_frames(opened, path)
            opened.load()
            icc = opened.info.get("icc_profile")
            upright = ImageOps.exif_transpose(opened)
            shallow = _eight_bits(upright, opened.format or "", path, notes)
        return Decoded(_to_rgb(shallow, icc, colour, background, notes), tuple(notes))
    except (UserError, MemoryError):
        raise
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file makes them raise: this is the edge to untrusted input.
        raise UserError(
            f"the picture is damaged: {error}", where=str(path), fix="replace it, or set data.skip_bad"
        ) from error


def probe(path: Path) -> tuple[int, int]:
    """Upright (width, height) from the header alone.

    A PNG may carry its orientation after the pixels; only `decode` sees that one.
    """
    try:
        with _open(read(path), path) as image:
            if image.format == "TIFF":
                return image.size  # Pillow reports TIFF sizes upright
            if image.format == "PNG" and "exif" not in image.info:
                return image.size  # asking further would decode the pixels
            width, height = image.size
            turned = image.getexif().get(Base.Orientation) in _TRANSPOSED
            return (height, width) if turned else (width, height)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the picture's header is damaged: {error}", where=str(path), fix="replace it") from error


def fit(image: Image.Image, plan: Fit) -> tuple[NDArray[np.float32], Geometry]:
    """Resize to `plan.resized`, crop to `plan.bucket`, flip: float32 [3, H, W] in [-1, 1] and the geometry."""
    geometry = plan.geometry(*image.size)
    resized = image if image.size == plan.resized else image.resize(plan.resized, Image.Resampling.LANCZOS)
    (left, top), (width, height) = plan.crop, plan.bucket
    pixels = np.asarray(resized.crop((left, top, left + width, top + height)))
    if plan.flip:
        pixels = pixels[:, ::-1]
    scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(scaled), geometry


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)  # AVIF came with Pillow 11.3


def _open(data: bytes, path: Path) -> Image.Image:
    if not data:
        raise UserError("the file is empty", where=str(path), fix="replace it, or set data.skip_bad")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError as error:
        raise UserError(
            "not a picture that can be read (looked for JPEG, PNG, WebP, BMP, GIF, TIFF, AVIF by content)",
            where=str(path),
            fix="convert or remove it, or set data.skip_bad",
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_big(str(error), path) from error
    if image.width * image.height > MAX_PIXELS:
        raise _too_big(f"{image.width} x {image.height} pixels", path)
    return image


def _too_big(size: str, path: Path) -> UserError:
    return UserError(
        f"the picture is too large to decode safely ({size})",
        where=str(path),
        fix=f"shrink it below {MAX_PIXELS // 1_000_000} megapixels",
    )


def _refuse_frames(image: Image.Image, path: Path) -> None:
    if image.format == "MPO":
        return  # a JPEG with a second view or a gain map: the first picture is the picture
    try:
        image.seek(1)
    except EOFError:
        return
    raise UserError(
        f"an animated or multi-page {image.format}", where=str(path), fix="save the frame you want as a still picture"
    )


def _eight_bits(image: Image.Image, file_format: str, path: Path, notes: list[str]) -> Image.Image:
    mode = image.mode
    # Before Pillow 11.3 a 16-bit grey PNG could open in the 32-bit mode, with 16-bit values.
    if mode.startswith("I;16") or (mode == "I" and file_format == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        notes.append("16-bit grey scaled to 8 bits")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if mode in ("I", "F"):
        kind = "32-bit integer" if mode == "I" else "floating-point"
        raise UserError(
            f"a {kind} picture, whose range of values is not known", where=str(path), fix="save it with 8 or 16 bits"
        )
    return image


def _to_rgb(
    image: Image.Image, icc: bytes | None, colour: tuple[int, int, int], background: str, notes: list[str]
) -> Image.Image:
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode == "CMYK":
        base = image
        notes.append("CMYK converted to RGB")
    elif image.mode in _GREY:
        base = image.convert("L")
    else:
        base = image.convert("RGBA").convert("RGB")
    rgb = _to_srgb(base, icc, notes)
    if alpha is not None and alpha.getextrema() != (255, 255):
        notes.append(f"transparency put on {background}")
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, colour), alpha)
    return rgb


def _to_srgb(image: Image.Image, icc: bytes | None, notes: list[str]) -> Image.Image:
    if not icc:
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image.convert("RGB")  # a conversion would only add rounding
        space = profile.profile.xcolor_space.strip()
        if _PROFILE_MODES.get(space) != image.mode:
            notes.append("colour profile of another kind than the pixels ignored")
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        notes.append("unreadable colour profile ignored")
        return image.convert("RGB")
    if converted is None:
        raise ValueError("colour conversion gave no picture")
    notes.append("colour profile converted to sRGB")
    return converted
