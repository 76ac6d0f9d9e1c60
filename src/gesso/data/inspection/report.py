"""What was found in a data set as one page that needs nothing else: no other file, no network, no script."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from PIL import Image

from gesso.core.folder import write_atomic
from gesso.data.images import decode_bytes
from gesso.data.inspection import charts
from gesso.data.inspection.result import Finding, Inspection, Item, Picture
from gesso.data.threads import ahead
from gesso.errors import ResourceError, UserError

MOST_THUMBNAILS = 300
"""Pictures shown on a page; the rest is listed by name."""

SIDE = 224
"""Longer side of a thumbnail in pixels."""

_SAMPLE, _EACH, _GROUPS, _OF_GROUP, _CROPS = 12, 14, 24, 4, 24
_LISTED = 500
_TERMS, _HEAT = 24, 12
_GROUPED = ("duplicate", "near duplicate", "leakage")


def write(path: Path, found: Inspection, *, title: str, progress: Callable[[int, int], None] | None = None) -> None:
    """Write the page about an inspection; its pictures are read once more for their thumbnails."""
    text = page(found, title=title, progress=progress)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode())
    except OSError as error:
        raise ResourceError(f"cannot be written: {error.strerror}", where=str(path), fix="name another file") from error


def page(found: Inspection, *, title: str, progress: Callable[[int, int], None] | None = None) -> str:
    """The page as HTML."""
    thumbs = _thumbnails(found, _wanted(found), progress)
    paired = [i for i in _sample(found) if found.pictures[i].rejected is not None]
    rivals = _thumbnails(found, paired, None, rivals=True)
    template = Template((resources.files("gesso.data.inspection") / "report.html").read_text("utf-8"))
    plain = [finding for finding in found.findings if finding.rule not in _GROUPED]
    grouped = [finding for finding in found.findings if finding.rule in _GROUPED]
    return template.substitute(
        title=escape(title),
        about=escape(_about(found)),
        cards=_cards(found),
        sample="".join(_figure(i, thumbs, "", "") for i in _sample(found) if i not in rivals),
        pairs="".join(_side_by_side(found.pictures[i], i, thumbs, rivals) for i in paired),
        findings="".join(_finding(f, thumbs) for f in plain) or "<p>None.</p>",
        duplicates="".join(_groups(f, thumbs) for f in grouped) or "<p>None.</p>",
        captions=_captions(found),
        buckets=_buckets(found),
        crops=_crops(found, thumbs),
    )


def _about(found: Inspection) -> str:
    sides = sorted(picture.look.width * picture.look.height for picture in found.pictures)
    sizes = f"; {sides[0] / 1e6:.2f} to {sides[-1] / 1e6:.2f} megapixels" if sides else ""
    sources = ", ".join(source.path for source in found.data.sources)
    return f"{sources}; judged for a resolution of {found.data.resolution}{sizes}"


def _cards(found: Inspection) -> str:
    held = sum(picture.split == "validation" for picture in found.pictures)
    facts = [
        (len(found.pictures) - held, "pictures to train on", ""),
        *([(held, "held out", "")] if held else []),
        *([(len(found.unreadable), "unreadable", "error")] if found.unreadable else []),
        *([(len(found.left_out), "would not be used", "warning")] if found.left_out else []),
        (found.wording.captions, "captions", ""),
    ]
    for severity, name in (("error", "errors"), ("warning", "warnings"), ("hint", "hints")):
        count = sum(finding.severity == severity for finding in found.findings)
        facts.append((count, name, severity if count else ""))
    return "".join(f'<div class="card {kind}"><b>{count:,}</b>{name}</div>' for count, name, kind in facts)


# Pictures


def _wanted(found: Inspection) -> list[int]:
    """Which pictures are shown, the most telling first, as many as a page may have."""
    wanted: dict[int, None] = {}
    for finding in found.findings:
        for group in finding.groups[:_GROUPS]:
            wanted |= {item.picture: None for item in group[:_OF_GROUP] if item.picture is not None}
        wanted |= {item.picture: None for item in finding.items[:_EACH] if item.picture is not None}
    wanted |= dict.fromkeys([*_most_cropped(found), *_sample(found)])
    return list(wanted)[:MOST_THUMBNAILS]


def _sample(found: Inspection) -> list[int]:
    count = len(found.pictures)
    return sorted({i * count // _SAMPLE for i in range(_SAMPLE)}) if count else []


def _most_cropped(found: Inspection) -> list[int]:
    cropped = [i for i, picture in enumerate(found.pictures) if picture.crop_loss > 0]
    return sorted(cropped, key=lambda i: -found.pictures[i].crop_loss)[:_CROPS]


def _thumbnails(
    found: Inspection, wanted: Sequence[int], progress: Callable[[int, int], None] | None, *, rivals: bool = False
) -> dict[int, str]:
    """A data: URL for each picture that is shown, or for its rival; those that cannot be read any more have none."""

    def thumbnail(i: int) -> str:
        record = found.pictures[i].record
        place = record.rejected if rivals and record.rejected is not None else record.place
        try:
            image = decode_bytes(place.read(), path=place, background=found.data.background).image
        except UserError:
            return ""
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

    thumbs = {}
    results = ahead(thumbnail, wanted, threads=min(8, os.cpu_count() or 1), depth=32)
    for done, (i, url) in enumerate(zip(wanted, results, strict=True), start=1):
        if url:
            thumbs[i] = url
        if progress is not None:
            progress(done, len(wanted))
    return thumbs


def _side_by_side(picture: Picture, i: int, thumbs: dict[int, str], rivals: dict[int, str]) -> str:
    figures = _figure(i, thumbs, "preferred", picture.caption) + _figure(i, rivals, "rejected", "")
    return f'<div class="side">{figures}</div>'


def _figure(i: int | None, thumbs: dict[int, str], name: str, note: str, *, box: str = "") -> str:
    if i not in thumbs:
        return ""
    caption = f"<figcaption><b>{escape(name)}</b> {escape(note)}</figcaption>" if name or note else ""
    image = f'<img src="{thumbs[i]}" alt="{escape(name)}" loading="lazy">'
    image = f'<div class="crop">{image}<i style="{box}"></i></div>' if box else image
    return f"<figure>{image}{caption}</figure>"


# Findings


def _finding(finding: Finding, thumbs: dict[int, str]) -> str:
    shown = [item for item in finding.items[:_EACH] if item.picture in thumbs]
    figures = "".join(_figure(item.picture, thumbs, item.name, item.note) for item in shown)
    figures = f'<div class="thumbs">{figures}</div>' if figures else ""
    rest = [item for item in finding.items if item not in shown]
    return f"{_head(finding)}{figures}{_listed(rest, of=len(finding.items))}</div>"


def _groups(finding: Finding, thumbs: dict[int, str]) -> str:
    rows: list[str] = []
    rest: list[Item] = []
    for group in finding.groups:
        first = group[:_OF_GROUP] if len(rows) < _GROUPS else ()
        shown = [item for item in first if item.picture in thumbs]
        if shown:
            figures = "".join(_figure(item.picture, thumbs, item.name, item.note) for item in shown)
            rows.append(f'<div class="side">{figures}</div>')
        rest += [item for item in group if item not in shown]
    return f"{_head(finding)}{''.join(rows)}{_listed(rest, of=len(finding.files))}</div>"


def _head(finding: Finding) -> str:
    fix = f'<p class="faint">{escape(finding.fix)}</p>' if finding.fix else ""
    rule = f'<span class="tag {finding.severity}">{finding.severity}</span><span class="rule">{finding.rule}</span>'
    return f'<div class="finding {finding.severity}"><p>{rule}: {escape(finding.what)}</p>{fix}'


def _listed(items: Sequence[Item], *, of: int) -> str:
    if not items:
        return ""
    lines = "".join(
        f"<li>{escape(item.name)}{f': {escape(item.note)}' if item.note else ''}</li>" for item in items[:_LISTED]
    )
    more = f"<li>and {len(items) - _LISTED} more</li>" if len(items) > _LISTED else ""
    few = " open" if len(items) <= 5 else ""
    what = f"{'' if len(items) == of else 'other '}{'file' if len(items) == 1 else 'files'}"
    return f"<details{few}><summary>{len(items)} {what}</summary><ul>{lines}{more}</ul></details>"


# Captions, buckets, crops


def _captions(found: Inspection) -> str:
    words = found.wording
    if not words.captions:
        return "<p>None.</p>"
    lengths = [n for n, picture in zip(words.tokens, found.pictures, strict=True) if picture.caption]
    everywhere = words.everywhere()[:12]
    shared = f" In every caption: {escape(', '.join(everywhere))}." if everywhere else ""
    what = "Tags are what stands between separators." if words.unit == "tags" else "Words, without the commonest."
    hot = [term for term, count in words.terms[:_HEAT] if count > 1]
    heat = charts.heat_map(hot, words.together[: len(hot), : len(hot)]) if len(hot) > 1 else "<p>Nothing does.</p>"
    pairs = charts.bars([(f"{pair.one} + {pair.other}", pair.captions) for pair in words.pairs(12)])
    return (
        f'<p class="faint">{words.captions:,} captions with {words.distinct:,} different {words.unit}. {what}'
        f"{shared}</p>"
        f'<div class="two"><div><h3>Length in tokens</h3><div class="wide">'
        f"{charts.histogram(lengths, limit=found.most_tokens, unit='tokens')}</div>"
        f'<p class="faint">{escape(words.method)}</p>'
        f"<h3>Together most often</h3><table>{pairs}</table></div>"
        f"<div><h3>Most frequent</h3><table>{charts.bars(words.terms[:_TERMS])}</table></div></div>"
        f'<h3>Which come together</h3><div class="wide">{heat}</div>'
        f'<p class="faint">Captions with both; the stronger the colour, the more of the rarer one’s captions.</p>'
    )


def _buckets(found: Inspection) -> str:
    if not found.buckets:
        return "<p>None.</p>"
    most = max(bucket.images for bucket in found.buckets)
    rows = "".join(
        f'<tr><td>{charts.shape(*b.size)}</td><td class="n">{b.size[0]} × {b.size[1]}</td>'
        f'<td class="n">{b.images}</td><td class="n">{b.crop_loss:.1%}</td>'
        f'<td class="w">{charts.bar(b.images / most)}</td></tr>'
        for b in found.buckets
    )
    head = '<th></th><th class="n">bucket</th><th class="n">images</th><th class="n">cropped</th><th></th>'
    enlarged = sum(picture.enlarged > 1 for picture in found.pictures)
    several = "; an image is counted at each resolution" if any(len(p.fits) > 1 for p in found.pictures) else ""
    return (
        f'<p class="faint">Training images in each bucket, and the mean share of them that is cropped away{several}. '
        f"{enlarged:,} images are enlarged to fill theirs.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    )


def _crops(found: Inspection, thumbs: dict[int, str]) -> str:
    chosen = _most_cropped(found)
    figures = []
    for i in chosen:
        picture = found.pictures[i]
        note = f"{picture.crop_loss:.0%} cropped away"
        figures.append(_figure(i, thumbs, picture.name, note, box=_box(picture)))
    moves = "; with random crops it moves at each visit" if _random(found) else ""
    return (
        f'<p class="faint">What is kept is bright{moves}.</p><div class="thumbs">{"".join(figures)}</div>'
        if chosen
        else "<p>None.</p>"
    )


def _random(found: Inspection) -> bool:
    return any((source.crop or found.data.crop) == "random" for source in found.data.sources)


def _box(picture: Picture) -> str:
    fit = max(picture.fits, key=lambda one: one.crop_loss)
    (left, top), (wide, high), (width, height) = fit.crop, fit.bucket, fit.resized
    shares = (left / width, top / height, wide / width, high / height)
    return ";".join(
        f"{name}:{100 * share:.2f}%" for name, share in zip(("left", "top", "width", "height"), shares, strict=True)
    )
