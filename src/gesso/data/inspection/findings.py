"""The rules that judge a data set: each says what is wrong with one thing, with which files, and what to do."""

from __future__ import annotations

import unicodedata
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Sequence

from gesso.data import pairs
from gesso.data.captions import contains
from gesso.data.inspection import near
from gesso.data.inspection.look import ending_fits
from gesso.data.inspection.result import Finding, Gathered, Item, Picture, Progress, Severity
from gesso.data.inspection.wording import Wording
from gesso.data.sources.found import counted
from gesso.data.sources.pairs import MISSING, TIE, UNLABELLED

TINY = 4
"""A picture whose shorter side is under the resolution divided by this is tiny."""

ASPECT = 3.0
"""Longer side over shorter side above which a picture is extreme."""

ENLARGED = 1.5
"""Above this the enlargement blurs visibly."""

CROPPED = 0.3
"""Share of a picture's area that may be cropped away before it is told."""

BLURRED = 0.06
"""Least `look.sharpness` of a sharp picture: measured sharp ones have over 0.8, and those blurred by a Gaussian of 2
pixels at 512 pixels under 0.06."""

FLAT = 2.0
"""Contrast, of 255, below which there is nothing to see."""

_ODD = ("Cf", "Co", "Cn")
_BAKED = "--fix turns the pixels themselves, and keeps the originals"


def judge(
    found: Gathered, words: Wording, *, trigger: str | None, most_tokens: int, progress: Progress | None
) -> list[Finding]:
    """All findings, the gravest first."""
    findings = [
        *_problems(found),
        *_unreadable(found),
        *_malformed(found),
        *_uncaptioned(found),
        *_pairs(found),
        *_sizes(found),
        *_quality(found.pictures),
        *_duplicates(found.pictures, progress),
        *_captions(found, words, most_tokens),
        *_trigger(found, trigger),
        *_files(found.pictures),
        *(Finding("hint", "note", notice, "") for notice in found.notices),
    ]
    order: dict[Severity, int] = {"error": 0, "warning": 1, "hint": 2}
    return sorted(findings, key=lambda finding: order[finding.severity])


def _problems(found: Gathered) -> Iterable[Finding]:
    """What the sources themselves complain of; those of one kind, mended alike, in one finding."""
    by_fix: dict[str, list[tuple[str, str]]] = {}
    for problem in found.problems:
        by_fix.setdefault(problem.fix, []).append((problem.where, problem.what))
    for fix, listed in by_fix.items():
        kinds = {what for _, what in listed}
        what = listed[0][1] if len(kinds) == 1 else f"{len(listed)} problems in captions, tables or folders"
        what += f" ({len(listed)} times)" if len(listed) > len(kinds) == 1 else ""
        items = [Item(where, said if len(kinds) > 1 else "") for where, said in listed]
        yield Finding("error", "source", what, fix, tuple(items))
    if not found.problems and not found.unreadable and not found.pictures:
        yield Finding("error", "source", "no picture is left to train on", "mend what is named below")


def _unreadable(found: Gathered) -> Iterable[Finding]:
    if found.unreadable:
        skipped = found.data.skip_bad
        fix = "replace or remove them" + ("; a run leaves them out" if skipped else ", or set data.skip_bad")
        what = f"{counted(len(found.unreadable), 'picture')} cannot be used"
        yield Finding("warning" if skipped else "error", "unreadable", what, fix, tuple(found.unreadable))


def _malformed(found: Gathered) -> Iterable[Finding]:
    if found.malformed:
        what = f"{counted(len(found.malformed), 'caption')} cannot be read with these caption options"
        fix = r"mend them (\{, \| and \} are the characters themselves), or change the options"
        yield Finding("error", "malformed", what, fix, tuple(found.malformed))


