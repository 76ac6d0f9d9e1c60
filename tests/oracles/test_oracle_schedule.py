"""The learning rate and the EMA decay as functions of the optimiser step."""

from __future__ import annotations

import formulas
import numpy as np
import pytest
from pydantic import ValidationError

from gesso.config.run import EMA
from gesso.core.schedule import Schedule

# type, warm-up as written, its length in steps, floor, cycles, power, total
TABLE = [
    ("constant", 0, 0, 0.0, 1, 1.0, 10),
    ("constant", 3, 3, 0.0, 1, 1.0, 10),
    ("constant", 0.1, 100, 0.0, 1, 1.0, 1000),
    ("constant", 5, 5, 0.3, 1, 1.0, 50),
    ("linear", 0, 0, 0.0, 1, 1.0, 2),
    ("linear", 0, 0, 0.0, 1, 1.0, 100),
    ("linear", 10, 10, 0.0, 1, 1.0, 100),
    ("linear", 0.25, 25, 0.1, 1, 1.0, 100),
    ("linear", 500, 500, 0.0, 1, 1.0, 1500),
    ("cosine", 0, 0, 0.0, 1, 1.0, 8),
    ("cosine", 2, 2, 0.0, 1, 1.0, 8),
    ("cosine", 0, 0, 0.1, 1, 1.0, 1000),
    ("cosine", 0.05, 50, 0.01, 1, 1.0, 1000),
    ("cosine", 100, 100, 1.0, 1, 1.0, 400),
    ("cosine", 1, 1, 0.0, 1, 1.0, 3),
    ("cosine_restarts", 0, 0, 0.0, 1, 1.0, 60),
    ("cosine_restarts", 0, 0, 0.0, 3, 1.0, 301),
    ("cosine_restarts", 10, 10, 0.2, 4, 1.0, 411),
    ("cosine_restarts", 7, 7, 0.0, 5, 1.0, 1000),
    ("cosine_restarts", 0.1, 30, 0.05, 2, 1.0, 300),
    ("cosine_restarts", 0, 0, 0.0, 7, 1.0, 2000),
    ("polynomial", 0, 0, 0.0, 1, 1.0, 100),
    ("polynomial", 10, 10, 0.0, 1, 2.0, 100),
    ("polynomial", 0.2, 20, 0.05, 1, 0.5, 100),
    ("polynomial", 3, 3, 0.0, 1, 3.0, 10_000),
]


def factors(row: tuple[str, float, int, float, int, float, int]) -> np.ndarray:
    kind, written, _, floor, cycles, power, total = row
    schedule = Schedule(type=kind, warmup=written, floor=floor, cycles=cycles, power=power)
    return np.array([schedule.factor(step, total) for step in range(total)])


@pytest.mark.parametrize("row", TABLE)
def test_every_step(row: tuple[str, float, int, float, int, float, int]) -> None:
    kind, written, warmup, floor, cycles, power, total = row
    assert Schedule(type=kind, warmup=written).warmup_steps(total) == warmup
    wanted = [
        formulas.learning_rate(kind, k, total, warmup=warmup, floor=floor, cycles=cycles, power=power)
        for k in range(total)
    ]
    assert np.abs(factors(row) - wanted).max() < 1e-12


@pytest.mark.parametrize("row", TABLE)
def test_shape(row: tuple[str, float, int, float, int, float, int]) -> None:
    """Warm-up rises from above 0 to the top at its stated step; then down, never up, to the floor on the last step."""
    kind, _, warmup, floor, cycles, _, _ = row
    found = factors(row)
    assert (found[:warmup] > 0).all()
    assert (np.diff(found[: warmup + 1]) > 0).all()
    assert found[warmup] == 1.0
    assert found.max() == 1.0
    after = np.diff(found[warmup:])
    if kind == "constant":
        assert (found[warmup:] == 1.0).all()
        return
    assert found[-1] == pytest.approx(floor, abs=1e-12)
    assert found.min() >= min(floor, found[0]) - 1e-12
    if kind == "cosine_restarts":
        assert int((after > 1e-9).sum()) == cycles - 1
    else:
        assert (after <= 1e-15).all()


@pytest.mark.parametrize("row", [row for row in TABLE if row[0] != "constant"])
def test_past_the_end_it_stays_at_the_floor(row: tuple[str, float, int, float, int, float, int]) -> None:
    """A run that is extended by a few steps must not see the rate climb back."""
    kind, written, _, floor, cycles, power, total = row
    schedule = Schedule(type=kind, warmup=written, floor=floor, cycles=cycles, power=power)
    for step in (total, total + 1, 2 * total, 10 * total):
        assert schedule.factor(step, total) == pytest.approx(floor, abs=1e-12)


@pytest.mark.parametrize("cycles", [2, 3, 4, 5, 6, 7, 8, 10, 12])
def test_every_restart_is_on_its_step(cycles: int) -> None:
    """Where a cycle begins on a whole step, that step has the full rate and the one before a small one."""
    for length in (3, 10, 49, 77, 100, 143):
        total = cycles * length + 1
        schedule = Schedule(type="cosine_restarts", cycles=cycles)
        found = [schedule.factor(i * length, total) for i in range(cycles)]
        assert found == pytest.approx([1.0] * cycles, abs=1e-9)


def test_a_run_of_one_step_has_a_rate() -> None:
    for kind in ("constant", "linear", "cosine", "cosine_restarts", "polynomial"):
        assert Schedule(type=kind).factor(0, 1) == 1.0


def test_a_warm_up_longer_than_the_run_rises_to_its_end() -> None:
    found = [Schedule(type="cosine", warmup=100).factor(step, 20) for step in range(20)]
    assert found == pytest.approx([(k + 1) / 101 for k in range(20)])


@pytest.mark.parametrize("bad", [{"floor": 1.5}, {"floor": -0.1}, {"warmup": -1}, {"cycles": 0}, {"power": 0.0}])
def test_senseless_values_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Schedule(**bad)


# --------------------------------------------------------------------------- EMA


@pytest.mark.parametrize(
    ("decay", "warmup"), [(0.9999, True), (0.999, True), (0.5, True), (0.0, True), (0.9999, False), (0.9, False)]
)
def test_ema_decay_at_every_update(decay: float, warmup: bool) -> None:
    wanted = formulas.ema_decays(12_000, decay, power=None) if warmup else [0.0] + [decay] * 11_999
    spec = EMA(decay=decay, warmup=warmup)
    assert np.abs(np.array([spec.decay_at(n) for n in range(1, 12_001)]) - wanted).max() < 1e-15


@pytest.mark.parametrize("warmup", [True, False])
def test_ema_of_constants_is_a_product(warmup: bool) -> None:
    """The first update copies; feeding w1 once and w2 ever after leaves w2 + (w1 - w2) times the product of decays."""
    spec = EMA(decay=0.9999, warmup=warmup)
    shadow = -7.0
    for update in range(1, 10_001):
        decay = spec.decay_at(update)
        shadow = decay * shadow + (1 - decay) * (1.0 if update == 1 else 3.0)
    decays = formulas.ema_decays(10_000, 0.9999, power=None) if warmup else [0.0] + [0.9999] * 9_999
    assert shadow == pytest.approx(formulas.ema_of_step(decays[1:], 1.0, 3.0), rel=1e-12)
    assert shadow != pytest.approx(3.0, abs=1e-12) or warmup
