"""Reads a picture of the small world back into facts, with no trained network: by asking what the painter would paint.

In this order: the style, the place, then the figure. Every look at every size and offset is laid over the picture, its
parts take the palette's best colours, and the one that leaves the least of the picture unexplained wins. What is left
unexplained by the winner decides whether there is a figure at all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from gesso.micro import captions, painter, templates, world
from gesso.micro.templates import LOOKS, MARGIN, SCALES, Array, Sheet, as_seen, pixels_of, pooled, smoothed
from gesso.micro.world import ALDAR, NEON, PEOPLE, SIDE, Facts, Jitter, Scene

TONED = tuple(painter.TONES)
"""The styles that have no colours."""
_JOINTED = float(pixels_of(painter.tiled(Image.new("RGB", (SIDE, SIDE), "white"))).mean())
"""Mean brightness of a white mosaic."""
_COARSE = (1, 3, 5)
"""The sizes that are tried first."""
_SOLVED, _HALF_SOLVED, _SLACK = 0.15, 0.4, 0.25
"""No other kind is tried once one leaves less than the first share, or the second and the others are worse by this."""
_MOST = 6
"""No more kinds are tried, but where there are no colours, for contours tell little at first sight."""
_NO_PLACE = 0.04
"""A place of which the free tiles are off by more is none of the known ones."""
_TINT = 0.1
"""By how much all colours of a picture may be off together, in 0..1."""
_BLURS = (0.0, 0.7, 1.2)
"""How blurred a picture may be, in pixels: a standard deviation."""
_SOMETHING = 0.25
"""Without a figure a picture differs from its place by less: a sum of squares over tiles."""
_LEFT, _LEFT_IF_CLEAR, _CLEAR = (0.34, 4.5), (0.18, 12.0), 0.03
"""What a figure may leave of that, as a share and in all; more where the free tiles about it are off by less."""
_FIRST_PERSON = next(i for i, look in enumerate(LOOKS) if look.is_person)


@dataclass(frozen=True)
class Verdict:
    """Which of the things that were asked for are shown: a bool for each field of `Facts`, None if not asked for."""

    subject: bool | None = None
    colour: bool | None = None
    place: bool | None = None
    style: bool | None = None
    pattern: bool | None = None
    hat: bool | None = None
    hat_colour: bool | None = None
    hair: bool | None = None
    beard: bool | None = None
    pose: bool | None = None
    expression: bool | None = None


def read(picture: Image.Image) -> Facts:
    """What a picture shows; None for what cannot be told.

    That is: colours in sepia and neon, the subject (and all about it) where there is none to recognise, what a thing
    or an animal does not have, the hair where hat and chin hide it, and a place that is none of the known ones.
    Aldar Köse is a man (or woman) of his looks; see `Facts.is_aldar`.
    """
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = pixels_of(picture)
    style = _style(pixels)
    pixels = _without_style(pixels, style)
    place, offset = _place(pixels, style, _free())
    if _is_bare(pixels, place, offset, style):
        return Facts(style=style, place=None if style in TONED and place in world.COLOURS else place)
    fits = _figure(pixels, place, offset, style)
    weights = np.clip(1 - 1.5 * min(fits, key=lambda fit: fit.error).cover, 0.0, 1.0)
    again = _place(pixels, style, weights)
    if again != (place, offset):
        place, offset = again
        fits = _figure(pixels, place, offset, style)
    drop = _backdrop(place, offset, style)
    facts, shown = _finished(pixels, fits, place, offset, style)
    off = _off_place(pixels, drop, weights)
    if not _is_there(pixels, shown, drop, clear=off < _CLEAR):
        facts = Facts(style=facts.style, place=place)
    if off > _NO_PLACE:
        facts = replace(facts, place=None)
    return captions.without_colours(facts) if style in TONED else facts


def read_all(pictures: Sequence[Image.Image]) -> list[Facts]:
    """What each picture shows."""
    return [read(picture) for picture in pictures]


def compare(shown: Facts, wanted: Facts) -> Verdict:
    """How a picture answers a prompt; `wanted` is what `captions.parse` gives.

    "person" is right for a man and a woman, and Aldar Köse is right by his looks. A prompt for a style without colours
    asks for none, so there he is known by the looks that are left.
    """
    if wanted.style in TONED:
        wanted = captions.without_colours(wanted)
    seen = asdict(shown)
    verdict = {name: want == seen[name] for name, want in asdict(wanted).items() if want is not None}
    if wanted.subject == "person":
        verdict["subject"] = shown.subject in PEOPLE
    if wanted.subject == ALDAR:
        his = world.ALDAR_LOOKS
        if wanted.style in TONED:
            shown = replace(shown, colour=his.colour, hat_colour=his.hat_colour)
        verdict["subject"] = shown.is_aldar
    return Verdict(**verdict)


def entropy(
    shown: Sequence[Facts],
    fields: Sequence[str] = ("colour", "pattern", "hat", "hat_colour", "hair", "beard", "pose", "expression"),
) -> float:
    """Mean entropy in bits of the fields over the people shown: how varied the class still is. 0 if there are none."""
    people = [asdict(facts) for facts in shown if facts.is_person]
    total = 0.0
    for name in fields:
        values = [value for facts in people if (value := facts[name]) is not None]
        counts = np.unique(values, return_counts=True)[1] if values else np.ones(1)
        shares = counts / counts.sum()
        total -= float((shares * np.log2(shares)).sum())
    return total / len(fields)


# Style.

_NEAR, _ON_CURVE = 0.8, {"sepia": 0.066, NEON: 0.145}
"""This share of the tiles lies so near to a style's curve of tones; where light meets dark, tiles do not."""
_NEON_GROUNDS = ("blue",)  # the other plain colours turn into what they could have been without it
_DARK_JOINTS = 0.07
"""Mosaics have more, even blurred and noisy (0.067 at the least of 50); others have less (0.067 at the most of 450)."""


