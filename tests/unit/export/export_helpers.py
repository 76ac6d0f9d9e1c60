"""A micro SDXL, a LoRA on it whose every matrix differs from 0, with alpha that is not the rank, and its export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gesso.adapters import LoRA
from gesso.core.runtime import Runtime
from gesso.core.seams import Attached, Parts
from gesso.export import lora
from gesso.export.lora import About, Verified
from gesso.families.sdxl import SDXL
from gesso.micro.models import build_sdxl

CPU = Runtime(torch.device("cpu"), "fp32")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("base") / "micro", seed=3)


@dataclass(frozen=True)
class Trained:
    family: SDXL
    parts: Parts
    attached: Attached

    def save(self, path: Path) -> Path:
        """As a checkpoint writes it."""
        state = {name: tensor.clone() for name, tensor in self.attached.state().items()}
        save_file(state, path, self.attached.metadata())
        return path


@pytest.fixture
def train(base: Path) -> Callable[[LoRA], Trained]:
    def make(adapter: LoRA) -> Trained:
        family = SDXL(base=str(base))
        parts = family.load(("denoiser", "vae", "text"), dtype=torch.float32, device=torch.device("cpu"))
        encoders = (0, 1) if adapter.train_text_encoders else ()
        attached = adapter.attach(parts, family, seed=1, text_encoders=encoders)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for tensor in attached.state().values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        return Trained(family, parts, attached)

    return make


ABOUT = About(
    title="aldar",
    architecture="stable-diffusion-xl-v1-base",
    base="stabilityai/stable-diffusion-xl-base-1.0",
    resolution=(64, 96),
    triggers=("sks aldar",),
    date="2025-01-02T03:04:05",
    tags={"photos": {"a hat": 2, "a robe": 1}},
    training={"ss_steps": "500"},
)
ADAPTER = LoRA(rank=4, alpha=6, targets="all-linear", train_text_encoders=True)


def export(
    trained: Trained, path: Path, format: lora.Format, precision: str = "fp32", fold_alpha: bool = False
) -> Verified:
    return lora.export(
        path,
        lora.taken(trained.attached),
        format=format,
        precision=precision,
        about=ABOUT,
        family=trained.family,
        expected=lora.probe(trained.family, trained.parts),
        runtime=CPU,
        fold_alpha=fold_alpha,
    )
