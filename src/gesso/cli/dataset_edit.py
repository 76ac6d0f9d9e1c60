"""Commands that change a folder of captioned pictures; each is recorded beside the data and can be taken back."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from gesso.cli.console import Console
from gesso.core.events import Progress
from gesso.errors import Problems, UserError

if TYPE_CHECKING:
    from gesso.data.captioning.plugins import Settings, Wanted
    from gesso.data.editing.caption_edit import Edited
    from gesso.data.editing.collection import Library
    from gesso.data.editing.tidy import Group

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder with pictures.", show_default=False)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")]
_SHOWN = 20


def metadata(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with pictures.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "--instance_prompt", help="Caption of the pictures that have none.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The file. Empty: metadata.jsonl in the folder.")
    ] = None,
    column: Annotated[str, typer.Option("--column", help="Name of the caption column.")] = "text",
    image_column: Annotated[str, typer.Option("--image-column", help="Name of the column with paths.")] = "file_name",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Give all pictures the prompt.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Write over the file if it exists.")] = False,
) -> None:
    """List the pictures of a folder with their captions in a metadata.jsonl."""
    from gesso.data.editing import tidy

    written = tidy.write_metadata(
        folder,
        prompt=prompt,
        output=output,
        caption_column=column,
        image_column=image_column,
        overwrite=overwrite,
        replace=replace,
        command=_told("metadata", folder),
    )
    kept = f", {written.kept} of them with the captions they had" if written.kept else ""
    typer.echo(f"{written.file}: {written.rows} pictures{kept}")


def dedupe(
    folder: Folder,
    near: Annotated[
        int | None,
        typer.Option("--near", min=0, max=32, help="Also what looks the same: hashes up to N of 64 bits apart."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Take duplicate pictures away; the largest and best captioned stays, and undo brings the others back."""
    from gesso.data.editing import tidy
    from gesso.data.editing.collection import Library

    library = Library(folder)
    with _bar("comparing") as progress:
        if near is None:
            groups = tidy.duplicates(library, progress=progress)
        else:
            groups = tidy.near_duplicates(library, near, progress=progress)
    _list_groups(groups)
    count = sum(len(group.others) for group in groups)
    if dry_run or not groups:
        typer.echo(f"{count} of {len(library.items)} pictures are duplicates{'; nothing was changed' * bool(groups)}")
        return
    tidy.remove_duplicates(
        library, groups, command=_told("dedupe", folder, [f"--near {near}"] if near is not None else [])
    )
    typer.echo(f"{count} of {len(library.items)} pictures were taken away")
    _tell_undo(folder)


