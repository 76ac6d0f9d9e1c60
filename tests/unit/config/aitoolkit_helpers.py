"""A process of a job file of ai-toolkit, and its conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gesso.config import dialects, document
from gesso.config.dialects import Converted

NAME = "a job file of ai-toolkit"
BASE: dict[str, Any] = {
    "trigger_word": "sks",
    "network": {"type": "lora"},
    "datasets": [{"folder_path": "/other"}],
    "train": {"lr": 1e-5},
    "model": {"name_or_path": "c/d", "arch": "sdxl"},
}


def convert(process: dict[str, Any]) -> Converted:
    text = document.emit({"job": "extension", "config": {"name": "n", "process": [process]}})
    return dialects.convert(NAME, document.parse(text, file="job.yaml"), folder=Path("/jobs"))
