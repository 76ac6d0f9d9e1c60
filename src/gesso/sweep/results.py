"""What came of the runs of a sweep: read from their folders, and written as a table, as CSV and as curves."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gesso.core import history
from gesso.core.folder import RunFolder, write_atomic
from gesso.core.history import Measured
from gesso.sweep.axes import Trial

_TAIL = 0.1


@dataclass(frozen=True)
class Outcome:
    """A run of a sweep as its folder tells it. `state` is "new", "running", "interrupted", "failed" or "finished"."""

    trial: Trial
    folder: Path
    state: str
    message: str = ""
    measured: tuple[Measured, ...] = ()
    train_loss: float | None = None
    """Mean over the last tenth of the steps."""
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    """The training loss by step."""

    def best(self, metric: str) -> Measured | None:
        """The best measurement of what was trained."""
        return history.best([one for one in self.measured if one.step], metric)

    def score(self, metric: str) -> float | None:
        """What runs are compared by: the best validation, or the training loss where nothing was held out."""
        found = self.best(metric)
        return found.values[metric] if found is not None else self.train_loss if metric == "loss" else None


def read(trial: Trial, folder: Path, *, message: str = "") -> Outcome:
    """What a run's folder says of it."""
    place = RunFolder(folder)
    if not place.status.is_file():
        return Outcome(trial, folder, "failed" if message else "new", message)
    state = str(json.loads(place.status.read_text())["state"])
    metrics: dict[str, Any] = json.loads(place.metrics.read_text()) if place.metrics.is_file() else {}
    losses, steps = metrics.get("loss", []), metrics.get("step", [])
    names = [name for name in metrics if name.startswith("validation_") and name != "validation_step"]
    measured = tuple(
        Measured(step, {name.removeprefix("validation_"): metrics[name][i] for name in names})
        for i, step in enumerate(metrics.get("validation_step", []))
    )
    tail = losses[-max(1, round(_TAIL * len(losses))) :]
    mean = sum(tail) / len(tail) if tail else None
    curve = tuple(zip(steps, losses, strict=True))
    return Outcome(trial, folder, "failed" if message else state, message, measured, mean, curve)


def ranked(outcomes: Sequence[Outcome], metric: str) -> list[Outcome]:
    """The best first; the ones without a figure last, in their order."""
    sign = 1 if history.better(metric) == "min" else -1
    scores = {one.trial.name: one.score(metric) for one in outcomes}
    known = [one for one in outcomes if scores[one.trial.name] is not None]
    known.sort(key=lambda one: sign * (scores[one.trial.name] or 0.0))
    return known + [one for one in outcomes if scores[one.trial.name] is None]


def table(outcomes: Sequence[Outcome], metric: str) -> list[list[str]]:
    """A heading and a row for each run, the best first."""
    keys = list(dict.fromkeys(key for one in outcomes for key in one.trial.values))
    others = list(dict.fromkeys(k for one in outcomes for m in one.measured for k in m.values if k != metric))
    heading = ["run", *keys, "state", f"best {metric}", "at step", f"last {metric}", *others, "train loss"]
    rows = [heading]
    for one in ranked(outcomes, metric):
        best, last = one.best(metric), one.measured[-1] if one.measured else None
        at_best = {} if best is None else best.values
        rows.append(
            [
                one.trial.name,
                *(one.trial.values.get(key, "") for key in keys),
                one.state,
                _figure(at_best.get(metric)),
                "" if best is None else str(best.step),
                _figure(None if last is None else last.values.get(metric)),
                *(_figure(at_best.get(name)) for name in others),
                _figure(one.train_loss),
            ]
        )
    return rows


def write(folder: Path, outcomes: Sequence[Outcome], *, metric: str) -> list[Path]:
    """results.csv, results.md and curves.png in the sweep's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = table(outcomes, metric)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(folder / "results.csv", text.getvalue().encode())
    lines = [f"# {folder.name}", "", *("| " + " | ".join(row) + " |" for row in rows)]
    lines.insert(3, "|" + "---|" * len(rows[0]))
    lines += ["", "![curves](curves.png)", ""]
    lines += [f"- {one.trial.name}: {one.message}" for one in outcomes if one.message]
    write_atomic(folder / "results.md", ("\n".join(lines).rstrip() + "\n").encode())
    write_atomic(folder / "curves.png", _curves(outcomes, metric))
    return [folder / name for name in ("results.csv", "results.md", "curves.png")]


def _curves(outcomes: Sequence[Outcome], metric: str) -> bytes:
    """The measure over the steps for each run; the smoothed training loss where nothing was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    held_out = any(one.measured for one in outcomes)
    for one in ranked(outcomes, metric):
        points = [(m.step, m.values[metric]) for m in one.measured if metric in m.values]
        points = points if held_out else list(one.curve)
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if held_out else None, label=one.trial.name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"validation {metric}" if held_out else "training loss")
    if axes.has_data():
        axes.legend(fontsize="small")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
