"""What this machine has, found out without importing torch."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys

from gesso.config.forecast import Machine


def detect() -> Machine:
    """GPU (the one with the most memory), its memory, and main memory."""
    import psutil

    memory = int(psutil.virtual_memory().total)
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Machine(gpu="Apple Silicon", gpu_memory=memory, memory=memory)
    gpus = nvidia_gpus()
    name, size = max(gpus, key=lambda gpu: gpu[1]) if gpus else (None, None)
    return Machine(gpu=name, gpu_memory=size, memory=memory)


def nvidia_gpus() -> list[tuple[str, int]]:
    """Name and memory in bytes of each NVIDIA GPU, as the driver tells; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in answer.splitlines() if "," in line]
    return [(name.strip(), int(size) * 2**20) for name, size in rows if size.strip().isdigit()]
