"""Commands about the small models in the package: how they are made, and how good they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gesso.cli.console import Console
from gesso.cli.failure import crash_log


def build(
    folder: Annotated[Path, typer.Option("--folder", help="Where to work; called again, it goes on there.")] = Path(
        "micro"
    ),
    only: Annotated[
        list[str] | None, typer.Option("--only", help="One model: vae, sdxl, clip or identity; repeatable.")
    ] = None,
) -> None:
    """Make the micro models again from nothing: paint the world and train on it.

    About two hours on two CPU cores. Can be stopped and started again. Ends with FOLDER/weights, as the package has it.
    """
    with crash_log(folder):
        from gesso.micro import build as recipe

        with Console() as console:
            made = recipe.build(folder, emit=console.handle, only=only or recipe.STAGES)
    for name, path in made.items():
        typer.echo(f"{name}: {path}")


def score(
    model: Annotated[str, typer.Option("--model", help="Another SDXL folder of the painted world.")] = "micro:sdxl",
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="How many held-out prompts to draw.")] = 512,
    output: Annotated[Path | None, typer.Option("--output", help="Also write the figures as JSON.")] = None,
    pictures: Annotated[Path | None, typer.Option("--pictures", help="Keep what was drawn in this folder.")] = None,
) -> None:
    """Measure the micro models on what they never saw. Three minutes on a CPU for 512 prompts."""
    from gesso.micro import score as scoring

    with Console() as console:
        figures = scoring.score(model=model, prompts=prompts, emit=console.handle, pictures=pictures)
    typer.echo("\n".join(scoring.table(figures)))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
