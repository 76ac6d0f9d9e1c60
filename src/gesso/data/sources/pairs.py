"""Pairs of pictures of which one was preferred: where a table or a folder has the two, and which of them won."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from gesso.config.run import Source
from gesso.data.places import Place
from gesso.data.sources import folder
from gesso.data.sources.found import Dropped, Entry, Found, counted, listed, some
from gesso.data.sources.tree import Kinds, Tree
from gesso.errors import UserError

NAMED = (("chosen", "rejected"), ("preferred", "rejected"), ("winner", "loser"))
"""Columns, or folders, with the preferred pictures and with the others."""
NUMBERED = (("jpg_0", "jpg_1", "label_0"), ("image_0", "image_1", "label_0"))
"""Columns with two pictures and with what says whether the first is preferred, as in Pick-a-Pic."""
_FOLDERS = (*NAMED, ("winners", "losers"))

TIE = "neither is preferred (a tie)"
UNLABELLED = "nothing says which is preferred"
MISSING = "one of the two pictures is missing"


class Columns(NamedTuple):
    """The columns of a pair: with a label it says whether the first picture is preferred, without one it always is."""

    first: str
    second: str
    label: str | None


def columns(names: Sequence[str], pictures: Sequence[str], source: Source, where: str) -> Columns | None:
    """Which columns hold pairs; None where there are none. `pictures` are those that can hold pictures."""
    if source.pairs == "none":
        return None
    if source.rejected_column is None and source.label_column is None:
        return None if source.image_column is not None else _usual(names, pictures)
    for key, name in (("rejected_column", source.rejected_column), ("label_column", source.label_column)):
        if name is not None and name not in names:
            what = f"there is no column '{name}'; the columns are: {', '.join(names) or 'none'}"
            raise UserError(what, where=where, fix=f"set {key}")
    known = [*NAMED, *(one[:2] for one in NUMBERED)]
    first, second, label = source.image_column, source.rejected_column, source.label_column
    there = [pair for pair in known if pair[0] in pictures and pair[1] in pictures]
    second = second or next((b for a, b in there if first in (None, a)), None)
    if label is None and first is None:
        label = next((c for a, b, c in NUMBERED if b == second and a in pictures and c in names), None)
    first = first or next((a for a, b in there if b == second), None)
    one = _of_pictures(first, "image_column", names, pictures, where)
    other = _of_pictures(second, "rejected_column", names, pictures, where)
    if one == other:
        raise UserError(f"both pictures of a pair are from '{one}'", where=where, fix="set image_column")
    return Columns(one, other, label)


def _of_pictures(name: str | None, key: str, names: Sequence[str], pictures: Sequence[str], where: str) -> str:
    if name is None or name not in pictures:
        told = f"the column '{name}' holds no pictures" if name in names else "a pair needs two columns of pictures"
        what = f"{told}; the columns are: {', '.join(names) or 'none'}"
        raise UserError(what, where=where, fix=f"set {key}")
    return name


def _usual(names: Sequence[str], pictures: Sequence[str]) -> Columns | None:
    for first, second in NAMED:
        if first in pictures and second in pictures:
            return Columns(first, second, None)
    for first, second, label in NUMBERED:
        if first in pictures and second in pictures and label in names:
            return Columns(first, second, label)
    return None


def decided(
    first: Place | None, second: Place | None, label: Any, pair: Columns, where: str, found: Found
) -> tuple[Place, Place] | None:
    """The preferred picture and the other; None, counted in `found`, if there is nothing to learn from them."""
    if first is None or second is None:
        found.dropped.append(Dropped(MISSING, where))
        return None
    if pair.label is None:
        return first, second
    value = _number(label, pair.label, where)
    if value is None or value == 0.5:
        found.dropped.append(Dropped(UNLABELLED if value is None else TIE, where))
        return None
    return (first, second) if value == 1 else (second, first)


def _number(label: Any, column: str, where: str) -> float | None:
    if label is None or (isinstance(label, str) and not label.strip()):
        return None
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = -1.0
    if math.isnan(value):
        return None
    if value not in (0, 0.5, 1):
        what = f"'{column}' is {label!r}"
        raise UserError(
            what, where=where, fix="write 1 if the first picture is preferred, 0 if the second is, 0.5 if none"
        )
    return value


def folders(kinds: Kinds) -> tuple[str, str] | None:
    """The two folders at the top of a tree that hold preferred pictures and the others, as they are written."""
    tops = {name.partition("/")[0] for _, name in kinds.pictures if "/" in name}
    by_name = {top.lower(): top for top in tops}
    for chosen, rejected in _FOLDERS:
        if chosen in by_name and rejected in by_name:
            return by_name[chosen], by_name[rejected]
    return None


def folder_entries(source: Source, tree: Tree, kinds: Kinds, two: tuple[str, str], found: Found) -> list[Entry]:
    """The pictures of the first folder, with the captions beside them, each with that of its stem in the other."""
    chosen, rejected = (f"{top}/" for top in two)
    others, doubled = _by_stem(kinds, rejected)
    ours = Kinds(
        pictures=[(stem, name) for stem, name in kinds.pictures if name.startswith(chosen)],
        sides={stem: files for stem, files in kinds.sides.items() if stem.startswith(chosen)},
        others=kinds.others,
    )
    made = []
    for entry in folder.entries(source.model_copy(update={"mask": "none"}), tree, ours, found):
        inner = entry.name.removeprefix(chosen)
        other = others.pop(inner.rpartition(".")[0], None)
        if other is None:
            found.dropped.append(Dropped(MISSING, tree.shown(entry.name)))
            continue
        concept = inner.partition("/")[0] if "/" in inner else ""
        made.append(entry._replace(rejected=tree.place(other), concept=concept))
    found.dropped += [Dropped(MISSING, tree.shown(name)) for name in others.values()]
    if doubled:
        what = f"several pictures of one stem, so the pair is not clear: {listed(doubled)}"
        found.problems.append(UserError(what, where=tree.shown(two[1]), fix="keep one of each, or rename the others"))
    _notice_unused(tree, kinds, (chosen, rejected), found)
    return made


def _by_stem(kinds: Kinds, top: str) -> tuple[dict[str, str], list[str]]:
    stems = Counter(stem for stem, name in kinds.pictures if name.startswith(top))
    names = {stem.removeprefix(top): name for stem, name in kinds.pictures if name.startswith(top)}
    return names, [name for stem, name in kinds.pictures if stems[stem] > 1]


def _notice_unused(tree: Tree, kinds: Kinds, tops: tuple[str, str], found: Found) -> None:
    outside = [name for _, name in kinds.pictures if not name.startswith(tops)]
    if outside:
        found.notices.append(f"{tree.root}: pictures outside of {tops[0]} and {tops[1]} are not used: {some(outside)}")
    beside = sorted(side for stem, sides in kinds.sides.items() if stem.startswith(tops[1]) for side in sides)
    if beside:
        found.notices.append(
            f"{tree.root}: {counted(len(beside), 'caption file')} in {tops[1]} not read, because a pair's caption is "
            f"the preferred picture's: {some(beside)}"
        )


def settle(source: Source, entries: Sequence[Entry], found: Found) -> list[Entry]:
    """The entries as the source wants its pairs; says what is left out, and what setting has no effect."""
    paired = any(entry.rejected is not None for entry in entries)
    if found.dropped:
        tell_dropped(source.path, found.dropped, len(entries) + len(found.dropped), found.notices)
    columns = [key for key in ("rejected_column", "label_column") if source.model_dump()[key] is not None]
    if not paired:
        if (source.pairs == "chosen" or columns) and not found.dropped and not found.problems:
            set_ = columns[0] if columns else "pairs"
            what = f"{set_} is set, but no pairs of pictures were found"
            found.problems.append(UserError(what, where=source.path, fix=f"take {set_} out, or name the columns"))
        return list(entries)
    if source.pairs == "chosen":
        return [entry._replace(rejected=None) for entry in entries]
    if source.mask != "none":
        what = f"mask is '{source.mask}', and pairs of pictures have no masks"
        found.problems.append(UserError(what, where=source.path, fix="set mask to none"))
    return list(entries)


def tell_dropped(path: str, dropped: Sequence[Dropped], total: int, notices: list[str]) -> None:
    """Say how many pairs are left out, for each reason."""
    for why, count in Counter(one.why for one in dropped).items():
        places = some(one.where for one in dropped if one.why == why)
        notices.append(f"{path}: {count} of {counted(total, 'pair')} left out: {why}: {places}")
