"""The command that looks through a data set: what is wrong with it, what a run would do with it, and safe mending."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli.console import Console
from gesso.core.events import Progress
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.config.files import Loaded
    from gesso.config.run import RunConfig
    from gesso.data.editing.mend import Plan
    from gesso.data.inspection.result import Finding, Inspection

_RUN_FILES = (".yaml", ".yml", ".toml", ".job")
_COLOURS = {"error": "red", "warning": "yellow", "hint": None}
_NAMED = 5


def scan(
    path: Annotated[
        str,
        typer.Argument(
            metavar="DATA|RUN", help="A folder, archive, table, URL or hub:OWNER/NAME with images; or a run."
        ),
    ],
    report: Annotated[Path | None, typer.Option(help="Write a page with pictures, such as report.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON, with every file.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Mend what is safe: see above.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before mending.")] = False,
    resolution: Annotated[
        int | None, typer.Option(help="Resolution to judge for. Default: 1024, or the run's.")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="Word that every caption should have.")] = None,
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of the run, as for gesso train.")
    ] = [],  # noqa: B006 (typer copies it)
    force: Annotated[bool, typer.Option("--force", help="Overwrite the page.")] = False,
) -> None:
    """Look at every picture and caption, and say what is wrong and what a run would do.

    --fix turns pictures upright that are stored turned, renames files whose ending is wrong, converts formats that
    are not read (.tga, .jp2, and .heic with pillow-heif), and writes captions as UTF-8 with plain line ends. It says
    what it would do and asks; originals are kept in the folder, and gesso dataset undo brings them back.

    Exits with 2 if there is something that would stop a run.
    """
    run = _loaded(path, resolution, sets).run
    if report is not None and report.exists() and not force:
        raise UserError("the file exists", where=str(report), fix="add --force to write over it")
    if as_json and fix and not yes:
        raise UserError("nobody can be asked where the answer is JSON", where="--json", fix="add --yes")
    mended = _mend(run, quiet=as_json, yes=yes) if fix else None
    found = _inspected(run, trigger=trigger, report=report, title=path)
    if as_json:
        answer = found.as_json() | ({} if mended is None else {"mended": mended})
        typer.echo(json.dumps(answer, indent=2))
    else:
        _show(found)
        if report is not None:
            typer.echo(f"page: {report}")
    if found.count("error"):
        raise typer.Exit(UserError.exit_code)


def _inspected(run: RunConfig, *, trigger: str | None, report: Path | None, title: str) -> Inspection:
    """The inspection of a run's data, and its page where one is wanted."""
    from gesso.config import advice
    from gesso.data import tokens
    from gesso.data.inspection import report as pages
    from gesso.data.inspection.inspect import inspect

    counter, most = tokens.counter_for(run)
    with Console(sys.stderr) as console:
        found = inspect(
            run.data,
            tokens=counter,
            most_tokens=most,
            trigger=trigger,
            multiple=advice.cell_size(run),
            progress=lambda task, done, total: console.handle(Progress(0, task, done, total)),
        )
        if report is not None:
            pages.write(
                report,
                found,
                title=title,
                progress=lambda done, total: console.handle(Progress(0, "making the page", done, total)),
            )
    return found


def _loaded(path: str, resolution: int | None, sets: list[str]) -> Loaded:
    """The run: as its file says, or as one with this data alone would be."""
    from gesso.config import dialects, document, files
    from gesso.config.dialects import kohya

    own = [*sets, *([f"data.resolution={resolution}"] if resolution is not None else [])]
    data: object = {"sources": [{"path": path}]}
    if path.lower().endswith(_RUN_FILES):
        if dialects.detect(dialects.read_document(Path(path)).data) != kohya.NAME:
            return files.load(path, sets=own)
        data = path  # it describes images alone
    text = document.emit({"data": data, "training": {"steps": 1}})
    return files.load_text(text, folder=Path.cwd(), file=path, sets=own)


