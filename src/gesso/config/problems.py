"""Validation errors in the user's terms: the file and line, the key, the value given, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from gesso.config import schema
from gesso.config.document import KeyPath, dotted
from gesso.errors import UserError

_RANGE = re.compile(r"\s*([\d.]+(?:e-?\d+)?)\s*(?:-|–|to)\s*([\d.]+(?:e-?\d+)?)\s*")
_NUMBER = re.compile(r"\s*[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?\s*")
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}
_SHORT = ("path", "base", "token", "type")
"""What a section with such a key is often given as, alone."""
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "path": "a path",
    "model": "a section with keys of its own",
    "dict": "a section with keys of its own",
    "finite": "a finite number",
}


@dataclass(frozen=True)
class Place:
    """Where a value came from: a file and line, `--set`, or a preset; `key` is the source's own name for it."""

    where: str
    key: str | None = None


Locate = Callable[[KeyPath], Place]


def translate(error: ValidationError, *, locate: Locate, foreign: Mapping[str, str]) -> list[UserError]:
    """One `UserError` a key; `foreign` names keys of other tools and what they are called here."""
    groups: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for item in error.errors(include_url=False):
        # A list with a bad item is also called too short: the item alone is the mistake.
        if item["type"] != "too_short" or not item["input"]:
            groups.setdefault(schema.clean(item["loc"]), []).append(item)
    return [_one(path, items, locate(path), foreign) for path, items in groups.items()]


def _one(path: KeyPath, items: Sequence[Mapping[str, Any]], place: Place, foreign: Mapping[str, str]) -> UserError:
    kind = items[0]["type"]
    key = place.key if place.key is not None else dotted(path)
    if kind == "extra_forbidden":
        return _of_another_type(path, place) or unknown(path, place, foreign)
    if kind == "missing":
        return _missing(path, place)
    if kind.startswith("union_tag"):
        return _wrong_tag(path, items[0], place)
    given = items[0]["input"]
    if kind == "value_error":
        message = str(items[0]["msg"]).removeprefix("Value error, ")
        return UserError(f"{key}: {message}" if key else message, where=place.where)
    return UserError(f"{key} {_rule(path, items)}, not {show(given)}", where=place.where, fix=_fix(path, items, given))


def unknown(path: KeyPath, place: Place, foreign: Mapping[str, str]) -> UserError:
    """The problem with a key that does not exist, and the key that was probably meant."""
    name = str(path[-1])
    holder, _ = schema.locate(path)
    section = dotted(path[:-1])
    siblings = list(schema.fields(holder))
    elsewhere = [key for key in schema.all_keys().get(name, ()) if key != dotted(path)]
    near = schema.nearest(name, siblings)
    far = schema.nearest(name, schema.all_keys())
    if near and near.lower() == name.lower().replace("-", "_"):
        fix = f"write {near}"
    elif elsewhere:
        fix = "did you mean " + " or ".join(([near] if near else []) + elsewhere[:3]) + "?"
    elif name in foreign:
        fix = f"that is called {foreign[name]} here"
    elif near:
        fix = f"did you mean {near}?"
    elif far:
        fix = "did you mean " + " or ".join(schema.all_keys()[far][:3]) + "?"
    else:
        fix = "known here: " + ", ".join(siblings)
    where = f"in {section}" if section else "at the top level"
    return UserError(f"unknown key {name} {where}", where=place.where, fix=fix)


def _of_another_type(path: KeyPath, place: Place) -> UserError | None:
    """The problem with a key that the section would have with another `type`, or None if it never has it."""
    holder, _ = schema.locate(path)
    name = str(path[-1])
    owners = [model for model in holder if name in model.model_fields]
    if not owners:
        return None
    types = " or ".join(word for model in owners for word in schema.choices(model.model_fields["type"].annotation))
    key = place.key or dotted(path)
    return UserError(f"{key} is only for type: {types}", where=place.where, fix=f"leave it out, or write type: {types}")


def show(value: Any) -> str:
    """A value as it would be written, shortened."""
    text = "nothing" if value is None else f"'{value}'" if isinstance(value, str) else str(value)
    if isinstance(value, bool):
        text = str(value).lower()
    return text if len(text) <= 60 else text[:57] + "..."


