"""Open whatever a user points at as a pipeline: a run, a checkpoint, a base model, and LoRA files on top."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gesso.config import files
from gesso.core import resolve
from gesso.core.folder import WEIGHTS, RunFolder
from gesso.core.runtime import Runtime
from gesso.core.seams import Family
from gesso.errors import UserError
from gesso.families import AnyFamily, lora_file, lora_names
from gesso.families.lora_file import LoRAFile

_MANIFEST, _AVERAGE = "manifest.json", "ema"


def open_pipeline(target: str, *, loras: Sequence[tuple[str, float]] = (), runtime: Runtime) -> tuple[Any, str]:
    """A pipeline ready to draw, and a line that says what is in it.

    `target` is a run folder (its newest whole checkpoint, averaged weights if the run samples with them), a checkpoint
    folder, a diffusers folder, a hub id or a `.safetensors` model. Each of `loras` is a file, folder or hub id with
    its weight, in diffusers' or kohya's format. Raises `UserError` for anything that cannot be read, and for a LoRA
    that does not fit the model layer by layer or does nothing.
    """
    family, own, base = _resolve(target)
    chosen = [lora_file.read(_fetch(name)) for name, _ in loras]
    for file in chosen:
        if not any(pair.up.any() and pair.scale for pair in file.pairs.values()):
            raise UserError("this LoRA changes nothing: all of its weights are 0", where=str(file.path), fix="drop it")
    parts = family.load(("denoiser", "vae", "text"), dtype=runtime.dtype, device=runtime.device)
    pipeline = family.pipeline(parts)
    stack = [*([(own, 1.0)] if own is not None else []), *zip(chosen, (w for _, w in loras), strict=True)]
    add_loras(pipeline, family, stack)
    label = [
        base,
        *([_title(own.path)] if own is not None else []),
        *(f"{name} x {weight:g}" for name, weight in loras),
    ]
    return pipeline, " + ".join(label)


def add_loras(pipeline: Any, family: Family, loras: Sequence[tuple[LoRAFile, float]]) -> None:
    """Load LoRA files into a fresh pipeline through diffusers and set their weights.

    Alpha is multiplied in first: diffusers loses it for some layouts. Raises `UserError` unless every layer of every
    file is in place afterwards.
    """
    if not loras:
        return
    networks = {name: pipeline.components[name] for name in family.part_names}
    modules = lora_names.modules({n: network for n, network in networks.items() if network is not None})
    names = [f"lora_{i}" for i in range(len(loras))]
    for adapter, (file, _) in zip(names, loras, strict=True):
        pairs = file.match(modules)
        state: dict[str, Any] = {}
        for layer, pair in pairs.items():
            up = pair.up if pair.scale == 1 else lora_file.folded(pair).up.to(pair.up.dtype)
            state |= {f"{layer}.lora_A.weight": pair.down, f"{layer}.lora_B.weight": up}
        with _quiet():
            pipeline.load_lora_weights(state, adapter_name=adapter)
        mark = f".lora_B.{adapter}.weight"
        placed = sum(key.endswith(mark) for n in networks.values() if n is not None for key in n.state_dict())
        if placed != len(pairs):
            raise UserError(
                f"diffusers put {placed} of the LoRA's {len(pairs)} layers in place",
                where=str(file.path),
                fix="update diffusers and peft",
            )
    pipeline.set_adapters(names, [weight for _, weight in loras])


def _resolve(target: str) -> tuple[Family, LoRAFile | None, str]:
    """The family with its base model, the trained weights on top of it if the target has any, and the base's name."""
    path = Path(target).expanduser()
    if (path / "run.yaml").is_file():
        run = files.load(RunFolder(path).config).run
        checkpoint = _newest(path)
    elif (path / WEIGHTS).is_file():
        folder = next((p for p in path.resolve().parents[:2] if (p / "run.yaml").is_file()), None)
        if folder is None:
            raise UserError(
                "these are LoRA weights without their run.yaml, so their base model is not known",
                where=str(path),
                fix=f"name the base model and give them as a LoRA: gesso sample BASE --lora {target}",
            )
        run, checkpoint = files.load(folder / "run.yaml").run, path
    else:
        if path.is_file() and path.suffix == ".safetensors":
            _refuse_lora(path)
        return AnyFamily(base=target), None, target
    average = checkpoint / _AVERAGE
    ema = run.training.ema
    if ema.enabled and ema.use_for_samples and (average / WEIGHTS).is_file():
        checkpoint = average
    return run.model, lora_file.read(checkpoint), run.model.base


def _title(weights: Path) -> str:
    """checkpoint-500, or checkpoint-500 (averaged)."""
    folder = weights.parent
    return f"{folder.parent.name} (averaged)" if folder.name == _AVERAGE else folder.name


def _newest(run: Path) -> Path:
    """The newest checkpoint whose weights are as they were written."""
    found = [(int(m[1]), p) for p in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))]
    for _, path in sorted(found, reverse=True):
        if _whole(path):
            return path
    raise UserError(
        "this run has no whole checkpoint yet" if not found else "every checkpoint of this run is damaged",
        where=str(run),
        fix="wait for its first checkpoint, or go on training with: gesso train --resume latest",
    )


def _whole(checkpoint: Path) -> bool:
    try:
        listed = json.loads((checkpoint / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    weights = [name for name in listed if name.endswith(WEIGHTS)]
    return WEIGHTS in weights and all(
        (checkpoint / name).is_file() and resolve.file_sha256(checkpoint / name) == listed[name]["sha256"]
        for name in weights
    )


def _fetch(name: str) -> Path:
    path = Path(name).expanduser()
    return path if path.exists() else resolve.locate(name, patterns=["*.safetensors"], key="--lora")


def _refuse_lora(path: Path) -> None:
    """A LoRA given as the model would fail deep inside a loader; say so here."""
    try:
        lora_file.read(path)
    except UserError:
        return
    raise UserError(
        "this is a LoRA, not a model", where=str(path), fix=f"name its base model: gesso sample BASE --lora {path}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings on parts that a LoRA leaves alone."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
