"""Commands about the machine: doctor and demo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gesso.cli.console import Console
from gesso.cli.failure import crash_log


def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where to put everything.")] = Path("demo"),
    show: Annotated[bool, typer.Option("--open", help="Open the report when it is ready.")] = False,
) -> None:
    """Teach a small model a new character, here and now.

    Twelve painted pictures, a few minutes on a CPU; then a report with pictures and figures from before and after.
    No GPU, no download.
    """
    with crash_log(folder):
        from gesso.micro import demo as story
        from gesso.micro import report

        with Console() as console:
            page = story.run(folder, emit=console.handle)
        figures = json.loads((page.parent / report.FIGURES).read_text(encoding="utf-8"))
    typer.echo("\n".join(["", *report.plain(figures), f"report: {page}"]))
    if show:
        typer.launch(str(page))


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False) -> None:
    """Say what is missing on this machine, and how to mend it."""
    from gesso.cli import health

    findings = health.examine()
    if as_json:
        answer = {"ok": health.sound(findings), "checks": [finding.as_json() for finding in findings]}
        typer.echo(json.dumps(answer, indent=2))
    else:
        for finding in findings:
            typer.echo(finding.line())
    if not health.sound(findings):
        raise typer.Exit(health.EXIT_CODE)
