"""A tiny SDXL and a handful of pictures that tests of whole runs share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from run_helpers import MakeRun, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a random miniature of SDXL."""
    import torch

    from gesso.micro.models import build_sdxl

    torch.set_num_threads(1)
    return build_sdxl(tmp_path_factory.mktemp("base") / "sdxl")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine captioned pictures of three shapes, so that windows mix buckets and one stays short."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(64, 64)] * 5 + [(96, 64)] * 2 + [(64, 96)] * 2):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a photo of thing number {i}")
    return folder


@pytest.fixture(scope="session")
def encodings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all runs of a test session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_run(tiny_base: Path, pictures: Path, encodings: Path, tmp_path: Path) -> MakeRun:
    """A RunConfig maker: keyword names are dotted keys with `__` for the dot."""
    from gesso.config.run import RunConfig

    def make(name: str = "run", **overrides: Any) -> RunConfig:
        return RunConfig.model_validate(settings(name, tiny_base, pictures, encodings, tmp_path, overrides))

    return make