def range_hint(value: Any) -> str | None:
    """What to do about text such as 400-500 where one number is wanted, or None."""
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    return f"{value} is a range, not a value: choose one number, such as {match.group(1)}" if match else None


def _missing(path: KeyPath, place: Place) -> UserError:
    if path == ("data",) or path == ("data", "sources"):
        fix = "add\n     data:\n       sources:\n         - path: FOLDER_WITH_IMAGES"
        return UserError("data.sources is missing: no training images are named", where=place.where, fix=fix)
    if path == ("training",):
        fix = "add\n     training:\n       steps: 1000"
        return UserError("training is missing: the run has no length", where=place.where, fix=fix)
    _, info = schema.locate(path)
    meaning = schema.first_sentence(info) if info is not None else ""
    return UserError(f"{dotted(path)} is missing", where=place.where, fix=f"{path[-1]}: {meaning}" if meaning else "")


def _wrong_tag(path: KeyPath, item: Mapping[str, Any], place: Place) -> UserError:
    _, info = schema.locate(path)
    models = schema.models_in(info.annotation) if info is not None else ()
    tag = str(item.get("ctx", {}).get("discriminator", "type")).strip("'")
    tag = tag if all(tag in model.model_fields for model in models) else "type"  # pydantic names a function here
    allowed = [word for model in models for word in schema.choices(model.model_fields[tag].annotation)]
    key = f"{place.key or dotted(path)}.{tag}"
    if item["type"] == "union_tag_not_found":
        return UserError(f"{key} is missing", where=place.where, fix=f"one of {', '.join(allowed)}")
    given = str(item.get("ctx", {}).get("tag", ""))
    near = schema.nearest(given, allowed)
    fix = f"did you mean {near}?" if near else ""
    return UserError(f"{key} must be one of {', '.join(allowed)}, not {show(given)}", where=place.where, fix=fix)


def _rule(path: KeyPath, items: Sequence[Mapping[str, Any]]) -> str:
    rules: list[str] = []
    for item in items:
        kind, ctx = item["type"], item.get("ctx", {})
        if kind in _BOUNDS:
            name, words = _BOUNDS[kind]
            rules.append(f"must be {words} {ctx[name]:g}")
        elif kind in ("literal_error", "enum"):
            _, info = schema.locate(path)
            allowed = schema.choices(info.annotation) if info is not None else ()
            rules.append("must be one of " + (", ".join(allowed) or str(ctx.get("expected", ""))))
        elif kind == "string_pattern_mismatch":
            rules.append("must start with a letter or digit and hold only letters, digits, spaces, _ . and -")
        elif kind == "too_short":
            rules.append(f"must have at least {ctx['min_length']} item(s)")
        else:
            rules.append("must be " + _KINDS.get(kind.split("_")[0], item["msg"]))
    unique = list(dict.fromkeys(rules))
    return unique[0] + "".join(f" or {rule.removeprefix('must be ')}" for rule in unique[1:])


def _fix(path: KeyPath, items: Sequence[Mapping[str, Any]], given: Any) -> str:
    kinds = {item["type"].split("_")[0] for item in items}
    _, info = schema.locate(path)
    if hint := range_hint(given):
        return hint
    if kinds & {"int", "float"} and isinstance(given, str) and _NUMBER.fullmatch(given):
        return f"write {given.strip()} without quotes"
    if "string" in kinds and isinstance(given, int | float):
        return f'put it in quotes: "{show(given)}"'
    if "bool" in kinds and isinstance(given, str) and given.lower() in ("yes", "no", "on", "off"):
        return f"write {'true' if given.lower() in ('yes', 'on') else 'false'}"
    if "model" in kinds and isinstance(given, str):
        # A section given as one word: usually the one key in it that matters.
        inside = [key for key in _SHORT if schema.locate((*path, key))[1] is not None]
        if inside:
            return f"write {{{inside[0]}: {given}}}"
    near = schema.nearest(given, schema.choices(info.annotation)) if isinstance(given, str) and info else None
    if near:
        return f"did you mean {near}?"
    if "tuple" in kinds and isinstance(given, str):
        return f"write a list: [{show(given)}]"
    if given is None and info is not None:
        return f"give a value or leave the key out (default {show(info.default)})"
    return schema.first_sentence(info) if info is not None else ""
