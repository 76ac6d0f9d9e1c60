"""Open whatever a user points at as a pipeline: a run, a checkpoint, a base model, and LoRA files on top."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gesso.adapters import Full, Layered, LoRA
from gesso.config import files
from gesso.config.run import RunConfig
from gesso.core import checkpoints
from gesso.core.changes import Pair
from gesso.core.checkpoints import AVERAGE, MANIFEST
from gesso.core.folder import WEIGHTS
from gesso.core.runtime import Runtime
from gesso.core.seams import Attached, Family, Parts
from gesso.errors import UserError
from gesso.evaluation import words
from gesso.families import AnyFamily, lora_file, lora_names, model_folder
from gesso.families.lora_file import LoRAFile


def open_pipeline(target: str, *, loras: Sequence[tuple[str, float]] = (), runtime: Runtime) -> tuple[Any, str]:
    """A pipeline ready to draw, and a line that says what is in it.

    `target` is a run folder (its newest whole checkpoint, averaged weights if the run samples with them), a checkpoint
    folder, a diffusers folder, a hub id or a `.safetensors` model. Each of `loras` is a file, folder or hub id with
    its weight, in diffusers' or kohya's format. Raises `UserError` for anything that cannot be read, and for a LoRA
    that does not fit the model layer by layer or does nothing.
    """
    path, weights, run = Path(target).expanduser(), Path(), None
    if _is_trained(path):
        run, weights = trained(target)
        family, base, title = run.model, run.model.base, [_title(weights)]
    else:
        family, base, title = _base(target), target, []
    stack = [(lora_file.read(lora_file.fetched(name, key="--lora")), weight) for name, weight in loras]
    for file, _ in stack:
        if not any(change.moves for change in file.layers.values()):
            raise UserError("this LoRA changes nothing: all of its weights are 0", where=str(file.path), fix="drop it")
    if run is not None and isinstance(run.adapter, Full):
        parts = model_folder.with_trained(family, weights, dtype=runtime.dtype, device=runtime.device)
    else:
        parts = family.load(("denoiser", "vae", "text"), dtype=runtime.dtype, device=runtime.device)
    own_words = {} if run is None else words.of_run(run.tokens, weights)
    words.teach(parts, family, own_words, [file for file, _ in stack])
    if run is not None and isinstance(run.adapter, LoRA) and not run.adapter.dora:
        stack.insert(0, (lora_file.read(weights / WEIGHTS), 1.0))
    elif run is not None and isinstance(run.adapter, Layered):
        attached(run, weights, parts)
    pipeline = family.pipeline(parts)
    add_loras(pipeline, family, stack)
    label = [base, *title, *(f"{name} x {weight:g}" for name, weight in loras)]
    return pipeline, " + ".join(label)


def attached(run: RunConfig, weights: Path, parts: Parts) -> Attached:
    """A run's adapter in place on a fresh model, with the trained tensors in `weights`."""
    state = checkpoints.tensors(weights)
    encoders = list(enumerate(run.model.part_names[1:]))
    trained = tuple(i for i, name in encoders if any(key.startswith(f"{name}.") for key in state))
    adapter = run.adapter.attach(parts, run.model, seed=run.seed, text_encoders=trained)
    adapter.restore(state)
    return adapter


def add_loras(pipeline: Any, family: Family, loras: Sequence[tuple[LoRAFile, float]]) -> None:
    """Load LoRA files into a fresh pipeline and set their weights.

    Plain LoRAs go through diffusers, with alpha multiplied in first, as it loses that for some layouts. DoRA, LoHa and
    LoKr, and anything on top of a trained adapter that is in place, are merged into the weights. Raises `UserError`
    unless every layer of every file is in place afterwards.
    """
    networks = {name: pipeline.components[name] for name in family.part_names}
    modules = lora_names.modules({n: network for n, network in networks.items() if network is not None})
    adapted = any(_is_adapted(network) for network in networks.values() if network is not None)
    plain = [one for one in loras if one[0].kinds == {"LoRA"} and not adapted]
    for file, weight in loras:
        if all(file is not other for other, _ in plain):
            lora_names.merge({n: v for n, v in networks.items() if v is not None}, file.match(modules), strength=weight)
    if not plain:
        return
    names = [f"lora_{i}" for i in range(len(plain))]
    for adapter, (file, _) in zip(names, plain, strict=True):
        pairs = file.match(modules)
        state: dict[str, Any] = {}
        for layer, pair in pairs.items():
            assert isinstance(pair, Pair)
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
    pipeline.set_adapters(names, [weight for _, weight in plain])


def trained(target: str, *, use_ema: bool | None = None) -> tuple[RunConfig, Path]:
    """The run that a run folder or checkpoint folder belongs to, and the folder of its trained weights.

    `use_ema` empty takes the averaged weights where the run samples with them. Raises `UserError` where there is no
    whole checkpoint, no run file beside it, or no average though one is asked for.
    """
    path = Path(target).expanduser()
    if (path / "run.yaml").is_file():
        folder, checkpoint = path, _newest(path)
    else:
        if not _is_trained(path):
            raise UserError(
                "neither a run folder nor a checkpoint", where=target, fix="give a folder with run.yaml in it"
            )
        checkpoint = path
        above = [p for p in path.resolve().parents[:2] if (p / "run.yaml").is_file()]
        if not above:
            raise UserError(
                "these are trained weights without their run.yaml, so their base model is not known",
                where=str(path),
                fix=f"of a LoRA, name the base model: gesso sample BASE --lora {target}",
            )
        folder = above[0]
    run = files.load(folder / "run.yaml").run
    average = checkpoint / AVERAGE
    ema = run.training.ema
    wanted = (ema.enabled and ema.use_for_samples) if use_ema is None else use_ema
    if wanted and average.is_dir():
        return run, average
    if use_ema:
        raise UserError("this checkpoint holds no averaged weights", where=str(checkpoint), fix="leave out --ema")
    return run, checkpoint


def _is_trained(path: Path) -> bool:
    """Whether this is a run folder, a checkpoint, or the averaged weights of one."""
    averaged = path.name == AVERAGE and (path.parent / MANIFEST).is_file()
    return averaged or any((path / name).is_file() for name in ("run.yaml", WEIGHTS, MANIFEST))


def _base(target: str) -> AnyFamily:
    path = Path(target).expanduser()
    if path.is_file() and lora_file.is_lora(path):
        raise UserError(
            "this is a LoRA, not a model", where=str(path), fix=f"name its base model: gesso sample BASE --lora {path}"
        )
    return AnyFamily(base=target)


def _is_adapted(network: Any) -> bool:
    """Whether a trained adapter is in place already."""
    return any(name.endswith(".base_layer") for name, _ in network.named_modules())


def _title(folder: Path) -> str:
    """checkpoint-500, or checkpoint-500 (averaged)."""
    return f"{folder.parent.name} (averaged)" if folder.name == AVERAGE else folder.name


def _newest(run: Path) -> Path:
    """The newest checkpoint that is as it was written."""
    path, refused = checkpoints.newest(run)
    if path is None:
        raise UserError(
            "every checkpoint of this run is damaged" if refused else "this run has no checkpoint yet",
            where=str(run),
            fix="wait for its first checkpoint, or go on training with: gesso train --resume latest",
        )
    return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings on parts that a LoRA leaves alone, and on there being several LoRAs."""
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            yield
    finally:
        logging.set_verbosity(level)
