"""Writes reference.md beside this file from the run file's schema, the command line and the error classes.

Run it after a change to any of them: `python docs/make_reference.py`. A test compares its answer with the file.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.models import ArgumentInfo, OptionInfo

from gesso import errors
from gesso.cli import failure
from gesso.cli.app import app
from gesso.config import presets, schema
from gesso.config.dialects import flat, rules
from gesso.config.document import flow
from gesso.config.run import RunConfig

FILE = Path(__file__).with_name("reference.md")
_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text", Path: "path"}
_HEAD = """\
# Reference

Every key of a run file, every command with its options, every exit code. `docs/make_reference.py` writes this page from
the code; do not edit it by hand. New to Gesso? Start with the [guide](guide.md).

[The run file](#the-run-file) · [Presets](#presets) · [The command line](#the-command-line)
· [Exit codes](#exit-codes) · [Environment variables](#environment-variables)
· [Keys of other tools](#keys-of-other-tools)

## The run file

A run file is YAML 1.2. Only `data.sources` and a length (`training.steps` or `training.epochs`) must be there. Unknown
keys are refused. `preset: NAME` at the top level lays the file over a [preset](#presets); `--set KEY=VALUE` lays one
value over both, with the dotted key (`training.learning_rate`), a list position being a number (`data.sources.0.path`).
A default of *empty* is written as a key without a value, or not at all.
"""
_ENVIRONMENT = """\
## Environment variables

| variable | meaning |
|---|---|
| `GESSO_CACHE` | Folder for encoded pictures and captions where the run file names none (`data.cache`). |
| `GESSO_DEBUG` | `1` shows the traceback with every error. |
| `OPENAI_API_KEY` | The key of `gesso dataset caption --with openai`, for OpenAI's own server. |
| `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE`, `HF_TOKEN` | Read by the Hugging Face libraries: where models are \
kept, no network, login. |
"""


def text() -> str:
    """The whole page."""
    parts = [_HEAD, *_sections(), _presets(), *_commands(), _exit_codes(), _ENVIRONMENT, _other_tools()]
    return "\n".join(part.rstrip() + "\n" for part in parts)


# The run file


def _sections() -> Iterator[str]:
    yield _section("Top level", RunConfig, "")
    # Kinds of a section may have inner sections in common, which stand once.
    yield from dict.fromkeys(_inner(RunConfig, ""))


def _inner(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, info in model.model_fields.items():
        kinds = schema.models_in(info.annotation)
        for inner in kinds:
            path = f"{prefix}{name}{'[]' if _is_list(info) else ''}"
            tag = f" with `type: {_tag(inner)}`" if len(kinds) > 1 else ""
            yield _section(f"`{path}`{tag}", inner, f"{path}.")
            yield from _inner(inner, f"{path}.")


def _section(title: str, model: type[BaseModel], prefix: str) -> str:
    about = "" if not prefix else " ".join((inspect.getdoc(model) or "").split()) + "\n\n"
    lines = [f"### {title}\n", f"{about}| key | value | default | meaning |", "|---|---|---|---|"]
    for name, info in model.model_fields.items():
        lines.append(f"| `{name}` | {_value(info, prefix + name)} | {_default(info)} | {_meaning(info)} |")
    return "\n".join(lines)


def _value(info: FieldInfo, path: str) -> str:
    inner = schema.models_in(info.annotation)
    if inner:
        many = "[]" if _is_list(info) else ""
        links = [_link(f"`{path}{many}`" + (f" with `type: {_tag(m)}`" if len(inner) > 1 else "")) for m in inner]
        return ("list of " if many else "section ") + " or ".join(links)
    bounds = [bound for mark in info.metadata if (bound := _bound(mark))]
    return ", ".join([_kind(info.annotation), *bounds])


def _bound(mark: Any) -> str:
    match mark:
        case Ge(ge=limit):
            return f"≥ {limit}"
        case Gt(gt=limit):
            return f"> {limit}"
        case Le(le=limit):
            return f"≤ {limit}"
        case Lt(lt=limit):
            return f"< {limit}"
        case _:
            return ""


def _bounds(mark: Any) -> Iterator[str]:
    marks = mark.metadata if isinstance(mark, FieldInfo) else [mark]
    return (bound for one in marks if (bound := _bound(one)))


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), [a for a in get_args(annotation) if a not in (type(None), Ellipsis)]
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin is Annotated:
        return ", ".join([_kind(inner[0]), *(bound for mark in inner[1:] for bound in _bounds(mark))])
    if origin is dict:
        return "section with keys of its own" if inner[1] is Any else f"names, each with a {_kind(inner[1])}"
    if origin is tuple:
        return f"list of {_plural(_kind(inner[0]))}"
    if origin in (Union, types.UnionType):
        return "number" if set(inner) == {int, float} else " or ".join(_kind(one) for one in inner)
    return _KINDS[annotation]


def _plural(kind: str) -> str:
    return kind if kind == "text" else f"{kind}s"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "**needed**"
    if schema.models_in(info.annotation):
        several = len(schema.models_in(info.annotation)) > 1
        default = info.default if _is_list(info) else [info.default] if several else []
        held = [f"`{_tag(type(one))}`" for one in default]
        return ", ".join(held)
    if info.default_factory is not None or info.default is None or info.default in ((), "", {}):
        return "*empty*"
    return f"`{flow(info.default)}`"


def _meaning(info: FieldInfo) -> str:
    inner = schema.models_in(info.annotation)
    own = info.description or (" ".join((inspect.getdoc(inner[0]) or "").split()) if inner else "")
    kind = (
        "Which kind this is." if get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1 else ""
    )
    return _cell(own or kind)


def _is_list(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is tuple


def _tag(model: type[BaseModel]) -> str:
    return str(model.model_fields["type"].default)


def _link(title: str) -> str:
    anchor = "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")
    return f"[{title}](#{anchor})"


def _cell(content: str) -> str:
    return " ".join(content.split()).replace("|", "\\|").replace("<", "&lt;")


# Presets, commands, exit codes


def _presets() -> str:
    rows = [f"| `{name}` | {_cell(presets.about(name))} |" for name in presets.names()]
    head = "## Presets\n\nWhat `preset:` in a run file and `gesso new --preset` start from. The memory is a forecast.\n"
    return "\n".join([head, "| preset | what it is for |", "|---|---|", *rows])


def _commands() -> Iterator[str]:
    yield "## The command line\n\n`gesso --version` shows the version, `gesso COMMAND --help` the options of a command."
    groups = {"gesso": app} | {f"gesso {g.name}": g.typer_instance for g in app.registered_groups if g.typer_instance}
    for prefix, group in groups.items():
        for command in group.registered_commands:
            assert command.callback is not None
            name = command.name or command.callback.__name__
            yield _command(f"{prefix} {name}", command.callback)


def _command(name: str, callback: Callable[..., Any]) -> str:
    arguments, rows = [], []
    for parameter in inspect.signature(callback, eval_str=True).parameters.values():
        info = parameter.annotation.__metadata__[0]
        needed = parameter.default is inspect.Parameter.empty
        if isinstance(info, ArgumentInfo):
            label = info.metavar or parameter.name.upper()
            arguments.append(label if needed else f"[{label}]")
            shown = f"`{_cell(label)}`"
        else:
            shown = _option(parameter, info)
        rows.append(f"| {shown} | {_cell(info.help or '')} | {_option_default(parameter)} |")
    about = " ".join((inspect.getdoc(callback) or "").split())
    usage = " ".join([name, *arguments, "[OPTIONS]"] if rows else [name])
    lines = [f"### `{name}`\n", about, f"\n```text\n{usage}\n```"]
    return "\n".join(lines + (["\n| option | meaning | default |", "|---|---|---|", *rows] if rows else []))


def _option(parameter: inspect.Parameter, info: OptionInfo) -> str:
    # Under `Annotated`, typer keeps the first name in the place of the default.
    first = [info.default] if isinstance(info.default, str) else []
    names = [*first, *(info.param_decls or ())] or [f"--{parameter.name.replace('_', '-')}"]
    flag = bool in (parameter.annotation.__origin__, *get_args(parameter.annotation.__origin__))
    shown = ", ".join(f"`{name}`" for name in names)
    longest = next(name for name in names if name.startswith("--")).removeprefix("--")
    return shown if flag else f"{shown} `{_cell(info.metavar or longest.upper())}`"


def _option_default(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is inspect.Parameter.empty:
        return "**needed**"
    if default is None or default is False or default in ("", []):
        return ""
    return f"`{default}`"


def _exit_codes() -> str:
    rows = {0: "Done.", failure.UNEXPECTED: "A fault in Gesso or below it. The details are in the file that it names."}
    kinds: list[type[errors.UserError]] = [errors.UserError, *errors.UserError.__subclasses__()]
    for error in kinds:
        if "exit_code" in vars(error):
            rows[error.exit_code] = " ".join((inspect.getdoc(error) or "").split("\n\n")[0].split())
    lines = [f"| {code} | {_cell(rows[code])} |" for code in sorted(rows)]
    return "\n".join(["## Exit codes\n", "| code | meaning |", "|---|---|", *lines])


# Other tools


def _other_tools() -> str:
    aliases: dict[str, list[str]] = {}
    for key, name in flat.KEYS.items():
        aliases.setdefault(name, []).append(key)

    def keys(name: str) -> str:
        return ", ".join(f"`{key}`" for key in aliases.pop(name))

    direct = [f"| {keys(name)} | `{rule.native}` |" for name, rule in rules.DIRECT.items()]
    ignored = [f"| {keys(name)} | {_cell(why)} |" for name, why in rules.IGNORED.items()]
    refused = [f"| {keys(name)} | {_cell(why)} |" for name, why in rules.REFUSED.items()]
    together = ", ".join(keys(name) for name in list(aliases))
    return "\n".join(
        [
            "## Keys of other tools\n",
            "Files with these keys are read as they stand ([how](guide.md#coming-from-another-tool)). `gesso check` "
            "tells what became of each key.\n",
            *("| key there | key here |", "|---|---|", *direct),
            f"\nRead together with others, as the guide's tables show: {together}.\n",
            *("| has no effect | why |", "|---|---|", *ignored),
            *("\n| refused when on | why |", "|---|---|", *refused),
        ]
    )


def main() -> None:
    """Write the page."""
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE}")


if __name__ == "__main__":
    main()
