"""Commands that use a trained model: sample and export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from gesso.errors import UserError


def sample(
    target: Annotated[
        str,
        typer.Argument(help="Run folder, checkpoint, diffusers folder, hub id or .safetensors.", show_default=False),
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be repeated.")],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="best|latest|STEP", help="Which checkpoint of a run folder.")
    ] = None,
    lora: Annotated[
        list[str], typer.Option("--lora", metavar="PATH[:WEIGHT]", help="A LoRA file to add; may be repeated.")
    ] = [],  # noqa: B006 (typer copies it)
    negative: Annotated[str, typer.Option("--negative", help="What to keep away from.")] = "",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the first picture; the next use seed + 1, ...")] = 0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", min=1, help="Classifier-free guidance scale.")] = 7.0,
    width: Annotated[int | None, typer.Option("--width", min=8, help="Empty: what the model was trained on.")] = None,
    height: Annotated[int | None, typer.Option("--height", min=8, help="Empty: what the model was trained on.")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures of each prompt.")] = 1,
    output: Annotated[Path, typer.Option("-o", "--output", help="The picture to write.")] = Path("out.png"),
    device: Annotated[str | None, typer.Option("--device", help="cuda, mps or cpu. Empty: the best there is.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, bf16 or fp16. Empty: what suits the device.")
    ] = None,
) -> None:
    """Draw pictures."""
    loras = [_weighted(text) for text in lora]
    chosen = precision_named(precision) if precision is not None else None
    from gesso import stages

    files = stages.sample(
        target,
        checkpoint=checkpoint,
        prompts=prompt,
        loras=loras,
        negative=negative,
        seed=seed,
        steps=steps,
        guidance=guidance,
        width=width,
        height=height,
        count=count,
        output=output,
        device=device,
        precision=chosen,
    )
    for file in files:
        typer.echo(file)


def export(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="What to export.", show_default=False)],
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="best|latest|STEP", help="Which checkpoint of a run folder.")
    ] = None,
    file_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="diffusers; for other programs kohya of an adapter, single-file of a whole model; merged, and "
            "single-file of an adapter, put it into its base model. Empty: what most read of its kind.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file, or the folder of a whole model.")
    ] = None,
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="Averaged weights or not. Empty: as the run says.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp16, bf16 or fp32. Empty: fp16, and fp32 for new words.")
    ] = None,
    hub_repo: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="NAME/REPO", help="Also push to this repository.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="Where it is verified.")] = None,
) -> None:
    """Write what was trained: a LoRA as a file, a full fine-tune as either, new words as a folder. Verified."""
    if file_format is not None:
        _one_of("--format", file_format, ("diffusers", "kohya", "merged", "single-file"))
    chosen = precision_named(precision) if precision is not None else None
    from gesso import stages

    path = stages.export(
        target,
        checkpoint=checkpoint,
        format=cast(Literal["diffusers", "kohya", "merged", "single-file"] | None, file_format),
        output=output,
        use_ema=ema,
        precision=chosen,
        hub_repo=hub_repo,
        device=device,
    )
    typer.echo(path)


def _weighted(text: str) -> tuple[str, float]:
    """`file.safetensors:0.8` as its two parts; a colon in the path itself (C:\\x) stays there."""
    path, colon, weight = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return text, 1.0


def precision_named(text: str) -> Literal["fp16", "bf16", "fp32"]:
    """A precision by its name; raises `UserError` for another word."""
    _one_of("--precision", text, ("fp16", "bf16", "fp32"))
    return cast(Literal["fp16", "bf16", "fp32"], text)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"'{value}' is not one of {', '.join(allowed)}", where=option)
