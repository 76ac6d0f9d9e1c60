"""Presets and examples: every one loads, and says something sensible."""

from __future__ import annotations

from pathlib import Path

import pytest

from gesso.config import files, presets
from gesso.config.forecast import GIB, forecast
from gesso.errors import UserError

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
SOURCE = "data: {sources: [{path: images}]}\n"


def test_the_presets_that_guides_name_are_there() -> None:
    assert presets.names() == ("character", "high_quality", "low_vram", "quick_test", "style")
    assert all(presets.about(name).endswith(".") for name in presets.names())
    with pytest.raises(UserError, match="no preset 'stile'"):
        presets.get("stile")


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_is_a_whole_run_but_for_its_data(name: str) -> None:
    run = files.load_text(f"preset: {name}\n{SOURCE}", folder=Path("/")).run
    assert run.training.gradient_checkpointing, "presets are made for cards of 8 to 16 GB"


def test_quick_test_is_quick() -> None:
    run = files.load_text(f"preset: quick_test\n{SOURCE}", folder=Path("/")).run
    assert (run.training.steps, run.training.learning_rate, run.training.batch_size) == (100, 1e-4, 1)
    assert (run.adapter.rank, run.data.resolution) == (16, 512)


@pytest.mark.parametrize(("name", "card"), [("low_vram", 8), ("character", 12), ("style", 16), ("high_quality", 16)])
def test_presets_fit_the_card_they_name(name: str, card: int, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    numbers = forecast(files.load_text(f"preset: {name}\n{SOURCE}", folder=tmp_path).run)
    assert numbers is not None
    assert numbers.memory_bytes is not None
    assert numbers.memory_bytes < 0.95 * card * GIB


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_loads(path: Path) -> None:
    loaded = files.load(path)
    assert (loaded.report is not None) == path.name.startswith("from_")
    if loaded.report is None:
        assert all(Path(source.path).parent.is_relative_to(path.parent) for source in loaded.run.data.sources)
