"""The run file's schema seen as paths: which keys there are, where, and what they may hold."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gesso.config.document import KeyPath
from gesso.config.run import RunConfig

Models = tuple[type[BaseModel], ...]
ROOT: Models = (RunConfig,)


def models_in(annotation: Any) -> Models:
    """Every section class inside an annotation, through unions, tuples and `Annotated`."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return (annotation,) if issubclass(annotation, BaseModel) else ()
    return tuple(model for inner in get_args(annotation) for model in models_in(inner))


def fields(models: Models) -> dict[str, FieldInfo]:
    """Field names of some section classes."""
    return {name: info for model in models for name, info in model.model_fields.items()}


def locate(path: KeyPath) -> tuple[Models, FieldInfo | None]:
    """Section classes that hold the last key of `path`, and its field; list positions are passed over."""
    models: Models = ROOT
    holder, info = models, None
    for part in path:
        if isinstance(part, int):
            continue
        holder, info = models, fields(models).get(part)
        models = models_in(info.annotation) if info is not None else ()
    return holder, info


def clean(loc: Iterable[str | int]) -> KeyPath:
    """A pydantic error location without the names of union members, so that it matches the file."""
    path: list[str | int] = []
    models: Models = ROOT
    lost = False
    for part in loc:
        if isinstance(part, int):
            path.append(part)
        elif part in fields(models) and not lost:
            path.append(part)
            models = models_in(fields(models)[part].annotation)
        elif models and not _is_tag(part, models):
            path.append(part)
            lost = True
    return tuple(path)


def _is_tag(part: str, models: Models) -> bool:
    """Whether `part` names a member of a union: a class, or the value of its `type` or `family`."""
    tags = {model.__name__ for model in models}
    for model in models:
        for info in model.model_fields.values():
            if get_origin(info.annotation) is Literal:
                tags.update(str(choice) for choice in get_args(info.annotation))
    return len(models) > 1 and part in tags


@cache
def all_keys() -> dict[str, tuple[str, ...]]:
    """Dotted keys of the whole schema by their last name; list positions are written `[]`."""
    found: dict[str, list[str]] = {}
    for key in _walk(ROOT, ""):
        found.setdefault(key.rsplit(".", 1)[-1], []).append(key)
    return {name: tuple(dict.fromkeys(keys)) for name, keys in found.items()}


def _walk(models: Models, prefix: str) -> Iterator[str]:
    for name, info in fields(models).items():
        inner = models_in(info.annotation)
        yield f"{prefix}{name}"
        many = "[]" if inner and "tuple" in str(info.annotation) else ""
        yield from _walk(inner, f"{prefix}{name}{many}.")


def choices(annotation: Any) -> tuple[str, ...]:
    """The words an annotation allows, where it is a choice."""
    if get_origin(annotation) is Literal:
        return tuple(str(choice) for choice in get_args(annotation))
    return tuple(choice for inner in get_args(annotation) for choice in choices(inner))


def nearest(word: str, among: Iterable[str]) -> str | None:
    """The most similar spelling, or None if nothing is close."""
    by_lower = {name.lower().replace("-", "_"): name for name in among}
    match = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower, n=1, cutoff=0.7)
    return by_lower[match[0]] if match else None


def first_sentence(info: FieldInfo) -> str:
    """A field's documentation up to its first full stop."""
    text = " ".join((info.description or "").split())
    return re.split(r"(?<!et al)\. ", text)[0].rstrip(".")
