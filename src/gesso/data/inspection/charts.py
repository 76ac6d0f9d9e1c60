"""Small charts for pages, as SVG and HTML that take their colours from the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

_BINS = 24
_LONG, _LABEL = 60, 18


def histogram(values: Sequence[int], *, limit: int, unit: str, width: int = 460, height: int = 170) -> str:
    """How many values there are of each size, with a line at the limit."""
    longest = max([*values, 1])
    step = max(1, -(-(longest + 1) // _BINS))
    counts = np.bincount(np.asarray(values, np.int64) // step, minlength=longest // step + 1)
    floor, left = height - 32, 34
    each = (width - left - 8) / len(counts)
    tallest = max(int(counts.max()), 1)
    parts = [f'<text class="soft" x="{left - 6}" y="14" text-anchor="end">{tallest}</text>']
    for i, count in enumerate(counts.tolist()):
        tall = (floor - 8) * count / tallest
        says = f"{i * step}{f' to {(i + 1) * step - 1}' if step > 1 else ''} {unit}: {count}"
        box = f'x="{left + i * each:.1f}" y="{floor - tall:.1f}" width="{max(each - 1, 1):.1f}" height="{tall:.1f}"'
        parts.append(f'<rect class="b" {box}><title>{escape(says)}</title></rect>')
    every = max(1, -(-len(counts) // 8))
    for i in range(0, len(counts), every):
        parts.append(f'<text class="soft" x="{left + i * each:.1f}" y="{floor + 14}">{i * step}</text>')
    if limit < longest:
        x = left + (limit + 1) / step * each
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{floor}"/>')
        parts.append(f'<text class="limit-text" x="{x + 4:.1f}" y="14">{limit} are read</text>')
    parts.append(f'<text class="soft" x="{width - 8}" y="{height - 2}" text-anchor="end">{escape(unit)}</text>')
    return _svg(width, height, parts)


def heat_map(names: Sequence[str], together: NDArray[np.int64], *, cell: int = 26, label: int = 120) -> str:
    """How often each two of the names come together; the darker, the larger a share of the rarer one."""
    count = len(names)
    width, height = label + cell * count + 60, label * 3 // 4 + cell * count
    top = height - cell * count
    parts = []
    for i, name in enumerate(names):
        short = _cut(name, _LABEL)
        y = top + i * cell + cell / 2 + 4
        parts.append(f'<text x="{label - 6}" y="{y:.0f}" text-anchor="end">{short}</text>')
        x = label + i * cell + cell / 2 + 4
        parts.append(f'<text transform="translate({x:.0f} {top - 6}) rotate(-50)">{short}</text>')
        for j in range(count):
            both, least = int(together[i, j]), int(min(together[i, i], together[j, j]))
            share = 0.0 if i == j else both / max(least, 1)
            says = f"{name}: {both}" if i == j else f"{name} + {names[j]}: {both}"
            box = f'x="{label + j * cell}" y="{top + i * cell}" width="{cell}" height="{cell}"'
            strength = 0.06 + 0.8 * share
            parts.append(f'<rect class="cell" {box} fill-opacity="{strength:.2f}"><title>{escape(says)}</title></rect>')
            if both and i != j:
                at = f'x="{label + j * cell + cell / 2:.0f}" y="{top + i * cell + cell / 2 + 4:.0f}"'
                parts.append(f'<text {at} text-anchor="middle" pointer-events="none">{_short(both)}</text>')
    return _svg(width, height, parts)


def bars(rows: Sequence[tuple[str, int]]) -> str:
    """Names with their counts, as a table with bars."""
    most = max([count for _, count in rows], default=1)
    return "".join(
        f'<tr><td>{_cut(name, _LONG)}</td><td class="n">{count}</td><td class="w">{bar(count / most)}</td></tr>'
        for name, count in rows
    )


def bar(share: float) -> str:
    """A bar that fills a share of its cell."""
    return f'<div class="bar" style="width:{100 * share:.1f}%"></div>'


def shape(width: int, height: int, *, side: int = 22) -> str:
    """An outline with the proportions of a picture."""
    scale = (side - 2) / max(width, height)
    wide, high = width * scale, height * scale
    box = f'x="{(side - wide) / 2:.1f}" y="{(side - high) / 2:.1f}" width="{wide:.1f}" height="{high:.1f}"'
    return _svg(side, side, [f'<rect class="shape" {box}/>'])


def _cut(text: str, most: int) -> str:
    return escape(text if len(text) <= most else text[: most - 1] + "…")


def _short(count: int) -> str:
    return str(count) if count < 1000 else f"{count / 1000:.0f}k"


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'role="img">{"".join(parts)}</svg>'
    )
