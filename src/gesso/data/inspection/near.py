"""Near duplicates: a perceptual hash for each picture, and groups of pictures whose hashes differ in few bits.

The hash is the usual 64-bit pHash: the signs of the low frequencies of a small grey version against their median. It
survives another size, format or compression and small edits. As pictures of one kind can share a hash by chance, a tiny
colour version is compared as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gesso.data.images import decode

DISTANCE = 6
"""Bits of 64 in which the hashes of near duplicates may differ."""

COLOUR_DISTANCE = 10.0
"""Mean difference of 8 x 8 colours, of 255, up to which two pictures with like hashes look alike."""

_SIDE, _LOW, _BITS = 32, 8, 64
_FLAT = 2.0
_PAIRS_AT_ONCE = 1 << 22


class Print(NamedTuple):
    """What is left of a picture to compare it by: the hash, None where there is nothing to see, and 8 x 8 colours."""

    hash: int | None
    colours: bytes


def fingerprint(image: Image.Image) -> Print:
    """The perceptual hash and the tiny colour version of a picture in RGB.

    A picture of a single colour has no hash: any two would be alike.
    """
    small = image.resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    colours = small.resize((_LOW, _LOW), Image.Resampling.BOX).tobytes()
    grey = np.asarray(small.convert("L"), np.float32)
    return Print(perceptual_hash(grey) if grey.std() >= _FLAT else None, colours)


def picture_hash(path: Path) -> Print:
    """The fingerprint of a picture's file; `UserError` where it cannot be read."""
    return fingerprint(decode(path))


def perceptual_hash(grey: NDArray[np.float32]) -> int:
    """The pHash of a grey picture [32, 32]; bit 0 stands for the mean and is always 0."""
    low = (_COSINES @ grey @ _COSINES.T).ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def _cosines() -> NDArray[np.float32]:
    frequency, place = np.arange(_LOW)[:, None], np.arange(_SIDE)[None, :]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * _SIDE)).astype(np.float32)


_COSINES = _cosines()


def alike(one: bytes, other: bytes) -> bool:
    """Whether two tiny colour versions are so close that the pictures look alike."""
    colours = (np.frombuffer(one, np.uint8).astype(np.int16), np.frombuffer(other, np.uint8).astype(np.int16))
    return float(np.abs(colours[0] - colours[1]).mean()) <= COLOUR_DISTANCE


def near_duplicates(prints: Sequence[Print], distance: int = DISTANCE) -> list[list[int]]:
    """Positions of pictures that look alike, group by group; a picture is in one group at most.

    All members of a group have a hash within `distance` bits of the first one's, and colours like it, so that a series
    of small changes does not chain into one group. Takes time in proportion to the number of pictures, unless very many
    of them have like hashes.
    """
    positions: dict[int, list[int]] = {}
    for i, one in enumerate(prints):
        if one.hash is not None:
            positions.setdefault(one.hash, []).append(i)
    values = np.array(sorted(positions), np.uint64)
    neighbours: dict[int, list[int]] = {}
    for a, b in near_pairs(values, distance).tolist():
        neighbours.setdefault(a, []).append(b)
        neighbours.setdefault(b, []).append(a)
    groups: list[list[int]] = []
    taken: set[int] = set()
    # The hash with most neighbours leads: it is the middle of its group.
    order = sorted(range(len(values)), key=lambda v: (-len(neighbours.get(v, ())), positions[int(values[v])][0]))
    for leader in order:
        family = [leader, *neighbours.get(leader, ())]
        waiting = [i for v in family for i in positions[int(values[v])] if i not in taken]
        own = set(positions[int(values[leader])])
        while waiting and waiting[0] in own:
            first, *others = waiting
            group = [first, *(i for i in others if alike(prints[first].colours, prints[i].colours))]
            chosen = set(group)
            waiting = [i for i in waiting if i not in chosen]
            if len(group) > 1:
                taken |= chosen
                groups.append(group)
    return sorted(groups)


def near_pairs(values: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """Pairs [n, 2] of positions, the smaller first, whose 64-bit values differ in at most `distance` bits.

    Cut into distance + 1 bands, two such values agree in one band at least: only those are compared.
    """
    edges = [_BITS * i // (distance + 1) for i in range(distance + 2)]
    found = [np.empty((0, 2), np.int64)]
    for low, high in itertools.pairwise(edges):
        band = (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0])
        for members in np.split(order, starts[1:]) if len(order) else []:
            found += _close(values, members, distance)
    pairs = np.concatenate(found)
    pairs.sort(axis=1)
    return np.unique(pairs, axis=0)


def _close(values: NDArray[np.uint64], members: NDArray[np.int64], distance: int) -> list[NDArray[np.int64]]:
    """The near pairs among the members of one band, some rows of the comparison at a time."""
    if len(members) < 2:
        return []
    own, found = values[members], []
    rows = max(1, _PAIRS_AT_ONCE // len(members))
    for start in range(0, len(members), rows):
        difference = own[start : start + rows, None] ^ own[None, start:]
        a, b = np.nonzero(_ones(difference) <= distance)
        upper = b > a
        if upper.any():
            found.append(np.stack([members[start + a[upper]], members[start + b[upper]]], 1))
    return found


def _ones(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How many bits are set in each."""
    values = values - ((values >> _1) & _M1)
    values = (values & _M2) + ((values >> _2) & _M2)
    values = (values + (values >> _4)) & _M4
    return (values * _H01) >> _56


_1, _2, _4, _56 = (np.uint64(n) for n in (1, 2, 4, 56))
_M1, _M2, _M4, _H01 = (
    np.uint64(m) for m in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101)
)
