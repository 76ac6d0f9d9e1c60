"""A micro SDXL, and a LoRA on it that shows in every picture."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gesso.adapters import LoRA
from gesso.core.seams import Attached, Parts
from gesso.families.sdxl import SDXL
from gesso.micro.models import build_sdxl

Made = tuple[SDXL, Parts, Attached]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("base") / "micro", seed=3)


@pytest.fixture
def train(base: Path) -> Callable[..., Made]:
    def make(adapter: LoRA, *, path: Path | None = None, seed: int = 5) -> Made:
        """Random adapter weights on the base; with `path`, written as a checkpoint writes them."""
        family = SDXL(base=str(base))
        parts = family.load(("denoiser", "vae", "text"), dtype=torch.float32, device=torch.device("cpu"))
        encoders = (0, 1) if adapter.train_text_encoders else ()
        attached = adapter.attach(parts, family, seed=1, text_encoders=encoders)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in attached.state().values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.clone() for k, v in attached.state().items()}, path, attached.metadata())
        return family, parts, attached

    return make