def _uncaptioned(found: Gathered) -> Iterable[Finding]:
    by_policy: dict[str, list[Item]] = {}
    for source, item in found.uncaptioned:
        policy: str = source.missing_captions
        if policy == "trigger" and not source.trigger:
            policy = "error"
        by_policy.setdefault(policy, []).append(item)
    means = {
        "error": ": a run would not start",
        "empty": ": trained on with no text",
        "trigger": ": trained on with the trigger word alone",
        "concept": ": trained on with the concept's name",
        "drop": ": left out",
    }
    for policy, items in by_policy.items():
        what = f"{counted(len(items), 'picture')} without a caption, or with an empty one{means[policy]}"
        fix = "write captions" + ("" if policy != "error" else ", or set missing_captions for the source")
        yield Finding("error" if policy == "error" else "hint", "no caption", what, fix, tuple(items))


_PAIRS: tuple[tuple[Severity, str, str], ...] = (
    ("hint", "tie", TIE),
    ("hint", "pair without a label", UNLABELLED),
    ("warning", "half a pair", MISSING),
    ("warning", "identical pair", pairs.IDENTICAL),
    ("warning", "pair of two shapes", pairs.SHAPES),
    ("warning", "pair of two sizes", pairs.SMALLER),
    ("warning", "duplicate pair", pairs.DUPLICATE),
    ("warning", "contradiction", pairs.CONTRADICTION),
)


def _pairs(found: Gathered) -> Iterable[Finding]:
    """How many pairs there are, and those that a run leaves out, by the reason."""
    count = sum(picture.rejected is not None for picture in found.pictures)
    total = count + len(found.dropped)
    if total:
        yield Finding("hint", "pairs", f"{count} of {counted(total, 'pair')} of pictures can be trained on", "")
    for severity, rule, why in _PAIRS:
        items = tuple(Item(one.where) for one in found.dropped if one.why == why)
        if items:
            yield Finding(severity, rule, f"{counted(len(items), 'pair')} left out: {why}", "", items)


def _sizes(found: Gathered) -> Iterable[Finding]:
    pictures, data = found.pictures, found.data
    small = [i for i, p in enumerate(pictures) if p.too_small]
    yield from _some(
        found.pictures,
        small,
        ("error", "too small for a bucket", f"{{}} smaller than one bucket step of {found.step} pixels"),
        "remove them, or set data.buckets.upscale to true",
        lambda p: f"{p.look.width} x {p.look.height}",
    )
    limit = data.resolution // TINY
    tiny = [i for i, p in enumerate(pictures) if min(p.look.width, p.look.height) < limit and not p.too_small]
    told = set(tiny)
    yield from _some(
        pictures,
        tiny,
        ("warning", "tiny", f"{{}} with a side under {limit} pixels"),
        "replace them with larger versions, or remove them",
        lambda p: f"{p.look.width} x {p.look.height}" + (f", enlarged {p.enlarged:.1f} times" * (p.enlarged > 1)),
    )
    yield from _some(
        pictures,
        [i for i, p in enumerate(pictures) if p.enlarged > ENLARGED and i not in told],
        ("warning", "enlarged", f"{{}} enlarged more than {ENLARGED} times, which blurs"),
        "use larger versions or a lower resolution, or set data.buckets.upscale to false",
        lambda p: f"{p.look.width} x {p.look.height}, enlarged {p.enlarged:.1f} times",
    )
    yield from _some(
        pictures,
        [i for i, p in enumerate(pictures) if _aspect(p) > ASPECT],
        ("warning", "extreme aspect", f"{{}} more than {ASPECT:g} times as long as wide"),
        "crop them by hand to what matters",
        lambda p: f"{p.look.width} x {p.look.height}, {_aspect(p):.1f} : 1",
    )
    cropped = [i for i, p in enumerate(pictures) if p.crop_loss > CROPPED]
    yield from _some(
        pictures,
        sorted(cropped, key=lambda i: -pictures[i].crop_loss),
        ("warning", "cropped", f"{{}} lose more than {CROPPED:.0%} of their area to the crop"),
        "crop them by hand to what matters, or widen data.buckets (smallest, largest)",
        lambda p: f"{p.crop_loss:.0%} cropped away",
    )


