"""How much each picture's loss counts, where a column of a table says so."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from gesso.config.run import Source
from gesso.data.sources.found import Entry, Found, Record, counted, listed, some
from gesso.errors import UserError

_MOST = 3.4e38
"""Larger ones are infinite in float32, in which losses are."""


def weight_of(cell: Any, column: str | None, where: str) -> float | None:
    """The weight in a cell of `column`; None where no column of weights is read.

    Raises `UserError` for an empty cell and for what is no number, below 0 or not finite.
    """
    if column is None:
        return None
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise UserError(f"no weight: '{column}' is empty", where=where, fix="write a number in every row, such as 1")
    value = _number(cell)
    if value is None or not 0 <= value <= _MOST:
        told = "a weight is a finite number, 0 or more"
        raise UserError(f"'{column}' is {reprlib.repr(cell)}; {told}", where=where, fix="write 1, 0.5 or the like")
    return abs(value)  # -0.0 is 0


def _number(cell: Any) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, (int, float, Decimal, str)):
        return None
    if isinstance(cell, str) and ("_" in cell or not cell.isascii()):
        return None  # Python's own spellings are no others'
    try:
        return float(cell)
    except (ValueError, OverflowError):
        return None


def check_listed(source: Source, entries: Sequence[Entry], found: Found) -> None:
    """Pictures that no table lists have no weight: a problem where the source names a column of weights."""
    bare = [entry.name for entry in entries if entry.weight is None]
    if source.weight_column is not None and bare:
        what = (
            f"weight_column is '{source.weight_column}', but {len(bare)} of {counted(len(entries), 'picture')} "
            f"{'comes' if len(bare) == 1 else 'come'} from no table, and caption files have no columns: {listed(bare)}"
        )
        fix = "list the pictures with their weights in a .jsonl, .csv or .parquet table, or take weight_column out"
        found.problems.append(UserError(what, where=source.path, fix=fix))


def tell_zeros(source: Source, records: Sequence[Record], found: Found) -> None:
    """Say how many pictures, or pairs, their table gives the weight 0."""
    zeros = [str(record.place) for record in records if record.weight == 0]
    if zeros:
        thing = "pair" if any(record.rejected is not None for record in records) else "picture"
        have, they, do = ("has", "it is", "does") if len(zeros) == 1 else ("have", "they are", "do")
        found.notices.append(
            f"{source.path}: {len(zeros)} of {counted(len(records), thing)} {have} the weight 0 in "
            f"'{source.weight_column}': {they} seen, but {do} not count in the loss: {some(zeros)}"
        )
