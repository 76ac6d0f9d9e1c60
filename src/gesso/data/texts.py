"""Text files that users wrote: UTF-8 or refused by name."""

from __future__ import annotations

from pathlib import Path

from gesso.errors import UserError


def read_text(path: Path) -> str:
    """The text of a UTF-8 file without its byte-order mark; anything else is a `UserError` that names it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix="check the file") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"the text is not UTF-8{kind}: byte 0x{data[error.start]:02x}",
            where=f"{path}:{line}",
            fix="save it as UTF-8",
        ) from error
