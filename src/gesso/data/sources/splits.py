"""Which files of a set belong to which split, by the names that the hub and WebDataset give them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gesso.data.sources.found import Found, some
from gesso.errors import UserError

_SPLIT = re.compile(r"(?:^|[/_.-])(training|train|validation|valid|val|dev|testing|test|evaluation|eval)(?=[/_.-]|$)")
_SAME = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation"}
_SAME |= {"testing": "test", "eval": "test", "evaluation": "test"}


def of_split(names: Sequence[str], split: str, *, where: str, found: Found) -> list[str]:
    """Those of the files that are of `split`; all of them if no name tells its split. What is left is noticed."""
    splits = [_split_of(name) for name in names]
    if not any(splits):
        return list(names)
    wanted = _SAME.get(split, split)
    chosen = [name for name, own in zip(names, splits, strict=True) if own == wanted]
    others = [name for name, own in zip(names, splits, strict=True) if own != wanted]
    if not chosen:
        there = ", ".join(sorted({own for own in splits if own}))
        raise UserError(f"no file of the split '{split}'; the files' names say: {there}", where=where, fix="set split")
    if others:
        found.notices.append(f"{where}: not read, because split is '{split}': {some(others)}")
    return chosen


def _split_of(name: str) -> str:
    match = _SPLIT.search(name.lower())
    return _SAME.get(match[1], match[1]) if match else ""
