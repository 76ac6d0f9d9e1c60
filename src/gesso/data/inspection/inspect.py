"""Everything about a data set that a person should know before training on it: pictures, captions, duplicates, buckets.

Nothing is raised for what is wrong with the data: it is all found in one look, and told as findings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gesso.config.run import Data, Source
from gesso.data import captions, index, pairs, settings
from gesso.data.buckets import Fit, Size, fit_all, sizes_for
from gesso.data.images import background_colour
from gesso.data.inspection.findings import judge
from gesso.data.inspection.look import Look, look
from gesso.data.inspection.result import Bucket, Gathered, Inspection, Item, Picture, Progress
from gesso.data.inspection.wording import wording
from gesso.data.places import is_url
from gesso.data.sources import Record, collect
from gesso.data.sources.found import Dropped
from gesso.data.threads import ahead
from gesso.data.tokens import Counter
from gesso.errors import UserError


def inspect(
    data: Data,
    *,
    tokens: Counter,
    most_tokens: int,
    trigger: str | None = None,
    multiple: int = 8,
    progress: Progress | None = None,
) -> Inspection:
    """Look at every picture and caption of a run's data.

    `trigger` is a word that every caption should have; a source's own trigger is put in by the run. `multiple` is what
    the model needs of every side.
    """
    background_colour(data.background)
    found = Gathered(data, [*data.sources, *index.held_folder(data)])
    for position, source in enumerate(found.sources):
        _gather(found, position, source, progress)
    _drop_pairs(found)
    _split(found)
    _fit(found, multiple)
    words = wording([p.caption for p in found.pictures], tokens=tokens, separator=data.captions.separator)
    found.pictures = [replace(p, tokens=n) for p, n in zip(found.pictures, words.tokens, strict=True)]
    findings = judge(found, words, trigger=trigger, most_tokens=most_tokens, progress=progress)
    return Inspection(
        data,
        tuple(found.pictures),
        tuple(found.unreadable),
        tuple(found.left_out),
        words,
        most_tokens,
        _buckets(found.pictures),
        tuple(findings),
    )


def _gather(found: Gathered, position: int, source: Source, progress: Progress | None) -> None:
    # Missing captions are told with their pictures, so here they are let through.
    listed = collect(source.model_copy(update={"missing_captions": "empty"}), index=position)
    found.problems += listed.problems
    told = ("trained on with no text", *(f"left out: {one.why}" for one in listed.dropped))
    found.notices += [notice for notice in listed.notices if not any(text in notice for text in told)]
    found.dropped += listed.dropped
    found.left_out += [Item(one.where, one.why) for one in listed.dropped]
    root = "" if is_url(source.path) else os.path.abspath(os.path.expanduser(source.path)) + os.sep
    several = len(found.sources) > 1

    def seen(record: Record) -> tuple[Look, Look | None] | UserError:
        one = look(record, background=found.data.background)
        if isinstance(one, UserError) or record.rejected is None:
            return one if isinstance(one, UserError) else (one, None)
        other = look(Record(record.rejected, ""), background=found.data.background)
        return other if isinstance(other, UserError) else (one, other)

    threads = min(8, os.cpu_count() or 1)
    looks = ahead(seen, listed.records, threads=threads, depth=8 * threads)
    total = len(listed.records)
    for done, (record, what) in enumerate(zip(listed.records, looks, strict=True), start=1):
        name = str(record.place)
        name = name if several else name.removeprefix(root)
        if isinstance(what, UserError):
            place = "" if what.where == str(record.place) else f"{what.where}: "
            found.unreadable.append(Item(name, place + what.what))
            if found.data.skip_bad:
                found.left_out.append(Item(name, "it cannot be read, and data.skip_bad is true"))
        else:
            _add(found, source, record, name, what[0])
            _pair_up(found, record, what[1])
        if progress is not None and (done == total or done % max(1, total // 500) == 0):
            progress("looking at pictures", done, total)


def _add(found: Gathered, source: Source, record: Record, name: str, what: Look) -> None:
    text, options = record.caption, settings.words(source, found.data)
    if not text:
        found.uncaptioned.append((source, Item(name, "", len(found.pictures))))
        if source.missing_captions == "drop":
            found.left_out.append(Item(name, "it has no caption, and missing_captions is drop"))
            found.uncaptioned[-1] = (source, Item(name))
            return
        text = {"trigger": source.trigger or "", "concept": record.concept}.get(source.missing_captions, "")
    wrong = captions.problems(text, options)
    found.malformed += [Item(name, problem, len(found.pictures)) for problem in wrong]
    shown = text if wrong else captions.render(text, options, trigger=source.trigger, draws=None)
    found.pictures.append(Picture(name, record, what, shown, bool(record.caption), 0, "train", (), False))


def _pair_up(found: Gathered, record: Record, rival: Look | None) -> None:
    if rival is not None and found.pictures and found.pictures[-1].record is record:
        found.pictures[-1] = replace(found.pictures[-1], rejected=rival)


def _drop_pairs(found: Gathered) -> None:
    """Leave out the pairs that a run would leave out."""
    own = len(found.data.sources)
    paired = [(i, p, p.rejected) for i, p in enumerate(found.pictures) if p.rejected is not None]
    facts = [
        pairs.Facts(
            *(p.record.source == own, p.record.caption, p.look.image, rival.image),
            *((p.look.width, p.look.height), (rival.width, rival.height)),
        )
        for _, p, rival in paired
    ]
    bad = pairs.unusable(facts, upscale=found.data.buckets.upscale)
    gone = {paired[k][0]: why for k, why in sorted(bad.items())}
    rivals = {i: p.record.rejected.name for i, p, _ in paired if p.record.rejected is not None}
    dropped = [Dropped(why, f"{found.pictures[i].name} and {rivals[i]}") for i, why in gone.items()]
    found.dropped += dropped
    found.left_out += [Item(one.where, one.why) for one in dropped]
    kept = [i for i in range(len(found.pictures)) if i not in gone]
    places = {old: new for new, old in enumerate(kept)}

    def moved(item: Item) -> Item:
        return item if item.picture is None else item._replace(picture=places.get(item.picture))

    found.pictures = [found.pictures[i] for i in kept]
    found.uncaptioned = [(source, moved(item)) for source, item in found.uncaptioned]
    found.malformed = [moved(item) for item in found.malformed]


def _split(found: Gathered) -> None:
    """Which pictures a run would hold out."""
    if not found.pictures:
        return
    own = len(found.data.sources)
    images = pairs.connected([(p.look.image, p.rejected.image if p.rejected else "") for p in found.pictures])
    fraction = found.data.validation.fraction
    try:
        chosen = index.held_out(images, fraction) if fraction else set()
    except UserError as error:
        found.problems.append(error)
        return
    found.pictures = [
        replace(p, split="validation") if image in chosen or p.record.source == own else p
        for p, image in zip(found.pictures, images, strict=True)
    ]


def _fit(found: Gathered, multiple: int) -> None:
    """Every picture's bucket at each resolution of its source."""
    fits: list[list[Fit]] = [[] for _ in found.pictures]
    small = np.zeros(len(found.pictures), bool)
    for position, source in enumerate(found.sources):
        members = [i for i, p in enumerate(found.pictures) if p.record.source == position]
        widths = np.array([found.pictures[i].look.width for i in members], np.int32)
        heights = np.array([found.pictures[i].look.height for i in members], np.int32)
        for side in settings.resolutions(source, found.data):
            try:
                sizes, found.step = sizes_for(found.data, resolution=side, multiple=multiple)
            except UserError as error:
                if error.what not in [problem.what for problem in found.problems]:
                    found.problems.append(error)
                continue
            upscale = found.data.buckets.upscale
            chosen = fit_all(widths, heights, sizes=sizes, step=found.step, upscale=upscale)
            for j, i in enumerate(members):
                if chosen.buckets[j].all():
                    fits[i].append(chosen.one(j))
                else:
                    small[i] = True
    found.pictures = [
        replace(p, fits=tuple(f), too_small=bool(s)) for p, f, s in zip(found.pictures, fits, small, strict=True)
    ]


def _buckets(pictures: Sequence[Picture]) -> tuple[Bucket, ...]:
    losses: dict[Size, list[float]] = {}
    for picture in pictures:
        for fit in picture.fits if picture.split == "train" else ():
            losses.setdefault(fit.bucket, []).append(fit.crop_loss)
    rows = [Bucket(size, len(values), sum(values) / len(values)) for size, values in losses.items()]
    return tuple(sorted(rows, key=lambda row: (-row.images, row.size)))
