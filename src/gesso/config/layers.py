"""Values laid over one another (preset, file, `--set`), each with the place it came from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gesso.config.document import KeyPath, dotted
from gesso.config.problems import Place
from gesso.errors import UserError

SET = "--set"


@dataclass
class Layers:
    """Values laid over one another: nested sections are merged, anything else is replaced."""

    file: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    preset: str | None = None
    """Where values of the preset come from, if there is one."""

    def lay(self, data: Mapping[str, Any], place: Callable[[KeyPath], Place]) -> None:
        """Put `data` on top; `place` tells where each of its keys came from."""
        self._merge(self.data, data, (), place)

    def locate(self, path: KeyPath) -> Place:
        """Where a key came from; for one that nobody wrote, where its section stands."""
        if path in self.places:
            return self.places[path]
        for length in range(len(path) - 1, 0, -1):
            if path[:length] in self.places:
                place = self.places[path[:length]]
                key = f"{place.key}.{dotted(path[length:])}" if place.key is not None else None
                return Place(place.where, key)
        return Place(self.file)

    def origin(self, path: KeyPath) -> str | None:
        """Where a value came from, or None if it is a default."""
        value: Any = self.data
        for part in path:
            if not isinstance(value, dict | list):
                break
            inner = value if isinstance(value, dict) else dict(enumerate(value))
            if part not in inner:
                return None
            value = inner[part]
        where = self.locate(path).where
        return SET if where.startswith(SET) else where

    def put(self, path: KeyPath, value: Any, place: Place) -> None:
        """Set one value, making sections and list items on the way."""
        holder: Any = self.data
        for depth, following in enumerate(path[1:]):
            holder = _step(holder, path[: depth + 1], [] if isinstance(following, int) else {}, place)
        self._forget(path)
        _step(holder, path, value, place, replace=True)
        self.places[path] = place

    def _merge(
        self, into: dict[str, Any], data: Mapping[str, Any], at: KeyPath, place: Callable[[KeyPath], Place]
    ) -> None:
        for key, value in data.items():
            path = (*at, key)
            if isinstance(value, Mapping) and isinstance(into.get(key), dict):
                self._merge(into[key], value, path, place)
                self.places[path] = place(path)
                continue
            self._forget(path)
            into[key] = copy.deepcopy(value)
            self._note(value, path, place)

    def _note(self, value: Any, path: KeyPath, place: Callable[[KeyPath], Place]) -> None:
        self.places[path] = place(path)
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        for key, item in inner:
            self._note(item, (*path, key), place)

    def _forget(self, path: KeyPath) -> None:
        for old in [old for old in self.places if old[: len(path)] == path]:
            del self.places[old]


def _step(holder: Any, path: KeyPath, value: Any, place: Place, *, replace: bool = False) -> Any:
    """Go from `holder` to the last part of `path`; put `value` there if nothing is, or if it is to be replaced."""
    part = path[-1]
    if isinstance(holder, dict):
        if replace or holder.get(part) is None:
            holder[part] = value
        return holder[part]
    if not isinstance(holder, list):
        raise UserError(f"{dotted(path[:-1])} is a value and has no {part}", where=place.where)
    if not isinstance(part, int) or part > len(holder):
        what = f"{dotted(path[:-1])} is a list of {len(holder)} and has no {part}"
        raise UserError(what, where=place.where, fix=f"give a position from 0 to {len(holder)}")
    if part == len(holder):
        holder.append(value)
    elif replace:
        holder[part] = value
    return holder[part]