def _style(pixels: Array) -> str:
    """The style but for the contours, which are seen when the figure is known."""
    small, tiled = pooled(pixels), _joints(pixels) > _DARK_JOINTS
    off = {n: float(np.quantile(templates.along(small, templates.curve(n))[1], _NEAR)) for n in _ON_CURVE}
    name = min(off, key=off.__getitem__)
    # Red on black is nearly neon and the market's walls are nearly sepia: it must look like a place, too.
    near = off[name] < _ON_CURVE[name] and not (tiled and name == NEON)
    near = near and _placed(pixels, "flat") > _placed(pixels, name)
    return name if near else "mosaic" if tiled else "flat"


def _joints(pixels: Array) -> float:
    """How much darker each fourth row and column is than the lines two away on both sides of it."""
    light = pixels @ templates.LUMA
    darker = 0.0
    for lines in (light, light.T):
        bands = lines.reshape(SIDE // templates.TILE, templates.TILE, SIDE)
        joint, before, after = bands[:-1, 3], bands[:-1, 1], bands[1:, 1]
        alike = np.exp(-(((after - before) / 0.15) ** 2))
        darker += 1 - float((alike * joint).sum() / (alike * 0.5 * (after + before) + 1e-4).sum())
        bend = np.clip(lines[2:-2] - 0.5 * (lines[:-4] + lines[4:]), -0.15, 0.15)
        darker += float(bend[3::4].mean() - bend[1::4].mean()) / (float(lines.mean()) + 0.02)
    return darker / 2


def _without_style(pixels: Array, style: str) -> Array:
    """The picture before its style: brightness of toned ones (in three equal channels), tiles without joints."""
    if style in TONED:
        return np.repeat(templates.along(pixels, templates.curve(style))[0][..., None], 3, axis=-1)
    if style == "mosaic":
        return np.minimum(smoothed(pixels) / _JOINTED, 1)
    return pixels


# Place.


@functools.cache
def _backdrops(style: str) -> tuple[list[tuple[str, float]], Array]:
    """Every place at every horizon, as the style has it: names and horizons, and [places, SIDE / 2, SIDE / 2, 3]."""
    names = [(name, float(h)) for name in world.SCENERY for h in np.arange(-3, 3.5, 1.0)]
    names += [(name, 0.0) for name in (_NEON_GROUNDS if style == NEON else world.COLOURS)]
    return names, np.stack([templates.halved(_backdrop(name, h, style)) for name, h in names])


@functools.cache
def _backdrop(name: str, horizon: float, style: str) -> Array:
    pixels = pixels_of(painter.backdrop(name, jitter=Jitter(horizon=horizon)))
    if style in TONED:
        return np.repeat((pixels @ templates.LUMA)[..., None], 3, axis=-1)
    if style == "mosaic":
        return smoothed(pixels)
    return pixels


@functools.cache
def _free() -> Array:
    """How often each pixel is not covered by a figure, [SIDE, SIDE]."""
    page = templates.sheet(0.99, outlined=False)
    covered = np.zeros(templates.SPAN * templates.SPAN, dtype=np.float32)
    for look in page.looks:
        covered += page.cover[[part for group in look for part in page.groups[group]]].sum(axis=0)
    window = (covered / len(LOOKS)).reshape(templates.SPAN, templates.SPAN)[MARGIN:-MARGIN, MARGIN:-MARGIN]
    return np.square(np.clip(1 - window, 0.02, 1), dtype=np.float32)


def _placed(pixels: Array, style: str) -> float:
    """How far the picture is from the nearest place, were it of that style."""
    half = templates.halved(_without_style(pixels, style))
    return float(_misfit(half, _backdrops(style)[1], templates.halved(_free())).min())


def _place(pixels: Array, style: str, weights: Array) -> tuple[str, float]:
    """The place and its horizon that most of the free pixels agree with."""
    names, drops = _backdrops(style)
    return names[int(_misfit(templates.halved(pixels), drops, templates.halved(weights)).argmin())]


def _misfit(pixels: Array, drops: Array, weights: Array) -> Array:
    """Weighted mean of the squared distance to each backdrop, no pixel counting more than a far one does."""
    squares = np.minimum(((drops - pixels) ** 2) @ np.ones(3, dtype=np.float32), 0.06)
    return (squares.reshape(len(drops), -1) @ weights.ravel()) / (weights.sum() + 1e-6)


def _off_place(pixels: Array, drop: Array, weights: Array) -> float:
    """How far the free tiles are from the place: a mean square, no tile counting more than a far one does."""
    squares, free = np.minimum(((pooled(pixels) - pooled(drop)) ** 2).sum(-1), 0.12), pooled(weights)
    return float((squares * free).sum() / (free.sum() + 1e-6))


# The figure.


@dataclass(frozen=True)
class _Fit:
    """A look laid over the picture."""

    look: int
    jitter: Jitter
    outlined: bool
    chosen: dict[str, int]
    """For each factor, which of its values."""
    cover: Array
    """[SIDE, SIDE], how much of each pixel the figure covers."""
    error: float


def _figure(pixels: Array, place: str, offset: float, style: str) -> list[_Fit]:
    """What explains the picture best over its place: a look without and one with contours, or the one that can be."""
    drop = _backdrop(place, offset, style)
    features = templates.features_of(pixels, drop)
    shifts, toned = templates.shifts_within(3, 2), style in TONED
    half = features.reshape(5, features.shape[1] // 2, 2, -1, 2).mean(axis=(2, 4))
    moved = templates.under(half, shifts, half=True)
    best: dict[str, tuple[float, int, int, int]] = {}
    for scale in _COARSE:
        gains, _ = templates.gains_of(templates.sheet(SCALES[scale], outlined=toned), moved, half=True, toned=toned)
        at, most = gains.argmax(axis=1).tolist(), gains.max(axis=1).tolist()
        for look, facts in enumerate(LOOKS):
            kind = "person" if facts.is_person else str(facts.subject)
            if kind not in best or most[look] > best[kind][0]:
                best[kind] = (most[look], look, scale, at[look])
    floor, first = templates.noise_of(pixels), sorted(best.values(), reverse=True)
    bare = templates.difference(pixels, drop) - floor
    kinds: list[list[_Fit]] = []
    for gain, look, scale, at in first if toned else first[:_MOST]:
        least = min((fit.error for fits in kinds for fit in fits), default=np.inf) - floor
        likely = gain > first[0][0] - _SLACK * abs(first[0][0])
        if least < (_SOLVED if likely else _HALF_SOLVED) * bare:
            break
        near = templates.shifts_within(2, 2) + np.clip(shifts[at] * 2, 2 - MARGIN, MARGIN - 2)
        moved, both = templates.under(features, near), []
        for outlined in _contours(style):
            where = _located(moved, near, style, look, scale, outlined)
            both.append(_refined(pixels, features, drop, style, look, where, outlined))
        kinds.append(both)
    return min(kinds, key=lambda fits: min(fit.error for fit in fits))


def _located(
    moved: Array, near: NDArray[np.intp], style: str, look: int, scale: int, outlined: bool
) -> tuple[int, float, NDArray[np.intp]]:
    """The best of the known sizes near one for a look, the best size between them, and the best of the shifts."""
    found: list[tuple[float, int, int]] = []
    reach = 2 if outlined else 1
    for size in range(max(scale - reach, 0), min(scale + reach + 1, len(SCALES))):
        page = templates.sheet(SCALES[size], outlined=outlined).only(look)
        gains, _ = templates.gains_of(page, moved, toned=style in TONED)
        found.append((float(gains.max()), size, int(gains.argmax())))
    _, best, at = max(found)
    return best, templates.between(SCALES, best, [(size, gain) for gain, size, _ in found]), near[at]


def _refined(
    pixels: Array, features: Array, drop: Array, style: str, look: int, where: tuple[int, float, NDArray[np.intp]],
    outlined: bool,
) -> _Fit:  # fmt: skip
    """The best look of the kind near a place and size, by what it leaves unexplained."""
    scale, size, shift = where
    near = templates.CROSS + np.clip(shift, 1 - MARGIN, MARGIN - 1)
    page = templates.sheet(SCALES[scale], outlined=outlined)
    looks = range(_FIRST_PERSON, len(LOOKS)) if LOOKS[look].is_person else [look]
    gains, choices = templates.gains_of(page, templates.under(features, near), toned=style in TONED)
    at_each = gains.argmax(axis=1)
    fits = []
    for i in sorted(looks, key=lambda i: -gains[i, at_each[i]])[:4]:
        at = int(at_each[i])
        fit = _laid(pixels, drop, page, style, i, near[at], outlined, choices[:, at])
        x, y = near[0] + templates.peak(gains[i])
        fits.append(replace(fit, jitter=Jitter(float(x), float(y), size, skin=fit.chosen.get("skin", 0))))
    return min(fits, key=lambda fit: fit.error)


def _contours(style: str) -> tuple[bool, ...]:
    """Whether the figure has contours; of colour pictures both are tried."""
    return (True,) if style in TONED else (False,) if style == "mosaic" else (False, True)


def _laid(
    pixels: Array, drop: Array, page: Sheet, style: str, look: int, shift: NDArray[np.intp],
    outlined: bool, choices: NDArray[np.intp],
) -> _Fit:  # fmt: skip
    """A look laid over the backdrop, in the chosen colours."""
    groups, names = zip(*[(np.asarray(page.groups[i]), page.factors[i]) for i in page.looks[look]], strict=True)
    x, y = int(shift[0]), int(shift[1])
    inside = (slice(MARGIN - y, MARGIN - y + SIDE), slice(MARGIN - x, MARGIN - x + SIDE))
    parts, sizes = np.concatenate(groups), [len(group) for group in groups]
    cover = page.cover[parts].reshape(-1, templates.SPAN, templates.SPAN)[:, *inside]
    total = cover.sum(axis=0)
    bare = drop * (1 - total[..., None])
    if style == "mosaic":
        bare, cover = smoothed(bare), np.stack([smoothed(part) for part in cover])
    tables = as_seen(page.colours[parts], style in TONED)
    values = np.concatenate([np.full(len(g), choices[i]) for g, i in zip(groups, page.looks[look], strict=True)])
    mixed = cover.reshape(len(parts), -1)
    templates.recolour(mixed, (pixels - bare).reshape(-1, 3), tables, values, sizes)
    shown = bare + (mixed.T @ tables[np.arange(len(parts)), values]).reshape(SIDE, SIDE, 3)
    chosen = {name: templates.valued(name, values[end - 1]) for name, end in zip(names, np.cumsum(sizes), strict=True)}
    return _Fit(look, Jitter(), outlined, chosen, total, templates.difference(pixels, shown))


# What it shows.


def _finished(pixels: Array, fits: Sequence[_Fit], place: str, offset: float, style: str) -> tuple[Facts, Array]:
    """The facts of the fitted figures, and the picture that they make: each is painted, and the nearest taken."""
    tries = []
    for fit in fits:
        named = [name for name in fit.chosen if name not in ("skin", "fixed")]
        chosen = {name: templates.VALUES[name][fit.chosen[name]] for name in named}
        manner = "outlined" if fit.outlined else "flat"
        facts = replace(LOOKS[fit.look], place=place, style=manner, **chosen)
        tries.append(Scene(facts, replace(fit.jitter, horizon=offset)))
    scene, shown, blur = _nearest(pixels, tries, style, _BLURS if style == "flat" else (0.0,))
    facts = scene.facts
    if facts.is_person:
        moods = [replace(scene, facts=replace(facts, expression=mood)) for mood in world.EXPRESSIONS]
        scene, shown, _ = _nearest(pixels, moods, style, (blur,))
        facts = scene.facts
        if all("hair" not in fit.chosen for fit in fits):
            facts = replace(facts, hair=None)
        elif style not in TONED:
            # Where little of it is seen, its colour is mixed with its neighbours'.
            shades = [replace(scene, facts=replace(facts, hair=hair)) for hair in world.HAIR]
            scene, shown, _ = _nearest(pixels, shades, style, (blur,))
            facts = scene.facts
    return replace(facts, style=facts.style if style == "flat" else style), shown


def _nearest(pixels: Array, scenes: Sequence[Scene], style: str, blurs: Sequence[float]) -> tuple[Scene, Array, float]:
    """The scene that paints the picture nearest to this one, the picture, and how blurred it has to be for that."""
    found = []
    for scene in scenes:
        painted = painter.paint(scene)
        for blur in blurs:
            blurred = painted.filter(ImageFilter.GaussianBlur(blur)) if blur else painted
            shown = pixels_of(blurred)
            if style in TONED:
                shown = np.repeat((shown @ templates.LUMA)[..., None], 3, axis=-1)
            if style == "mosaic":
                shown = smoothed(shown)
            found.append((float(((pixels - shown) ** 2).sum()), scene, shown, blur))
    return min(found, key=lambda entry: entry[0])[1:]


def _is_there(pixels: Array, shown: Array, drop: Array, *, clear: bool) -> bool:
    """Whether the figure explains most of what is seen from afar, without noise; all colours may be a little off."""
    seen = pooled(pixels)
    wrong = seen - pooled(shown)
    wrong -= np.clip(np.median(wrong, axis=(0, 1)), -_TINT, _TINT)
    left, without = float((wrong**2).sum()), float(((seen - pooled(drop)) ** 2).sum())
    limits = (_LEFT, _LEFT_IF_CLEAR) if clear else (_LEFT,)
    return any(left < share * without and left < most for share, most in limits)


def _is_bare(pixels: Array, place: str, offset: float, style: str) -> bool:
    """Whether there is nothing but the place, and noise, of which a tile's mean keeps a sixteenth."""
    squares = (pooled(pixels) - pooled(_backdrop(place, offset, style))) ** 2
    return float(squares.sum()) < _SOMETHING + SIDE**2 / templates.TILE**4 * templates.noise_of(pixels)
