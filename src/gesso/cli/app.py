"""All commands in one place."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from gesso import __version__
from gesso.cli import cache, dataset, dataset_edit, dataset_pairs, dreambooth, micro, pictures, runs, sweep, system
from gesso.errors import Interrupted


class _Group(TyperGroup):
    """Knows commands of two words, and lets Ctrl-C through as our own error, which has its own exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        both = " ".join(args[:2])
        return (both, self.commands[both], args[2:]) if both in self.commands else super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
config = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look into run files.")
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look over and edit sets of images.")
encodings = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="What is kept of encoded images.")
small = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The small models in the package.")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gesso {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Fine-tune diffusion image models.

    Start with: gesso new FOLDER_WITH_IMAGES, then gesso check run.yaml, then gesso train run.yaml.
    Or see the whole way in a few minutes, without a GPU or a download: gesso demo.
    """


app.command()(runs.new)
app.command()(runs.check)
app.command()(runs.train)
# "train dreambooth" wins over a run file of that name, which is ./dreambooth.
app.command("train dreambooth", context_settings={"ignore_unknown_options": True})(dreambooth.train)
app.command("class-images")(dreambooth.class_images)
app.command()(sweep.sweep)
app.command("curves")(runs.draw_curves)
app.command()(pictures.sample)
app.command()(pictures.export)
app.command()(system.demo)
app.command()(system.doctor)
config.command("show")(runs.show_config)
config.command("presets")(runs.list_presets)
data.command("scan")(dataset.scan)
data.command("metadata")(dataset_edit.metadata)
data.command("caption")(dataset_edit.caption)
data.command("caption-edit")(dataset_edit.caption_edit)
data.command("dedupe")(dataset_edit.dedupe)
data.command("split")(dataset_edit.split)
data.command("pairs")(dataset_pairs.pairs)
data.command("push")(dataset_edit.push)
data.command("undo")(dataset_edit.undo)
encodings.command("stats")(cache.stats)
encodings.command("verify")(cache.verify)
encodings.command("prune")(cache.prune)
small.command("build")(micro.build)
small.command("score")(micro.score)
app.add_typer(config, name="config")
app.add_typer(data, name="dataset")
app.add_typer(encodings, name="cache")
app.add_typer(small, name="micro")
