"""Commands around run files: new, check, train, config show."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gesso.cli import show
from gesso.cli.console import Console
from gesso.cli.failure import crash_log, placed
from gesso.errors import Problems, UserError

if TYPE_CHECKING:
    from gesso.config.advice import Advice
    from gesso.config.files import Loaded
    from gesso.data.preflight import Preflight

RunFile = Annotated[Path, typer.Argument(metavar="RUN", help="A run file.", show_default=False)]
Sets = Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Replace a value; may be repeated.")]


def new(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Images: a folder, archive, table, URL or hub:OWNER/NAME; or a data set file of kohya's scripts.",
            show_default=False,
        ),
    ],
    preset: Annotated[str, typer.Option(help="What to start from: see `gesso config presets`.")] = "character",
    base: Annotated[str | None, typer.Option(help="Base model: folder, hub id or .safetensors.")] = None,
    trigger: Annotated[str | None, typer.Option(help="Word that will stand for what is learnt, such as sks.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The run file to write.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the run file.")] = False,
) -> None:
    """Write a run file for a set of images."""
    from gesso.config import files

    show.report(files.write_new(output, data=data, preset=preset, base=base, trigger=trigger, force=force))
    typer.echo(f"wrote {output}\nnext: gesso check {output}")


def check(
    run: RunFile,
    sets: Sets = [],  # noqa: B006 (typer copies it)
    quick: Annotated[bool, typer.Option("--quick", help="Do not open the images.")] = False,
    samples: Annotated[
        int, typer.Option("--show", metavar="N", min=0, help="Show N samples, with caption and tokens, as trained on.")
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Answer as JSON.")] = False,
) -> None:
    """Find mistakes in a run file and in its images, and what the run will take."""
    from gesso.config import files

    if not as_json:
        loaded = files.load(run, sets=sets)
        show.report(loaded.report)
        found, seen = _looked_over(loaded, quick=quick, samples=samples)
        show.advice(found, loaded.origins)
        found.require(loaded.origins)
        show.images(seen)
        show.samples(seen)
        typer.echo(f"ok: gesso train {run}")
        return
    try:
        loaded = files.load(run, sets=sets)
        found, seen = _looked_over(loaded, quick=quick, samples=samples, shown=False)
    except UserError as error:
        listed = error.problems if isinstance(error, Problems) else (error,)
        typer.echo(json.dumps({"ok": False, "errors": [show.error_json(one) for one in listed]}, indent=2))
        raise typer.Exit(error.exit_code) from None
    typer.echo(json.dumps(show.advice_json(found, loaded) | {"data": show.images_json(seen)}, indent=2))
    if found.errors:
        raise typer.Exit(UserError.exit_code)


def _looked_over(
    loaded: Loaded, *, quick: bool = False, samples: int = 0, shown: bool = True
) -> tuple[Advice, Preflight | None]:
    """The advice on a run, with its images looked at unless that is to be quick; raises what is wrong with them."""
    from gesso.config import advice, machine

    run, there = loaded.run, machine.detect()
    found = advice.check(run, there)
    if quick or found.errors:
        return found, None
    from gesso.data.preflight import preflight

    with Console() if shown else contextlib.nullcontext() as console:
        progress = None if console is None else console.count("reading images")
        seen = preflight(run, multiple=advice.cell_size(run), samples=samples, progress=progress)
    return advice.check(run, there, counted=seen.counted), seen


def train(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run file.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option("--config", help="The same, as an option.")] = None,
    sets: Sets = [],  # noqa: B006 (typer copies it)
    resume: Annotated[
        str | None,
        typer.Option(
            *("--resume", "--resume_from_checkpoint", "--resume-from-checkpoint"),
            metavar="latest|PATH",
            help="Go on from the newest checkpoint, or from this one.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--output-dir", "--output_dir", help="The run folder.")
    ] = None,
    hub_repo: Annotated[
        str | None,
        typer.Option(
            "--hub-model-id", "--hub_model_id", metavar="NAME/REPO", help="Push the result to this hub repository."
        ),
    ] = None,
    push: Annotated[
        bool, typer.Option("--push-to-hub", "--push_to_hub", help="Push, to the repository that the file names.")
    ] = False,
    accept: Annotated[
        list[str],
        typer.Option("--accept-change", metavar="KEY", help="Resume although this setting has changed."),
    ] = [],  # noqa: B006 (typer copies it)
) -> None:
    """Train, or go on training."""
    loaded = _load_for_training(_one_file(run, config, resume), sets, output)
    carry_out(loaded, resume=resume, hub_repo=hub_repo, push=push, accept=accept)


def carry_out(
    loaded: Loaded,
    *,
    resume: str | None = None,
    hub_repo: str | None = None,
    push: bool = False,
    accept: Sequence[str] = (),
) -> None:
    """Look a run over, train it, and push the result if that is asked for."""
    from gesso.adapters import LoRA

    report = loaded.report
    resume = resume or (report.resume if report is not None else None)
    hub_repo = hub_repo or (report.hub_repo if report is not None else None)
    if push and hub_repo is None:
        raise UserError("no hub repository is named", where="--push-to-hub", fix="add --hub-model-id NAME/REPOSITORY")
    show.report(report)
    if hub_repo is not None and not isinstance(loaded.run.adapter, LoRA):
        what = "only LoRA files are pushed to the hub so far, and this run trains something else"
        raise UserError(what, where=hub_repo, fix=f"train without it, then: hf upload {hub_repo} FOLDER")
    found, _ = _looked_over(loaded)
    found.require(loaded.origins)
    show.advice(found, loaded.origins)
    folder = loaded.run.folder.expanduser().absolute()
    with crash_log(folder), placed(loaded.origins):
        from gesso import stages

        console = Console()
        try:
            with console:
                stages.train(loaded.run, resume=resume, accept=accept, emit=console.handle)
        finally:
            if console.steps:
                _draw_curves(folder)
        if hub_repo is not None:
            stages.export(str(folder), format="diffusers", output=None, use_ema=None, hub_repo=hub_repo)
            typer.echo(f"pushed to https://huggingface.co/{hub_repo}")


def _draw_curves(folder: Path) -> None:
    """However a run ends; what ended it says more than why there is no picture of it."""
    from gesso.core import curves
    from gesso.core.folder import RunFolder

    with contextlib.suppress(UserError, OSError):
        typer.echo(f"curves: {curves.write(RunFolder(folder))}")


def draw_curves(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, also of a run that is going on.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The picture to write.  [default: RUN/curves.png]")
    ] = None,
) -> None:
    """Draw the losses, the held-out measures and the learning rate of a run."""
    from gesso.core import curves
    from gesso.core.folder import RunFolder

    typer.echo(f"wrote {curves.write(RunFolder(run), output)}")


def show_config(run: RunFile, sets: Sets = []) -> None:  # noqa: B006 (typer copies it)
    """Show every value of a run and where it comes from."""
    from gesso.config import files

    loaded = files.load(run, sets=sets)
    show.report(loaded.report)
    show.values(loaded.run.model_dump(mode="json"), loaded.origins)


def list_presets() -> None:
    """List what `gesso new --preset` can start from."""
    from gesso.config import presets

    for name in presets.names():
        typer.echo(f"{name:14}{presets.about(name)}")


def _one_file(run: Path | None, config: Path | None, resume: str | None) -> Path:
    if run is not None and config is not None and run != config:
        raise UserError(f"two run files are named: {run} and {config}", where="--config", fix="give one of them")
    if run is not None or config is not None:
        return run or config or Path()
    if resume not in (None, "latest"):
        beside = Path(str(resume)).absolute().parent / "run.yaml"
        if beside.is_file():
            return beside
    raise UserError("no run file is named", fix="gesso train run.yaml; gesso new DATA_FOLDER writes one")


def _load_for_training(path: Path, sets: list[str], output: Path | None) -> Loaded:
    from gesso.config import files

    extra = [f"output={json.dumps(str(output))}"] if output is not None else []
    return files.load(path, sets=[*sets, *extra])
