"""What a sweep goes over: keys with values, ranges to search, profiles; and the runs that follow from them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gesso.config import document, presets
from gesso.errors import UserError

OVER, PROFILE = "--over", "--profile"
_OPEN, _CLOSE = "[{(", "]})"


@dataclass(frozen=True)
class Axis:
    """A key and its values as they are written; or a range, which only a search can take."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0

    @property
    def is_range(self) -> bool:
        """Whether values are to be found between two numbers."""
        return not self.values

    @property
    def whole(self) -> bool:
        """Whether a range is of whole numbers."""
        return self.low == int(self.low) and self.high == int(self.high)

    @property
    def logarithmic(self) -> bool:
        """Whether a range is searched by its orders of magnitude: where it spans one or more."""
        return self.low > 0 and self.high >= 10 * self.low


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: its name, which is its folder's, and what it sets."""

    name: str
    values: Mapping[str, str]
    sets: tuple[str, ...]


def parse(text: str) -> Axis:
    """`adapter.rank=8,16,32` or `training.learning_rate=1e-5..1e-3`; raises `UserError` for anything else."""
    key, equals, right = text.partition("=")
    key = key.strip()
    if not equals or not key or not right.strip():
        raise UserError(f"'{text}' is not of the form key=value,value", where=OVER, fix="write adapter.rank=8,16,32")
    if found := re.fullmatch(r"\s*([-+.\deE]+?)\.\.([-+.\deE]+)\s*", right):
        low, high = (_number(part, text) for part in found.groups())
        if low >= high:
            raise UserError(f"{key}: the range {right.strip()} is empty", where=OVER, fix="write the lower end first")
        return Axis(key, low=low, high=high)
    values = tuple(value.strip() for value in _split(right))
    if not all(values):
        raise UserError(f"{key}: a value is missing in '{right}'", where=OVER, fix="take a comma out")
    if len(set(values)) < len(values):
        raise UserError(f"{key}: a value is there twice in '{right}'", where=OVER, fix="take it out")
    return Axis(key, values)


def grid(axes: Sequence[Axis], profiles: Mapping[str, Sequence[str]]) -> list[Trial]:
    """Every combination of values, the profiles first. Raises `UserError` for a range, or a key that comes twice."""
    _check_keys(axes)
    for axis in axes:
        if axis.is_range:
            what = f"{axis.key}: a grid has no values between {axis.low:g} and {axis.high:g} to take"
            raise UserError(what, where=OVER, fix="write the values with commas, or add --search optuna")
    columns = [[(axis.key, value) for value in axis.values] for axis in axes]
    if profiles:
        columns.insert(0, [("profile", name) for name in profiles])
    return [trial(dict(pairs), profiles) for pairs in itertools.product(*columns)]


def trial(values: Mapping[str, str], profiles: Mapping[str, Sequence[str]]) -> Trial:
    """The run of some values; a profile's settings come first, so that the others win."""
    own = [f"{key}={value}" for key, value in values.items() if key != "profile"]
    laid = [*profiles[values["profile"]], *own] if "profile" in values else own
    return Trial(_name(values), dict(values), tuple(laid))


def read_profile(name: str) -> list[str]:
    """What a profile sets: a preset of ours, or the values of a YAML file (its ending may be left out)."""
    path = next((p for p in (Path(name), Path(f"{name}.yaml")) if p.is_file()), None)
    if path is None:
        presets.get(name, where=PROFILE)
        return [f"preset={name}"]
    found = document.parse(path.read_text("utf-8"), file=str(path))
    return [f"{key}={json.dumps(value)}" for key, value in _leaves(found.data, "")]


def _leaves(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and (value or not prefix):
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), value


def _check_keys(axes: Sequence[Axis]) -> None:
    keys = [axis.key for axis in axes]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UserError(f"{min(twice)} is swept twice", where=OVER, fix="write all of its values behind one --over")
    if reserved := {"name", "output"} & set(keys):
        raise UserError(f"each run of a sweep has a {min(reserved)} of its own", where=OVER, fix="take it out")


def _name(values: Mapping[str, str]) -> str:
    """rank-8_learning_rate-1e-4; by whole keys where their last words are the same."""
    last = [key.rpartition(".")[2] for key in values]
    short = len(set(last)) == len(last)
    parts = []
    for key, value in values.items():
        plain = re.sub(r"[^\w.+-]+", "-", value).strip("-.") or "empty"
        parts.append(plain if key == "profile" else f"{key.rpartition('.')[2] if short else key}-{plain}")
    return "_".join(parts) or "run"


def _split(text: str) -> list[str]:
    """At the commas that are in no brackets and no quotes."""
    pieces, depth, quote = [""], 0, ""
    for letter in text:
        quote = "" if letter == quote else letter if letter in "\"'" and not quote else quote
        if not quote:
            depth += (letter in _OPEN) - (letter in _CLOSE)
        if letter == "," and depth == 0 and not quote:
            pieces.append("")
        else:
            pieces[-1] += letter
    return pieces


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"'{whole}' is no range of numbers", where=OVER, fix="write 1e-5..1e-3") from None
