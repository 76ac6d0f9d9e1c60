"""What a run will take: steps, epochs, checkpoints, disk and memory. Rough, and without opening an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path

from gesso.adapters import Embedding, Full, LoRA
from gesso.config import class_images
from gesso.config.image_files import images_in
from gesso.config.run import RunConfig, Source
from gesso.errors import UserError

GIB = 2**30

_TOKEN_WIDTH = 768 + 1280
_UNET_PARAMETERS = 2_567_000_000
# Of these, what the targets of a full fine-tune mean.
_UNET_TARGETS = {"attention": 955_000_000, "attention-mlp": 2_209_000_000, "all-linear": 2_234_000_000}
_TEXT_PARAMETERS = 818_000_000
# GiB of saved activations a sample at 1024 x 1024 in 16 bits, with adapters in float32.
_ACTIVATIONS = {"attention": 7.3, "other": 9.4, "checkpointed": 1.6}
_WORKSPACE = 1.0
# Numbers of a gradient that are there at once where weights are updated inside the backward pass: six pieces.
_PASSING = 100_000_000


@dataclass(frozen=True)
class Machine:
    """What the run would go on; None where it could not be found out. Memory in bytes."""

    gpu: str | None = None
    gpu_memory: int | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Forecast:
    """Sizes in bytes; None where the base model is not of a known size."""

    images: tuple[int, ...]
    held_out: int
    samples_per_epoch: int
    steps_per_epoch: int
    steps: int
    epochs: float
    checkpoints: int
    checkpoints_kept: int
    parameters: int | None
    checkpoint_bytes: int | None
    result_bytes: int
    """Of the whole model that a full fine-tune leaves in the end; a LoRA file is not worth counting."""
    cache_bytes: int
    memory_bytes: int | None
    exact: bool = False
    """Whether the images were looked at; else their numbers are an estimate."""

    @property
    def disk_bytes(self) -> int:
        """All that is written and stays."""
        return self.cache_bytes + self.result_bytes + self.checkpoints_kept * (self.checkpoint_bytes or 0)


@dataclass(frozen=True)
class Counted:
    """How many images there are, where they were looked at: per source, held out, and samples and steps an epoch."""

    images: tuple[int, ...]
    held_out: int
    samples_per_epoch: int
    steps_per_epoch: int


def count(source: Source) -> int | None:
    """Image files of a local folder, by their ending; None where that is not how the source is laid out."""
    folder = Path(source.path)
    if source.layout not in ("auto", "folder", "kohya") or not folder.is_dir():
        return None
    listings = [folder / (source.metadata or f"metadata{ending}") for ending in (".jsonl", ".csv", ".parquet")]
    if any(listing.is_file() for listing in listings):
        return None
    return sum(1 for _ in images_in(folder)) or None


def _estimate(run: RunConfig) -> Counted | None:
    filled = {folder.source: folder.count for folder in class_images.folders(run)}
    counts = [max(count(s) or 0, filled.get(i, 0)) or None for i, s in enumerate(run.data.sources)]
    if "pair" in run.objective.needs:
        counts = [None if n is None else n // 2 or None for n in counts]
    images = tuple(n for n in counts if n is not None)
    plain = not run.data.balance and all(source.share is None for source in run.data.sources)
    if len(images) < len(counts) or not plain:
        return None
    # Prior images come on top of the samples of an epoch, and none is held out.
    taught = [(n, source) for n, source in zip(images, run.data.sources, strict=True) if source.role == "instance"]
    count_taught, fraction = sum(n for n, _ in taught), run.data.validation.fraction
    held_out = max(1, int(count_taught * fraction)) if fraction else 0
    visits = sum(n * source.repeats * _sides(source) for n, source in taught)
    samples = max(1, round(visits * (1 - held_out / max(count_taught, 1))))
    return Counted(images, held_out, samples, ceil(samples / (run.training.batch_size * run.training.accumulation)))


def _sides(source: Source) -> int:
    return len(source.resolution) if isinstance(source.resolution, tuple) else 1


def forecast(run: RunConfig, counted: Counted | None = None) -> Forecast | None:
    """The numbers for a run; without `counted` they are an estimate, and None where the images are not plain files."""
    exact = counted is not None
    counted = counted or _estimate(run)
    if counted is None:
        return None
    images, per_epoch = counted.images, counted.steps_per_epoch
    steps = run.training.total_steps(per_epoch)
    saves = {*range(run.checkpoint.every, steps + 1, run.checkpoint.every), steps}
    kept = set(sorted(saves)[-run.checkpoint.keep_last :])
    if run.checkpoint.keep_every:
        kept |= {step for step in saves if step % run.checkpoint.keep_every == 0}
    known = full_size(run)
    parameters = _parameters(run) if known else _counted(run)
    return Forecast(
        images=images,
        held_out=counted.held_out,
        samples_per_epoch=counted.samples_per_epoch,
        steps_per_epoch=per_epoch,
        steps=steps,
        epochs=steps / per_epoch,
        checkpoints=len(saves),
        checkpoints_kept=len(kept),
        parameters=parameters,
        checkpoint_bytes=None if parameters is None else parameters * _saved(run) + _frozen(run),
        result_bytes=_result(run),
        cache_bytes=_cache(run, images, visits=steps * run.training.batch_size * run.training.accumulation),
        memory_bytes=_memory(run, parameters) if known and parameters is not None else None,
        exact=exact,
    )


def live_text(run: RunConfig) -> bool:
    """Whether captions are encoded at every step, because what reads them trains."""
    return run.adapter.train_text_encoders or bool(run.tokens)


def full_size(run: RunConfig) -> bool:
    """Whether the base model has the published size; a small local model has not."""
    base = run.model.base
    if base.startswith("micro:"):
        return False
    unet = Path(base, "unet")
    if not unet.is_dir():
        return True
    return sum(f.stat().st_size for f in unet.glob("*.safetensors")) > GIB


def _parameters(run: RunConfig) -> int | None:
    if isinstance(run.adapter, Full):
        return _networks(run) - _still(run)
    words = _TOKEN_WIDTH * sum(token.vectors for token in run.tokens)
    if isinstance(run.adapter, Embedding):
        return words
    layers = published(run)
    try:
        chosen = run.adapter.choose(layers, run.model)
    except UserError:
        return None  # not the forecast's to report
    return sum(run.adapter.size(layers[name], choice) for name, choice in chosen.items()) + words


def published(run: RunConfig) -> dict[str, tuple[int, ...]]:
    """Layers and weight shapes of the published model's networks that an adapter sits on."""
    names = run.model.part_names if run.adapter.train_text_encoders else run.model.part_names[:1]
    return {name: shape for name, shape in run.model.published_layers().items() if name.partition(".")[0] in names}


