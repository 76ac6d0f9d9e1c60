"""One training in memory: networks, adapter, optimiser and average, and how they are saved and restored."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gesso.adapters import TOKENS
from gesso.config.run import RunConfig
from gesso.core import history
from gesso.core.batch import Batch
from gesso.core.events import Component
from gesso.core.runtime import Runtime
from gesso.core.seams import Attached, Parts
from gesso.errors import UserError
from gesso.training import in_backward, memory, optim, rounding, validation
from gesso.training.checkpoint import Snapshot
from gesso.training.ema import Average
from gesso.training.loop import Learner
from gesso.training.policy import LivePolicy
from gesso.training.resume import OPTIMIZER

_PIECE = 2**24


@dataclass
class Session:
    """A model with its adapter attached, ready to train."""

    run: RunConfig
    parts: Parts
    adapter: Attached
    policy: LivePolicy
    learner: Learner
    start: list[Tensor] | None
    """The trained weights of each group before the first step, in main memory; None where they are not there."""

    @classmethod
    def build(cls, run: RunConfig, parts: Parts, runtime: Runtime, *, fresh: bool = True) -> Session:
        """Load the denoiser into `parts`, attach the adapter and make the optimiser.

        With `fresh` the adapter reads what it starts from; without, `restore` comes next.
        """
        rates = text_encoder_rates(run)
        dtype, text_dtype = network_types(run, runtime)
        parts.denoiser = run.model.load({"denoiser"}, dtype=dtype, device=runtime.device).denoiser
        memory.prepare(parts, run.training)
        adapter = run.adapter.at(run.training.learning_rate).attach(
            parts, run.model, seed=run.seed, text_encoders=tuple(rates), reference=run.objective.reference
        )
        known = _begin(adapter, fresh=fresh)
        if {dtype, text_dtype} != {runtime.dtype}:
            for network in (parts.denoiser, *parts.text_encoders):
                runtime.autocast(network)
        denoiser, *encoders = run.model.part_names
        rate_of = {denoiser: run.training.learning_rate} | {encoders[i]: rate for i, rate in rates.items()}
        rate_of[TOKENS] = token_rate(run)
        inside = run.training.fused_backward
        groups = [
            optim.flat_group(
                run.training.optimizer,
                name,
                parameters,
                learning_rate=rate_of[part] * factor,
                stop=run.training.text_encoder_stop if part in encoders else None,
                keep_gradient=not inside,
            )
            for name, part, factor, parameters in _by_rate(adapter)
        ]
        learner = Learner(
            groups=groups,
            optimizer=(in_backward if inside else rounding).build(run.training.optimizer, groups, seed=run.seed),
            average=Average(run.training.ema, groups) if run.training.ema.enabled else None,
            scaler=runtime.scaler(),
            after_step=adapter.after_step,
            at_once=inside,
        )
        start = [group.flat.detach().to("cpu", copy=True) for group in groups] if known else None
        return cls(run, parts, adapter, LivePolicy(run.model, parts, adapter), learner, start)

    def snapshot(self, identity: Mapping[str, Any]) -> Snapshot:
        """Everything a checkpoint holds."""
        learner = self.learner
        if learner.optimizer.torn:
            raise RuntimeError("a step was left half done: some weights are ahead of others")
        with learner.optimizer.evaluated():
            weights = self.adapter.state()
            if learner.optimizer.averages:
                weights = {name: tensor.clone() for name, tensor in weights.items()}
        return Snapshot(
            step=learner.step,
            weights=weights,
            layout=self.adapter.layout(),
            optimizer=optim.state(learner.optimizer),
            average=learner.average.state() if learner.average else None,
            position={
                "scaler": learner.scaler.state_dict(),
                "identity": dict(identity),
                "history": history.as_json(learner.history),
                "best": self.best_step,
            },
        )

    def restore(self, saved: Snapshot) -> None:
        """Go on from a checkpoint; raises `UserError` where it does not fit this run."""
        learner = self.learner
        self.adapter.restore(saved.weights)
        if saved.position["identity"].get(OPTIMIZER) in (None, self.run.training.optimizer.type):
            optim.restore(learner.optimizer, saved.optimizer)
        if learner.average is not None:
            if saved.average is None:
                raise UserError(
                    "the checkpoint holds no averaged weights",
                    where="training.ema.enabled",
                    fix="set it to false, as in the run that was saved",
                )
            learner.average.restore(saved.average)
        if learner.scaler.is_enabled() and saved.position["scaler"]:
            learner.scaler.load_state_dict(saved.position["scaler"])
        learner.step = saved.step
        learner.history = history.from_json(saved.position.get("history", []))

    def release(self) -> None:
        """Let go of the networks once training is over."""
        self.parts.denoiser, self.parts.vae, self.parts.text_encoders = None, None, []

    @contextmanager
    def as_sampled(self) -> Iterator[None]:
        """Inside, the model is as pictures should show it: averaged if the run says so, dropout off."""
        average = self.learner.average
        averaged = average.in_place() if average and self.run.training.ema.use_for_samples else nullcontext()
        with self.learner.optimizer.evaluated(), averaged, self.policy.evaluating():
            yield

    @property
    def best_step(self) -> int | None:
        """The step to keep, by the measure that the run names; None where it names none or nothing is measured yet."""
        metric = self.run.checkpoint.keep_best
        found = None if metric is None else history.best([m for m in self.learner.history if m.step], metric)
        return None if found is None else found.step

    @property
    def stalled(self) -> str:
        """Why going on is of no use, or nothing while it is."""
        rule = self.run.training.early_stopping
        if rule is None:
            return ""
        limits = {"patience": rule.patience, "min_delta": rule.min_delta}
        lead = history.stalled(self.learner.history, rule.metric, mode=rule.mode, **limits)  # type: ignore[arg-type]
        if lead is None:
            return ""
        more = f" by more than {rule.min_delta:g}" if rule.min_delta else ""
        return (
            f"the validation {rule.metric} has not got better{more} than {lead.values[rule.metric]:.4g} of step "
            f"{lead.step} in {rule.patience} measurements"
        )

    def require_measures(self, found: Collection[str]) -> None:
        """Raise `UserError` where the run goes by a measure that validation does not have."""
        rule = self.run.training.early_stopping
        for key, name in (
            ("training.early_stopping.metric", None if rule is None else rule.metric),
            ("checkpoint.keep_best", self.run.checkpoint.keep_best),
        ):
            if name is not None and name not in found:
                fix = (
                    f"there is {', '.join(found)}" if found else "set data.validation.fraction or data.validation.path"
                )
                what = f"validation does not measure {name}" if found else "no images are held out to measure it on"
                raise UserError(what, where=key, fix=fix)

    def components(self) -> tuple[Component, ...]:
        """Each part of the model, the frozen ones too."""
        learner, found = self.learner, []
        with learner.optimizer.evaluated():
            parts = [group.part.partition(" ")[0] for group in learner.groups]
            for part in dict.fromkeys([*self.run.model.part_names, *parts, "vae"]):
                own = [i for i, name in enumerate(parts) if name == part]
                count = sum(learner.groups[i].flat.numel() for i in own if learner.groups[i].learning_rate)
                rates = sorted({rate for i in own if (rate := learner.groups[i].learning_rate)})
                found.append(Component(part, count, tuple(rates), self._change(own)))
        return tuple(found)

    def _change(self, groups: Sequence[int]) -> float | None:
        """How far some groups went from where they started, relative to it."""
        if not groups:
            return 0.0
        if self.start is None:
            return None
        moved = before = 0.0
        for i in groups:
            was, now = self.start[i], self.learner.groups[i].flat.detach().cpu()
            for old, new in zip(was.split(_PIECE), now.split(_PIECE), strict=True):
                moved += float((new.double() - old.double()).square().sum())
                before += float(old.double().square().sum())
        return math.sqrt(moved / before) if before else math.inf if moved else 0.0

    def measure(self, batches: Sequence[Batch], runtime: Runtime) -> dict[str, float]:
        """Means of the objective's measures over held-out batches, with the weights that a checkpoint would hold."""
        with self.learner.optimizer.evaluated():
            return validation.measure(self.run.objective, self.policy, batches, runtime)


