"""The models in the package are those that the recipe beside them made, and they stay small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gesso.core import resolve

LIMIT = 24_000_000
"""Bytes of all files; the repository carries them."""


@pytest.fixture(scope="module")
def weights() -> Path:
    return resolve.locate("micro:sdxl").parent


def test_every_network_is_the_one_that_was_made(weights: Path) -> None:
    recipe = json.loads((weights / "recipe.json").read_text(encoding="utf-8"))
    found = {str(p.relative_to(weights)): resolve.file_sha256(p) for p in weights.rglob("*.safetensors")}
    assert {name.split("/")[0] for name in found} == {"sdxl", "clip", "identity"}
    assert found == recipe["sha256"]


def test_all_of_it_is_small(weights: Path) -> None:
    assert sum(path.stat().st_size for path in weights.rglob("*") if path.is_file()) < LIMIT
