"""Painted pictures that a look can tell apart, and folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from gesso.config.run import Buckets, Data, Source
from gesso.data import tokens
from gesso.data.inspection.inspect import inspect
from gesso.data.inspection.result import Finding, Inspection


def discs(seed: int, size: tuple[int, int] = (192, 192)) -> Image.Image:
    """Sharp coloured discs of all sizes on a plain ground."""
    drawn = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(drawn.integers(60, 200, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(60):
        x, y, radius = *(drawn.random(2) * size), min(60, 4 / max(0.05, drawn.random()))
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=tuple(drawn.integers(0, 255, 3).tolist()))
    return image


def put(folder: Path, name: str, image: Image.Image, caption: str | None = "a thing", **options: Any) -> Path:
    """A picture and, unless it is None, its caption."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    image.save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


def data_of(*folders: Path, resolution: int = 192, **changes: Any) -> Data:
    """The data of a run over these folders."""
    sources = tuple(Source(path=str(folder)) for folder in folders)
    fields: dict[str, Any] = {"sources": sources, "resolution": resolution, "buckets": Buckets(step=16)}
    return Data.model_validate(fields | changes)


def inspected(data: Data, **options: Any) -> Inspection:
    """An inspection with estimated tokens."""
    given: dict[str, Any] = {"tokens": tokens.counter(None), "most_tokens": 75, "multiple": 8}
    return inspect(data, **(given | options))


def rules(found: Inspection) -> dict[str, Finding]:
    """The findings by rule; each rule may say one thing only."""
    named = [finding.rule for finding in found.findings]
    assert len(set(named)) == len(named), named
    return {finding.rule: finding for finding in found.findings}


def names(finding: Finding) -> list[str]:
    """The files of a finding."""
    return [item.name for item in finding.files]