def _begin(adapter: Attached, *, fresh: bool) -> bool:
    """Put in place what training starts from; on going on that is only for comparison, and may be gone."""
    try:
        adapter.begin()
    except UserError:
        if fresh:
            raise
        return False
    return True


def _by_rate(adapter: Attached) -> Iterator[tuple[str, str, float, dict[str, nn.Parameter]]]:
    """Parameters of one learning rate together: the group's name, its part, the rate's factor, and the parameters."""
    for part, parameters in adapter.parameters().items():
        shared: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            shared.setdefault(adapter.rate_factor(name), {})[name] = parameter
        for factor, group in sorted(shared.items(), key=lambda item: item[0] != 1):  # reports show the first one's rate
            yield part if factor == 1 else f"{part} x {factor!r}", part, factor, group


def token_rate(run: RunConfig) -> float:
    """Learning rate of the vectors of new words."""
    own = run.training.token_learning_rate
    return run.training.learning_rate if own is None else own


def text_encoder_rates(run: RunConfig) -> dict[int, float]:
    """Learning rate of each text encoder that trains, by index; an encoder with rate 0 is left alone."""
    if not run.adapter.train_text_encoders:
        return {}
    count = len(run.model.part_names) - 1
    rates = run.training.text_encoder_learning_rates or (run.training.learning_rate,)
    if len(rates) not in {1, count}:
        raise UserError(
            f"{len(rates)} learning rates for {count} text encoders",
            where="training.text_encoder_learning_rates",
            fix=f"give one number for all of them, or {count}",
        )
    each = rates * count if len(rates) == 1 else rates
    return {i: rate for i, rate in enumerate(each) if rate > 0}


def network_types(run: RunConfig, runtime: Runtime) -> tuple[torch.dtype, torch.dtype]:
    """What the denoiser and the text encoders are loaded in."""
    spec = run.adapter.at(run.training.learning_rate)
    return spec.types(runtime.dtype, text_encoders=bool(text_encoder_rates(run)))
