"""Run files as users write them, and the command line as they call it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from gesso import cli
from run_helpers import settings

Shell = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    def refused(self, code: int, *parts: str) -> str:
        """Assert the exit code and a short message that holds every part; returns the message."""
        assert self.code == code, f"exit {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err
        for part in parts:
            assert part in self.err, f"{part!r} is not in:\n{self.err}"
        assert len(self.err.splitlines()) <= 12, f"too much to read:\n{self.err}"
        return self.err

    def fine(self) -> str:
        """Assert success with nothing to complain about; returns what was printed."""
        assert self.code == 0, f"exit {self.code}\n{self.out}\n{self.err}"
        return self.out


@dataclass(frozen=True)
class Desk:
    """A user's folder with a run file for the tiny model, and the command line in it."""

    folder: Path
    base: Path
    pictures: Path
    encodings: Path
    capture: pytest.CaptureFixture[str] = field(repr=False)

    @property
    def run_file(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def write(self, **overrides: Any) -> Path:
        """Write run.yaml; keyword names are dotted keys with `__` for the dot."""
        values = settings("run", self.base, self.pictures, self.encodings, self.folder, overrides)
        YAML().dump(values, self.run_file)
        return self.run_file

    def line(self, text: str) -> str:
        """`run.yaml:N`, N being the number of the only line that starts with this text."""
        (number,) = [
            i for i, line in enumerate(self.run_file.read_text().splitlines(), 1) if line.strip(" -").startswith(text)
        ]
        return f"{self.run_file}:{number}"

    def call(self, *arguments: str | Path) -> Answer:
        """The command line in this process."""
        self.capture.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        printed = self.capture.readouterr()
        code = caught.value.code
        return Answer(code if isinstance(code, int) else 0, printed.out, printed.err)

    def train(self, *arguments: str | Path) -> Answer:
        """`gesso train run.yaml ...` in this process."""
        return self.call("train", self.run_file, *arguments)


def environment() -> dict[str, str]:
    """One thread and no hub for a process of its own."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def shell(*command: str | Path, cwd: Path) -> Answer:
    """`python COMMAND...` in a process of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@contextmanager
def started(*command: str | Path, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    """`python COMMAND...` running beside the test, killed when the block is left."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        **{"cwd": cwd, "env": environment(), "text": True},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def draw_pictures(folder: Path, names: Sequence[str], *, seed: int = 0, side: int = 64) -> None:
    """Noise pictures of one size under these names."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        pixels = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
