"""Commands about the cache of encodings: what is in it, whether it is whole, and making room."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli.console import Console
from gesso.cli.show import size
from gesso.core.events import Progress
from gesso.core.resolve import cache_root
from gesso.errors import ResourceError, UserError

if TYPE_CHECKING:
    from gesso.data.upkeep import Contents, Pruned, Verified

ENCODINGS = "encodings"
"""Sub-folder of the cache that holds the entries."""

_UNITS = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}

_Cache = Annotated[
    Path | None, typer.Option("--cache", help="The cache folder. Default: $GESSO_CACHE, else ~/.cache/gesso.")
]
_Json = Annotated[bool, typer.Option("--json", help="Answer as JSON.")]


def stats(cache: _Cache = None, as_json: _Json = False) -> None:
    """Show what the cache holds: entries, size and last use, by kind and encoder."""
    from gesso.data import upkeep

    folder = _folder(cache)
    found = upkeep.stats(folder)
    if as_json:
        answer = {"folder": str(folder), "entries": found.entries, "bytes": found.bytes}
        unfinished = {"files": found.unfinished, "bytes": found.unfinished_bytes}
        _print({**answer, "parts": [part._asdict() for part in found.parts], "unfinished": unfinished})
    else:
        _show_contents(found, folder)


def verify(
    cache: _Cache = None,
    delete: Annotated[bool, typer.Option("--delete", help="Remove the damaged entries; runs make them again.")] = False,
    as_json: _Json = False,
) -> None:
    """Read every entry and compare its checksum; exits with 3 if damaged ones are left.

    A run never trains on a damaged entry: it makes it again. This finds a failing disk before a run does.
    """
    from gesso.data import upkeep

    folder = _folder(cache)
    with Console(sys.stderr) as console:
        found = upkeep.verify(
            folder,
            delete=delete,
            progress=lambda done, total: console.handle(Progress(0, "checking entries", done, total)),
        )
    left = [one for one in found.damaged if not one.deleted]
    if as_json:
        damaged = [{**one._asdict(), "path": str(one.path)} for one in found.damaged]
        _print({"folder": str(folder), "ok": not left, **found._asdict(), "damaged": damaged})
    else:
        _show_verified(found, folder)
    if left:
        raise typer.Exit(ResourceError.exit_code)


def prune(
    unused_for: Annotated[
        str | None, typer.Option("--unused-for", help="Remove what no run used for so long, such as 30d, 12h or 2w.")
    ] = None,
    larger_than: Annotated[
        str | None, typer.Option("--larger-than", help="Remove the longest unused until so much is left: 20GB, 500MB.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cache: _Cache = None,
    as_json: _Json = False,
) -> None:
    """Remove entries that are no longer used; a run that needs one again makes it again.

    What was used within the last hour stays. What killed processes left half-written goes in any case.
    """
    from gesso.data import upkeep

    age = None if unused_for is None else _duration(unused_for)
    limit = None if larger_than is None else _size(larger_than)
    folder = _folder(cache)
    if as_json and not (yes or dry_run):
        raise UserError("nobody can be asked where the answer is JSON", where="--json", fix="add --yes or --dry-run")
    found = upkeep.prune(folder, unused_for=age, larger_than=limit, dry_run=True)
    if not (as_json or (yes and not dry_run)):
        _show_pruned(found, folder, "would go" if dry_run else "to remove")
    if not dry_run and found.entries + found.leftovers:
        if not yes:
            typer.confirm("Remove them?", abort=True)
        found = upkeep.prune(folder, unused_for=age, larger_than=limit)
        if not as_json:
            _show_pruned(found, folder, "removed")
    if as_json:
        _print({"folder": str(folder), "dry_run": dry_run, **found._asdict()})


def _folder(cache: Path | None) -> Path:
    root = cache_root() if cache is None else cache.expanduser()
    if cache is not None and not root.is_dir():
        raise UserError("there is no such folder", where=str(root), fix="check --cache")
    return root / ENCODINGS


def _duration(text: str) -> timedelta:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([mhdw])", text.strip().lower())
    if found is None:
        raise UserError(f"'{text}' is not a time", where="--unused-for", fix="use 30d, 12h, 2w or 90m")
    return timedelta(seconds=float(found[1]) * _UNITS[found[2]])


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    if found is None or (found[3] and not found[2]):
        raise UserError(f"'{text}' is not a size", where="--larger-than", fix="use 20GB, 500MB or 1.5TiB")
    power = "kmgt".find(found[2]) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def _print(answer: object) -> None:
    typer.echo(json.dumps(answer, indent=2))


def _ago(moment: float) -> str:
    seconds = max(time.time() - moment, 0)
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, right: tuple[str, ...]) -> None:
    from rich import box
    from rich.console import Console as Screen
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    # Wide enough for whole paths where nobody looks at a terminal's edge.
    Screen(width=None if sys.stdout.isatty() else 200).print(table)


def _show_contents(found: Contents, folder: Path) -> None:
    if not found.entries:
        typer.echo(f"nothing is cached in {folder}")
    else:
        rows = [
            (p.kind, p.encoder[:16], str(p.entries), size(p.bytes), _ago(p.oldest), _ago(p.newest)) for p in found.parts
        ]
        columns = ("kind", "encoder", "entries", "size", "longest unused", "last used")
        _table(f"{found.entries} entries, {size(found.bytes)} in {folder}", columns, rows, right=("entries", "size"))
    if found.unfinished:
        typer.echo(f"{found.unfinished} files ({size(found.unfinished_bytes)}) are being written, or were when killed")


def _show_verified(found: Verified, folder: Path) -> None:
    typer.echo(f"{found.good} entries ({size(found.bytes)}) in {folder} are good, {len(found.damaged)} damaged")
    if found.skipped:
        typer.echo(f"{found.skipped} entries of an older version were not checked; no run reads them")
    if found.damaged:
        rows = [(d.kind, d.of or "?", "removed" if d.deleted else "damaged", str(d.path)) for d in found.damaged]
        _table("damaged", ("kind", "of", "state", "file"), rows, right=())
        if not all(one.deleted for one in found.damaged):
            typer.echo("a run that needs them makes them again; gesso cache verify --delete removes them now")


def _show_pruned(found: Pruned, folder: Path, verb: str) -> None:
    used = "" if found.newest is None else f", last used {_ago(found.newest)} or earlier"
    typer.echo(f"{verb}: {found.entries} entries ({size(found.bytes)}){used}")
    if found.leftovers:
        typer.echo(f"{verb}: {found.leftovers} unfinished files ({size(found.leftover_bytes)}) of killed processes")
    typer.echo(f"{found.kept_entries} entries ({size(found.kept_bytes)}) stay in {folder}")