def _networks(run: RunConfig) -> int:
    """Parameters of the networks that a full fine-tune trains, wholly or in part: what its checkpoints hold."""
    spec = run.adapter.at(run.training.learning_rate) if isinstance(run.adapter, Full) else run.adapter
    denoiser = _UNET_PARAMETERS if isinstance(spec, Full) and spec.train_denoiser else 0
    return denoiser + _TEXT_PARAMETERS * spec.train_text_encoders


def _still(run: RunConfig) -> int:
    """Parameters of these that are no target; names of layers are taken to mean all of them, and not counted."""
    spec = run.adapter.at(run.training.learning_rate) if isinstance(run.adapter, Full) else run.adapter
    targets = spec.targets if isinstance(spec, Full) and isinstance(spec.targets, str) else "all"
    return _UNET_PARAMETERS - _UNET_TARGETS.get(targets, _UNET_PARAMETERS)


def _counted(run: RunConfig) -> int | None:
    """Parameters of a small local model that trains as a whole, read from the heads of its files."""
    root = Path(run.model.base)
    if not (isinstance(run.adapter, Full) and root.is_dir()):
        return None
    denoiser, *encoders = run.model.part_names
    parts = [denoiser] * run.adapter.train_denoiser + encoders * run.adapter.train_text_encoders
    try:
        return sum(_tensors(file) for part in parts for file in (root / part).glob("*.safetensors")) or None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a damaged model is not the forecast's to report


