"""Every rule that looks at more than one value of a run, or at the disk. Command line and studio share it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gesso.adapters import Full, Layered, LoRA
from gesso.config import advice_images, advice_words, objective_rules, training_rules
from gesso.config.findings import Finding
from gesso.config.findings import error as _error
from gesso.config.findings import warning as _warning
from gesso.config.forecast import GIB, Counted, Forecast, Machine, forecast, full_size, published
from gesso.config.run import RunConfig
from gesso.core import resolve
from gesso.core.schedule import steps_of
from gesso.errors import Problems, UserError

__all__ = ["Advice", "Counted", "Finding", "Forecast", "Machine", "check"]


@dataclass(frozen=True)
class Advice:
    """What is wrong, what is odd, and what the run will take; no forecast without images."""

    findings: tuple[Finding, ...]
    forecast: Forecast | None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What keeps the run from starting."""
        return tuple(f for f in self.findings if f.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What is allowed, and probably not meant."""
        return tuple(f for f in self.findings if f.level == "warning")

    @property
    def hints(self) -> tuple[Finding, ...]:
        """What would make the run more useful."""
        return tuple(f for f in self.findings if f.level == "hint")

    def require(self, origins: Mapping[str, str] | None = None) -> None:
        """Raise `Problems` if there are errors."""
        if self.errors:
            raise Problems([finding.as_error(origins) for finding in self.errors])


def check(run: RunConfig, machine: Machine | None = None, *, counted: Counted | None = None) -> Advice:
    """Look a run over before anything heavy is loaded; `counted` are its images where they were looked at."""
    findings = [finding for rule in _RULES for finding in rule(run)]
    broken = any(f.level == "error" and f.key.startswith("data.") for f in findings)
    numbers = None if broken else forecast(run, counted)
    if numbers is not None:
        # What an estimate finds may be wrong, so it keeps nothing from starting.
        about = list(_about_numbers(run, numbers))
        softer = [replace(f, level="warning") if f.level == "error" else f for f in about]
        findings += about if numbers.exact else softer
        findings += _about_machine(run, numbers, machine) if machine is not None else []
    return Advice(tuple(findings), numbers)


def _model(run: RunConfig) -> Iterator[Finding]:
    for key, name in (("model.base", run.model.base), ("model.vae", run.model.vae)):
        if name is not None and Path(name).is_absolute() and not Path(name).exists():
            fix = "give a diffusers folder, a .safetensors checkpoint or a hub id"
            yield _error(key, f"there is no {name}", fix)
    try:
        cell_size(run)
    except UserError as error:
        inside = "" if error.where.startswith("model.") else f": {error.where}"
        yield _error("model.base", error.what + inside, error.fix)


def cell_size(run: RunConfig) -> int:
    """Pixels per latent cell; SDXL's 8 where the model is not on this machine."""
    local = _is_local(run) and (run.model.vae is None or Path(run.model.vae).exists())
    return run.model.latent_factor if local else 8


def _is_local(run: RunConfig) -> bool:
    return run.model.base.startswith(resolve.PACKAGED) or Path(run.model.base).is_dir()


def _sizes(run: RunConfig) -> Iterator[Finding]:
    data, buckets = run.data, run.data.buckets
    try:
        cell = cell_size(run)
    except UserError:
        return  # the model is the mistake, and `_model` says so
    lengths = {
        "data.resolution": data.resolution,
        "preview.width": run.preview.width,
        "preview.height": run.preview.height,
    }
    for i, source in enumerate(data.sources):
        sides = (source.resolution,) if isinstance(source.resolution, int) else source.resolution or ()
        lengths |= {f"data.sources.{i}.resolution": side for side in sides}
    for key, length in lengths.items():
        if length is not None and length % cell:
            near = max(round(length / cell), 1) * cell
            yield _error(key, f"{length} is not a multiple of {cell} pixels", f"write {near}")
    if not buckets.enabled:
        return
    if buckets.step % cell:
        yield _error("data.buckets.step", f"{buckets.step} is not a multiple of {cell} pixels", "64 is usual")
    if buckets.step > data.resolution:
        yield _error("data.buckets.step", f"{buckets.step} is more than the resolution {data.resolution}", "lower it")
    elif data.resolution % buckets.step:
        what = f"{data.resolution} is not a multiple of the bucket step {buckets.step}; no bucket is that square"
        yield _warning("data.resolution", what, f"{round(data.resolution / buckets.step) * buckets.step} is")
    if buckets.smallest is not None and buckets.smallest > data.resolution:
        yield _error("data.buckets.smallest", f"{buckets.smallest} is more than the resolution {data.resolution}")
    if buckets.largest is not None and buckets.largest < data.resolution:
        yield _error("data.buckets.largest", f"{buckets.largest} is less than the resolution {data.resolution}")


def _full(run: RunConfig) -> Iterator[Finding]:
    if not isinstance(run.adapter, Full):
        return
    adapter, training = run.adapter, run.training
    if adapter.weights == "bf16" and training.precision != "bf16":
        what = f"weights that are kept in bf16 also compute in bf16, and training.precision is {training.precision}"
        yield _error("adapter.weights", what, "set training.precision: bf16, or adapter.weights: fp32")
    kind = training.optimizer.kind
    if adapter.weights == "bf16" and (kind is None or not kind.by_number):
        what = f"{training.optimizer.type} looks at whole tensors, and bf16 weights are updated piece by piece"
        yield _error("training.optimizer.type", what, "write adamw or lion, or adapter.weights: fp32")
    if run.name in ("logs", "samples") or run.name.startswith("checkpoint-"):
        what = f"the trained model's folder in the run folder would be {run.name}, which has another use"
        yield _error("name", what, "choose another name")


def _adapter(run: RunConfig) -> Iterator[Finding]:
    for i, fused in enumerate(run.model.fuse):
        if Path(fused.path).is_absolute() and not Path(fused.path).exists():
            yield _error(f"model.fuse.{i}.path", f"there is no {fused.path}", "name a LoRA file, or its folder")
    adapter = run.adapter
    if isinstance(adapter, LoRA) and adapter.init_from is not None:
        start = Path(adapter.init_from)
        if start.is_absolute() and not start.exists():
            yield _error("adapter.init_from", f"there is no {start}", "name a LoRA file, or its folder")
    if isinstance(adapter, Layered) and full_size(run):
        try:
            adapter.choose(published(run), run.model)
        except UserError as error:
            yield _error(error.where, error.what, error.fix)


def _output(run: RunConfig) -> Iterator[Finding]:
    folder = run.folder.expanduser().absolute()
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    if not existing.is_dir():
        yield _error("output", f"{existing} is a file, so {folder} cannot be a folder", "choose another output")
        return
    try:
        handle, name = tempfile.mkstemp(prefix=".gesso-check-", dir=existing)
        with os.fdopen(handle, "wb") as file:
            file.write(b"gesso")
            file.flush()
            os.fsync(file.fileno())
        Path(name).rename(name + "-renamed")
        Path(name + "-renamed").unlink()
    except OSError as error:
        yield _error("output", f"{existing} cannot be written to: {error.strerror}", "choose another output")


def _prompts(run: RunConfig) -> Iterator[Finding]:
    prompts = run.preview.prompts
    triggers = [s.trigger for s in run.data.sources if s.trigger and s.role == "instance"]
    triggers += [token.token for token in run.tokens if token.token not in triggers]
    if not prompts:
        yield Finding("hint", "preview.prompts", "no previews will be drawn", "add prompts to see what is learnt")
    elif triggers and not any(trigger in prompt for trigger in triggers for prompt in prompts):
        yield _warning(
            "preview.prompts", f"no prompt has the trigger word {' or '.join(triggers)}", "add one that does"
        )
    if any(not prompt.strip() for prompt in prompts):
        yield _warning("preview.prompts", "a prompt is empty")


def _objective(run: RunConfig) -> Iterator[Finding]:
    known: str | None = run.model.prediction
    if known is None and _is_local(run):
        with contextlib.suppress(UserError):  # `_model` says what is wrong with it
            known = run.model.predicts
    yield from objective_rules.findings(run, predicts=known)


def _settings(run: RunConfig) -> Iterator[Finding]:
    if run.data.captions.dropout > 0.5:
        what = f"{run.data.captions.dropout:.0%} of the captions are dropped"
        yield _warning("data.captions.dropout", what, "0.05 to 0.1 is usual")
    holdout = run.data.validation
    if run.validation.every is not None and not holdout.fraction and holdout.path is None:
        fix = "set data.validation.fraction or data.validation.path"
        yield _warning("validation.every", "no images are held out, so nothing is measured", fix)


def _about_numbers(run: RunConfig, numbers: Forecast) -> Iterator[Finding]:
    images = sum(n for n, s in zip(numbers.images, run.data.sources, strict=True) if s.role == "instance")
    group = run.training.batch_size * run.training.accumulation
    if numbers.held_out >= images:
        what = f"{images} image(s) cannot be shared between training and validation"
        yield _error("data.validation.fraction", what, "set it to 0")
    elif numbers.held_out and images - numbers.held_out < 4:
        what = f"only {images - numbers.held_out} images are left to train on"
        yield _warning("data.validation.fraction", what, "set it to 0")
    if group > numbers.samples_per_epoch:
        what = (
            f"one step takes {group} samples = batch_size {run.training.batch_size} x accumulation "
            f"{run.training.accumulation}, and an epoch has only {numbers.samples_per_epoch}"
        )
        # How many images are held out is only known once their contents are; without that the count is exact.
        level: Literal["error", "warning"] = "warning" if numbers.held_out else "error"
        yield Finding(level, "training.accumulation", what, "lower one of them, or raise data.sources[].repeats")
    warmup = run.training.schedule.warmup_steps(numbers.steps)
    if warmup >= numbers.steps:
        what = f"the warm-up of {warmup} steps is not over when the run ends after {numbers.steps}"
        yield _warning("training.schedule.warmup", what, "shorten it")
    stop = run.training.text_encoder_stop
    if stop is not None and steps_of(stop, numbers.steps) >= numbers.steps:
        what = f"the run ends after {numbers.steps} steps, before the text encoders stop at {stop:g}"
        yield _warning("training.text_encoder_stop", what, "take it out, or lower it")
    ema = run.training.ema
    if ema.enabled and not ema.warmup and numbers.steps * (1 - ema.decay) < 3:
        what = f"an average with decay {ema.decay:g} still holds mostly the start after {numbers.steps} steps"
        yield _warning("training.ema.decay", what, "turn training.ema.warmup on")
    if run.checkpoint.every >= numbers.steps:
        yield Finding("hint", "checkpoint.every", "only the last step will be saved", "lower it to be able to go back")
    folder = run.folder.expanduser().absolute()
    existing = next(p for p in (folder, *folder.parents) if p.is_dir())
    free, written = shutil.disk_usage(existing).free, numbers.disk_bytes - numbers.cache_bytes
    if free < written + GIB // 2:
        what = f"checkpoints and result take about {written / GIB:.1f} GiB, and {free / GIB:.1f} are free"
        yield _error("output", what, "free some space, or lower checkpoint.keep_last")
    cache = (run.data.cache or resolve.cache_root()).expanduser().absolute()
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.is_dir())).free
    if free < numbers.cache_bytes + GIB // 2:
        # How much of it is there already is not known here.
        what = f"the whole cache takes about {numbers.cache_bytes / GIB:.1f} GiB, and {free / GIB:.1f} are free"
        yield _warning("data.cache", what, "name a folder with space, or set data.encoding to live")


