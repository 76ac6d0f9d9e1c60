"""Encoded pictures and captions, made once and kept in a `Store` under the hash of all that they depend on.

Nothing is ever stale: whatever changes an encoding changes its name. `fill` proves that every entry a run needs is
there and whole; where one goes bad after that, `rebuild` makes it again in the middle of the run.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gesso.data import images
from gesso.data.filling import Filled, Filling, Work
from gesso.data.store import Array, Entry, Store
from gesso.errors import NumericError, UserError

if TYPE_CHECKING:
    from gesso.core.seams import Emit, Family, Parts
    from gesso.data.plan import Visit

VERSION = 2
"""Counts up when the code that makes entries changes what it makes."""

_BATCH_PIXELS = 4 * 1024 * 1024
_BATCH_CAPTIONS = 32
_CPU = torch.device("cpu")
_PICTURE = "the VAE's encoding of this picture"


class Encoded(NamedTuple):
    """A picture as the denoiser sees it: posterior moments [2C, h, w], and its mask [1, h, w] where it has one."""

    moments: Tensor
    mask: Tensor | None


def encoder_batch(device: torch.device, pixels: int) -> int:
    """How many pictures of so many pixels go through the VAE at once: on a GPU as many as make about 4 megapixels.

    One on a CPU, where more are no faster and would let an entry's last bits depend on its company.
    """
    return 1 if device.type == "cpu" else max(1, _BATCH_PIXELS // pixels)


class LatentCache:
    """Posterior moments of fitted pictures in a store.

    `fingerprint` names the VAE's weights and settings, `dtype` the precision it computes in. `rebuild` encodes a visit
    whose entry was pruned or damaged after `fill`; without it such a read is a `UserError`.
    """

    def __init__(
        self,
        store: Store,
        *,
        fingerprint: str,
        dtype: torch.dtype,
        background: str,
        rebuild: Callable[[Visit], Encoded] | None = None,
    ) -> None:
        self._store, self._background, self._rebuild = store, background, rebuild
        self._fingerprint, self._dtype = fingerprint, str(dtype)

    def key(self, visit: Visit) -> str:
        """The name of a rendition: content, geometry, colours, background, mask, encoder and code."""
        row = visit.row
        mask = ["alpha" if row.mask is None else "file", row.mask_hash] if row.mask_hash else []
        return _key("latents", row.image, visit.fit.facts, self._background, mask, self._fingerprint, self._dtype)

    def read(self, visit: Visit) -> Encoded:
        """The encoding of a visit, as views of what was read; `UserError` if it is missing or damaged."""
        key = self.key(visit)
        entry = self._store.get(key)
        if entry is None:
            if self._rebuild is None:
                raise _lost(self._store, key, str(visit.row.place))
            encoded = self._rebuild(visit)
            self._put(key, visit, encoded)
            return encoded
        tensors = _tensors(entry)
        return Encoded(tensors["moments"], tensors.get("mask"))

    def fill(
        self,
        visits: Sequence[Visit],
        *,
        family: Family,
        parts: Parts,
        device: torch.device,
        emit: Emit,
        batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
    ) -> Filled:
        """Encode the renditions that are missing or damaged; afterwards all of `visits` can be read.

        Every rank gives the same visits, begins with its own share and then makes what is still missing of the
        others'. `batch_size` is `encoder_batch` if empty. Raises `NumericError` naming the picture if its encoding is
        not finite, and `UserError` if a file changed since it was indexed.
        """

        def size(visit: Visit) -> int:
            width, height = visit.fit.bucket
            return encoder_batch(device, width * height) if batch_size is None else batch_size

        def order(visit: Visit) -> tuple[object, ...]:
            # Neighbours share a shape where that makes batches, and else an archive or a table's row group.
            place = visit.row.place
            shape = visit.fit.bucket if size(visit) > 1 else (0, 0)
            return shape, place.url, place.start, place.part, visit.fit.facts

        def load(visit: Visit) -> Loaded:
            return _load(visit, self._background)

        def encode(_batch: Sequence[Visit], loaded: Sequence[Loaded]) -> list[Encoded]:
            return _encode(loaded, family, parts, device)

        def save(key: str, visit: Visit, encoded: Encoded) -> None:
            _require_finite(encoded.moments, _PICTURE, str(visit.row.place))
            self._put(key, visit, encoded)

        wanted: dict[str, Visit] = {}
        for visit in visits:
            wanted.setdefault(self.key(visit), visit)
        work = Work(size, lambda visit: visit.fit.bucket, order, load, encode, save)
        return Filling(self._store, "caching images", wanted, work, emit, step).run(rank, world_size)

    def _put(self, key: str, visit: Visit, encoded: Encoded) -> None:
        tensors = {"moments": encoded.moments}
        if encoded.mask is not None:
            tensors["mask"] = encoded.mask
        width, height = visit.fit.bucket
        of = f"{visit.row.place} at {width} x {height}"
        self._store.put(key, _arrays(tensors), kind="latents", encoder=self._fingerprint, of=of)


class LiveLatents:
    """The same without a disk: every visit is encoded when it is read, one at a time, with the bits of a cached one."""

    def __init__(self, *, family: Family, parts: Parts, device: torch.device, background: str) -> None:
        self._family, self._parts, self._device, self._background = family, parts, device, background
        # Threads that prepare batches must not be in the encoder at once: memory for one picture is what it has.
        self._lock = threading.Lock()

    def read(self, visit: Visit) -> Encoded:
        """The encoding of a visit; errors as of `LatentCache.fill`."""
        loaded = _load(visit, self._background)
        with self._lock:
            [encoded] = _encode([loaded], self._family, self._parts, self._device)
        _require_finite(encoded.moments, _PICTURE, str(visit.row.place))
        return encoded


class TextCache:
    """Text embeddings of captions in a store.

    `fingerprint` names the encoders and their settings (long-prompt policy too); `rebuild` as for pictures.
    """

    def __init__(
        self,
        store: Store,
        *,
        fingerprint: str,
        dtype: torch.dtype,
        rebuild: Callable[[str], dict[str, Tensor]] | None = None,
    ) -> None:
        self._store, self._rebuild = store, rebuild
        self._fingerprint, self._dtype = fingerprint, str(dtype)

    def key(self, caption: str) -> str:
        """The name of a caption's embeddings."""
        return _key("text", caption, self._fingerprint, self._dtype)

    def read(self, caption: str) -> dict[str, Tensor]:
        """The embeddings of a caption, each without a batch dimension; `UserError` if missing or damaged."""
        key = self.key(caption)
        entry = self._store.get(key)
        if entry is None:
            if self._rebuild is None:
                raise _lost(self._store, key, f"caption {caption!r}")
            embeddings = self._rebuild(caption)
            self._put(key, caption, embeddings)
            return embeddings
        return _tensors(entry)

    def fill(
        self,
        captions: Sequence[str],
        *,
        family: Family,
        parts: Parts,
        emit: Emit,
        device: torch.device = _CPU,
        batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
    ) -> Filled:
        """Encode the captions that are missing or damaged; ranks and errors as for pictures.

        `device` is where the encoders are; if `batch_size` is empty, it says how many captions are encoded at once.
        """
        size = batch_size or (1 if device.type == "cpu" else _BATCH_CAPTIONS)

        def encode(batch: Sequence[str], _loaded: Sequence[None]) -> list[dict[str, Tensor]]:
            return _embed(batch, family, parts)

        def save(key: str, caption: str, embeddings: dict[str, Tensor]) -> None:
            _require_finite_text(embeddings, caption)
            self._put(key, caption, embeddings)

        wanted = {self.key(caption): caption for caption in captions}
        work = Work(lambda _: size, lambda _: None, lambda caption: (caption,), lambda _: None, encode, save)
        return Filling(self._store, "caching captions", wanted, work, emit, step).run(rank, world_size)

    def _put(self, key: str, caption: str, embeddings: Mapping[str, Tensor]) -> None:
        of = f"caption {caption[:200]!r}"
        self._store.put(key, _arrays(embeddings), kind="text", encoder=self._fingerprint, of=of)


