"""Carrying a sweep out: each run in its own folder, checked before the first one starts, resumed where it broke off."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gesso.config import advice, files
from gesso.config.files import Loaded
from gesso.core import history
from gesso.core.events import Event
from gesso.core.folder import RunFolder
from gesso.errors import Interrupted, Problems, ResourceError, UserError
from gesso.sweep import axes as over
from gesso.sweep import results
from gesso.sweep.axes import Axis, Trial
from gesso.sweep.results import Outcome

Load = Callable[[Sequence[str]], Loaded]
"""Reads the run file with some `key=value` laid over it."""


@dataclass(frozen=True)
class Sweep:
    """A run file and what to try with it."""

    load: Load
    folder: Path
    axes: tuple[Axis, ...] = ()
    profiles: Mapping[str, Sequence[str]] = field(default_factory=dict)
    search: Literal["grid", "optuna"] = "grid"
    trials: int = 0
    """How many runs a search makes; a grid makes all there are."""
    metric: str = "loss"

    def planned(self) -> list[Trial]:
        """The runs of a grid; a search plans each one when the ones before it are known."""
        return [] if self.search == "optuna" else over.grid(self.axes, self.profiles)

    def check(self) -> None:
        """Raise `UserError` for anything wrong with any run, or with the search, before the first one starts."""
        if not self.axes and not self.profiles:
            raise UserError("there is nothing to compare", where=over.OVER, fix="add --over adapter.rank=8,16")
        trials = self.planned() or list(self._corners())
        names = [trial.name for trial in trials]
        if len(set(names)) < len(names):
            raise UserError(
                "two runs of this sweep would have the same folder", where=over.OVER, fix="write other values"
            )
        for trial in trials:
            loaded = self.loaded(trial)
            found = advice.check(loaded.run)
            if found.errors:
                errors = [one.as_error(loaded.origins) for one in found.errors]
                raise Problems(
                    [UserError(f"{e.what} (in the run {trial.name})", where=e.where, fix=e.fix) for e in errors]
                )
            if self.metric not in (there := loaded.run.objective.measures):
                what = f"objective {loaded.run.objective.type} does not measure {self.metric}"
                raise UserError(what, where="--by", fix=f"write one of {', '.join(there)}")
        if self.search == "optuna":
            held = self.loaded(trials[0]).run.data.validation
            if not held.fraction and held.path is None:
                fix = "set data.validation.fraction"
                raise UserError("a search needs held-out images to go by", where="data.validation", fix=fix)
            _optuna()
            if self.trials < 1:
                raise UserError("a search needs to know how many runs to make", where="--trials", fix="add --trials 20")

    def loaded(self, trial: Trial) -> Loaded:
        """A run of the sweep, in its own folder."""
        place = [f"output={json.dumps(str(self.folder / trial.name))}", f"name={json.dumps(trial.name)}"]
        return self.load([*trial.sets, *place])

    def outcomes(self) -> list[Outcome]:
        """Where the planned runs stand."""
        return [results.read(trial, self.folder / trial.name) for trial in self.planned()]

    def carry_out(self, emit: Callable[[Event], None], *, tell: Callable[[str], None]) -> list[Outcome]:
        """Make the runs that are not finished yet; one that fails is noted, and the next one starts.

        Raises `Interrupted` after SIGTERM or Ctrl-C; the same call then goes on where it stopped.
        """
        done: list[Outcome] = []
        try:
            for trial in self._suggested(done) if self.search == "optuna" else iter(self.planned()):
                done.append(self._make(trial, emit, tell))
        finally:
            results.write(self.folder, done or self.outcomes(), metric=self.metric)
        return done

    def _make(self, trial: Trial, emit: Callable[[Event], None], tell: Callable[[str], None]) -> Outcome:
        from gesso import stages

        run, folder = self.loaded(trial).run, RunFolder(self.folder / trial.name)
        before = results.read(trial, folder.path)
        if before.state == "finished" and folder.config.read_text() == files.dump(run):
            tell(f"{trial.name}: finished before")
            return before
        tell(f"{trial.name}: {'goes on' if before.state != 'new' else 'starts'}")
        message = ""
        try:
            stages.train(run, resume="latest" if folder.config.is_file() else None, emit=emit)
        except Interrupted:
            raise
        except UserError as failure:
            message = failure.what
            tell(f"{trial.name}: failed: {message}")
        gc.collect()  # the model of one run must not be there beside the next one's
        return results.read(trial, folder.path, message=message)

    def _corners(self) -> Iterator[Trial]:
        """Runs that have every profile, every listed value and both ends of every range, to check a search by."""
        first = {axis.key: axis.values[0] if axis.values else _text(axis, axis.low) for axis in self.axes}
        first |= {"profile": next(iter(self.profiles))} if self.profiles else {}
        yield over.trial(first, self.profiles)
        for name in list(self.profiles)[1:]:
            yield over.trial(first | {"profile": name}, self.profiles)
        for axis in self.axes:
            for value in axis.values[1:] or [_text(axis, axis.high)]:
                if value != first[axis.key]:
                    yield over.trial(first | {axis.key: value}, self.profiles)

    def _suggested(self, done: Sequence[Outcome]) -> Iterator[Trial]:
        """The search's runs. Each is a function of the ones before it and its number, so that a search can go on."""
        optuna = _optuna()
        spaces = {axis.key: _space(axis) for axis in self.axes}
        spaces |= (
            {"profile": optuna.distributions.CategoricalDistribution(list(self.profiles))} if self.profiles else {}
        )
        direction = "minimize" if history.better(self.metric) == "min" else "maximize"
        for number in range(self.trials):
            study = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=number))
            for one in done:
                study.add_trial(_known(one, spaces, one.score(self.metric)))
            asked = study.ask(spaces).params
            values = {a.key: _text(a, asked[a.key]) if a.is_range else asked[a.key] for a in self.axes}
            yield over.trial(values | ({"profile": asked["profile"]} if self.profiles else {}), self.profiles)


def _known(outcome: Outcome, spaces: Mapping[str, Any], score: float | None) -> Any:
    optuna = _optuna()
    values: dict[str, Any] = {}
    for key, space in spaces.items():
        text = outcome.trial.values[key]
        categorical = isinstance(space, optuna.distributions.CategoricalDistribution)
        values[key] = text if categorical else min(max(float(text), space.low), space.high)
        if isinstance(space, optuna.distributions.IntDistribution):
            values[key] = int(values[key])
    state = optuna.trial.TrialState.FAIL if score is None else optuna.trial.TrialState.COMPLETE
    return optuna.trial.create_trial(params=values, distributions=dict(spaces), value=score, state=state)


def _space(axis: Axis) -> Any:
    kinds = _optuna().distributions
    if not axis.is_range:
        return kinds.CategoricalDistribution(axis.values)
    if axis.whole:
        return kinds.IntDistribution(int(axis.low), int(axis.high), log=axis.logarithmic)
    return kinds.FloatDistribution(axis.low, axis.high, log=axis.logarithmic)


def _text(axis: Axis, value: float) -> str:
    return str(int(value)) if axis.whole else f"{value:.3g}"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        fix = "pip install 'gesso[sweep]', or leave --search out"
        raise ResourceError("a search needs optuna", where="--search", fix=fix) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
