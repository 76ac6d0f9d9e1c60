"""Where events go. JSONL is always on; `AnyTracker` lists the ones a run file can add."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from gesso.core import checkpoints
from gesso.core.events import (
    Event,
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
from gesso.core.folder import RunFolder, write_json
from gesso.core.seams import Emit, Spec, Tracker
from gesso.errors import Interrupted, UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_REFRESH_SECONDS = 5.0


class TensorBoard(Spec):
    """Scalars and preview pictures under `logs/` for `tensorboard --logdir`."""

    type: Literal["tensorboard"] = "tensorboard"

    def open(self, folder: RunFolder, *, name: str) -> Tracker:  # noqa: ARG002
        """Start writing into the run folder; a resumed run goes on in the same curves."""
        return _TensorBoard(folder)


class Wandb(Spec):
    """Weights & Biases. Log in with `wandb login` or WANDB_API_KEY; no key is ever read from a run file."""

    type: Literal["wandb"] = "wandb"
    project: str = "gesso"
    """Project on W&B."""
    run_name: str | None = None
    """Name there. Empty: the run's name."""
    entity: str | None = None
    """User or team. Empty: your default."""

    def open(self, folder: RunFolder, *, name: str) -> Tracker:
        """Start or take up the run of this folder on W&B; raises ImportError where wandb is not installed."""
        return _Wandb(self, folder, name)


AnyTracker = Annotated[TensorBoard | Wandb, Field(discriminator="type")]


class Jsonl:
    """The truth about a run: events.jsonl line by line, metrics.json, status.json and logs/train.log."""

    def __init__(self, folder: RunFolder, *, started_at: int) -> None:
        self._folder = folder
        self._events: IO[str] = _append_lines(folder.events)
        self._log: IO[str] = (folder.logs / "train.log").open("a", encoding="utf-8")
        self._curves = _curves(folder, before=started_at)
        self._components: tuple[dict[str, Any], ...] = ()
        self._total = 0
        self._refreshed = 0.0

    def handle(self, event: Event) -> None:
        """Append the event; refresh the other files now and then, and at every turning point."""
        self._events.write(json.dumps({"time": time.time(), **event.as_json()}) + "\n")
        self._events.flush()
        state, turning = "running", True
        match event:
            case RunStarted():
                self._total = event.total_steps
            case StepDone():
                _append(self._curves, "train", _columns(event.as_json()))
                turning = False
            case Validated():
                _append(self._curves, "validation", _columns(event.as_json()))
            case Finished():
                state = "finished"
                self._components = event.as_json()["components"]
            case Failed():
                state = "interrupted" if event.resumable and event.exit_code == 75 else "failed"
        if line := _log_line(event):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self._log.flush()
        if turning or time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            self._refresh(event.step, state)

    def close(self) -> None:
        """Write the curves a last time."""
        self._write_metrics()
        self._events.close()
        self._log.close()

    def _refresh(self, step: int, state: str) -> None:
        self._refreshed = time.monotonic()
        status = {"state": state, "step": step, "total_steps": self._total, "updated": time.time()}
        write_json(self._folder.status, status | {"pid": os.getpid(), "host": socket.gethostname()}, durable=False)
        self._write_metrics()

    def _write_metrics(self) -> None:
        parts = {"components": self._components} if self._components else {}
        write_json(self._folder.metrics, _flat(self._curves) | parts, durable=False)


class RunLog:
    """A run's trackers as a context: what is told goes to all of them and to `emit`, the way the run ends included.

    A tracker that fails is dropped with a warning and the run goes on; only the local log may raise. While something is
    being prepared, `stopping()` ends it with `Interrupted`; in training the loop asks by itself.
    """

    def __init__(
        self,
        folder: RunFolder,
        extra: Sequence[AnyTracker],
        *,
        name: str,
        started_at: int,
        stopping: Callable[[], bool],
        emit: Emit,
    ) -> None:
        self._folder, self._step, self._stopping, self._emit = folder, started_at, stopping, emit
        self._local = Jsonl(folder, started_at=started_at)
        self._others: dict[str, Tracker] = {}
        for spec in extra:
            try:
                self._others[spec.type] = spec.open(folder, name=name)
            except Exception as error:
                self._left_out(spec.type, error)

    def __enter__(self) -> Emit:
        return self.tell

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            code = error.exit_code if isinstance(error, UserError) else 75 if kind is KeyboardInterrupt else 1
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self.tell(Failed(self._step, message, code, resumable=bool(checkpoints.listed(self._folder.path))))
        for name, tracker in self._others.items():
            try:
                tracker.close()
            except Exception as failure:
                self._left_out(name, failure)
        self._local.close()

    def tell(self, event: Event) -> None:
        """Pass an event on to everyone."""
        if isinstance(event, Progress) and self._stopping():
            raise Interrupted("stopped as asked, before training began", fix="start it again; what is cached is kept")
        self._step = max(self._step, event.step)
        self._local.handle(event)
        for name, tracker in list(self._others.items()):
            try:
                tracker.handle(event)
            except Exception as error:
                del self._others[name]
                self._left_out(name, error)
        self._emit(event)

    def _left_out(self, name: str, error: Exception) -> None:
        warning = Warned(self._step, f"{name} does not work and is left out: {error}. Training goes on.")
        self._local.handle(warning)
        self._emit(warning)


