"""Encoded pictures and captions on disk, named by the hash of all that they depend on.

An entry is a 16-byte checksum followed by safetensors bytes, written beside its place and renamed into it, so two
processes may fill one folder. Nothing is ever stale: whatever changes the encoding changes the name.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import safetensors.torch
import torch
from torch import Tensor

from gesso.core.events import Progress, Warned
from gesso.core.seams import Emit, Family, Parts
from gesso.data.buckets import Visit
from gesso.data.images import content_hash, decode_bytes, fit, read
from gesso.data.threads import ahead
from gesso.errors import NumericError, ResourceError, UserError

VERSION = 1
"""Counts up when the code that makes entries changes what it makes."""

_CHECKSUM = 16
T = TypeVar("T")


class Filled(NamedTuple):
    """What filling a cache did: entries made, found, and (among those made) found damaged."""

    encoded: int
    reused: int
    damaged: int


class Store:
    """Tensors by key, one file an entry, in sub-folders of the first two digits of the key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where an entry is kept."""
        return self.folder / key[:2] / f"{key[2:]}.entry"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The entry, or None if there is none or if its checksum is wrong."""
        try:
            content = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(error) from error
        checksum, blob = content[:_CHECKSUM], content[_CHECKSUM:]
        if checksum != _checksum(key, blob):
            return None
        return safetensors.torch.load(blob)

    def has_file(self, key: str) -> bool:
        """Whether there is a file for this entry, good or damaged."""
        return self.path(key).exists()

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Write an entry; readers see it whole or not at all."""
        blob = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
        path = self.path(key)
        temporary = path.with_name(f".{os.getpid()}-{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_checksum(key, blob) + blob)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ResourceError:
        return ResourceError(
            f"the cache cannot be used: {error.strerror}",
            where=str(self.folder),
            fix="free some disk space, or set data.cache to another folder",
        )


class LatentCache:
    """Posterior moments [2C, h, w] float32 of fitted pictures.

    `fingerprint` names the VAE's weights and settings, `dtype` the precision it computes in.
    """

    def __init__(self, store: Store, *, fingerprint: str, dtype: torch.dtype, background: str) -> None:
        self._store, self._background = store, background
        self._encoder = [fingerprint, str(dtype)]

    def key(self, visit: Visit) -> str:
        """The name of a rendition: content, geometry, background, encoder and code."""
        fitted = visit.fit
        geometry = [fitted.resized, fitted.bucket, fitted.crop, fitted.flip]
        return _key("latents", visit.row.image, geometry, self._background, self._encoder)

    def read(self, visit: Visit) -> Tensor:
        """The moments of a visit, [2C, h, w]; `UserError` if they are missing or damaged."""
        return _read(self._store, self.key(visit), str(visit.row.path))["moments"]

    def fill(
        self,
        visits: Sequence[Visit],
        *,
        family: Family,
        parts: Parts,
        device: torch.device,
        emit: Emit,
        batch_size: int = 1,
        step: int = 0,
    ) -> Filled:
        """Encode the renditions that are missing or damaged.

        With the default batch size an entry's bits do not depend on what else is encoded. Raises `NumericError`
        naming the picture if its encoding is not finite, and `UserError` if a file changed since it was indexed.
        """
        filling = _Filling(self._store, "caching images", len({self.key(v) for v in visits}), emit, step)
        todo = sorted(filling.missing(visits, self.key), key=lambda v: v.fit.bucket)
        pixels = ahead(functools.partial(_pixels, background=self._background), todo, threads=2, depth=4)
        for batch in _runs(zip(todo, pixels, strict=True), batch_size):
            stacked = torch.stack([tensor for _, tensor in batch]).to(device)
            with torch.no_grad():
                moments = family.encode_images(parts, stacked).cpu()
            for (visit, _), one in zip(batch, moments, strict=True):
                _require_finite(one, "the VAE's encoding of this picture", str(visit.row.path))
                filling.put(self.key(visit), {"moments": one})
        return filling.finish()


class TextCache:
    """Text embeddings of captions. `fingerprint` names the encoders and their settings (long-prompt policy too)."""

    def __init__(self, store: Store, *, fingerprint: str, dtype: torch.dtype) -> None:
        self._store = store
        self._encoder = [fingerprint, str(dtype)]

    def key(self, caption: str) -> str:
        """The name of a caption's embeddings."""
        return _key("text", caption, self._encoder)

    def read(self, caption: str) -> dict[str, Tensor]:
        """The embeddings of a caption, each without a batch dimension; `UserError` if missing or damaged."""
        return _read(self._store, self.key(caption), f"caption {caption!r}")

    def fill(
        self,
        captions: Sequence[str],
        *,
        family: Family,
        parts: Parts,
        emit: Emit,
        batch_size: int = 1,
        step: int = 0,
    ) -> Filled:
        """Encode the captions that are missing or damaged; errors as for pictures."""
        filling = _Filling(self._store, "caching captions", len(set(captions)), emit, step)
        todo = filling.missing(captions, self.key)
        for i in range(0, len(todo), batch_size):
            batch = todo[i : i + batch_size]
            with torch.no_grad():
                text = {name: tensor.cpu() for name, tensor in family.encode_text(parts, batch).items()}
            for row, caption in enumerate(batch):
                entry = {name: tensor[row].clone() for name, tensor in text.items()}
                for tensor in entry.values():
                    _require_finite(tensor, "the text encoders' output for this caption", repr(caption))
                filling.put(self.key(caption), entry)
        return filling.finish()