def _about_machine(run: RunConfig, numbers: Forecast, machine: Machine) -> Iterable[Finding]:
    device = run.training.device
    if machine.gpu is None and full_size(run) and not (device or "").startswith(("cuda", "mps")):
        what = "no GPU was found; a model of this size takes minutes a step on a CPU"
        yield _warning("training.device", what, "gesso doctor tells what is missing")
    available, needed = machine.gpu_memory, numbers.memory_bytes
    if available is not None and needed is not None and needed > 0.95 * available:
        what = f"about {needed / GIB:.0f} GiB are needed, and {machine.gpu} has {available / GIB:.0f}"
        options = {
            "training.gradient_checkpointing: true": not run.training.gradient_checkpointing,
            "training.batch_size: 1 with more accumulation": run.training.batch_size > 1,
            "training.precision: bf16": run.training.precision == "fp32",
            "adapter.weights: bf16": isinstance(run.adapter, Full) and run.adapter.weights == "fp32",
            "training.fused_backward: true": isinstance(run.adapter, Full) and not run.training.fused_backward,
            "a LoRA": isinstance(run.adapter, Full),
            "a lower data.resolution": True,
        }
        yield _warning("training", what, "try " + ", or ".join(name for name, helps in options.items() if helps))


_RULES: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (
    *(*advice_images.RULES, _model, _sizes, *training_rules.RULES, *advice_words.RULES),
    *(_full, _adapter, _output, _prompts, _objective, _settings),
)