class LiveText:
    """The same without a disk: a caption is encoded when it is read, with the bits of a cached one."""

    def __init__(self, *, family: Family, parts: Parts) -> None:
        self._family, self._parts = family, parts
        self._lock = threading.Lock()

    def read(self, caption: str) -> dict[str, Tensor]:
        """The embeddings of a caption, each without a batch dimension."""
        with self._lock:
            [embeddings] = _embed([caption], self._family, self._parts)
        _require_finite_text(embeddings, caption)
        return embeddings


class Loaded(NamedTuple):
    """A fitted picture [3, H, W] in [-1, 1] and its mask [1, H, W], before the encoder."""

    pixels: Tensor
    mask: Tensor | None


def _load(visit: Visit, background: str) -> Loaded:
    pixels = images.prepare(visit.row, visit.fit, background=background)
    mask = None if pixels.mask is None else torch.from_numpy(pixels.mask)
    return Loaded(torch.from_numpy(pixels.image), mask)


def _encode(loaded: Sequence[Loaded], family: Family, parts: Parts, device: torch.device) -> list[Encoded]:
    try:
        with torch.no_grad():
            moments = family.encode_images(parts, torch.stack([one.pixels for one in loaded]).to(device)).cpu()
    except torch.OutOfMemoryError:
        # Four megapixels are too much for this GPU: fewer at once are only slower.
        if len(loaded) == 1:
            raise
        half = len(loaded) // 2
        return [*_encode(loaded[:half], family, parts, device), *_encode(loaded[half:], family, parts, device)]
    masks = [None if one.mask is None else _shrunk(one.mask, moments.shape[-2:]) for one in loaded]
    return [Encoded(one, mask) for one, mask in zip(moments, masks, strict=True)]