def split(
    folder: Folder,
    validation: Annotated[float, typer.Option("--validation", help="Share of the pictures to hold out.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where they go.")],
    copy: Annotated[bool, typer.Option("--copy", help="Leave them here as well.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Hold out a part of the pictures in another folder: the same ones that a run with this share would hold out."""
    if not 0 < validation < 1:
        raise UserError(f"{validation} is no share", where="--validation", fix="use a number between 0 and 1")
    from gesso.data.editing import tidy
    from gesso.data.editing.collection import Library

    library = Library(folder)
    held = tidy.held_out(library, validation)
    if dry_run:
        typer.echo("\n".join(item.name for item in held))
    else:
        tidy.split(library, held, output, copy=copy, command=_told("split", folder, [f"--output {output}"]))
    done = "would go" if dry_run else "were copied" if copy else "were moved"
    typer.echo(f"{len(held)} of {len(library.items)} pictures {done} to {output}")
    if not dry_run:
        _tell_undo(folder, f" --also {shlex.quote(str(output))}")


def caption_edit(
    folder: Folder,
    find: Annotated[str | None, typer.Option("--find", help="Text to replace.")] = None,
    replace: Annotated[str, typer.Option("--replace", help="What to put in its place.")] = "",
    regex: Annotated[bool, typer.Option("--regex", help="--find is a regular expression.")] = False,
    ignore_case: Annotated[bool, typer.Option("--ignore-case", help="--find in any case.")] = False,
    prepend: Annotated[str, typer.Option("--prepend", help="Text before every caption, as it stands.")] = "",
    append: Annotated[str, typer.Option("--append", help="Text behind every caption, as it stands.")] = "",
    add_tag: Annotated[list[str], typer.Option("--add-tag", help="Where it is not there yet; repeatable.")] = [],  # noqa: B006
    remove_tag: Annotated[list[str], typer.Option("--remove-tag", help="Repeatable.")] = [],  # noqa: B006
    unique: Annotated[bool, typer.Option("--unique", help="Keep the first of equal tags only.")] = False,
    lower: Annotated[bool, typer.Option("--lower", help="Make all letters small.")] = False,
    separator: Annotated[str, typer.Option("--separator", help="What stands between tags.")] = ",",
    table: Annotated[Path | None, typer.Option("--metadata", help="A .jsonl or .csv file with the captions.")] = None,
    extension: Annotated[str | None, typer.Option("--extension", help="Ending of the caption files.")] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="How many changes to show.")] = 10,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Change many captions at once, in caption files or a metadata table. Shows the changes and asks first."""
    from gesso.data.editing import caption_edit as editing
    from gesso.data.editing.collection import Library

    change = editing.CaptionEdit(
        find=find,
        replace=replace,
        regex=regex,
        ignore_case=ignore_case,
        remove_tags=tuple(remove_tag),
        add_tags=tuple(add_tag),
        unique=unique,
        prepend=prepend,
        append=append,
        lower=lower,
        separator=separator,
    )
    library = Library(folder, metadata=table, extension=extension)
    edited = editing.preview(library, change)
    for one in edited[:show]:
        _show(one)
    without = sum(item.caption is None for item in library.items)
    typer.echo(f"{len(edited)} of {len(library.items) - without} captions change; {without} pictures have none")
    if dry_run or not edited:
        return
    if not yes:
        if not _is_terminal():
            raise UserError("nobody is there to ask", where="caption-edit", fix="add --yes, or --dry-run to look only")
        if not typer.confirm("Change them?"):
            typer.echo("nothing was changed")
            return
    editing.apply(library, edited, command=_told("caption-edit", folder))
    _tell_undo(folder)


def caption(
    folder: Folder,
    plugin: Annotated[str, typer.Option("--with", help="blip, florence, wd, openai or MODULE:FUNCTION.")],
    model: Annotated[str | None, typer.Option("--model", help="Local folder or hub id. Empty: the usual one.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What the model is asked, or begins with.")] = None,
    prefix: Annotated[str, typer.Option("--prefix", help="Text before every caption, as it stands.")] = "",
    suffix: Annotated[str, typer.Option("--suffix", help="Text behind every caption, as it stands.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the captions that are there.")] = False,
    append: Annotated[bool, typer.Option("--append", help="Add to the captions that are there.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures, or requests, at a time.")] = 8,
    device: Annotated[str | None, typer.Option("--device", help="cuda, mps or cpu. Empty: the best there is.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Longest caption.")] = 256,
    threshold: Annotated[float, typer.Option("--threshold", help="wd: least score of a general tag.")] = 0.35,
    character_threshold: Annotated[
        float, typer.Option("--character-threshold", help="wd: least score of a character.")
    ] = 0.85,
    endpoint: Annotated[
        str, typer.Option("--endpoint", help="openai: address of the server.")
    ] = "https://api.openai.com/v1",
    key_env: Annotated[
        str | None, typer.Option("--key-env", help="openai: environment variable with the key for this server.")
    ] = None,
    table: Annotated[Path | None, typer.Option("--metadata", help="A .jsonl or .csv file for the captions.")] = None,
    extension: Annotated[str | None, typer.Option("--extension", help="Ending of the caption files.")] = None,
) -> None:
    """Let a model write captions. Pictures that have one are passed over; called again, it goes on where it stopped."""
    if overwrite and append:
        raise UserError("either --overwrite or --append", where="caption")
    from gesso.data.captioning import plugins as captioners
    from gesso.data.editing.collection import Library

    library = Library(folder, metadata=table, extension=extension)
    mode = "overwrite" if overwrite else "append" if append else "missing"
    wanted = captioners.Wanted(mode=mode, prefix=prefix, suffix=suffix)
    settings = captioners.Settings(
        model=model,
        prompt=prompt,
        device=device,
        batch_size=batch_size,
        max_tokens=max_tokens,
        threshold=threshold,
        character_threshold=character_threshold,
        endpoint=endpoint,
        key_env=key_env,
    )
    _write_captions(library, plugin, settings, wanted)


def _write_captions(library: Library, plugin: str, settings: Settings, wanted: Wanted) -> None:
    from gesso.data.captioning import plugins as captioners

    chosen = {"with": plugin, "model": settings.model, "prompt": settings.prompt}
    options = [f"--{name} {shlex.quote(value)}" for name, value in chosen.items() if value]
    options += [f"--{wanted.mode}"] if wanted.mode != "missing" else []
    command = _told("caption", library.folder, options)
    items = captioners.pending(library, wanted, command=command)
    if not items:
        raise UserError(
            f"nothing was written: all {len(library.items)} pictures have a caption",
            where=str(library.folder),
            fix="add --overwrite or --append to write them anyway",
        )
    skipped = len(library.items) - len(items)
    if skipped:
        typer.echo(f"{skipped} of {len(library.items)} pictures have a caption and are passed over")
    captioner = captioners.load(plugin, settings)
    with _bar("captioning") as progress:
        report = captioners.run(
            library,
            captioner,
            items,
            wanted=wanted,
            batch_size=settings.batch_size,
            command=command,
            progress=progress,
        )
    if report.written:
        typer.echo(f"{report.written} {'caption' if report.written == 1 else 'captions'} written")
        _tell_undo(library.folder)
    if report.failed:
        what = f"{len(report.failed)} pictures got no caption" if report.written else "nothing was written"
        raise Problems(report.failed, what=what)


def push(
    folder: Folder,
    repo: Annotated[str, typer.Option("--repo", metavar="OWNER/NAME", help="The data set on the hub.")],
    private: Annotated[bool, typer.Option("--private/--public", help="Who can see it, if it is new.")] = True,
    layout: Annotated[
        str, typer.Option("--layout", help="auto, imagefolder or parquet (auto: for more than 5,000 pictures).")
    ] = "auto",
) -> None:
    """Upload pictures and captions to the Hugging Face hub, with a card. Log in with hf auth login, or set HF_TOKEN."""
    if layout not in ("auto", "imagefolder", "parquet"):
        raise UserError(f"'{layout}' is not one of auto, imagefolder, parquet", where="--layout")
    from gesso.data.editing import publish

    typer.echo(publish.publish(folder, repo, private=private, layout=cast(publish.Layout, layout)))


def undo(
    folder: Folder,
    last: Annotated[int, typer.Option("--last", min=1, help="How many commands to take back.")] = 1,
    redo: Annotated[bool, typer.Option("--redo", help="Do again what was taken back.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also where files were changed since.")] = False,
    also: Annotated[
        list[Path], typer.Option("--also", help="Another folder that files were moved to; repeatable.")
    ] = [],  # noqa: B006
    show: Annotated[bool, typer.Option("--list", help="Only show the record.")] = False,
) -> None:
    """Take back the last command that changed this folder, to the byte; or do it again."""
    from gesso.data.editing.journal import Journal

    journal = Journal(folder, also=also)
    if show:
        for entry in journal.entries():
            state = "taken back" if entry.undone else entry.state
            typer.echo(f"{entry.time}  {len(entry.changes):>6} changes  {state:10}  {entry.command}")
        return
    done = journal.redo(last=last, force=force) if redo else journal.undo(last=last, force=force)
    for one in done:
        typer.echo(f"{'done again' if redo else 'taken back'}: {one.command} ({one.changes} changes, {one.time})")


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _told(name: str, folder: Path, options: Sequence[str] = ()) -> str:
    return " ".join([f"gesso dataset {name}", shlex.quote(str(folder)), *options])


def _tell_undo(folder: Path, more: str = "") -> None:
    typer.echo(f"to take it back: gesso dataset undo {shlex.quote(str(folder))}{more}")


@contextmanager
def _bar(task: str) -> Iterator[Callable[[int, int], None]]:
    with Console() as console:
        yield lambda done, total: console.handle(Progress(0, task, done, total))


def _list_groups(groups: Sequence[Group]) -> None:
    for group in groups[:_SHOWN]:
        typer.echo(f"{group.keep.name} stays; the same: {', '.join(item.name for item in group.others)}")
    if len(groups) > _SHOWN:
        typer.echo(f"and {len(groups) - _SHOWN} groups more")


def _show(one: Edited) -> None:
    """A caption before and after, with what differs in colour."""
    matcher = difflib.SequenceMatcher(None, one.before, one.after, autojunk=False)
    old, new = "", ""
    for tag, a, b, c, d in matcher.get_opcodes():
        same = tag == "equal"
        old += one.before[a:b] if same else typer.style(one.before[a:b], fg="red", strikethrough=True)
        new += one.after[c:d] if same else typer.style(one.after[c:d], fg="green", bold=True)
    typer.echo(f"{one.item.name}\n  - {_indented(old)}\n  + {_indented(new)}")


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")
