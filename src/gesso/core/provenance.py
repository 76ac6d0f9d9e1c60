"""What a run was made with: versions of everything that can change a number."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import gesso

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "pillow", "tokenizers")


def provenance() -> dict[str, Any]:
    """Versions of Gesso, Python and the packages whose code touches the numbers, and the commit in a checkout."""
    packages = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "gesso": gesso.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }


def _commit() -> str | None:
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
