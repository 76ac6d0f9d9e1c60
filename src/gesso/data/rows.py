"""The rows of a data set: one small object each where one is looked at, an Arrow table where there are a million."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from gesso.data.places import Place

Split = Literal["train", "validation"]
Role = Literal["instance", "prior"]

ALPHA = "alpha"
"""The `mask_hash` of a mask that is the picture's own transparency."""

_WORD = pa.dictionary(pa.int32(), pa.string())
PLACE = pa.struct(
    [("url", pa.string()), ("kind", pa.string()), ("part", pa.string()), ("start", pa.int64()), ("size", pa.int64())]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("place", PLACE),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),
        ("split", _WORD),
        ("weight", pa.float64()),
        ("repeats", pa.float64()),
        ("role", _WORD),
        ("concept", _WORD),
        ("source", pa.int32()),
        ("mask", PLACE),
        ("mask_hash", _WORD),
        ("rejected", PLACE),
        ("rejected_hash", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Row:
    """One sample. `image` names the file's content; `id` is the same unless several rows share that content."""

    id: str
    image: str
    place: Place
    width: int
    """Upright, in pixels; so is the height."""
    height: int
    caption: str
    """As it was written; `captions.render` makes what is trained on."""
    split: Split = "train"
    weight: float = 1.0
    repeats: float = 1.0
    role: Role = "instance"
    concept: str = ""
    source: int = 0
    """Position in `data.sources`; one more for the validation folder."""
    mask: Place | None = None
    mask_hash: str = ""
    """Content of the mask file, `ALPHA`, or empty where the whole picture counts."""
    rejected: Place | None = None
    """Of a pair the picture that was not preferred; the other fields are of the preferred one."""
    rejected_hash: str = ""
    """Its content."""

    @property
    def other(self) -> Row | None:
        """The rejected picture as a row of its own, under the same id and told of the same size; None without pairs."""
        if self.rejected is None:
            return None
        return replace(self, image=self.rejected_hash, place=self.rejected, rejected=None, rejected_hash="")


class Rows(Sequence[Row]):
    """Rows in columns; an item is made when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Rows:
        """Rows as a table, in the order given."""
        if isinstance(rows, Rows):
            return rows
        return cls(pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Rows: ...

    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self.table.take(pa.array(range(*index.indices(len(self))), pa.int64())))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        values = {name: self.table.column(name)[index].as_py() for name in _NAMES}
        values["place"] = Place(**values["place"])
        for name in ("mask", "rejected"):
            values[name] = None if values[name] is None else Place(**values[name])
        return Row(**values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rows) and self.table.equals(other.table)

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def numbers(self, name: str) -> NDArray[Any]:
        """A column of numbers."""
        return self.table.column(name).to_numpy()

    def words(self, name: str) -> tuple[NDArray[np.int32], list[str]]:
        """A column of words as codes, and the word of each code."""
        column = self.table.column(name).combine_chunks()
        column = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        column = column.chunk(0) if isinstance(column, pa.ChunkedArray) and column.num_chunks else column
        if not len(column):
            return np.zeros(0, np.int32), []
        return column.indices.to_numpy(zero_copy_only=False).astype(np.int32), column.dictionary.to_pylist()

    @property
    def pairs(self) -> NDArray[np.bool_]:
        """Which rows are pairs of pictures."""
        found: NDArray[np.bool_] = pc.not_equal(self.table.column("rejected_hash"), "").to_numpy()
        return found

    def where(self, **words: str) -> Rows:
        """The rows whose columns hold these words."""
        table = self.table
        for name, word in words.items():
            chosen = pc.equal(pc.cast(table.column(name), pa.string()), word)
            table = table if pc.all(chosen).as_py() else table.filter(chosen)  # a copy of a million rows takes space
        return self if table is self.table else Rows(table)

    def sorted(self) -> Rows:
        """By id, so that the names of files change no run."""
        order = pc.sort_indices(self.table.column("id")).to_numpy()
        in_order = bool((order[1:] > order[:-1]).all())
        return self if in_order else Rows(self.table.take(pa.array(order)))


_NAMES = tuple(field.name for field in fields(Row))
