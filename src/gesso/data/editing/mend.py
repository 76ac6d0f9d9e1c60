"""Safe mending of a folder: files become what they were meant to be, and what the pictures show does not change.

Each mend is planned first and said; the originals are kept in the journal of the folder, so all can be taken back.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image, ImageChops, ImageOps, ImageStat

from gesso.data.editing.journal import Journal, Transaction
from gesso.data.images import EXTENSIONS, decode_bytes
from gesso.data.inspection.look import FORMATS, ending_fits
from gesso.data.threads import ahead
from gesso.errors import UserError

Kind = Literal["orientation", "ending", "format", "encoding", "line ends"]

SIDE_ENDINGS = (".txt", ".caption", ".json")
_TABLES = (".jsonl", ".csv")
_PILLOW = {".tga": "TGA", ".jp2": "JPEG2000", ".jfif": "JPEG"}
_LOSS = 4.0
_HEIF = (".heic", ".heif")
_ROW = re.compile(r"[^\x00-\x7f]{3}")
_PUNCTUATION = "€‚ƒ„…†‡ˆ‰‹‘’“”•–—˜™›\u00a0¡¢£¥§¨©«¬®°±²³´¶·¸¹»¼½¾¿×÷"


@dataclass(frozen=True)
class Mend:
    """One change to one file: what it is, in words, and the new name where it gets one."""

    path: Path
    kind: Kind
    what: str
    to: Path | None = None


@dataclass(frozen=True)
class Plan:
    """What can be mended, and what cannot be with certainty: those files stay as they are."""

    mends: tuple[Mend, ...]
    left: tuple[tuple[Path, str], ...]


def plan(folder: Path, *, progress: Callable[[int, int], None] | None = None) -> Plan:
    """Look through a folder and its sub-folders for what `apply` would mend; nothing is changed."""
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise UserError("only files in a folder on this disk can be mended", where=str(folder), fix="unpack it first")
    files = _files(folder)
    names = _names_in_tables(files)
    pictures = [path for path in files if _is_picture(path)]
    stems = Counter(path.with_suffix("") for path in pictures)
    texts = [path for path in files if _is_text(path, stems)]
    found: list[Mend] = []
    left: list[tuple[Path, str]] = []
    work = [*pictures, *texts]
    taken = set(files)
    looks = ahead(_look, work, threads=min(8, os.cpu_count() or 1), depth=32)
    for done, (path, mends) in enumerate(zip(work, looks, strict=True), start=1):
        for mend in mends if isinstance(mends, list) else ():
            reason = _in_the_way(mend, taken, stems, names)
            if reason:
                left.append((mend.path, reason))
            else:
                found.append(mend)
                taken |= {mend.to} if mend.to is not None else set()
        if isinstance(mends, str):
            left.append((path, mends))
        if progress is not None:
            progress(done, len(work))
    return Plan(tuple(found), tuple(left))


def apply(folder: Path, mends: Sequence[Mend], *, progress: Callable[[int, int], None] | None = None) -> int:
    """Make the planned changes in one entry of the folder's journal; returns how many files were changed.

    A file that is no longer as it was planned for is a `UserError` that names it; what was done can be undone.
    """
    with Journal(folder).begin("scan --fix") as edit:
        for done, mend in enumerate(mends, start=1):
            _apply(mend, edit)
            if progress is not None:
                progress(done, len(mends))
        return edit.count


def _apply(mend: Mend, edit: Transaction) -> None:
    if mend.kind == "ending" and mend.to is not None:
        edit.rename(mend.path, mend.to)
        return
    data = mend.path.read_bytes()
    if mend.kind == "orientation":
        edit.write(mend.path, upright(data, path=mend.path))
    elif mend.kind == "format" and mend.to is not None:
        edit.write(mend.to, _as_png(data, path=mend.path))
        edit.remove(mend.path)
    else:
        text = _decoded(data)
        if isinstance(text, _Unsure):
            raise UserError(f"the file changed: {text.why}", where=str(mend.path), fix="scan again")
        edit.write(mend.path, (text if _is_table(mend.path) else _tidy(text, mend.path)).encode())


def _look(path: Path) -> list[Mend] | str:
    """The mends for one file, or why it is left."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return _look_at_picture(path, data) if _is_picture(path) else _look_at_text(path, data)


