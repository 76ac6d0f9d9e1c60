"""The command that makes pairs of pictures for preference training."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli.console import Console
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.data.editing.pairing import Pairing

_NAMED = 3


def pairs(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write metadata.jsonl into.")],
    chosen: Annotated[Path | None, typer.Option("--chosen", metavar="DIR", help="Preferred pictures.")] = None,
    rejected: Annotated[
        Path | None, typer.Option("--rejected", metavar="DIR", help="The others, by the same names.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Caption of the preferred pictures that have none.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option("--scores", metavar="FILE", help="A .jsonl, .csv or .parquet table: image, prompt, score."),
    ] = None,
    score_column: Annotated[
        str | None, typer.Option("--score-column", help="Column with the scores. Default: score.")
    ] = None,
    min_gap: Annotated[
        float | None, typer.Option("--min-gap", min=0, help="Leave out pairs whose scores are closer. Default: 0.")
    ] = None,
    every: Annotated[
        bool | None,
        typer.Option("--all/--top-bottom", help="All pairs of a prompt, or its best against its worst (the default)."),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Write over the list if it exists.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be written.")] = False,
) -> None:
    """Make pairs for preference training: from two folders, by the names of the files; or from pictures with scores.

    Pictures that are not in the output folder are copied into it. Ties are never pairs.
    """
    from gesso.data.editing import pairing
    from gesso.data.sources.found import counted

    if (scores is None) == (chosen is None) or (chosen is None) != (rejected is None):
        raise UserError(
            "pairs come from two folders or from scores",
            where="gesso dataset pairs",
            fix="give --chosen DIR and --rejected DIR, or --scores FILE",
        )
    if chosen is not None and rejected is not None:
        _refuse({"--score-column": score_column, "--min-gap": min_gap, "--all/--top-bottom": every}, "--scores")
        found = pairing.of_folders(chosen, rejected, prompt=prompt)
        told = f"--chosen {shlex.quote(str(chosen))} --rejected {shlex.quote(str(rejected))}"
    else:
        assert scores is not None
        _refuse({"--prompt": prompt}, "--chosen and --rejected")
        found = pairing.of_scores(
            scores, score_column=score_column or "score", min_gap=min_gap or 0.0, every=bool(every)
        )
        told = f"--scores {shlex.quote(str(scores))}"
    with Console() as console:
        found = pairing.usable(found, console.count("looking at pictures"))
    _tell(found)
    if dry_run:
        typer.echo(f"{counted(len(found.pairs), 'pair')}; nothing was written")
        return
    written = pairing.write(found, output, replace=replace, command=f"gesso dataset pairs {told}")
    copied = f"; {written.copied} pictures copied into {written.file.parent / 'images'}" if written.copied else ""
    typer.echo(f"{written.file}: {counted(len(found.pairs), 'pair')}{copied}")
    typer.echo(f"to take it back: gesso dataset undo {shlex.quote(str(output))}")


def _refuse(options: dict[str, object], belong: str) -> None:
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} belongs to {belong}", where=option, fix="leave it out")


def _tell(found: Pairing) -> None:
    for why, count in Counter(one.why for one in found.dropped).items():
        typer.echo(f"left out, {why}: {count}")
        places = [one.where for one in found.dropped if one.why == why]
        for place in places[:_NAMED]:
            typer.echo(f"  {place}")
        if count > _NAMED:
            typer.echo(f"  and {count - _NAMED} more")
