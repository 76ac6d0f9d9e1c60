"""What `gesso doctor` looks at. torch is asked in a child process, so a broken one is a finding and not a crash."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gesso.config.machine import nvidia_gpus
from gesso.errors import ResourceError

EXIT_CODE = ResourceError.exit_code
GIB = 2**30
_OPTIONAL = {
    "bitsandbytes": "8-bit AdamW on NVIDIA GPUs",
    "xformers": "another attention kernel; torch's own is as fast on most machines",
    "wandb": "Weights & Biases",
}
_FIRST = ("torch", "diffusers", "transformers", "peft", "safetensors")
_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
print(json.dumps({"cuda": torch.version.cuda, "gpus": gpus, "mps": torch.backends.mps.is_available(),
                  "threads": torch.get_num_threads(), "bf16": bool(gpus) and torch.cuda.is_bf16_supported()}))
"""


@dataclass(frozen=True)
class Check:
    """One thing looked at. `missing` is required, `absent` is optional."""

    name: str
    state: Literal["ok", "missing", "absent", "note"]
    found: str
    mend: str = ""

    def line(self) -> str:
        """For people."""
        mark = {"ok": "ok", "missing": "MISSING", "absent": "-", "note": "note"}[self.state]
        return f"{mark:8}{self.name:18}{self.found}" + (f"\n{'':26}-> {self.mend}" if self.mend else "")

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return dataclasses.asdict(self)


def sound(checks: list[Check]) -> bool:
    """Whether nothing required is missing."""
    return not any(check.state == "missing" for check in checks)


def examine() -> list[Check]:
    """All checks, in the order to read them."""
    gpus = nvidia_gpus()
    return [_python(), *_packages(), *_devices(gpus), *_room(), *_hub(), *_optional(bool(gpus))]


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _requirements() -> dict[str, Any]:
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in importlib.metadata.requires("gesso") or []]
    return {one.name.lower(): one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}


def _packages() -> list[Check]:
    try:
        requirements = _requirements()
    except importlib.metadata.PackageNotFoundError:
        return [Check("gesso", "missing", "not installed as a package", "pip install gesso")]
    checks = []
    for name in sorted(requirements, key=lambda name: (name not in _FIRST, name)):
        wanted = requirements[name]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, "missing", "not installed", f'pip install "{wanted}"'))
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            checks.append(Check(name, "missing", f"{version}, too old", f'pip install --upgrade "{wanted}"'))
        else:
            checks.append(Check(name, "ok", version))
    return checks


def _devices(gpus: list[tuple[str, int]]) -> list[Check]:
    try:
        child = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, timeout=120, check=True)
        torch = json.loads(child.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        detail = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        last = (str(detail).strip().splitlines() or ["no answer"])[-1]
        return [Check("devices", "missing", f"torch cannot be imported: {last}", "pip install --force-reinstall torch")]
    if torch["gpus"]:
        bf16 = "bf16 and fp16" if torch["bf16"] else "fp16 (no bf16: set training.precision: fp16)"
        return [Check("devices", "ok", f"{', '.join(torch['gpus'])} with CUDA {torch['cuda']}, {bf16}")]
    if gpus:
        built = f"CUDA {torch['cuda']}" if torch["cuda"] else "the CPU only"
        mend = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
        return [
            Check("devices", "missing", f"{gpus[0][0]} is there, but torch (built for {built}) cannot use it", mend)
        ]
    if torch["mps"]:
        return [Check("devices", "ok", "Apple GPU (mps)")]
    found = f"CPU only, {torch['threads']} threads: good for the demo and for small models"
    return [Check("devices", "note", found)]


def _room() -> list[Check]:
    import psutil

    memory = psutil.virtual_memory()
    disk = shutil.disk_usage(Path.cwd())
    low = disk.free < 10 * GIB
    mend = "the SDXL base takes 7 GiB and each checkpoint some hundred MiB: free some space" if low else ""
    return [
        Check("memory", "ok", f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} free"),
        Check("disk", "note" if low else "ok", f"{disk.free / GIB:.1f} GiB free in {Path.cwd()}", mend),
    ]


def _hub() -> list[Check]:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    models = sorted(p.name.removeprefix("models--").replace("--", "/") for p in cache.glob("models--*"))
    found = f"{cache}: {', '.join(models[:6]) if models else 'no models yet'}" + (" ..." if len(models) > 6 else "")
    token = bool(os.environ.get("HF_TOKEN")) or (home / "token").is_file()
    login = Check("hub login", "ok", "a token is there") if token else _no_token()
    return [Check("model cache", "ok" if models else "note", found), login]


def _no_token() -> Check:
    return Check("hub login", "absent", "none; only needed for gated models and for pushing", "hf auth login")


def _optional(nvidia: bool) -> list[Check]:
    checks = []
    for name, use in _OPTIONAL.items():
        try:
            checks.append(Check(name, "ok", importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            useful = nvidia or name == "wandb"
            where = "" if useful else " (needs an NVIDIA GPU)"
            checks.append(Check(name, "absent", f"{use}{where}", f"pip install {name}" if useful else ""))
    return checks
