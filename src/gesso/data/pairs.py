"""Pairs of pictures of which one was preferred: which of them teach nothing, and what they need of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from gesso.errors import Problems, UserError

if TYPE_CHECKING:
    from gesso.config.run import RunConfig
    from gesso.data.rows import Rows
    from gesso.data.visits import Visit

IDENTICAL = "both pictures are the same"
SHAPES = "the two pictures are not of one shape, and neither is ever stretched"
SMALLER = "one picture is smaller, and data.buckets.upscale is false"
CONTRADICTION = "another pair says the opposite about the same pictures and caption"
DUPLICATE = "the same pair is there already"

PAIR = "pair"
"""What an objective needs of its batches when it compares two pictures."""


class Facts(NamedTuple):
    """One pair after both of its pictures were decoded; sizes are (width, height), upright."""

    group: object
    """Only pairs of one group can be the same or contradict each other."""
    caption: str
    chosen: str
    """Hash of its file; so is the other."""
    rejected: str
    size: tuple[int, int]
    rejected_size: tuple[int, int]


def unusable(pairs: Sequence[Facts], *, upscale: bool = True) -> dict[int, str]:
    """The positions of pairs that cannot be trained on, and why; of equal pairs the first stays.

    `upscale` says whether a picture may be enlarged; if not, one that is smaller than the other cannot be made its
    size.
    """
    found: dict[int, str] = {}
    seen: dict[tuple[object, ...], list[int]] = {}
    for i, pair in enumerate(pairs):
        if pair.chosen == pair.rejected:
            found[i] = IDENTICAL
        elif not same_shape(pair.size, pair.rejected_size):
            found[i] = SHAPES
        elif not upscale and pair.size != pair.rejected_size:
            found[i] = SMALLER
        else:
            pictures = sorted((pair.chosen, pair.rejected))
            seen.setdefault((pair.group, pair.caption, *pictures), []).append(i)
    for members in seen.values():
        contradicted = len({pairs[i].chosen for i in members}) > 1
        found |= dict.fromkeys(members if contradicted else members[1:], CONTRADICTION if contradicted else DUPLICATE)
    return found


def same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are equal, or one is the other resized in proportion, with its sides rounded to pixels."""
    (wide, high), (width, height) = sorted((one, other), reverse=True)
    by_width, by_height = abs(high * width - height * wide), abs(wide * height - width * high)
    return by_width < wide or by_height < high


def connected(both: Sequence[tuple[str, str]]) -> list[str]:
    """The group of each pair (chosen, rejected): pairs that share a picture, be it through others, are in one.

    A single picture has an empty second. A group is named by the least hash in it.
    """
    if not any(rejected for _, rejected in both):
        return [picture for picture, _ in both]
    parents: dict[str, str] = {}

    def root(name: str) -> str:
        while (parent := parents.setdefault(name, name)) != name:
            parents[name] = name = parents[parent]
        return name

    for chosen, rejected in both:
        one, other = root(chosen), root(rejected or chosen)
        parents[max(one, other)] = min(one, other)
    return [root(chosen) for chosen, _ in both]


def sides(visit: Visit) -> tuple[Visit, ...]:
    """The looks at pictures that a visit is made of: one, or two of a pair, the preferred picture first."""
    other = visit.row.other
    return (visit,) if other is None else (visit, replace(visit, row=other))


def require(run: RunConfig, rows: Rows) -> None:
    """Refuse sources without pairs where the objective compares two pictures, and pairs where it does not."""
    wanted = PAIR in run.objective.needs
    sources, paired = rows.numbers("source"), rows.pairs
    problems = []
    for i, source in enumerate([*run.data.sources, *run.data.sources[:1]]):
        own = sources == i
        wrong = own & (paired != wanted)
        if not wrong.any():
            continue
        path = source.path if i < len(run.data.sources) else str(run.data.validation.path)
        count = f"{int(wrong.sum())} of {int(own.sum())} samples"
        if wanted:
            what = f"the objective {run.objective.type} needs pairs of pictures, and {count} here are single pictures"
            fix = "name columns chosen and rejected, or two folders of these names; gesso dataset pairs makes them"
        else:
            what = f"{count} here are pairs of pictures, which the objective {run.objective.type} does not compare"
            fix = "choose an objective that does, or set pairs: chosen to train on the preferred pictures alone"
        problems.append(UserError(what, where=path, fix=fix))
    if problems:
        raise Problems(problems)
