"""Every oracle runs on one thread, so that sums have one order; the tiny model is written once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gesso.micro.models import build_sdxl


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a tiny SDXL of random weights."""
    return build_sdxl(tmp_path_factory.mktemp("oracle") / "sdxl", seed=3)
