"""Pairs of pictures made from what users have: two folders, or pictures with scores; written as a metadata.jsonl."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gesso.data import pairs
from gesso.data.editing.collection import Library
from gesso.data.editing.journal import Journal
from gesso.data.images import content_hash, probe, read
from gesso.data.sources.folder import caption_text
from gesso.data.sources.found import Dropped, Found
from gesso.data.sources.pairs import MISSING, TIE
from gesso.data.sources.table import CAPTION_COLUMNS, IMAGE_COLUMNS, Table, read_table
from gesso.data.sources.tree import LocalTree
from gesso.errors import Problems, UserError

UNCAPTIONED = "the preferred picture has no caption (--prompt gives it one)"
ALONE = "there is one picture of this prompt only"
CLOSE = "the scores are less than {:g} apart"

Progress = Callable[[int, int], None]


class Pair(NamedTuple):
    """One picture preferred to another; `facts` are what else its line says."""

    chosen: Path
    rejected: Path
    caption: str
    facts: dict[str, float] = {}


@dataclass
class Pairing:
    """Pairs that can be trained on, and those that are left out."""

    pairs: list[Pair] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


class Written(NamedTuple):
    """The list that was written, and how many pictures were copied beside it."""

    file: Path
    copied: int


def of_folders(chosen: Path, rejected: Path, *, prompt: str | None = None) -> Pairing:
    """Pictures of equal names, endings aside; captions are those of the first folder, or else `prompt`."""
    first, second = Library(chosen), Library(rejected)
    if first.folder.is_relative_to(second.folder) or second.folder.is_relative_to(first.folder):
        raise UserError("one folder holds the other", where=str(rejected), fix="keep them beside each other")
    if doubled := [*first.shared, *second.shared]:
        where = str(min(doubled))
        raise UserError("another picture has the same name with another ending", where=where, fix="rename one of them")
    found = Pairing()
    others = {Path(item.name).with_suffix(""): item for item in second.items}
    for item in first.items:
        other = others.pop(Path(item.name).with_suffix(""), None)
        caption = item.caption or prompt
        if other is None or caption is None:
            found.dropped.append(Dropped(MISSING if other is None else UNCAPTIONED, str(item.picture)))
        else:
            found.pairs.append(Pair(item.picture, other.picture, caption))
    found.dropped += [Dropped(MISSING, str(item.picture)) for item in others.values()]
    return found


def of_scores(file: Path, *, score_column: str = "score", min_gap: float = 0.0, every: bool = False) -> Pairing:
    """The best picture of each prompt and the worst; with `every`, any two of a prompt whose scores differ.

    `file` is a table of image, prompt and score; paths start from its folder. Pairs less than `min_gap` apart are left
    out, and so are ties. All rows that cannot be read are raised together as `Problems`.
    """
    by_prompt: dict[str, list[tuple[float, Path]]] = {}
    for picture, prompt, score in _scored(file, score_column):
        by_prompt.setdefault(prompt, []).append((score, picture))
    found = Pairing()
    for prompt, scored in by_prompt.items():
        ranked = sorted(scored, key=lambda one: (-one[0], one[1]))
        if len(ranked) == 1:
            found.dropped.append(Dropped(ALONE, f"'{prompt}'"))
            continue
        for best, worst in itertools.combinations(ranked, 2) if every else [(ranked[0], ranked[-1])]:
            gap = best[0] - worst[0]
            if gap == 0 or gap < min_gap:
                why = TIE if gap == 0 else CLOSE.format(min_gap)
                found.dropped.append(Dropped(why, f"'{prompt}': {best[1].name} and {worst[1].name}"))
            else:
                scores = {"chosen_score": best[0], "rejected_score": worst[0]}
                found.pairs.append(Pair(best[1], worst[1], prompt, scores))
    return found


def _scored(file: Path, column: str) -> Iterator[tuple[Path, str, float]]:
    file = file.expanduser().absolute()
    if not file.is_file():
        raise UserError("there is no such file", where=str(file), fix="name a .jsonl, .csv or .parquet table")
    found = Found()
    table = read_table(LocalTree(str(file.parent), [file.name]), file.name, found)
    image, caption = (_column(table, usual) for usual in (IMAGE_COLUMNS, CAPTION_COLUMNS))
    if column not in table.columns:
        there = ", ".join(table.columns)
        raise UserError(
            f"there is no column '{column}'; the columns are: {there}",
            where=table.where,
            fix="name the one with the scores with --score-column",
        )
    rows = []
    for where, row in table.rows:
        try:
            rows.append(_row(row, (image, caption, column), file.parent, where))
        except UserError as error:
            found.problems.append(error)
    if found.problems:
        raise Problems(found.problems, what="nothing was written")
    yield from rows


def _column(table: Table, usual: Sequence[str]) -> str:
    for name in usual:
        if name in table.columns:
            return name
    there = ", ".join(table.columns)
    raise UserError(
        f"none of the columns {', '.join(usual)}; there are: {there}", where=table.where, fix=f"name one {usual[0]}"
    )


def _row(row: dict[str, Any], columns: tuple[str, str, str], folder: Path, where: str) -> tuple[Path, str, float]:
    image, caption, score = (row.get(column) for column in columns)
    if not isinstance(image, str) or not image.strip():
        raise UserError(f"the image path is not text: {image!r}", where=where, fix="write the picture's path")
    picture = folder / image
    if not picture.is_file():
        raise UserError(f"there is no picture '{image}'", where=where, fix="paths start from the folder of the table")
    text = (caption_text(caption, where) or "").strip()
    if not text:
        raise UserError(f"'{columns[1]}' is empty", where=where, fix="write the prompt of the picture")
    try:
        value = float(score)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"'{columns[2]}' is {score!r}", where=where, fix="write a number")
    return picture, text, value


def usable(found: Pairing, progress: Progress | None = None) -> Pairing:
    """What is left when each picture was opened: no two of other shapes, no file against itself, no pair twice."""
    looks: dict[Path, tuple[str, tuple[int, int]]] = {}
    listed = []
    for done, pair in enumerate(found.pairs, start=1):
        for path in (pair.chosen, pair.rejected):
            if path not in looks:
                looks[path] = content_hash(read(path)), probe(path)
        (chosen, size), (rejected, other) = looks[pair.chosen], looks[pair.rejected]
        listed.append(pairs.Facts(None, pair.caption, chosen, rejected, size, other))
        if progress is not None:
            progress(done, len(found.pairs))
    bad = pairs.unusable(listed)
    left = [Dropped(why, f"{found.pairs[i].chosen} and {found.pairs[i].rejected}") for i, why in bad.items()]
    kept = [pair for i, pair in enumerate(found.pairs) if i not in bad]
    return Pairing(kept, [*found.dropped, *left])


def write(found: Pairing, output: Path, *, replace: bool = False, command: str = "pairs") -> Written:
    """Write metadata.jsonl into `output`; pictures from outside are copied into its `images`, as lists need it.

    A list that exists is only written over with `replace`.
    """
    folder = output.expanduser().absolute()
    file = folder / "metadata.jsonl"
    if file.exists() and not replace:
        raise UserError("the file exists", where=str(file), fix="add --replace to write over it (undo brings it back)")
    if not found.pairs:
        raise UserError("no pair is left", where=str(output), fix="see the reasons above")
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    names: dict[Path, str] = {}
    copies: dict[Path, Path] = {}
    for path in dict.fromkeys(path for pair in found.pairs for path in (pair.chosen, pair.rejected)):
        real = path.resolve()
        if not real.is_relative_to(folder):
            # Part of its content in the name: pictures of two folders often share theirs.
            copies[path] = folder / "images" / f"{path.stem}-{content_hash(read(path))[:8]}{path.suffix}"
            real = copies[path]
        names[path] = real.relative_to(folder).as_posix()
    lines = [
        json.dumps(
            {"chosen": names[p.chosen], "rejected": names[p.rejected], "caption": p.caption} | p.facts,
            ensure_ascii=False,
        )
        for p in found.pairs
    ]
    copies = {path: to for path, to in copies.items() if not to.exists()}
    with Journal(folder).begin(command) as edit:
        for path, to in copies.items():
            edit.write(to, read(path))
        edit.write(folder / file.name, "".join(f"{line}\n" for line in lines).encode())
    return Written(file, len(copies))