def _shrunk(mask: Tensor, size: Sequence[int]) -> Tensor:
    """The mean of a mask [1, H, W] over the area of each latent, [1, h, w]."""
    return torch.nn.functional.adaptive_avg_pool2d(mask, (size[0], size[1]))


def _embed(captions: Sequence[str], family: Family, parts: Parts) -> list[dict[str, Tensor]]:
    with torch.no_grad():
        text = {name: tensor.cpu() for name, tensor in family.encode_text(parts, list(captions)).items()}
    return [{name: tensor[row] for name, tensor in text.items()} for row in range(len(captions))]


def _require_finite_text(embeddings: Mapping[str, Tensor], caption: str) -> None:
    for tensor in embeddings.values():
        _require_finite(tensor, "the text encoders' output for this caption", repr(caption))


def _require_finite(tensor: Tensor, what: str, where: str) -> None:
    if not torch.isfinite(tensor).all():
        raise NumericError(
            f"{what} is not finite",
            where=where,
            fix="set training.precision to bf16 or fp32, or model.vae to an fp16-safe one",
        )


def _lost(store: Store, key: str, where: str) -> UserError:
    state = "missing" if store.check(key) == "missing" else "damaged"
    return UserError(
        f"its cache entry is {state}: {store.path(key)}", where=where, fix="resume the run; it will be made again"
    )


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    def array(tensor: Tensor) -> Array:
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        return Array(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)

    return {name: array(tensor) for name, tensor in tensors.items()}


def _tensors(entry: Entry) -> dict[str, Tensor]:
    """Views of the buffer that the entry was read into."""
    return {
        name: torch.from_numpy(array.data).view(_DTYPES[array.dtype]).reshape(array.shape)
        for name, array in entry.arrays.items()
    }


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.bool)
}
