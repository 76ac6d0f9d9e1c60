"""What Pillow warns of while it decodes a picture, for the one who decodes it instead of past everybody to stderr.

`warnings.catch_warnings` swaps state of the whole process, so threads that decode at once would take each other's. Here
one hook stays in place, and each thread hears its own; what is warned of elsewhere goes where it went before.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from PIL import Image


class _Own(threading.local):
    heard: list[str] | None = None


_own = _Own()
_lock = threading.Lock()


class _Hook:
    """Takes the place of `warnings.showwarning`, which `before` was."""

    def __init__(self, before: Callable[..., None]) -> None:
        self._before = before

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _own.heard is None:
            self._before(message, category, filename, lineno, file, line)
        else:
            _own.heard.append(" ".join(str(message).split()))


@contextmanager
def heard() -> Iterator[list[str]]:
    """A list that receives the text of what this thread is warned of meanwhile; other threads' is not in it."""
    _listen()
    outer, mine = _own.heard, list[str]()
    _own.heard = mine
    try:
        yield mine
    finally:
        _own.heard = outer


def _listen() -> None:
    # Not once for all: whoever uses `warnings.catch_warnings` around us begins without the hook.
    with _lock:
        if not isinstance(warnings.showwarning, _Hook):
            warnings.showwarning = _Hook(warnings.showwarning)
            # Of each picture, and not only of the first that has the fault.
            warnings.filterwarnings("always", module=r"PIL\.")
            # Our own limit is an error, and lower than what Pillow refuses.
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
