"""The trainers that are compared: for each, the command line that trains the same adapter on the same files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML


@dataclass(frozen=True)
class Cell:
    """One line of the table: what differs between measurements."""

    batch_size: int
    precision: str

    def __str__(self) -> str:
        return f"batch {self.batch_size} {self.precision}"


@dataclass(frozen=True)
class Task:
    """What every trainer is asked to do: a rank-`rank` attention LoRA, AdamW, constant rate, nothing recomputed."""

    model: Path
    images: Path
    resolution: int
    steps: int
    rank: int
    learning_rate: float
    seed: int
    device: str
    peer_script: Path


def gesso(task: Task, cell: Cell, folder: Path) -> list[str]:
    """`gesso train` with a run file; the cache of latents and text is empty at the start."""
    run = {
        "name": "benchmark",
        "output": str(folder / "output"),
        "seed": task.seed,
        "model": {"family": "sdxl", "base": str(task.model)},
        "data": {
            "sources": [{"path": str(task.images)}],
            "resolution": task.resolution,
            "buckets": {"enabled": False},
            "cache": str(folder / "cache"),
        },
        "adapter": {"type": "lora", "rank": task.rank, "alpha": task.rank, "targets": "attention"},
        "training": {
            "steps": task.steps,
            "batch_size": cell.batch_size,
            "learning_rate": task.learning_rate,
            "schedule": {"type": "constant"},
            "optimizer": {"type": "adamw"},
            "precision": cell.precision,
            "gradient_checkpointing": False,
            "device": task.device,
        },
        "trackers": [{"type": "tensorboard"}],
    }
    file = folder / "run.yaml"
    with file.open("w", encoding="utf-8") as stream:
        YAML().dump(run, stream)
    return ["-m", "gesso", "--", "train", str(file)]


def diffusers(task: Task, cell: Cell, folder: Path) -> list[str]:
    """The diffusers project's `train_text_to_image_lora_sdxl.py`, whose defaults are kept where ours are the same."""
    flags = {
        "pretrained_model_name_or_path": task.model,
        "train_data_dir": task.images,
        "caption_column": "text",
        "resolution": task.resolution,
        "train_batch_size": cell.batch_size,
        "max_train_steps": task.steps,
        "learning_rate": task.learning_rate,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "rank": task.rank,
        "mixed_precision": "no" if cell.precision == "fp32" else cell.precision,
        "seed": task.seed,
        "output_dir": folder / "output",
        "cache_dir": folder / "cache",
    }
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [str(task.peer_script), "--", *given, "--center_crop"]


TRAINERS: dict[str, Callable[[Task, Cell, Path], list[str]]] = {"gesso": gesso, "diffusers": diffusers}
"""Name in the results -> what follows `meter.py --report ...` on the command line; the first is what ratios judge."""