def _aspect(picture: Picture) -> float:
    sides = picture.look.width, picture.look.height
    return max(sides) / min(sides)


def _quality(pictures: Sequence[Picture]) -> Iterable[Finding]:
    flat = [i for i, p in enumerate(pictures) if p.look.contrast < FLAT]
    blurred = [i for i, p in enumerate(pictures) if p.look.sharpness < BLURRED and p.look.contrast >= FLAT]
    yield from _some(
        pictures,
        sorted(blurred, key=lambda i: pictures[i].look.sharpness),
        ("warning", "blurred", f"{{}} with no sharp part (sharpness under {BLURRED})"),
        "remove them, or use sharper versions",
        lambda p: f"sharpness {p.look.sharpness:.3f}",
    )
    yield from _some(
        pictures,
        flat,
        ("hint", "flat", "{} of a single colour"),
        "remove them unless that is meant",
        lambda p: f"contrast {p.look.contrast:.1f} of 255",
    )


def _duplicates(pictures: Sequence[Picture], progress: Progress | None) -> Iterable[Finding]:
    by_content: dict[str, list[int]] = {}
    for i, picture in enumerate(pictures):
        if picture.rejected is None:  # pairs share pictures, and often look alike
            by_content.setdefault(picture.look.image, []).append(i)
    exact = [group for group in by_content.values() if len(group) > 1]
    # One of each content is compared: equal files are told as such.
    firsts = [group[0] for group in by_content.values()]
    if progress is not None:
        progress("comparing pictures", 0, len(firsts))
    groups = near.near_duplicates([pictures[i].look.print for i in firsts])
    alike = [[firsts[i] for i in group] for group in groups]
    if progress is not None:
        progress("comparing pictures", len(firsts), len(firsts))
    if exact:
        count = sum(len(group) - 1 for group in exact)
        what = f"{counted(count, 'picture')} there already, the same to the byte"
        fix = "keep one of each (gesso dataset dedupe); `repeats` is how to see a picture more often"
        yield Finding("warning", "duplicate", what, fix, groups=_grouped(pictures, exact))
    if alike:
        what = f"{counted(len(alike), 'group')} of pictures that look alike (hashes at most {near.DISTANCE} of 64 bits "
        what += "apart, and like colours)"
        fix = "keep the best of each (gesso dataset dedupe --near 6), unless each is meant to count"
        yield Finding("warning", "near duplicate", what, fix, groups=_grouped(pictures, alike))
    everything = {i: by_content[pictures[i].look.image] for group in alike for i in group}
    families = [*exact, *([j for i in group for j in everything[i]] for group in alike)]
    leaks = [family for family in families if len({pictures[i].split for i in family}) > 1]
    if leaks:
        held = {i for family in leaks for i in family if pictures[i].split == "validation"}
        what = (
            f"{counted(len(held), 'held-out picture')} also trained on, or nearly: the validation loss looks too good"
        )
        fix = "remove the copies, or hold out a folder of other pictures (data.validation.path)"
        yield Finding("warning", "leakage", what, fix, groups=_grouped(pictures, leaks, split=True))


def _grouped(
    pictures: Sequence[Picture], groups: Sequence[Sequence[int]], *, split: bool = False
) -> tuple[tuple[Item, ...], ...]:
    def item(i: int) -> Item:
        seen = pictures[i]
        size = f"{seen.look.width} x {seen.look.height}"
        return Item(seen.name, {"train": "trained on", "validation": "held out"}[seen.split] if split else size, i)

    return tuple(tuple(item(i) for i in group) for group in groups)