class _Filling:
    """Counts, progress events and writes of one `fill`."""

    def __init__(self, store: Store, task: str, total: int, emit: Emit, step: int) -> None:
        self._store, self._task, self._total, self._emit, self._step = store, task, total, emit, step
        self._encoded = self._reused = self._damaged = 0

    def missing(self, items: Iterable[T], key: Callable[[T], str]) -> list[T]:
        """The distinct items that have no good entry."""
        wanted: dict[str, T] = {}
        for item in items:
            wanted.setdefault(key(item), item)
        todo = []
        for name, item in wanted.items():
            if self._store.get(name) is not None:
                self._reused += 1
                self._report()
                continue
            self._damaged += self._store.has_file(name)
            todo.append(item)
        return todo

    def put(self, key: str, entry: dict[str, Tensor]) -> None:
        self._store.put(key, entry)
        self._encoded += 1
        self._report()

    def finish(self) -> Filled:
        if self._damaged:
            self._emit(Warned(self._step, f"{self._damaged} damaged cache entries were made again"))
        return Filled(self._encoded, self._reused, self._damaged)

    def _report(self) -> None:
        done = self._encoded + self._reused
        # At most about 200 events a task, the last one always.
        if done == self._total or done % max(1, self._total // 200) == 0:
            self._emit(Progress(self._step, self._task, done, self._total))


def _pixels(visit: Visit, *, background: str) -> Tensor:
    data = read(visit.row.path)
    if content_hash(data) != visit.row.image:
        raise UserError("the picture changed after it was indexed", where=str(visit.row.path), fix="start again")
    pixels, _ = fit(decode_bytes(data, path=visit.row.path, background=background).image, visit.fit)
    return torch.from_numpy(pixels)


def _runs(pairs: Iterable[tuple[Visit, Tensor]], size: int) -> Iterator[list[tuple[Visit, Tensor]]]:
    """Lists of at most `size` neighbours of one shape."""
    batch: list[tuple[Visit, Tensor]] = []
    for visit, pixels in pairs:
        if batch and (len(batch) == size or batch[0][1].shape != pixels.shape):
            yield batch
            batch = []
        batch.append((visit, pixels))
    if batch:
        yield batch


def _require_finite(tensor: Tensor, what: str, where: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NumericError(
            f"{what} is not finite",
            where=where,
            fix="set training.precision to bf16 or fp32, or model.vae to an fp16-safe one",
        )


def _read(store: Store, key: str, where: str) -> dict[str, Tensor]:
    entry = store.get(key)
    if entry is None:
        state = "damaged" if store.has_file(key) else "missing"
        raise UserError(
            f"its cache entry is {state}: {store.path(key)}", where=where, fix="resume the run; it will be made again"
        )
    return entry


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


def _checksum(key: str, blob: bytes) -> bytes:
    # The key is part of it: an entry under a wrong name is damaged too.
    return hashlib.blake2b(blob, digest_size=_CHECKSUM, key=key.encode()).digest()
