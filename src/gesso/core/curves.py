"""The curves of a run as a picture, from its metrics.json."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gesso.core.folder import RunFolder, write_atomic
from gesso.errors import UserError

_MEAN_OF = 25
"""Steps that the running mean of the loss is over."""
_LIGHT, _DARK = ("#26262b", "#c6c6cc", "#bf8500", "#2d64d7"), ("#e4e2dd", "#55555f", "#e8b440", "#82a8ff")
"""Ink, single steps, their mean, and what was held out."""
_CHANCE = {"accuracy": 0.5, "margin": 0.0}
"""Where a measure stands for a model that has learnt nothing."""


def write(folder: RunFolder, to: Path | None = None) -> Path:
    """Draw a run's curves into `curves.png` in its folder, or into a new file elsewhere.

    Raises `UserError` before its second step, and where the other file exists.
    """
    metrics = json.loads(folder.metrics.read_text(encoding="utf-8")) if folder.metrics.is_file() else {}
    if len(metrics.get("step", [])) < 2:
        what = "there are no curves yet: they need two steps" if folder.events.is_file() else "this is no run folder"
        raise UserError(what, where=str(folder.path), fix="name a folder that `gesso train` has trained in")
    if to is not None and to.exists():
        raise UserError("it exists already", where=str(to), fix="choose another name")
    path = to or folder.path / "curves.png"
    write_atomic(path, draw(metrics))
    return path


def draw(metrics: Mapping[str, Any], *, dark: bool = False, held_out: str = "validation") -> bytes:
    """A PNG: training loss with its running mean and the held-out loss; below them every other held-out measure, such
    as the accuracy and the margin of preferences, and the learning rate.

    `metrics` is what metrics.json holds; `dark` is for dark paper, which shines through.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ink, faint, warm, cool = _DARK if dark else _LIGHT
    names = [n.removeprefix("validation_") for n in metrics if n.startswith("validation_")]
    measures = [name for name in names if name not in ("step", "loss")]
    figure = Figure(figsize=(8, 4.6 + 1.4 * len(measures)), layout="constrained")
    FigureCanvasAgg(figure)
    above, *middle, below = figure.subplots(
        2 + len(measures), 1, sharex=True, height_ratios=(4, *(1.6 for _ in measures), 1)
    )
    steps, losses = metrics["step"], metrics["loss"]
    above.plot(steps, losses, ".", color=faint, markersize=4, label="training, each step")
    above.plot(steps, running_mean(losses), color=warm, label=f"training, mean of {_MEAN_OF} steps")
    known = metrics.get("validation_step", [])
    if known:
        above.plot(known, metrics["validation_loss"], "o-", color=cool, markersize=4, label=held_out)
    above.set(ylabel="loss", ylim=(min(0.0, *losses), None))
    above.legend(frameon=False, labelcolor=ink)
    for axes, name in zip(middle, measures, strict=True):
        axes.plot(known, metrics[f"validation_{name}"], "o-", color=cool, markersize=4)
        if name in _CHANCE:
            axes.axhline(_CHANCE[name], color=faint, linestyle="--")
        axes.set(ylabel=name)
    below.plot(steps, metrics["learning_rate"], color=ink)
    below.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
    below.xaxis.get_major_locator().set_params(integer=True)
    below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (above, *middle, below):
        axes.tick_params(colors=ink)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(ink)
        for label in (axes.xaxis.label, axes.yaxis.label, axes.yaxis.get_offset_text()):
            label.set_color(ink)
        axes.patch.set_alpha(0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor=(0, 0, 0, 0) if dark else "white")
    return buffer.getvalue()


def running_mean(values: Sequence[float], width: int = _MEAN_OF) -> list[float]:
    """The mean of the last `width` values at each place."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
