"""Quick runs on the tiny model, and how to compare what they leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
MakeRun = Callable[..., Any]


def settings(
    name: str, base: Path, pictures: Path, encodings: Path, folder: Path, overrides: dict[str, Any]
) -> Settings:
    """The settings of a quick run on the tiny model, with overrides laid over them."""
    values: Settings = {
        "name": name,
        "output": str(folder / name),
        "seed": 3,
        "model": {"base": str(base)},
        "data": {
            "sources": [{"path": str(pictures)}],
            "resolution": 64,
            "buckets": {"step": 16},
            "captions": {"dropout": 0.2},
            "flip": True,
            "cache": str(encodings),
            "workers": 0,
        },
        "adapter": {"rank": 4, "alpha": 6},
        "training": {
            "steps": 8,
            "batch_size": 2,
            "accumulation": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "device": "cpu",
            "schedule": {"type": "cosine", "warmup": 2},
            "ema": {"enabled": True, "decay": 0.95},
        },
        "checkpoint": {"every": 3},
        "trackers": [],
    }
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split("__")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return values


def checkpoint_bytes(folder: Path, step: int) -> dict[str, tuple[Settings, bytes]]:
    """Header and tensor bytes of every tensor file of a checkpoint, to compare runs bit for bit.

    The header is parsed because the library writes the keys of its metadata in any order.
    """
    found = folder / f"checkpoint-{step}"
    files = {}
    for path in found.rglob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        files[str(path.relative_to(found))] = (json.loads(content[8:start]), content[start:])
    assert "state/optimizer.safetensors" in files
    assert any(not name.startswith(("state/", "ema/")) for name in files)
    return files