def _captions(found: Gathered, words: Wording, most_tokens: int) -> Iterable[Finding]:
    pictures = found.pictures
    long = [i for i, p in enumerate(pictures) if p.tokens > most_tokens]
    yield from _some(
        pictures,
        sorted(long, key=lambda i: -pictures[i].tokens),
        ("warning", "long caption", f"{{}} with a caption of more than {most_tokens} tokens ({words.method})"),
        "shorten them, put what matters first, or set model.long_prompts to chunk: what is over is cut",
        lambda p: f"{'' if words.exact else 'about '}{p.tokens} tokens",
    )
    odd = {i: _odd(p.record.caption) for i, p in enumerate(pictures)}
    yield from _some(
        pictures,
        [i for i, text in odd.items() if text],
        ("warning", "odd characters", "{} with invisible or broken characters in the caption"),
        "remove them: the text encoders read them as something else",
        lambda p: _odd(p.record.caption),
    )
    if pictures and words.captions:
        text, count = Tally(p.caption for p in pictures if p.has_caption).most_common(1)[0]
        if count > 3 and 2 * count > words.captions:
            what = f"{count} of {words.captions} captions are the same: '{text[:60]}'"
            yield Finding(
                "hint", "same caption", what, "say what differs, so that it is not learnt as part of the word"
            )


def _odd(text: str) -> str:
    """Invisible, unassigned and replacement characters, by number; those that join emoji and letters are ordinary."""
    found = [
        f"U+{ord(character):04X}"
        for character in dict.fromkeys(text)
        if character == "\ufffd" or (character not in "\u200c\u200d" and unicodedata.category(character) in _ODD)
    ]
    return ", ".join(found)


def _trigger(found: Gathered, trigger: str | None) -> Iterable[Finding]:
    """Which captions have the trigger word, as a whole word in any case."""
    for position, source in enumerate(found.data.sources):
        word = source.trigger or (trigger if source.role == "instance" else None)
        own = [i for i, p in enumerate(found.pictures) if p.record.source == position and p.has_caption]
        if not word or not own:
            continue
        bare = [i for i in own if not contains(found.pictures[i].record.caption, word)]
        share = 1 - len(bare) / len(own)
        what = f"'{word}' is in {share:.1%} of the captions ({len(own) - len(bare)} of {len(own)})"
        what += f" of {source.path}" if len(found.data.sources) > 1 else ""
        items = tuple(Item(found.pictures[i].name, found.pictures[i].record.caption[:80], i) for i in bare)
        if source.trigger:
            put = f"; a run puts it before {counted(len(bare), 'other')}" if bare else ""
            yield Finding("hint", "trigger", what + put, "", items)
        else:
            fix = "set the source's trigger, and a run puts it before the others" if bare else ""
            yield Finding("warning" if bare else "hint", "trigger", what, fix, items)


def _files(pictures: Sequence[Picture]) -> Iterable[Finding]:
    turned = [i for i, p in enumerate(pictures) if p.look.orientation != 1]
    yield from _some(
        pictures,
        turned,
        ("hint", "orientation", "{} stored turned, with a note (EXIF) on how to turn it back; a run does that"),
        f"nothing has to be done; other tools may show them turned: {_BAKED}",
        lambda p: f"orientation {p.look.orientation}",
    )
    files = [(i, p) for i, p in enumerate(pictures) if p.record.place.kind == "file"]
    wrong = [i for i, p in files if not ending_fits(p.record.place.name, p.look.format)]
    yield from _some(
        pictures,
        wrong,
        ("hint", "wrong ending", "{} whose ending is not what the file is"),
        "nothing has to be done; --fix renames them",
        lambda p: f"it is {p.look.format}",
    )
    for note in sorted({note for p in pictures for note in p.look.notes}):
        which = [i for i, p in enumerate(pictures) if note in p.look.notes]
        yield from _some(pictures, which, ("hint", "converted", f"{{}}: {note}"), "", lambda _: "")


def _some(
    pictures: Sequence[Picture],
    chosen: Sequence[int],
    kind: tuple[Severity, str, str],
    fix: str,
    note: Callable[[Picture], str],
) -> Iterable[Finding]:
    """A finding about some pictures, or none if there are none."""
    if chosen:
        severity, rule, what = kind
        items = tuple(Item(pictures[i].name, note(pictures[i]), i) for i in chosen)
        yield Finding(severity, rule, what.format(counted(len(chosen), "picture")), fix, items)
