"""DreamBooth by flags alone: class-images, and train dreambooth with the flags of the diffusers scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gesso.cli import runs
from gesso.cli.console import Console
from gesso.cli.pictures import precision_named
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.core.runtime import Precision
    from gesso.evaluation.class_images import Wanted

_SIZE = re.compile(r"(\d+)(?:[xX*](\d+))?")


def class_images(
    prompt: Annotated[
        str,
        typer.Option(
            *("--prompt", "-p", "--class-prompt", "--class_prompt"),
            help="What the class is called, such as 'a photo of a person'.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            *("-o", "--output", "--output-dir", "--output_dir", "--class-data-dir", "--class_data_dir"),
            metavar="DIR",
            help="The folder; pictures that are there count, and are left alone.",
        ),
    ],
    count: Annotated[
        int,
        typer.Option(
            *("--count", "-n", "--num-images", "--num_images", "--num-class-images", "--num_class_images"),
            min=1,
            help="How many pictures the folder is to hold.",
        ),
    ] = 200,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Run, folder, hub id or .safetensors. Empty: the base model of a new run."),
    ] = None,
    batch: Annotated[
        int, typer.Option("--batch", "--batch-size", "--batch_size", min=1, help="Pictures drawn at once.")
    ] = 4,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Sampling steps.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", min=1, help="Classifier-free guidance scale.")] = 7.0,
    size: Annotated[
        str | None, typer.Option("--size", metavar="WxH", help="In pixels. Empty: what the model was trained on.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the first picture; the next use seed + 1, ...")
    ] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cuda, mps or cpu. Empty: the best there is.")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="fp32, bf16 or fp16. Empty: what suits the device.")
    ] = None,
) -> None:
    """Draw pictures of a class for prior preservation; started again, it goes on where it stopped.

    Each picture has its caption beside it, so that the folder is a source with `role: prior` as it is.
    """
    if not prompt.strip():
        raise UserError("it is empty", where="--prompt", fix="say what the class is called: 'a photo of a person'")
    width, height = _size(size)
    chosen = precision_named(precision) if precision is not None else None
    from gesso.evaluation.class_images import Wanted

    wanted = Wanted(output.expanduser(), prompt, count, seed, steps, guidance, width, height, batch)
    drawn = _filled(wanted, model, device, chosen)
    typer.echo(f"{output}: {f'{drawn} drawn' if drawn else 'nothing is missing'}, of {count} wanted")
    typer.echo(f"as a source of a run with objective.type dreambooth: {{path: {output}, role: prior}}")


def _filled(wanted: Wanted, model: str | None, device: str | None, precision: Precision | None) -> int:
    """How many pictures were drawn."""
    from gesso.config.run import RunConfig
    from gesso.core.runtime import Runtime
    from gesso.evaluation import class_images, models

    target = model or str(RunConfig.model_fields["model"].default.base)

    def opened() -> tuple[Any, str]:
        return models.open_pipeline(target, runtime=Runtime.for_inference(precision, device))

    with Console() as console:
        return class_images.fill(wanted, open_pipeline=opened, emit=console.handle)


def train(
    flags: Annotated[
        list[str],
        typer.Argument(metavar="FLAGS", help="--instance-data-dir DIR --instance-prompt TEXT --max-train-steps N ..."),
    ],
    sets: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a key of a run file; may be repeated.")
    ] = [],  # noqa: B006 (typer copies it)
    model: Annotated[str | None, typer.Option("--model", help="Base model: folder, hub id or .safetensors.")] = None,
) -> None:
    """Train by the flags of the diffusers DreamBooth scripts, with - or _ between words.

    The reference lists them under "Keys of other tools". What each becomes is printed; one that asks for something that
    is not there is refused by name. Class images are drawn only with --with-prior-preservation. The run folder's
    run.yaml holds the same as a run file.
    """
    from gesso.config import files

    given = options(flags)
    if model is not None:
        given |= {"pretrained_model_name_or_path": model}
    runs.carry_out(files.load_options(given, folder=Path.cwd(), sets=sets))


def options(flags: Sequence[str]) -> dict[str, Any]:
    """`--name value`, `--name=value` and `--name` as a mapping; several values are a list. Names have underscores.

    Raises `UserError` for a word that belongs to no flag, and for a flag that is given twice.
    """
    found: dict[str, Any] = {}
    name = ""
    for word in flags:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            name = flag.replace("-", "_")
            if name in found:
                raise UserError(f"--{flag} is given twice", where="command line", fix="keep one of them")
            found[name] = value if equals else True
        elif not name:
            fix = "a run file is trained with: gesso train RUN; one that is called dreambooth with: ./dreambooth"
            raise UserError(f"'{word}' belongs to no flag", where="command line", fix=fix)
        elif found[name] is True:
            found[name] = word
        else:
            found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), word]
    return found


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"'{text}' is no size", where="--size", fix="write 1024x1024, or 1024 for a square")
    return int(match[1]), int(cast(str, match[2] or match[1]))
