"""The run folder: where everything is, who holds it, and writes that are whole or absent."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gesso.errors import LockedError, ResourceError

WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Files are the interface: the studio, the launchers and the command line read these."""

    path: Path

    @property
    def config(self) -> Path:
        """The run file as resolved."""
        return self.path / "run.yaml"

    @property
    def lock_file(self) -> Path:
        """Versions and hashes of everything that went in."""
        return self.path / "lock.json"

    @property
    def events(self) -> Path:
        """Append-only JSON lines, one per event."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """Curves as lists, for a quick look."""
        return self.path / "metrics.json"

    @property
    def status(self) -> Path:
        """What the run is doing now."""
        return self.path / "status.json"

    @property
    def logs(self) -> Path:
        """TensorBoard files, train.log, tracebacks."""
        return self.path / "logs"

    @property
    def samples(self) -> Path:
        """Preview pictures, one folder a step, and their index."""
        return self.path / "samples"

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimiser steps."""
        return self.path / f"checkpoint-{step}"

    def prepare(self) -> None:
        """Create the folder and prove that it can be written; raises `ResourceError` otherwise."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.samples.mkdir(exist_ok=True)
            write_atomic(self.path / ".probe", b"probe")
            (self.path / ".probe").unlink()
        except OSError as error:
            raise ResourceError(
                f"the run folder cannot be written ({error.strerror})",
                where=str(self.path),
                fix="choose another folder with --output, or free space and permissions there",
            ) from error

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder for this process; raises `LockedError` while another process does.

        The kernel drops the lock when the holder dies, so a crash never leaves a stale one.
        """
        with (self.path / ".lock").open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise LockedError(
                    f"another run is writing here ({holder})",
                    where=str(self.path),
                    fix="wait for it or stop it, or choose another folder with --output",
                ) from None
            handle.truncate(0)
            handle.write(f"pid {os.getpid()} on {socket.gethostname()}")
            handle.flush()
            yield


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that readers see the old or the new content, never a part; fsynced if `durable`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            if durable:
                handle.flush()
                os.fsync(handle.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, *, durable: bool = True) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode(), durable=durable)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