def _look_at_picture(path: Path, data: bytes) -> list[Mend] | str:
    ending = path.suffix.lower()
    if ending not in EXTENSIONS:
        return _look_at_unread(path, data)
    try:
        decode_bytes(data, path=path)
    except UserError as error:
        return error.what
    with Image.open(io.BytesIO(data)) as image:
        kind, turned = image.format or "", image.getexif().get(ExifTags.Base.Orientation, 1)
    mends = []
    if turned in range(2, 9):
        how = "written again at quality 95" if kind in ("JPEG", "MPO", "AVIF") else "no pixel changes its value"
        mends.append(Mend(path, "orientation", f"turn the pixels upright (EXIF orientation {turned}; {how})"))
    if not ending_fits(path.name, kind):
        to = path.with_suffix(FORMATS[kind][0])
        mends.append(Mend(path, "ending", f"it is {kind}: rename to {to.name}", to))
    return mends


def _look_at_unread(path: Path, data: bytes) -> list[Mend] | str:
    ending = path.suffix.lower()
    if data[:3] == b"\xff\xd8\xff":
        to = path.with_suffix(".jpg")
        return [Mend(path, "ending", f"it is JPEG: rename to {to.name}", to)]
    if ending in _HEIF and importlib.util.find_spec("pillow_heif") is None:
        return "reading it needs pillow-heif: pip install pillow-heif"
    try:
        _open_unread(data, path).load()
    except Exception as error:
        # Pillow's decoders raise whatever a damaged file makes them raise: this is the edge to untrusted input.
        return f"it cannot be read: {error}"
    to = path.with_suffix(".png")
    return [Mend(path, "format", f"convert to {to.name}, without loss", to)]


def _open_unread(data: bytes, path: Path) -> Image.Image:
    if path.suffix.lower() in _HEIF:
        import pillow_heif

        pillow_heif.register_heif_opener()
        return Image.open(io.BytesIO(data), formats=["HEIF"])
    return Image.open(io.BytesIO(data), formats=[_PILLOW[path.suffix.lower()]])


def _as_png(data: bytes, *, path: Path) -> bytes:
    image = ImageOps.exif_transpose(_open_unread(data, path))
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG", icc_profile=image.info.get("icc_profile"))
    return buffer.getvalue()


def upright(data: bytes, *, path: Path) -> bytes:
    """A picture's file with its pixels turned as its EXIF orientation says, which then says nothing more.

    Other metadata and the colour profile stay. A file without loss stays so: what is shown is compared, and a
    `UserError` is raised if it changed.
    """
    before = decode_bytes(data, path=path).image
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        kind = "JPEG" if image.format == "MPO" else image.format or ""
        turned = ImageOps.exif_transpose(image)
        exif = turned.getexif()
        exif.pop(ExifTags.Base.Orientation, None)
        profile = image.info.get("icc_profile")
        match kind:
            case "JPEG":
                turned.save(buffer, kind, quality=95, subsampling=0, exif=exif, icc_profile=profile)
            case "AVIF":
                turned.save(buffer, kind, quality=95, exif=exif, icc_profile=profile)
            case "WEBP":
                turned.save(buffer, kind, lossless=True, exact=True, exif=exif, icc_profile=profile)
            case "TIFF":
                # Pillow gives TIFF pixels upright already; its old tags would describe the old file.
                turned.save(buffer, kind, compression=image.info.get("compression"), icc_profile=profile)
            case _:
                turned.save(buffer, kind, exif=exif, icc_profile=profile)
    after = decode_bytes(buffer.getvalue(), path=path).image
    most = _LOSS if kind in ("JPEG", "AVIF") else 0.0
    if after.size != before.size or _difference(before, after) > most:
        raise UserError("turning it would change what it shows", where=str(path), fix="turn it with an editor")
    return buffer.getvalue()


