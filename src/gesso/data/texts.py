"""Text files that users wrote: UTF-8 or refused by name."""

from __future__ import annotations

import codecs
from pathlib import Path

from gesso.errors import UserError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark; anything else is a `UserError` that names it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the file") from error
    return decode_text(data, where=str(path))


def decode_text(data: bytes, *, where: str) -> str:
    """As `read_text`, from the file's bytes; `where` is only for messages."""
    try:
        return str(data.removeprefix(codecs.BOM_UTF8), "utf-8")  # the codec utf-8-sig is ten times slower
    except UnicodeDecodeError as error:
        kind = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"the text is not UTF-8{kind}: byte 0x{error.object[error.start]:02x}",
            where=f"{where}:{line}",
            fix="save it as UTF-8",
        ) from error
