"""Copies of the tiny model with changes, and what two loads of a model have in common."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gesso.core.batch import Geometry
from gesso.core.seams import Parts
from gesso.families.sdxl import SDXL

CPU = torch.device("cpu")
ALL = ("denoiser", "vae", "text")
CAPTIONS = ["", "a red circle on a blue sea"]
GEOMETRY = [Geometry(1023, 765, 1, 255, 1024, 768), Geometry(3001, 2047, 17, 0, 640, 1536)]


def copy(base: Path, to: Path) -> Path:
    """The model with files of its own, as hard links: replace them, never write into them."""
    shutil.copytree(base, to, copy_function=lambda a, b: Path(b).hardlink_to(a))
    return to


def reconfigure(file: Path, **changes: Any) -> None:
    """Change values of a JSON config."""
    content = json.loads(file.read_text()) | changes
    file.unlink()
    file.write_text(json.dumps(content))


def rewrite(file: Path, change: Any) -> None:
    """Replace the tensors of a file by `change(tensors)`."""
    state = change(load_file(file))
    metadata = {"format": "pt"}
    file.unlink()
    save_file(state, file, metadata)


def load(family: SDXL, names: tuple[str, ...] = ALL, dtype: torch.dtype = torch.float32) -> Parts:
    return family.load(names, dtype=dtype, device=CPU)


def same_networks(one: Parts, other: Parts) -> None:
    """All four networks have the same tensors, in value, type and name."""
    pairs = [(one.denoiser, other.denoiser), (one.vae, other.vae)]
    pairs += zip(one.text_encoders, other.text_encoders, strict=True)
    assert len(pairs) == 4
    for a, b in pairs:
        assert type(a) is type(b)
        mine, theirs = ({**dict(x.named_parameters()), **dict(x.named_buffers())} for x in (a, b))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name


def answers(family: SDXL, parts: Parts) -> dict[str, torch.Tensor]:
    """What the whole model says about fixed inputs."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        text = family.encode_text(parts, CAPTIONS)
        noisy = torch.randn(2, 4, 8, 8, generator=generator)
        predicted = family.predict(parts.denoiser, noisy, torch.tensor([999, 257]), family.condition(text, GEOMETRY))
        moments = family.encode_images(parts, torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1)
        picture = parts.vae.decode(noisy[:, :, :4, :4]).sample
    return {**text, "prediction": predicted, "moments": moments, "picture": picture}


def same_answers(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
