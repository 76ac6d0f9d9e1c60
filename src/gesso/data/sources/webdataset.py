"""WebDataset shards: TARs in which a picture and its caption have one key. Only where things lie is kept of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gesso.config.run import Source
from gesso.data.images import EXTENSIONS
from gesso.data.places import Place, is_url
from gesso.data.sources.archive import Member, tar_members
from gesso.data.sources.folder import caption_endings, read_caption
from gesso.data.sources.found import Entry, Found, counted, listed, some
from gesso.data.sources.policy import with_masks
from gesso.data.sources.tree import MASK, UNREAD_ENDINGS
from gesso.data.threads import ahead
from gesso.errors import UserError

MAX_SHARDS = 100_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_THREADS = 8


@dataclass(slots=True)
class _Sample:
    """What a shard holds under one key, ending -> member."""

    pictures: dict[str, Member] = field(default_factory=dict)
    sides: dict[str, Member] = field(default_factory=dict)


class _Shard(NamedTuple):
    entries: list[Entry]
    masks: dict[str, Place]
    unused: list[str]
    several: list[str]
    found: Found


def is_pattern(path: str) -> bool:
    """Whether a path names several files, as in set-{000..099}.tar."""
    return _BRACES.search(path) is not None


def expand(pattern: str) -> list[str]:
    """The names that a pattern with {000..099} or {a,b} stands for."""
    parts = _BRACES.split(pattern)
    choices = [list(_choices(part, pattern)) if i % 2 else [part] for i, part in enumerate(parts)]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > MAX_SHARDS:
        raise UserError(f"{count} shards, more than {MAX_SHARDS}", where=pattern, fix="name fewer at once")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, pattern: str) -> Iterator[str]:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if match is None:
        if "," not in inside:
            raise UserError(f"{{{inside}}} is no range", where=pattern, fix="write {000..099} or {a,b}")
        yield from inside.split(",")
        return
    first, last = int(match[1]), int(match[2])
    if last < first or last - first >= MAX_SHARDS:
        raise UserError(f"{{{inside}}} is no range of up to {MAX_SHARDS}", where=pattern, fix="write {000..099}")
    width = len(match[1]) if match[1].startswith("0") or len(match[1]) == len(match[2]) else 0
    yield from (f"{number:0{width}}" for number in range(first, last + 1))


def pairs_up(members: Sequence[Member], source: Source) -> bool:
    """Whether every key of an archive has one picture and a caption, as in a shard."""
    samples, _, _ = _samples(members, caption_endings(source))
    pictures = [sample for sample in samples.values() if sample.pictures]
    return bool(pictures) and all(len(sample.pictures) == 1 and sample.sides for sample in pictures)


def entries(urls: Sequence[str], source: Source, found: Found) -> list[Entry]:
    """The samples of all shards; a shard that cannot be read is a problem, and so is a key with several pictures."""

    def look(url: str) -> _Shard:
        own = Found()
        try:
            return _shard(url, tar_members(url, own), source, own)
        except UserError as error:
            own.problems.append(error)
            return _Shard([], {}, [], [], own)

    threads = _THREADS if any(map(is_url, urls)) else 1
    shards = ahead(look, urls, threads=threads, depth=2 * threads) if threads > 1 else map(look, urls)
    return _joined(list(shards), source, found)


def entries_of(url: str, members: Sequence[Member], source: Source, found: Found) -> list[Entry]:
    """As `entries`, of one shard whose members are known."""
    return _joined([_shard(url, members, source, Found())], source, found)


def _joined(shards: Sequence[_Shard], source: Source, found: Found) -> list[Entry]:
    for shard in shards:
        found.problems += shard.found.problems
        found.notices += shard.found.notices
        found.hidden += shard.found.hidden
    unused = [name for shard in shards for name in shard.unused]
    several = [name for shard in shards for name in shard.several]
    if unused:
        found.notices.append(f"{source.path}: {counted(len(unused), 'member')} not used: {some(unused)}")
    if several:
        found.notices.append(
            f"{source.path}: several captions under one key, of which the first is read: {some(several)}"
        )
    masks = {stem: place for shard in shards for stem, place in shard.masks.items()}
    return with_masks(source, [entry for shard in shards for entry in shard.entries], masks, found)


def _shard(url: str, members: Sequence[Member], source: Source, found: Found) -> _Shard:
    endings = caption_endings(source)
    samples, masks, unused = _samples(members, endings)
    made: list[Entry] = []
    several: list[str] = []
    doubled: list[str] = []
    for key, sample in samples.items():
        if not sample.pictures:
            unused += [f"{url}::{member.name}" for member in sample.sides.values()]
            continue
        if len(sample.pictures) > 1:
            doubled.append(f"{key} ({', '.join(sorted(sample.pictures))})")
            continue
        side = next((sample.sides[ending] for ending in endings if ending in sample.sides), None)
        if len(sample.sides) > 1 and side is not None:
            several.append(f"{url}::{key} ({', '.join(sorted(sample.sides))})")
        [(ending, picture)] = sample.pictures.items()
        try:
            caption, where = _caption(side, f"{url}::{key}{endings[0]}", source)
        except UserError as error:
            found.problems.append(error)
            continue
        folder, slash, _ = key.partition("/")
        made.append(Entry(f"{url}/{key}{ending}", picture.place, caption, where, None, folder if slash else ""))
    if doubled:
        what = f"several pictures under one key: {listed(doubled)}"
        found.problems.append(UserError(what, where=url, fix="give each a key of its own"))
    return _Shard(made, {f"{url}/{key}": mask.place for key, mask in masks.items()}, unused, several, found)


def _caption(side: Member | None, expected: str, source: Source) -> tuple[str | None, str]:
    if side is None:
        return None, expected
    where = str(side.place)
    if side.text is None:
        raise UserError("the caption file is too long", where=where, fix="shorten it")
    return read_caption(side.text, where, key=source.caption_column), where


def _samples(
    members: Sequence[Member], endings: Sequence[str]
) -> tuple[dict[str, _Sample], dict[str, Member], list[str]]:
    """Members by key (a name up to the first dot of its last part), masks by key, and pictures of no use."""
    samples: dict[str, _Sample] = {}
    masks: dict[str, Member] = {}
    unused: list[str] = []
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, rest = base.partition(".")
        key, ending = f"{folder}{slash}{stem}", f"{dot}{rest.lower()}"
        if key.lower().endswith(MASK) and ending == ".png":
            masks[key[: -len(MASK)]] = member
        elif ending in EXTENSIONS and not key.lower().endswith(MASK):
            samples.setdefault(key, _Sample()).pictures[ending] = member
        elif ending in endings:
            samples.setdefault(key, _Sample()).sides[ending] = member
        elif ending.endswith(EXTENSIONS) or ending in UNREAD_ENDINGS:
            unused.append(str(member.place))
    return samples, masks, unused
