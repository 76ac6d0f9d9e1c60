"""One remark about a run, as the rules of `advice` make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gesso.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One remark about one key."""

    level: Literal["error", "warning", "hint"]
    key: str
    what: str
    fix: str = ""

    def as_error(self, origins: Mapping[str, str] | None = None) -> UserError:
        """As an error; `origins` tell the line that the value came from."""
        origin = (origins or {}).get(self.key, "default")
        where = self.key if origin == "default" else f"{origin} ({self.key})"
        return UserError(self.what, where=where, fix=self.fix)


def error(key: str, what: str, fix: str = "") -> Finding:
    """What keeps a run from starting."""
    return Finding("error", key, what, fix)


def warning(key: str, what: str, fix: str = "") -> Finding:
    """What is allowed, and probably not meant."""
    return Finding("warning", key, what, fix)