def _tensors(file: Path) -> int:
    """How many numbers a safetensors file holds."""
    with file.open("rb") as handle:
        head = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    return sum(prod(entry["shape"]) for name, entry in head.items() if name != "__metadata__")


def _moments(run: RunConfig) -> int:
    """Bytes a parameter of what the optimiser remembers; most of Muon's weights need one number and not two."""
    kind = run.training.optimizer.kind
    return 8 if kind is None else kind.moments


def _weight(run: RunConfig) -> int:
    """Bytes that a trained weight is kept in."""
    return 2 if isinstance(run.adapter, Full) and run.adapter.weights == "bf16" else 4


def _saved(run: RunConfig) -> int:
    """Bytes a parameter in a checkpoint: its weight, moments, and the average in float64 and in float32."""
    return _weight(run) + _moments(run) + 12 * run.training.ema.enabled


def _frozen(run: RunConfig) -> int:
    """Bytes in a checkpoint of layers that do not train, which are saved with those that do, and with their average."""
    full = isinstance(run.adapter, Full) and full_size(run)
    return _still(run) * _weight(run) * (1 + run.training.ema.enabled) if full else 0


def _result(run: RunConfig) -> int:
    whole = isinstance(run.adapter, Full) and full_size(run)
    return 2 * (_UNET_PARAMETERS + _TEXT_PARAMETERS) if whole else 0


def _cache(run: RunConfig, images: Sequence[int], *, visits: int) -> int:
    """float32 mean and deviation of 4 channels for each version of an image (of both, where they are pairs), and text
    embeddings for each caption."""
    data = run.data
    if data.encoding == "live":
        return 0
    latents = captions = 0
    seen = {"instance": 0.0, "prior": 0.0}
    for count, source in zip(images, data.sources, strict=True):
        seen[source.role] += count * source.repeats
    for count, source in zip(images, data.sources, strict=True):
        sides = source.resolution or data.resolution
        listed = sides if isinstance(sides, tuple) else (sides,)
        cells = sum((side // 8) ** 2 for side in listed)
        random = (source.crop or data.crop) == "random" or data.rotation or data.colour
        flips = 1 + (data.flip if source.flip is None else source.flip)
        words = source.captions or data.captions
        varied = words.shuffle or words.tag_dropout or words.wildcards or words.lines == "choose"
        most = round(visits * count * source.repeats / max(1, seen[source.role]) / len(listed))
        each = data.variants * count if data.variants else most
        latents += cells * (min(most, each * flips) if random else min(most, count * flips))
        captions += min(most * len(listed), each) if varied else count
    wide = 4 if run.training.precision == "fp32" else 2
    text = 0 if live_text(run) else captions * (77 * 2048 + 1280) * wide
    return 2 * 4 * 4 * latents * (1 + ("pair" in run.objective.needs)) + text


def _memory(run: RunConfig, parameters: int) -> int:
    """Bytes on the GPU: weights, gradients, moments, the average in float64, activations, and room to work in."""
    training, adapter = run.training, run.adapter
    wide = 2 if training.precision == "fp32" else 1
    weight, frozen = _weight(run), 2 * wide  # bytes of each
    held = (_UNET_PARAMETERS + _TEXT_PARAMETERS * live_text(run)) * frozen
    if isinstance(adapter, Full):
        networks = _networks(run)
        # A pass in 16 bits makes a copy of float32 weights; a reference is a copy of what trains.
        casts = 2 if weight == 4 and wide == 1 else 0
        held = weight * _still(run) + casts * networks + weight * parameters * run.objective.reference
        held += frozen * _UNET_PARAMETERS * (networks < _UNET_PARAMETERS)
    kind = "attention" if isinstance(adapter, LoRA) and adapter.targets == "attention" else "other"
    saved = _ACTIVATIONS["checkpointed" if training.gradient_checkpointing else kind]
    activations = saved * wide * training.batch_size * (run.data.resolution / 1024) ** 2
    trained = parameters * (weight + _moments(run) + 8 * training.ema.enabled)
    trained += weight * (min(parameters, _PASSING) if training.fused_backward else parameters)
    return round(held + trained + (activations + _WORKSPACE) * GIB)
