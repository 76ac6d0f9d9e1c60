"""Pictures, folders and a stand-in model family for the data tests."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gesso.config.run import Buckets, Data, Source
from gesso.data.places import Place
from gesso.data.rows import Row

CPU = torch.device("cpu")


def solid(path: Path, size: tuple[int, int] = (64, 64), colour: object = (200, 30, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def captioned(folder: Path, name: str, caption: str, size: tuple[int, int] = (64, 64), colour: object = "red") -> Path:
    path = solid(folder / name, size, colour)
    path.with_suffix(".txt").write_text(caption, "utf-8")
    return path


def folder_of(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((64, 64),)) -> Path:
    """Pictures that all differ, each captioned with its number."""
    for i in range(count):
        captioned(folder, f"{i:03}.png", f"picture {i}", sizes[i % len(sizes)], (i % 256, 7 * i % 256, 40))
    return folder


def data_for(*folders: Path, cache: Path, resolution: int = 64, step: int = 16, **changes: object) -> Data:
    fields: dict[str, object] = {
        "sources": tuple(Source(path=str(f)) for f in folders),
        "resolution": resolution,
        "buckets": Buckets(step=step),
        "cache": cache,
    }
    return Data.model_validate(fields | changes)


def row(number: int, size: tuple[int, int] = (64, 64), **changes: object) -> Row:
    name = f"{number:032x}"
    fields = {"caption": f"picture {number}", "place": Place(f"/nowhere/{number}.png")} | changes
    return Row(id=name, image=name, width=size[0], height=size[1], **fields)  # type: ignore[arg-type]


def settle() -> None:
    """Let fresh files grow older than the moment in which a scan does not trust their timestamps."""
    time.sleep(0.15)


class PoolingFamily:
    """A family whose VAE averages 8 x 8 pixels and whose text embedding is the caption's letters."""

    def __init__(self) -> None:
        self.images = 0
        self.texts = 0

    def encode_images(self, _parts: object, pixels: torch.Tensor) -> torch.Tensor:
        self.images += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, 8)
        return torch.cat([mean, torch.full_like(mean, 1e-3)], dim=1)

    def encode_text(self, _parts: object, captions: list[str]) -> dict[str, torch.Tensor]:
        self.texts += len(captions)
        letters = [[ord(c) for c in caption.ljust(24)[:24]] for caption in captions]
        embeddings = torch.tensor(letters, dtype=torch.float32)
        return {"embeddings": embeddings, "pooled": embeddings.mean(1, keepdim=True)}

    def latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        mean, deviation = moments.chunk(2, dim=1)
        return mean + deviation * noise


def caption_of(embedding: torch.Tensor) -> str:
    return "".join(chr(int(v)) for v in embedding).rstrip()


def coordinates(width: int, height: int) -> Image.Image:
    """Red says the column, green the row (both below 256)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)[None, :]
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)
