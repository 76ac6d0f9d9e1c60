"""The rules of how a run trains: rates, optimiser, and what must be installed for them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator

from gesso.adapters import Embedding, Full
from gesso.config import advice_words
from gesso.config.findings import Finding, error, warning
from gesso.config.forecast import full_size
from gesso.config.run import RunConfig
from gesso.objectives import DreamBooth

_PACKAGES = {"pytorch_optimizer": "pytorch-optimizer"}


def _rates(run: RunConfig) -> Iterator[Finding]:
    training, rates = run.training, run.training.text_encoder_learning_rates
    key, encoders = "training.text_encoder_learning_rates", len(run.model.part_names) - 1
    if rates is not None and not run.adapter.train_text_encoders:
        fix = "set adapter.train_text_encoders: true, or take the rates out"
        yield error(key, "rates are given, but the text encoders do not train", fix)
    elif rates is not None and len(rates) not in (1, encoders):
        yield error(key, f"{len(rates)} rates for {encoders} text encoders", f"give 1 or {encoders}")
    own = rates if run.adapter.train_text_encoders and rates is not None else ()
    full = isinstance(run.adapter, Full)
    # A model of full size is not trained from random weights here, and what it knows is soon lost at higher rates.
    tuned = full and full_size(run)
    usual = "1e-5 is usual" if tuned else "1e-3 is usual from random weights" if full else "1e-4 is usual"
    denoiser = run.adapter.train_denoiser if isinstance(run.adapter, Full) else not isinstance(run.adapter, Embedding)
    used = denoiser or (run.adapter.train_text_encoders and rates is None)
    if not any((*own, *advice_words.rates(run).values())) and not (training.learning_rate and used):
        yield error("training.learning_rate", "every learning rate is 0, so nothing would be trained", usual)
    finds = training.optimizer.kind is not None and training.optimizer.kind.finds_rate
    common = [("training.learning_rate", training.learning_rate)] if used else []
    for name, rate in [*common, *((key, rate) for rate in own)]:
        if rate > (1e-4 if tuned else 1e-2) and not finds:
            what = "a full fine-tune" if full else "an adapter"
            yield warning(name, f"{rate:g} is very high for {what}", usual)
        elif 0 < rate < (1e-8 if full else 1e-7):
            yield warning(name, f"{rate:g} is so low that hardly anything will change", usual)


def _optimizer(run: RunConfig) -> Iterator[Finding]:
    training = run.training
    kind, name = training.optimizer.kind, training.optimizer.type
    if kind is not None and kind.finds_rate and training.learning_rate < 0.1:
        what = f"{name} finds the rate itself and multiplies it with this one, {training.learning_rate:g}"
        yield warning("training.learning_rate", what, "write 1")
    if name == "schedule_free":
        if training.ema.enabled:
            fix = "turn it off, or choose another optimiser"
            yield error("training.ema.enabled", "schedule_free already averages the weights", fix)
        if training.schedule.type != "constant":
            what = (
                f"schedule_free is made for a constant rate after the warm-up, and this one is {training.schedule.type}"
            )
            yield warning("training.schedule.type", what, "write constant")
    if training.text_encoder_stop is not None:
        key = "training.text_encoder_stop"
        if not run.adapter.train_text_encoders:
            yield error(key, "the text encoders do not train", "take it out, or set adapter.train_text_encoders: true")
        elif not training.learning_rate:
            yield error(key, "only the text encoders train, so nothing would after it", "take it out")


def _fused(run: RunConfig) -> Iterator[Finding]:
    """What cannot be once weights change before the whole gradient is known, or while some of it is still to come."""
    training, optimizer = run.training, run.training.optimizer
    if not training.fused_backward:
        return
    inside = "with training.fused_backward weights change"
    otherwise = "or training.fused_backward: false"
    if not isinstance(run.adapter, Full):
        what = f"the gradients of an adapter ({run.adapter.type}) are too small for it to save anything"
        yield error("training.fused_backward", what, "take it out; it is for adapter.type: full")
        return
    if training.accumulation > 1:
        what = f"{inside} with every batch, and gradients of {training.accumulation} batches cannot be added up"
        yield error("training.accumulation", what, f"write 1 and a larger training.batch_size, {otherwise}")
    if isinstance(run.objective, DreamBooth):
        what = f"{inside} with every batch, and dreambooth takes two a step, of instance and class"
        yield error("objective.type", what, f"write denoise, {otherwise}")
    if training.clip is not None:
        what = f"{inside} before the norm of the whole gradient is known, so it cannot be clipped"
        yield error("training.clip", what, f"leave it empty (clip: null), {otherwise}")
    if training.precision == "fp16":
        what = f"{inside} before it is known whether the gradient overflows in fp16"
        yield error("training.precision", what, f"write bf16 or fp32, {otherwise}")
    if not optimizer.by_piece:
        what = f"{inside} tensor by tensor, and {optimizer.type} looks at all of them"
        if optimizer.kind is None:
            what = f"{inside} tensor by tensor, and it is not known whether {optimizer.type} looks at all of them"
        yield error("training.optimizer.type", what, f"write adamw, adamw8bit, lion or adafactor, {otherwise}")


def _packages(run: RunConfig) -> Iterator[Finding]:
    training, optimizer = run.training, run.training.optimizer
    key, package = "training.optimizer.type", optimizer.path.partition(".")[0]
    wanted = {
        key: (package, package != "torch", _PACKAGES.get(package, package), "adamw"),
        "training.attention": ("xformers", training.attention == "xformers", "xformers", "sdpa"),
    }
    for name, (module, used, distribution, instead) in wanted.items():
        if used and importlib.util.find_spec(module) is None:
            yield error(name, f"{module} is not installed", f"pip install {distribution}, or write {instead}")
    torch = importlib.metadata.version("torch")
    if optimizer.type == "muon" and tuple(map(int, torch.split(".")[:2])) < (2, 9):
        yield error(key, f"muon needs torch 2.9 or newer; this is {torch}", "pip install -U torch, or write adamw")
    for i, tracker in enumerate(run.trackers):
        if tracker.type == "wandb" and importlib.util.find_spec("wandb") is None:
            yield error(f"trackers.{i}.type", "wandb is not installed", "pip install wandb, or take the tracker out")
    if training.device == "cpu":
        if training.precision == "fp16":
            yield error("training.precision", "fp16 training needs a GPU", "use bf16 or fp32 on a CPU")
        if optimizer.kind is not None and not optimizer.kind.runs_on("cpu"):
            yield error(key, f"{optimizer.type} needs a GPU", "write adamw8bit, adamw or adafactor")


def _stopping(run: RunConfig) -> Iterator[Finding]:
    holdout, rule, best = run.data.validation, run.training.early_stopping, run.checkpoint.keep_best
    if not holdout.fraction and holdout.path is None:
        fix = "set data.validation.fraction or data.validation.path"
        if rule is not None:
            yield error("training.early_stopping", "no images are held out, so nothing tells when to stop", fix)
        if best is not None:
            yield error("checkpoint.keep_best", "no images are held out, so no checkpoint is known to be the best", fix)
        return
    asked = {"training.early_stopping.metric": None if rule is None else rule.metric, "checkpoint.keep_best": best}
    for key, name in asked.items():
        if name is not None and name not in run.objective.measures:
            there = ", ".join(run.objective.measures)
            yield error(key, f"objective {run.objective.type} does not measure {name}", f"write one of {there}")


RULES: tuple[Callable[[RunConfig], Iterator[Finding]], ...] = (_rates, _optimizer, _fused, _packages, _stopping)
