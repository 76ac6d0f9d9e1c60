"""What the user sees when something goes wrong, and the exit code."""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gesso.errors import Interrupted, Problems, UserError

UNEXPECTED = 1


class _Crash(Exception):
    """An unexpected error whose traceback is already on disk."""

    def __init__(self, error: Exception, log: Path) -> None:
        self.error, self.log = error, log


@contextmanager
def reporting() -> Iterator[None]:
    """Turn exceptions into a short message and an exit code; GESSO_DEBUG=1 shows the traceback as well."""
    try:
        yield
    except UserError as error:
        _debug()
        print("\n".join(error.lines()), file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(Interrupted.exit_code) from None
    except _Crash as crash:
        _unexpected(crash.error, crash.log)
    except Exception as error:
        _unexpected(error, _write(error, Path(tempfile.gettempdir())))


@contextmanager
def crash_log(folder: Path) -> Iterator[None]:
    """Inside: the traceback of an unexpected error goes to `folder`/logs, if that can be written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        try:
            log = _write(error, folder / "logs")
        except OSError:
            log = _write(error, Path(tempfile.gettempdir()))
        raise _Crash(error, log) from error


@contextmanager
def placed(origins: Mapping[str, str]) -> Iterator[None]:
    """Inside: an error about a key of the run also says which file and line that key's value came from."""
    try:
        yield
    except UserError as error:
        raise _place(error, origins) from error


def _place(error: UserError, origins: Mapping[str, str]) -> UserError:
    if isinstance(error, Problems):
        return Problems([_place(one, origins) for one in error.problems], what=error.what)
    keys = (key for key in origins if key == error.where or key.startswith(f"{error.where}."))
    origin = origins.get(next(keys, ""), "default")
    if not error.where or origin == "default":
        return error
    return type(error)(error.what, where=f"{origin} ({error.where})", fix=error.fix)


def _unexpected(error: Exception, log: Path) -> None:
    _debug()
    message = str(error).strip().split("\n")[0]
    print(f"unexpected error: {type(error).__name__}: {message}", file=sys.stderr)
    print(f"  -> the details are in {log}", file=sys.stderr)
    raise SystemExit(UNEXPECTED) from None


def _write(error: Exception, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=time.strftime("gesso-crash-%Y%m%d-%H%M%S-"), suffix=".txt", dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(" ".join(sys.argv) + "\n\n" + "".join(traceback.format_exception(error)))
    return Path(name)


def _debug() -> None:
    if os.environ.get("GESSO_DEBUG") == "1":
        traceback.print_exc()
