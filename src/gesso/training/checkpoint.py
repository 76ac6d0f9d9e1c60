"""Checkpoints that are whole or absent: written beside, hashed, synced, then renamed into place. No pickle anywhere.

RUN/checkpoint-500/
    pytorch_lora_weights.safetensors    what `pipe.load_lora_weights` reads; also the trained state itself
    unet/config.json ...                or, of a full fine-tune, each trained network as `from_pretrained` reads it
    ema/...                             the averaged weights in the same files
    state/optimizer.safetensors  state/position.json
    manifest.json                       name, size and SHA-256 of every other file, written last
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from gesso.config.run import Checkpoint
from gesso.core.checkpoints import (
    AVERAGE,
    MANIFEST,
    OPTIMIZER,
    POSITION,
    SHADOW,
    faults,
    is_model,
    is_weights,
    listed,
    newest,
)
from gesso.core.folder import sync_folder
from gesso.core.seams import Layout
from gesso.errors import ResourceError, UserError

_SPARE = 1.2


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs to go on from `step` finished optimiser steps."""

    step: int
    weights: Mapping[str, Tensor]
    layout: Layout
    optimizer: Mapping[str, Tensor]
    average: Mapping[str, Tensor] | None
    position: Mapping[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        average = self.average or {}
        tensors = [*self.weights.values(), *self.optimizer.values(), *average.values()]
        return sum(t.nbytes for t in tensors) + sum(4 * t.numel() for t in average.values())

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Each file's name in the checkpoint folder and its content, one at a time."""
        yield from self._weights(self.weights)
        yield OPTIMIZER, _pack(self.optimizer)
        yield POSITION, (json.dumps({"step": self.step, **self.position}, indent=2) + "\n").encode()
        if self.average is not None:
            # Readers want float32, and buffers too, which have no average; going on exactly needs every bit.
            averaged = {**self.weights, **{k: v.float() for k, v in self.average.items()}}
            for name, content in self._weights(averaged):
                yield f"{AVERAGE}/{name}", content
            yield SHADOW, _pack(self.average)

    def _weights(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, bytes]]:
        for name, own in self.layout.split(tensors).items():
            yield name, _pack(own, self.layout.headers[name])
        for name, text in self.layout.texts.items():
            yield name, text.encode()


@dataclass
class Store:
    """The checkpoints of one run folder. `wait` seconds pass between the tries of a save that finds the disk full."""

    folder: Path
    policy: Checkpoint
    warn: Callable[[str], None]
    tries: int = 3
    wait: float = 20.0
    _last_size: int = field(default=0, init=False)

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint durably, then drop the ones the policy does not keep.

        Raises `ResourceError` when the disk stays full; what was saved before is then untouched.
        """
        target = self.folder / f"checkpoint-{snapshot.step}"
        if target.exists() and not faults(target):
            return target
        for attempt in range(1, self.tries + 1):
            try:
                self._check_space(snapshot.size)
                self._write(target, snapshot)
                break
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT} or attempt == self.tries:
                    raise self._failed(target, error) from error
                self.warn(f"{error.strerror} while saving {target.name}; trying again in {self.wait:.0f} s")
                time.sleep(self.wait)
        self._prune(written=target, best=snapshot.position.get("best"))
        return target

    def sweep(self) -> None:
        """Remove what an earlier process left half written or half deleted."""
        for path in [*self.folder.glob(".partial-*"), *self.folder.glob(".trash-*")]:
            shutil.rmtree(path, ignore_errors=True)

    def _check_space(self, size: int) -> None:
        needed = int(_SPARE * size)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed")

    def _write(self, target: Path, snapshot: Snapshot) -> None:
        partial = self.folder / f".partial-{target.name}-{uuid.uuid4().hex[:8]}"
        try:
            manifest = {}
            for name, content in snapshot.files():
                _write_synced(partial / name, content)
                manifest[name] = {"size": len(content), "sha256": sha256(content).hexdigest()}
            _write_synced(partial / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
            for folder in {folder for name in manifest for folder in (partial / name).parents} - set(partial.parents):
                sync_folder(folder)
            if target.exists():
                target.rename(self.folder / f".trash-{target.name}-{uuid.uuid4().hex[:8]}")
            partial.rename(target)
            sync_folder(self.folder)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _failed(self, target: Path, error: OSError) -> ResourceError:
        kept, _ = newest(self.folder)
        return ResourceError(
            f"checkpoint could not be saved ({error.strerror})",
            where=str(target),
            fix=f"free space there, then go on with --resume latest; {kept.name if kept else 'nothing'} is kept",
        )

    def _prune(self, *, written: Path, best: int | None) -> None:
        """Drop old checkpoints; `written` was just made and synced, so at least one good one remains."""
        steps = listed(self.folder)
        older = [step for step in steps if step < int(written.name.rpartition("-")[2])]
        spare = older[: max(len(older) - (self.policy.keep_last - 1), 0)]
        for step in spare:
            if step == best or (self.policy.keep_every and step % self.policy.keep_every == 0):
                continue
            path = steps[step]
            trash = self.folder / f".trash-{path.name}-{uuid.uuid4().hex[:8]}"
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def load(path: Path) -> Snapshot:
    """Read a checkpoint back; raises `UserError` listing what is wrong with a damaged one."""
    if problems := faults(path):
        raise UserError(
            f"this checkpoint is damaged: {'; '.join(problems)}",
            where=str(path),
            fix="use --resume latest, which takes the newest whole one",
        )
    position = json.loads((path / POSITION).read_text())
    names = sorted(json.loads((path / MANIFEST).read_text()))
    weights: dict[str, Tensor] = {}
    headers: dict[str, dict[str, str]] = {}
    for name in filter(is_weights, names):
        with safetensors.safe_open(path / name, framework="pt") as handle:
            headers[name] = dict(handle.metadata() or {})
        weights |= {f"{Layout.prefix(name)}{k}": t for k, t in safetensors.torch.load_file(path / name).items()}
    texts = {name: (path / name).read_text() for name in names if is_model(name) and not is_weights(name)}
    shadow = path / SHADOW
    return Snapshot(
        step=int(position.pop("step")),
        weights=weights,
        layout=Layout(headers, texts),
        optimizer=safetensors.torch.load_file(path / OPTIMIZER),
        average=safetensors.torch.load_file(shadow) if shadow.exists() else None,
        position=position,
    )


def _pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, dict(metadata) if metadata else None)


def _write_synced(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
