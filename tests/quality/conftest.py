"""One trained character and one set of the base model's pictures, shared by all tests of quality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from quality_helpers import BASE, draw, opened, teach

from gesso.micro import captions, score, world
from gesso.micro.lessons import CHARACTER

STEPS = 200
ORDINARY, UNSEEN = 48, 16


@pytest.fixture(scope="session")
def base() -> Any:
    """The packaged model in plain diffusers."""
    return score.open_model(BASE)


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short character lesson."""
    return teach(tmp_path_factory.mktemp("character"), CHARACTER, steps=STEPS)


@pytest.fixture(scope="session")
def taught_pipeline(taught: Path) -> Any:
    return opened(taught)


@pytest.fixture(scope="session")
def unseen() -> list[str]:
    """Prompts for Aldar where and as he never was in the lesson."""
    return CHARACTER.prompts(UNSEEN)


@pytest.fixture(scope="session")
def taught_pictures(taught_pipeline: Any, unseen: list[str]) -> list[Image.Image]:
    return draw(taught_pipeline, unseen)


@pytest.fixture(scope="session")
def ordinary() -> list[str]:
    """Prompts of the world as the base model knows it, in combinations that it was never shown."""
    return [captions.caption(scene.facts) for scene in world.held_out_scenes(score.SEED, ORDINARY)]


@pytest.fixture(scope="session")
def ordinary_pictures(base: Any, ordinary: list[str]) -> list[Image.Image]:
    return draw(base, ordinary)