def _difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures of one size, of 255."""
    means: list[float] = ImageStat.Stat(ImageChops.difference(one, other)).mean
    return max(means)


def _look_at_text(path: Path, data: bytes) -> list[Mend] | str:
    text = _decoded(data)
    if isinstance(text, _Unsure):
        return text.why
    encoding = _encoding(data)
    if encoding:
        return [Mend(path, "encoding", f"{encoding} to UTF-8")]
    if not _is_table(path) and _tidy(text, path) != text:
        what = "line ends as \\n" if "\r" in text else "blank space around the caption away"
        return [Mend(path, "line ends", what)]
    return []


@dataclass(frozen=True)
class _Unsure:
    why: str


def _decoded(data: bytes) -> str | _Unsure:
    """The text, if there is no doubt about its encoding."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return data[len(mark) :].decode(encoding)
            except UnicodeDecodeError:
                return _Unsure(f"it begins as {encoding}, but is not")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            return _Unsure(f"its encoding is not known (byte 0x{data[error.start]:02x} at {error.start})")
        # Text in another alphabet, read as Windows-1252, is rows of accented letters; Western text has them one by one.
        ordinary = all(unicodedata.category(c).startswith("L") or c in _PUNCTUATION for c in text if c > "\x7f")
        if ordinary and not _ROW.search(text):
            return text
        return _Unsure("its encoding is not known: neither UTF-8 nor plausible as Windows-1252")


_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


def _encoding(data: bytes) -> str:
    """What is not plain UTF-8 about bytes that can be decoded, in words; empty if nothing is."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return "UTF-8 with a byte-order mark" if encoding == "utf-8" else encoding.upper()[:6]
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "Windows-1252"
    return ""


def _tidy(text: str, path: Path) -> str:
    lines = text.replace("\r\n", "\n").replace("\r", "\n")
    if path.suffix.lower() == ".json":
        return lines
    return lines.strip() + ("\n" if lines.endswith("\n") and lines.strip() else "")


def _files(folder: Path) -> list[Path]:
    found = []
    for place, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not _hidden(name))
        found += [Path(place) / name for name in sorted(files) if not _hidden(name)]
    return [path for path in found if not path.is_symlink()]


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_picture(path: Path) -> bool:
    ending = path.suffix.lower()
    return ending in EXTENSIONS or ending in _PILLOW or ending in _HEIF


def _is_table(path: Path) -> bool:
    return path.suffix.lower() in _TABLES


def _is_text(path: Path, stems: Counter[Path]) -> bool:
    if _is_table(path):
        return path.stem == "metadata"
    return path.suffix.lower() in SIDE_ENDINGS and path.with_suffix("") in stems


def _names_in_tables(files: Sequence[Path]) -> str | None:
    """The text of all tables beside the pictures, which may name them; None where one cannot be searched."""
    texts = []
    for path in files:
        if path.suffix.lower() == ".parquet":
            return None
        if _is_table(path):
            text = _decoded(path.read_bytes())
            if isinstance(text, _Unsure):
                return None
            texts.append(text)
    return "\n".join(texts)


def _in_the_way(mend: Mend, taken: set[Path], stems: Counter[Path], names: str | None) -> str:
    """Why a file cannot get its new name; empty if it can."""
    if mend.to is None:
        return ""
    if mend.to in taken:
        return f"{mend.to.name} is there already"
    if stems[mend.to.with_suffix("")] > 1:
        return "another picture has the same name with another ending"
    if names is None or mend.path.name in names:
        return "a table names it: it would not find it again"
    return ""
