"""The best step and the end of a run's patience, from measurements alone."""

from __future__ import annotations

from math import nan

import pytest

from gesso.core import history
from gesso.core.history import Measured


def losses(*values: float) -> list[Measured]:
    return [Measured(10 * i, {"loss": value, "accuracy": 1 - value}) for i, value in enumerate(values)]


def test_the_best_is_the_lowest_loss_or_the_highest_of_anything_else_and_the_earlier_of_equals() -> None:
    found = losses(0.5, 0.2, 0.9, 0.2)
    assert [history.best(found, name) for name in ("loss", "accuracy")] == [found[1], found[1]]
    assert history.best(found, "accuracy", mode="min") == found[2]
    assert history.best(found, "loss", among=[0, 20]) == found[0]
    assert history.best(found, "margin") is None
    assert history.best(losses(nan, 0.7, nan), "loss") == Measured(10, losses(nan, 0.7)[1].values)


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "lead"),
    [
        ((0.5, 0.4, 0.3), 2, 0.0, None),
        ((0.5, 0.4, 0.4, 0.4), 2, 0.0, 10),
        ((0.5, 0.4, 0.6, 0.39, 0.5), 2, 0.0, None),
        ((0.5, 0.4, 0.6, 0.39, 0.5), 2, 0.05, 10),
        ((0.5, 0.48, 0.46, 0.44), 3, 0.05, None),
        ((0.5, 0.49, 0.48, 0.47), 2, 0.05, 0),
        ((0.5, nan, nan), 2, 0.0, 0),
        ((nan, nan), 2, 0.0, 10),
    ],
)
def test_patience_ends_after_so_many_measurements_without_a_gain(
    values: tuple[float, ...], patience: int, min_delta: float, lead: int | None
) -> None:
    found = history.stalled(losses(*values), "loss", patience=patience, min_delta=min_delta)
    assert (None if found is None else found.step) == lead


def test_a_measure_that_should_rise() -> None:
    falling = losses(0.1, 0.2, 0.3)
    assert history.stalled(falling, "accuracy", patience=2, min_delta=0.0) == falling[0]
    assert history.stalled(falling, "accuracy", patience=2, min_delta=0.0, mode="min") is None


def test_the_answer_does_not_change_by_what_comes_later() -> None:
    """A resumed run reads the same decision from a part of the history."""
    whole = losses(0.5, 0.4, 0.45, 0.46, 0.1)
    assert history.stalled(whole[:4], "loss", patience=2, min_delta=0.0) == whole[1]
    assert history.stalled(whole, "loss", patience=2, min_delta=0.0) == whole[1]
    assert history.from_json(history.as_json(whole)) == whole
