"""Pairs of pictures in a run file: what does not go together is refused by name, and each picture is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gesso.config import advice
from gesso.config.forecast import Counted, forecast
from gesso.config.run import RunConfig


def run(folder: Path, objective: str, **source: Any) -> RunConfig:
    folder.mkdir(exist_ok=True)
    values = {
        "data": {"sources": [{"path": str(folder)} | source]},
        "objective": {"type": objective},
        "output": str(folder.parent / "out"),
        "training": {"steps": 10},
    }
    return RunConfig.model_validate(values)


@pytest.mark.parametrize(
    ("objective", "source", "key", "what"),
    [
        ("dpo", {"pairs": "chosen"}, "data.sources.0.pairs", "the objective dpo compares pairs"),
        ("dpo", {"pairs": "none"}, "data.sources.0.pairs", "the objective dpo compares pairs"),
        ("dpo", {"mask": "alpha"}, "data.sources.0.mask", "pairs of pictures have no masks"),
        ("denoise", {"rejected_column": "bad"}, "data.sources.0.rejected_column", "'bad' is of pairs"),
        ("denoise", {"label_column": "who"}, "data.sources.0.label_column", "'who' is of pairs"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, objective: str, source: dict[str, str], key: str, what: str) -> None:
    found = [f for f in advice.check(run(tmp_path / "a", objective, **source)).errors if f.key.startswith("data.")]
    assert [f.key for f in found] == [key]
    assert what in found[0].what


@pytest.mark.parametrize(
    ("objective", "source"),
    [("dpo", {"rejected_column": "bad"}), ("dpo", {}), ("denoise", {"pairs": "chosen", "label_column": "who"})],
)
def test_what_does(tmp_path: Path, objective: str, source: dict[str, str]) -> None:
    assert not [f for f in advice.check(run(tmp_path / "a", objective, **source)).errors if f.key.startswith("data.")]


def test_both_pictures_of_a_pair_are_cached(tmp_path: Path) -> None:
    counted = Counted((20,), 0, 20, 20)
    one, two = (forecast(run(tmp_path / "a", kind), counted) for kind in ("denoise", "dpo"))
    assert one is not None
    assert two is not None
    assert two.cache_bytes - one.cache_bytes == 10 * 2 * 4 * 128 * 128 * 4, "10 of the 20 pairs are seen"


def test_two_folders_hold_half_as_many_pairs_as_pictures(tmp_path: Path) -> None:
    for name in ("chosen/a", "chosen/b", "rejected/a", "rejected/b"):
        path = tmp_path / "a" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    numbers = forecast(run(tmp_path / "a", "dpo"))
    assert numbers is not None
    assert numbers.images == (2,)