def _mend(run: RunConfig, *, quiet: bool, yes: bool) -> list[dict[str, str]]:
    """Mend the run's folders, each after it was said what would be done; returns what was done."""
    from gesso.data.editing import mend

    paths = [source.path for source in run.data.sources]
    held = run.data.validation.path
    listed = [Path(path).expanduser() for path in paths if "://" not in path] + ([held] if held is not None else [])
    folders = [folder for folder in dict.fromkeys(listed) if folder.is_dir()]
    if not folders:
        raise UserError("only folders on this disk can be mended", where="--fix", fix="unpack or download it first")
    done: list[dict[str, str]] = []
    with Console(sys.stderr) as console:
        plans = {
            folder: mend.plan(
                folder, progress=lambda n, total: console.handle(Progress(0, "looking for what to mend", n, total))
            )
            for folder in folders
        }
    for folder, plan in plans.items():
        if not quiet:
            _show_plan(folder, plan)
        if not plan.mends:
            continue
        if not yes:
            typer.confirm(f"Mend them? The originals are kept in {folder / '.gesso'}", abort=True)
        mend.apply(folder, plan.mends)
        done += [{"file": str(one.path), "kind": one.kind, "what": one.what} for one in plan.mends]
        if not quiet:
            typer.echo(f"mended; to take it back: gesso dataset undo {folder}")
    return done


def _show_plan(folder: Path, plan: Plan) -> None:
    if not plan.mends:
        typer.echo(f"nothing to mend in {folder}")
    for kind in dict.fromkeys(one.kind for one in plan.mends):
        ones = [one for one in plan.mends if one.kind == kind]
        typer.echo(f"{kind}: {len(ones)} file{'s' * (len(ones) != 1)}")
        for one in ones[:_SHOWN]:
            typer.echo(f"  {one.path.relative_to(folder.resolve())}: {one.what}")
        if len(ones) > _SHOWN:
            typer.echo(f"  and {len(ones) - _SHOWN} more")
    for path, why in plan.left:
        typer.echo(f"left as it is: {path.relative_to(folder.resolve())}: {why}")


_SHOWN = 20


def _show(found: Inspection) -> None:
    """The findings for people: each with a few of its files."""
    held = sum(picture.split == "validation" for picture in found.pictures)
    sizes = sorted(picture.look.width * picture.look.height for picture in found.pictures)
    typer.echo(f"pictures    {len(found.pictures)}" + (f", {held} of them held out" if held else ""))
    if sizes:
        if found.pairs:
            typer.echo(f"pairs       {found.pairs}, a preferred picture and another each")
        typer.echo(f"            {sizes[0] / 1e6:.2f} to {sizes[-1] / 1e6:.2f} megapixels")
        words = found.wording
        lengths = sorted(words.tokens)
        middle, longest = lengths[len(lengths) // 2], lengths[-1]
        typer.echo(f"captions    {words.captions}; {middle} tokens in the middle, {longest} at most; {words.method}")
        named = ", ".join(f"{term} {count}" for term, count in words.terms[:8])
        typer.echo(f"{words.unit:12}{words.distinct} different; most often: {named}")
        pairs = "; ".join(f"{pair.one} + {pair.other} {pair.captions}" for pair in words.pairs(5))
        if pairs:
            typer.echo(f"together    {pairs}")
        typer.echo("bucket        images  cropped away")
        for (width, height), count, loss in found.buckets:
            typer.echo(f"{f'{width} x {height}':13} {count:6} {loss:8.1%}")
    for item in found.left_out[:_NAMED]:
        typer.echo(f"not used: {item.name}: {item.note}")
    if len(found.left_out) > _NAMED:
        typer.echo(f"not used: {len(found.left_out) - _NAMED} more")
    for finding in found.findings:
        _show_finding(finding)
    counts = [(found.count("error"), "error"), (found.count("warning"), "warning"), (found.count("hint"), "hint")]
    typer.echo(", ".join(f"{count} {name}{'s' * (count != 1)}" for count, name in counts))


def _show_finding(finding: Finding) -> None:
    fix = f" -> {finding.fix}" if finding.fix else ""
    typer.secho(f"{finding.severity}: {finding.rule}: {finding.what}{fix}", fg=_COLOURS[finding.severity])
    lines = [f"{item.name}: {item.note}" if item.note else item.name for item in finding.items]
    lines += ["  =  ".join(item.name for item in group) for group in finding.groups]
    for line in lines[:_NAMED]:
        typer.echo(f"  {line}")
    if len(lines) > _NAMED:
        typer.echo(f"  and {len(lines) - _NAMED} more")