class _TensorBoard:
    def __init__(self, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._make = folder, SummaryWriter
        self._writer: SummaryWriter | None = None

    def handle(self, event: Event) -> None:
        if self._writer is None:
            # Points of an earlier try that lie beyond the resumed step are hidden, not drawn twice.
            purge = event.step + 1 if event.step else None
            self._writer = self._make(str(self._folder.logs), purge_step=purge)
        for name, value in _scalars(event).items():
            self._writer.add_scalar(name, value, event.step)
        if isinstance(event, PreviewReady):
            for i, file in enumerate(event.files):
                self._writer.add_image(f"preview/{i}", _pixels(self._folder.path / file), event.step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    def __init__(self, spec: Wandb, folder: RunFolder, name: str) -> None:
        import wandb

        self._folder, self._wandb = folder, wandb
        self._run = wandb.init(
            project=spec.project, name=spec.run_name or name, entity=spec.entity, dir=str(folder.logs), resume="allow"
        )

    def handle(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._run.config.update(event.settings, allow_val_change=True)
        if scalars := _scalars(event):
            self._run.log(scalars, step=event.step)
        if isinstance(event, PreviewReady):
            shots = zip(event.files, event.prompts, strict=True)
            images = [self._wandb.Image(str(self._folder.path / file), caption=prompt) for file, prompt in shots]
            self._run.log({"previews": images}, step=event.step)

    def close(self) -> None:
        self._run.finish()


def _append_lines(path: Path) -> IO[str]:
    """Open for appending whole lines; a line cut off by a crash stays a line of its own."""
    cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    handle = path.open("a", encoding="utf-8")
    if cut:
        handle.write("\n")
    return handle


def _scalars(event: Event) -> dict[str, float]:
    match event:
        case StepDone():
            return {
                "train/loss": event.loss,
                "train/learning_rate": event.learning_rate,
                "train/gradient_norm": event.gradient_norm,
                "speed/samples_per_second": event.samples / max(event.seconds, 1e-9),
                "speed/data_share": event.data_seconds / max(event.seconds, 1e-9),
                "memory/peak_bytes": event.memory,
            }
        case Validated():
            return {f"validation/{name}": value for name, value in event.values.items()}
        case _:
            return {}


def _pixels(file: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _log_line(event: Event) -> str:
    match event:
        case RunStarted():
            return f"start at step {event.step} of {event.total_steps}, {event.samples} training images"
        case StepDone():
            return (
                f"step {event.step} loss {event.loss:.5f} lr {event.learning_rate:.3g} norm {event.gradient_norm:.4g}"
            )
        case Validated():
            return f"step {event.step} validation {', '.join(f'{k} {v:.5f}' for k, v in event.values.items())}"
        case Saved():
            return f"step {event.step} saved {event.path}"
        case PreviewReady():
            return f"step {event.step} previews {', '.join(event.files)}"
        case Warned():
            return f"warning: {event.message}"
        case Finished():
            why = f": {event.reason}" if event.reason else ""
            return f"finished at step {event.step} after {event.seconds:.0f} s{why}"
        case Failed():
            return f"ended at step {event.step}: {event.message}"
        case _:
            return ""


Curves = dict[str, dict[str, list[float]]]


def _columns(row: Mapping[str, Any]) -> dict[str, float]:
    """What the curves keep of a `StepDone` or `Validated` event as it stands in events.jsonl."""
    if row["event"] == "StepDone":
        return {name: row[name] for name in ("step", "loss", "learning_rate")}
    return {"step": row["step"], "loss": row["loss"], **row.get("measures", {})}


def _append(curves: Curves, group: str, columns: Mapping[str, float]) -> None:
    for name, value in columns.items():
        curves.setdefault(group, {}).setdefault(name, []).append(value)


def _flat(curves: Curves) -> dict[str, Any]:
    """Training columns under their own names (`metrics["loss"][-1]`), validation columns with a prefix."""
    return curves.get("train", {}) | {
        f"validation_{name}": values for name, values in curves.get("validation", {}).items()
    }


def _curves(folder: RunFolder, *, before: int) -> Curves:
    """What earlier parts of this run measured up to the step it goes on from."""
    curves: Curves = {}
    if not folder.events.exists():
        return curves
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for line in folder.events.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a killed process may be cut
        if row.get("event") in {"StepDone", "Validated"} and row["step"] <= before:
            rows[row["event"], row["step"]] = row
    for (event, _), row in sorted(rows.items()):
        _append(curves, "train" if event == "StepDone" else "validation", _columns(row))
    return curves
