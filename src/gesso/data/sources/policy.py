"""A source's rules for captions and concepts, applied to what its layout gave."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gesso.config.run import Source
from gesso.data.places import Place
from gesso.data.sources.found import Entry, Found, Record, counted, listed, some
from gesso.errors import UserError

MAX_CAPTION = 10_000
"""Characters; longer captions are files that are no captions."""

# Control characters and half of a surrogate pair: tokenisers fail on them or drop them.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def records_of(source: Source, index: int, entries: Sequence[Entry], found: Found) -> list[Record]:
    """The entries as records; what breaks a rule goes to `found`."""
    missing: list[Entry] = []
    nameless: list[Entry] = []
    made: list[Record] = []
    for entry in entries:
        folder, slash, _ = entry.name.partition("/")
        concept = source.concept or (entry.concept if entry.concept is not None else folder if slash else "")
        caption = (entry.caption or "").strip()
        if not caption:
            missing.append(entry)
            if source.missing_captions == "drop":
                continue
            if source.missing_captions == "trigger":
                caption = source.trigger or ""
            elif source.missing_captions == "concept":
                caption = concept
                if not concept:
                    nameless.append(entry)
        elif len(caption) > MAX_CAPTION or _CONTROL.search(caption):
            found.problems.append(_bad_caption(caption, entry.where))
            continue
        repeats = source.repeats * entry.repeats
        weight = 1.0 if entry.weight is None else entry.weight
        made.append(Record(entry.place, caption, index, concept, repeats, entry.mask, entry.rejected, weight))
    if missing:
        _say_missing(source, index, missing, nameless, len(entries), found)
    return made


def _bad_caption(caption: str, where: str) -> UserError:
    if len(caption) > MAX_CAPTION:
        what = f"a caption of {len(caption)} characters (at most {MAX_CAPTION})"
        return UserError(what, where=where, fix="shorten it")
    match = _CONTROL.search(caption)
    code = ord(match[0]) if match else 0
    return UserError(f"the caption holds the control character U+{code:04X}", where=where, fix="remove it")


def _say_missing(
    source: Source, index: int, missing: list[Entry], nameless: list[Entry], total: int, found: Found
) -> None:
    policy, path = source.missing_captions, source.path
    have = "has" if len(missing) == 1 else "have"
    said = f"{len(missing)} of {counted(total, 'picture')} {have} no caption"
    beside = [entry.beside for entry in missing if entry.beside]
    if beside:
        endings = some(sorted({name.rpartition(".")[2] for name in beside}))
        said += f" (not read: {some(beside)}; if captions are in them, set caption_extension to {endings})"
    if policy == "error":
        fix = "write the missing or empty captions, or set missing_captions to empty, trigger, concept or drop"
        found.problems.append(UserError(f"{said}: {listed(e.where for e in missing)}", where=path, fix=fix))
    elif policy == "drop":
        found.notices.append(f"{path}: {said}; left out: {some(str(e.place) for e in missing)}")
        if len(missing) == total:
            what = "no picture is left: none of them has a caption, and missing_captions is 'drop'"
            found.problems.append(UserError(what, where=path, fix="write captions, or set missing_captions"))
    elif policy == "trigger" and not source.trigger:
        what = "missing_captions is 'trigger', but the source has no trigger"
        found.problems.append(UserError(what, where=f"data.sources.{index}.trigger", fix="set the trigger word"))
    elif policy == "concept" and nameless:
        what = f"missing_captions is 'concept', but nothing names the concept of {some(e.name for e in nameless)}"
        found.problems.append(
            UserError(what, where=f"data.sources.{index}.concept", fix="set the concept, or put them in sub-folders")
        )
    else:
        means = {"empty": "no text", "trigger": "the trigger word", "concept": "the concept's name"}[policy]
        found.notices.append(f"{path}: {said}; trained on with {means}: {some(e.name for e in missing)}")


def with_masks(source: Source, entries: list[Entry], masks: dict[str, Place], found: Found) -> list[Entry]:
    """The entries with their mask files; `masks` are by picture without its ending.

    A picture without a mask is a problem if the source has masks; masks that are not used are noticed.
    """
    if source.mask != "file":
        if masks:
            found.notices.append(
                f"{source.path}: {counted(len(masks), 'mask file')} not used, because mask is '{source.mask}': "
                f"{some(str(place) for place in masks.values())}"
            )
        return entries
    stems = [entry.name.rpartition(".")[0] for entry in entries]
    bare = [str(entry.place) for entry, stem in zip(entries, stems, strict=True) if stem not in masks]
    if bare:
        have = "has" if len(bare) == 1 else "have"
        found.problems.append(
            UserError(
                f"{len(bare)} of {counted(len(entries), 'picture')} {have} no mask: {listed(bare)}",
                where=source.path,
                fix="draw NAME-masklabel.png beside each, or set mask to none or alpha",
            )
        )
    lost = sorted(str(masks[stem]) for stem in masks.keys() - set(stems))
    if lost:
        found.notices.append(f"mask files without a picture: {some(lost)}")
    return [entry._replace(mask=masks.get(stem)) for entry, stem in zip(entries, stems, strict=True)]
