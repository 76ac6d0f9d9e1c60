"""Trackers: the local log is the truth, everything else may die without stopping a run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gesso.core.events import Event, Finished, PreviewReady, Progress, RunStarted, StepDone, Validated, Warned
from gesso.core.folder import RunFolder
from gesso.errors import Interrupted, NumericError
from gesso.trackers import RunLog, TensorBoard, Wandb


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.prepare()
    return run


def step(number: int, loss: float = 0.5) -> StepDone:
    return StepDone(
        step=number,
        loss=loss,
        learning_rate=1e-4,
        gradient_norm=1.0,
        samples=2,
        seconds=0.5,
        data_seconds=0.1,
        memory=1000,
        epoch=number / 2,
    )


def log(
    folder: RunFolder, *extra: Any, told: list[Event] | None = None, started_at: int = 0, stop: bool = False
) -> RunLog:
    sink = (told if told is not None else []).append
    return RunLog(folder, extra, name="run", started_at=started_at, stopping=lambda: stop, emit=sink)


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.events.read_text().splitlines() if line.endswith("}")]


def test_events_metrics_status_and_log(folder: RunFolder) -> None:
    with log(folder) as tell:
        tell(RunStarted(0, 3, 10, str(folder.path)))
        for number in (1, 2, 3):
            tell(step(number, loss=1 / number))
        tell(Validated(3, 0.25, 4))
        tell(Finished(3, 1.0, 1000, {}))
    assert [row["event"] for row in rows(folder)] == ["RunStarted", *["StepDone"] * 3, "Validated", "Finished"]
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["loss"] == [1.0, 1 / 2, 1 / 3]
    assert (metrics["validation_step"], metrics["validation_loss"]) == ([3], [0.25])
    status = json.loads(folder.status.read_text())
    assert (status["state"], status["step"], status["total_steps"]) == ("finished", 3, 3)
    assert "step 3 validation loss 0.25" in (folder.logs / "train.log").read_text()


def test_named_measures_have_curves_of_their_own_also_after_a_resume(folder: RunFolder) -> None:
    with log(folder) as tell:
        tell(Validated.of(0, {"loss": 0.7, "accuracy": 0.5}, samples=4))
        tell(Validated.of(2, {"loss": 0.6, "accuracy": 0.75}, samples=4))
        tell(Validated.of(4, {"loss": 0.1, "accuracy": 0.1}, samples=4))
    with log(folder, started_at=2) as tell:
        tell(Validated.of(4, {"loss": 0.5, "accuracy": 1.0}, samples=4))
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["validation_step"] == [0, 2, 4]
    assert metrics["validation_loss"] == [0.7, 0.6, 0.5]
    assert metrics["validation_accuracy"] == [0.5, 0.75, 1.0]
    assert "step 4 validation loss 0.50000, accuracy 1.00000" in (folder.logs / "train.log").read_text()
    assert rows(folder)[-1]["measures"] == {"accuracy": 1.0}


def test_a_line_cut_by_a_crash_does_not_swallow_the_next(folder: RunFolder) -> None:
    with log(folder) as tell:
        tell(step(1))
        tell(step(2))
    with folder.events.open("a") as handle:
        handle.write('{"event": "StepDone", "st')
    with log(folder, started_at=2) as tell:
        tell(step(3))
    assert [row["step"] for row in rows(folder) if '"loss"' in json.dumps(row)] == [1, 2, 3]
    assert json.loads(folder.metrics.read_text())["step"] == [1, 2, 3]


def test_curves_of_a_resumed_run_have_each_step_once(folder: RunFolder) -> None:
    with log(folder) as tell:
        for number in (1, 2, 3, 4):
            tell(step(number, loss=1.0))
    with log(folder, started_at=2) as tell:
        for number in (3, 4):
            tell(step(number, loss=2.0))
    metrics = json.loads(folder.metrics.read_text())
    assert metrics["step"] == [1, 2, 3, 4]
    assert metrics["loss"] == [1.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (NumericError("loss is not finite"), "failed", 4),
        (Interrupted("asked to"), "failed", 75),
        (ValueError("x"), "failed", 1),
    ],
)
def test_a_failed_run_says_so(folder: RunFolder, error: Exception, state: str, code: int) -> None:
    with pytest.raises(type(error)), log(folder) as tell:
        tell(step(1))
        raise error
    last = rows(folder)[-1]
    assert (last["event"], last["exit_code"], last["step"]) == ("Failed", code, 1)
    assert not last["resumable"]
    assert json.loads(folder.status.read_text())["state"] == state


def test_a_stop_request_ends_preparations(folder: RunFolder) -> None:
    with pytest.raises(Interrupted), log(folder, stop=True) as tell:
        tell(step(1))
        tell(Progress(0, "caching images", 1, 2))


class Broken:
    """A tracker that fails in one of its three moments."""

    type = "broken"

    def __init__(self, moment: str) -> None:
        self._moment = moment

    def open(self, folder: RunFolder, *, name: str) -> Broken:
        self._fail("open")
        return self

    def handle(self, event: Event) -> None:
        self._fail("handle")

    def close(self) -> None:
        self._fail("close")

    def _fail(self, moment: str) -> None:
        if moment == self._moment:
            raise ConnectionError("the server is down")


@pytest.mark.parametrize("moment", ["open", "handle", "close"])
def test_a_dead_tracker_is_dropped_once_and_the_run_goes_on(folder: RunFolder, moment: str) -> None:
    told: list[Event] = []
    with log(folder, Broken(moment), told=told) as tell:
        tell(step(1))
        tell(step(2))
    warnings = [event for event in told if isinstance(event, Warned)]
    assert len(warnings) == 1
    assert "the server is down" in warnings[0].message
    assert [row["step"] for row in rows(folder) if row["event"] == "StepDone"] == [1, 2]


def test_tensorboard_holds_scalars_and_previews(folder: RunFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = folder.samples / "00.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    with log(folder, TensorBoard()) as tell:
        tell(step(1, loss=0.75))
        tell(Validated(1, 0.5, 4, {"margin": 2.0}))
        tell(PreviewReady(1, ("samples/00.png",), ("a photo",)))
    read = EventAccumulator(str(folder.logs)).Reload()
    assert [e.value for e in read.Scalars("train/loss")] == [0.75]
    assert [e.value for e in read.Scalars("validation/loss")] == [0.5]
    assert [e.value for e in read.Scalars("validation/margin")] == [2.0]
    assert read.Scalars("speed/samples_per_second")[0].value == pytest.approx(4.0)
    assert len(read.Images("preview/0")) == 1


def test_wandb_gets_settings_scalars_and_pictures(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(update=lambda values, allow_val_change: sent.append(("config", values))),
        log=lambda values, step: sent.append((step, values)),
        finish=lambda: sent.append("finish"),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **settings: sent.append(settings) or run  # type: ignore[attr-defined]
    fake.Image = lambda file, caption: (Path(file).name, caption)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with log(folder, Wandb(project="p", run_name="n")) as tell:
        tell(RunStarted(0, 3, 10, str(folder.path), {"seed": 1}))
        tell(step(2))
        tell(PreviewReady(2, ("samples/00.png",), ("a photo",)))
    assert sent[0]["project"] == "p"
    assert sent[0]["name"] == "n"
    assert sent[1] == ("config", {"seed": 1})
    assert sent[2][0] == 2
    assert sent[2][1]["train/loss"] == 0.5
    assert sent[3] == (2, {"previews": [("00.png", "a photo")]})
    assert sent[-1] == "finish"


def test_wandb_missing_is_a_warning(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    told: list[Event] = []
    with log(folder, Wandb(), told=told) as tell:
        tell(step(1))
    assert any(isinstance(event, Warned) and "wandb" in event.message for event in told)
