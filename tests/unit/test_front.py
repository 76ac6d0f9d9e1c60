"""The front (command line, config, specs) answers without loading torch or the model libraries."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate")


@pytest.mark.parametrize(
    "module",
    [
        "gesso",
        "gesso.cli",
        "gesso.config.files",
        "gesso.config.advice",
        "gesso.config.run",
        "gesso.families",
        "gesso.errors",
    ],
)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
