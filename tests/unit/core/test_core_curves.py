"""The picture of a run's curves: everything that was measured is in it, and there is one only where there is a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gesso.core import curves
from gesso.core.folder import RunFolder
from gesso.errors import UserError

METRICS: dict[str, Any] = {
    "step": [1, 2, 3],
    "loss": [0.7, 0.6, 0.5],
    "learning_rate": [1e-4, 1e-4, 5e-5],
    "validation_step": [0, 3],
    "validation_loss": [0.69, 0.6],
    "validation_accuracy": [0.5, 0.8],
    "validation_margin": [0.0, 0.4],
    "components": [{"part": "unet"}],
}


def pixels(metrics: dict[str, Any], **options: Any) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(curves.draw(metrics, **options))).convert("RGBA"))


@pytest.mark.parametrize("name", [name for name in METRICS if name not in ("components", "step", "validation_step")])
def test_every_measured_value_shows(name: str) -> None:
    changed = {**METRICS, name: [value + 0.05 * (i + 1) for i, value in enumerate(METRICS[name])]}
    assert not np.array_equal(pixels(METRICS), pixels(changed))


def test_each_measure_has_a_panel_of_its_own_and_a_run_without_held_out_pictures_has_none() -> None:
    plain = {name: values for name, values in METRICS.items() if not name.startswith("validation_")}
    one = {name: values for name, values in METRICS.items() if name != "validation_margin"}
    heights = [len(pixels(metrics)) for metrics in (plain, one, METRICS)]
    assert heights == sorted(set(heights))


def test_losses_below_0_are_inside(tmp_path: Path) -> None:
    assert not np.array_equal(pixels({**METRICS, "loss": [0.7, 0.6, -3.0]}), pixels(METRICS))


def test_written_beside_the_run_or_where_asked_and_never_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    assert curves.write(RunFolder(tmp_path)) == tmp_path / "curves.png"
    curves.write(RunFolder(tmp_path))
    mine = tmp_path / "mine.png"
    assert curves.write(RunFolder(tmp_path), mine) == mine
    with pytest.raises(UserError, match="exists already"):
        curves.write(RunFolder(tmp_path), mine)


@pytest.mark.parametrize(("made", "reason"), [(["events.jsonl"], "they need two steps"), ([], "no run folder")])
def test_what_has_no_curves_is_told(tmp_path: Path, made: list[str], reason: str) -> None:
    for name in made:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=reason):
        curves.write(RunFolder(tmp_path))
    assert not (tmp_path / "curves.png").exists()


def test_the_running_mean_is_over_the_last_values() -> None:
    assert curves.running_mean([2.0, 4.0, 6.0, 8.0], width=2) == [2.0, 3.0, 5.0, 7.0]
