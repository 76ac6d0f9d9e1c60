"""Pictures: file bytes -> upright sRGB pixels -> a bucket's tensor. What is odd is converted knowingly or refused."""

from __future__ import annotations

import hashlib
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageColor, ImageEnhance, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base

from gesso.core.batch import Geometry
from gesso.data.buckets import Fit
from gesso.data.decoder_warnings import heard
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.data.index import Row
    from gesso.data.places import Place

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
"""File endings that count as pictures in a folder; what a file really is, is read from its content."""

MAX_PIXELS = 170_000_000
"""Largest picture that is decoded; bigger headers are taken for decompression bombs."""

_TRANSPOSED = (5, 6, 7, 8)
_JPEG_END = b"\xff\xd9"
_FILLED = (128, (128, 128, 128))
"""What a JPEG decoder shows where the data ran out, in grey and in colour."""
_SAME_SHAPE = 0.02
_GREY = ("1", "L", "LA", "La")
_PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}

# Pillow loads its rarer formats on first use, which is not safe when several threads are first.
Image.init()
_FORMATS: list[str] = [name for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF") if name in Image.OPEN]
"""Those that are read; AVIF came with Pillow 11.3."""


class Decoded(NamedTuple):
    """An upright RGB picture, what had to be done to get it (a phrase each), and its transparency where it has some."""

    image: Image.Image
    notes: tuple[str, ...]
    alpha: Image.Image | None = None


class Pixels(NamedTuple):
    """A picture as the VAE takes it, float32 [3, H, W] in [-1, 1], and its mask, [1, H, W] in [0, 1], if it has one."""

    image: NDArray[np.float32]
    mask: NDArray[np.float32] | None


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


def decode_bytes(data: bytes, *, path: Path | Place, background: str = "white") -> Decoded:
    """As `decode`, from the file's bytes; `path` is only for messages. What Pillow warns of is among the notes.

    A PNG has checksums, so that any damage is an error. A JPEG has none, and its decoder does not tell what it makes
    up: bytes changed in its middle may give another picture and no error, unless the data then end too early.
    """
    colour = background_colour(background)
    notes: list[str] = []
    try:
        with heard() as warned:
            with _open(data, path) as opened:
                _refuse_frames(opened, path)
                opened.load()
                if opened.format == "JPEG" and _ends_early(opened, data):
                    raise ValueError("its data end before its pixels do")
                icc = opened.info.get("icc_profile")
                upright = ImageOps.exif_transpose(opened)
                shallow = _eight_bits(upright, opened.format or "", path, notes)
            alpha = shallow.convert("RGBA").getchannel("A") if shallow.has_transparency_data else None
            alpha = alpha if alpha is not None and alpha.getextrema() != (255, 255) else None
            rgb = _to_srgb(_opaque(shallow, notes), icc, notes)
        if alpha is not None:
            notes.append(f"transparency put on {background}")
            rgb = Image.composite(rgb, Image.new("RGB", rgb.size, colour), alpha)
        notes += [f"the decoder warns of {path}: {text}" for text in dict.fromkeys(warned)]
        return Decoded(rgb, tuple(notes), alpha)
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
        with heard(), _open(read(path), path) as image:
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


def decode_mask(data: bytes, *, place: Place, size: tuple[int, int]) -> Image.Image:
    """A mask file as grey (white is where the loss counts), at the picture's upright size.

    A mask of another size is scaled; one of another shape is a `UserError`.
    """
    mask = decode_bytes(data, path=place).image.convert("L")
    if abs(math.log(mask.width / mask.height) - math.log(size[0] / size[1])) > _SAME_SHAPE:
        raise UserError(
            f"the mask is {mask.width} x {mask.height} and its picture {size[0]} x {size[1]}: not the same shape",
            where=str(place),
            fix="draw the mask on the picture as it is now",
        )
    return mask if mask.size == size else mask.resize(size, Image.Resampling.BILINEAR)


def fit(image: Image.Image, plan: Fit) -> tuple[NDArray[np.float32], Geometry]:
    """Resize to `plan.resized`, crop to `plan.bucket`, flip: float32 [3, H, W] in [-1, 1] and the geometry.

    Where the plan says so, the picture is also turned about the middle of its crop and its colours are changed.
    """
    cropped = _crop(image, plan, Image.Resampling.LANCZOS)
    for factor, enhance in zip(plan.colour, _COLOURS, strict=True):
        if factor != 1:
            cropped = enhance(cropped).enhance(factor)
    scaled = np.asarray(cropped).transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(scaled), plan.geometry(*image.size)


def prepare(row: Row, plan: Fit, *, background: str) -> Pixels:
    """Read, decode and fit a row's picture and its mask; `UserError` if a file is not what was indexed."""
    decoded = decode_bytes(_as_indexed(row.place, row.image), path=row.place, background=background)
    pixels, _ = fit(decoded.image, plan)
    if not row.mask_hash:
        return Pixels(pixels, None)
    if row.mask is not None:
        data = _as_indexed(row.mask, row.mask_hash)
        mask = decode_mask(data, place=row.mask, size=decoded.image.size)
    else:
        mask = decoded.alpha if decoded.alpha is not None else Image.new("L", decoded.image.size, 255)
    cropped = np.asarray(_crop(mask, plan, Image.Resampling.BILINEAR), np.float32) / np.float32(255)
    return Pixels(pixels, cropped[None])


def _as_indexed(place: Place, expected: str) -> bytes:
    data = place.read()
    if content_hash(data) != expected:
        raise UserError("the file changed after it was indexed", where=str(place), fix="start again")
    return data


_COLOURS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def _crop(image: Image.Image, plan: Fit, filter: Image.Resampling) -> Image.Image:
    resized = image if image.size == plan.resized else image.resize(plan.resized, filter)
    (left, top), (width, height) = plan.crop, plan.bucket
    cropped = _turned(resized, plan) if plan.angle else resized.crop((left, top, left + width, top + height))
    return ImageOps.mirror(cropped) if plan.flip else cropped


def _turned(image: Image.Image, plan: Fit) -> Image.Image:
    """The crop turned about its middle, and enlarged just so much that no corner lies outside the picture."""
    (left, top), (width, height) = plan.crop, plan.bucket
    x, y = left + width / 2, top + height / 2
    cosine, sine = math.cos(math.radians(plan.angle)), math.sin(math.radians(plan.angle))
    wide, high = width * abs(cosine) + height * abs(sine), width * abs(sine) + height * abs(cosine)
    scale = min(1.0, 2 * min(x, image.width - x) / wide, 2 * min(y, image.height - y) / high)
    a, b, c, d = scale * cosine, -scale * sine, scale * sine, scale * cosine
    shift = (x - a * width / 2 - b * height / 2, y - c * width / 2 - d * height / 2)
    return image.transform(
        plan.bucket, Image.Transform.AFFINE, (a, b, shift[0], c, d, shift[1]), Image.Resampling.BICUBIC
    )


def _open(data: bytes, path: Path | Place) -> Image.Image:
    if not data:
        raise UserError("the file is empty", where=str(path), fix="replace it, or set data.skip_bad")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
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


def _too_big(size: str, path: Path | Place) -> UserError:
    return UserError(
        f"the picture is too large to decode safely ({size})",
        where=str(path),
        fix=f"shrink it below {MAX_PIXELS // 1_000_000} megapixels",
    )


def _refuse_frames(image: Image.Image, path: Path | Place) -> None:
    if image.format == "MPO":
        return  # a JPEG with a second view or a gain map: the first picture is the picture
    try:
        image.seek(1)
    except EOFError:
        return
    raise UserError(
        f"an animated or multi-page {image.format}", where=str(path), fix="save the frame you want as a still picture"
    )


def _ends_early(opened: Image.Image, data: bytes) -> bool:
    """Whether a JPEG that is properly closed has data for only a part of its pixels."""
    whole = data.rstrip(b"\0")
    if opened.getpixel((opened.width - 1, opened.height - 1)) not in _FILLED or not whole.endswith(_JPEG_END):
        return False
    # Grey in the corner may be meant. More data would change the picture only if the decoder still wanted some.
    longer = whole.removesuffix(_JPEG_END) + bytes(range(64)) + _JPEG_END
    with Image.open(io.BytesIO(longer), formats=("JPEG",)) as other:
        return other.tobytes() != opened.tobytes()


def _eight_bits(image: Image.Image, file_format: str, path: Path | Place, notes: list[str]) -> Image.Image:
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


def _opaque(image: Image.Image, notes: list[str]) -> Image.Image:
    """The colours alone, in a mode that a colour profile can be applied to."""
    if image.mode == "CMYK":
        notes.append("CMYK converted to RGB")
        return image
    return image.convert("L") if image.mode in _GREY else image.convert("RGBA").convert("RGB")


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
