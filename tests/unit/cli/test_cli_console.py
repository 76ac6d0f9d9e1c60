from __future__ import annotations

import io
import math

import pytest

from gesso.cli.console import Console, Tally, components_table, duration
from gesso.core.events import (
    Component,
    Failed,
    Finished,
    PreviewReady,
    Progress,
    RunStarted,
    Saved,
    StepDone,
    Validated,
    Warned,
)


def step(number: int, *, loss: float = 0.5, seconds: float = 2.0, data_seconds: float = 0.5) -> StepDone:
    return StepDone(
        number,
        loss=loss,
        learning_rate=1e-4,
        gradient_norm=1.0,
        samples=4,
        seconds=seconds,
        data_seconds=data_seconds,
        memory=3 * 2**30,
        epoch=number / 10,
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(console: Console, *, steps: int = 100) -> None:
    with console:
        for done in range(1, 13):
            console.handle(Progress(0, task="reading images", done=done, total=12))
        console.handle(RunStarted(0, total_steps=steps, samples=12, folder="runs/x"))
        console.handle(Validated(0, loss=0.9, samples=4))
        for number in range(1, steps + 1):
            console.handle(step(number, loss=1.0 if number == 1 else 0.5))
        console.handle(Warned(50, message="something [odd] happened"))
        console.handle(Validated(50, loss=0.3, samples=4))
        console.handle(PreviewReady(50, files=("a.png", "b.png"), prompts=("a", "b")))
        console.handle(Saved(100, path="runs/x/checkpoint-100", seconds=0.25))
        console.handle(Validated(100, loss=0.4, samples=4, measures={"accuracy": 0.75}))
        outputs = {"checkpoint": "runs/x/checkpoint-100"}
        parts = (Component("unet", 1234567, (1e-4,), 0.01234), Component("vae", 0, (), 0.0))
        console.handle(Finished(100, 3725.0, 5 * 2**30, outputs, reason="no gain", components=parts))


def test_plain_lines_tell_everything_without_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 0.0)
    stream = io.StringIO()
    play(Console(stream))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("reading")] == ["reading images 12/12"]
    assert "training 100 steps on 12 samples an epoch: runs/x" in lines
    steps = [line for line in lines if line.startswith("training ") and "loss" in line]
    assert len(steps) == 20, "every 5 %"
    assert steps[0].startswith("training 5/100  loss 0.5000 (smooth 0.5940)")
    assert "lr 1.00e-04  2.00 samples/s  waiting for data 25%  3.0 GiB  left 3:10" in steps[0]
    assert "warning: something [odd] happened" in lines
    assert "step 100: validation loss 0.4000, accuracy 0.7500 on 4 measurements" in lines
    assert "step 50: previews: a.png, b.png" in lines
    assert "step 100: saved runs/x/checkpoint-100 in 0.2 s" in lines
    assert "stopped early, after step 100 of 100: no gain" in lines
    end = lines[lines.index("done: 100 steps in 1:02:05, peak memory 5.0 GiB") :]
    assert end[1].startswith("  loss 1.0000 at first, 0.5")
    assert end[2:] == [
        "  validation loss 0.9000 at first, 0.4000 at last, lowest 0.3000 at step 50",
        "  part    trained    rate  change",
        "  unet  1,234,567  0.0001   1.23%",
        "  vae      frozen       -       0",
        "  checkpoint: runs/x/checkpoint-100",
        'try it: gesso sample runs/x --prompt "..."',
    ]


def test_plain_lines_also_come_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    console = Console(stream)
    console.handle(RunStarted(0, total_steps=10_000, samples=12, folder="x"))
    for number in range(1, 11):
        console.handle(step(number))
    lines = [line.split()[1] for line in stream.getvalue().splitlines() if "loss" in line]
    assert lines == ["3/10000", "5/10000", "7/10000", "9/10000"], "6 s a step"


def test_a_terminal_gets_a_bar_and_the_same_news() -> None:
    stream = Terminal()
    play(Console(stream))
    text = stream.getvalue()
    assert "\x1b" in text
    for words in ("100/100", "something [odd] happened", "checkpoint-100", "lowest 0.3000 at step 50"):
        assert words in text


def test_a_resumed_run_says_from_where_and_a_failed_one_whether_to_resume() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.handle(RunStarted(40, total_steps=100, samples=12, folder="x"))
    console.handle(Failed(60, message="disk full", exit_code=3, resumable=True))
    assert stream.getvalue().splitlines() == [
        "training 100 steps on 12 samples an epoch, from step 40: x",
        "stopped at step 60; it can be resumed",
    ]


def test_rates_follow_the_last_steps_only() -> None:
    tally = Tally(total=200)
    for number in range(1, 101):
        tally.add(step(number, seconds=100.0 if number <= 50 else 1.0, data_seconds=0.0))
    assert tally.seconds_left == pytest.approx(100.0)
    assert "4.00 samples/s  waiting for data 0%" in tally.figures()


def test_the_smoothed_loss_is_not_pulled_towards_zero_at_the_start() -> None:
    tally = Tally(total=10)
    tally.add(step(1, loss=2.0))
    assert tally.loss == pytest.approx(2.0)
    tally.add(step(2, loss=1.0))
    assert 1.0 < tally.loss < 2.0
    assert tally.first_loss == 2.0


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3600, "1:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_what_started_at_zero_went_no_share_of_it() -> None:
    """As the rotations of OFT do, which begin at none."""
    table = components_table([Component("unet", 12, (1e-4, 1e-3, 2e-3), math.inf), Component("vae", 0, (), 0.0)])
    assert [line.split()[-1] for line in table] == ["change", "0", "0"]
    assert table[1].endswith("from 0")
    assert "0.0001 to 0.002" in table[1]
