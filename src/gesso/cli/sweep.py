"""`gesso sweep`: several runs of one run file, compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from gesso.cli.console import Console
from gesso.cli.failure import crash_log
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.config.files import Loaded
    from gesso.sweep.engine import Load


def sweep(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run file.", show_default=False)] = None,
    over: Annotated[
        list[str],
        typer.Option("--over", metavar="KEY=A,B,...", help="Values to try, or LOW..HIGH to search; may be repeated."),
    ] = [],  # noqa: B006 (typer copies it)
    profile: Annotated[
        list[str],
        typer.Option("--profile", metavar="NAME", help="A preset or a YAML file to lay over it; may be repeated."),
    ] = [],  # noqa: B006 (typer copies it)
    dataset: Annotated[
        str | None, typer.Option("--dataset", metavar="DATA", help="Images, where there is no run file.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the sweep: its folder is runs/NAME.")] = None,
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value in every run; may be repeated.")
    ] = [],  # noqa: B006 (typer copies it)
    search: Annotated[
        str, typer.Option("--search", help="grid: all combinations. optuna: look for the best.")
    ] = "grid",
    trials: Annotated[int, typer.Option("--trials", metavar="N", min=0, help="Runs that a search makes.")] = 0,
    by: Annotated[str, typer.Option("--by", metavar="MEASURE", help="What runs are compared by.")] = "loss",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the runs.")] = False,
) -> None:
    """Train the same run with several values and compare them; run it again to go on where it stopped."""
    from gesso.sweep import axes, results
    from gesso.sweep.engine import Sweep

    if search not in ("grid", "optuna"):
        raise UserError(f"'{search}' is not one of grid, optuna", where="--search")
    load, folder = _source(run, dataset, sets, name)
    made = Sweep(
        load,
        folder,
        tuple(axes.parse(text) for text in over),
        {Path(text).stem: axes.read_profile(text) for text in profile},
        cast(Literal["grid", "optuna"], search),
        trials,
        by,
    )
    made.check()
    if dry_run:
        for one in made.outcomes():
            typer.echo(f"{one.state:12}{one.folder}  {' '.join(one.trial.sets)}")
        if search == "optuna":
            typer.echo(f"{trials} runs in {folder}, each chosen when the ones before it are known")
        return
    with crash_log(folder), Console() as console:
        outcomes = made.carry_out(console.handle, tell=typer.echo)
    for line in _aligned(results.table(outcomes, by)):
        typer.echo(line)
    for path in results.write(folder, outcomes, metric=by):
        typer.echo(path)
    if not any(one.measured for one in outcomes):
        typer.echo("note: no images are held out, so the training loss is compared, which jumps with the noise")
    if any(one.state == "failed" for one in outcomes):
        raise typer.Exit(UserError.exit_code)


def _source(run: Path | None, dataset: str | None, sets: list[str], name: str | None) -> tuple[Load, Path]:
    """How a run of the sweep is read, and the sweep's folder."""
    from gesso.config import files

    if (run is None) == (dataset is None):
        raise UserError(
            "name a run file, or images with --dataset", fix="gesso sweep run.yaml --over adapter.rank=8,16"
        )
    if run is not None:
        path = run

        def load(more: Sequence[str]) -> Loaded:
            return files.load(path, sets=[*sets, *more])

        plain = files.load(path, sets=sets).run
        return load, (plain.folder.parent / (name or f"{plain.name}-sweep")).expanduser().absolute()

    def load_data(more: Sequence[str]) -> Loaded:
        text = f"data:\n  sources:\n    - path: {json.dumps(dataset)}\n"
        return files.load_text(text, folder=Path.cwd(), file="--dataset", sets=[*sets, *more])

    return load_data, Path("runs", name or Path(str(dataset)).name).absolute()


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
