"""Run events on the screen: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from gesso.cli.show import size
from gesso.core.events import (
    Component,
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

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live
    from rich.progress import TaskID

_WINDOW = 50
_SMOOTHING = 0.97
_QUIET_SECONDS = 10.0
_QUIET_SHARE = 0.05


@dataclass
class Tally:
    """The figures of a run so far; rates are over the last steps only."""

    total: int = 0
    step: int = 0
    first_loss: float | None = None
    loss: float = float("nan")
    held_out: list[tuple[int, float]] = field(default_factory=list)
    last: StepDone | None = None
    folder: str = ""
    _sum: float = 0.0
    _weight: float = 0.0
    _recent: deque[StepDone] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def add(self, event: StepDone) -> None:
        """Take in one step."""
        self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * event.loss
        self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        self.loss = self._sum / self._weight
        self.first_loss = event.loss if self.first_loss is None else self.first_loss
        self.step, self.last = event.step, event
        self._recent.append(event)

    @property
    def seconds_left(self) -> float:
        """At the speed of the last steps."""
        return (self.total - self.step) * sum(e.seconds for e in self._recent) / max(len(self._recent), 1)

    def figures(self) -> str:
        """One line about where the run stands."""
        if self.last is None:
            return ""
        seconds = max(sum(e.seconds for e in self._recent), 1e-9)
        rate = sum(e.samples for e in self._recent) / seconds
        waiting = sum(e.data_seconds for e in self._recent) / seconds
        return (
            f"loss {self.last.loss:.4f} (smooth {self.loss:.4f})  lr {self.last.learning_rate:.2e}  "
            f"{rate:.2f} samples/s  waiting for data {waiting:.0%}  {size(self.last.memory)}  "
            f"left {duration(self.seconds_left)}"
        )


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:07:00."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def components_table(components: Sequence[Component]) -> list[str]:
    """One line a part of the model: trained parameters, learning rate, and how far its weights went."""
    if not components:
        return []
    rows = [("part", "trained", "rate", "change")]
    for one in components:
        trained = f"{one.parameters:,}" if one.parameters else "frozen"
        lowest_and_highest = dict.fromkeys((*one.learning_rates[:1], *one.learning_rates[-1:]))
        rate = " to ".join(f"{rate:g}" for rate in lowest_and_highest) or "-"
        change = "?" if one.change is None else "0" if one.change == 0 else f"{one.change:.2%}"
        change = "from 0" if one.change is not None and math.isinf(one.change) else change
        rows.append((one.part, trained, rate, change))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


class Console:
    """A sink for run events; use as a context so that the bar is put away in the end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._bars = _Bars(self._stream) if self._stream.isatty() else None
        self._tally = Tally()
        self._printed: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Console:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    @property
    def steps(self) -> int:
        """The last step that was shown; 0 before the first."""
        return self._tally.step

    def count(self, task: str) -> Callable[[int, int], None]:
        """A function that shows how much of a task outside of a run is done."""
        return lambda done, total: self.handle(Progress(0, task, done, total))

    def handle(self, event: Event) -> None:
        """Show one event."""
        match event:
            case RunStarted():
                self._started(event)
            case Progress():
                self._advance(event.task, event.done, event.total, "")
            case StepDone():
                self._tally.add(event)
                self._advance("training", event.step, self._tally.total, self._tally.figures())
            case Validated():
                self._tally.held_out.append((event.step, event.loss))
                figures = ", ".join(f"{name} {value:.4f}" for name, value in event.values.items())
                self._line(f"step {event.step}: validation {figures} on {event.samples} measurements")
            case PreviewReady():
                self._line(f"step {event.step}: previews: {', '.join(event.files)}")
            case Saved():
                self._line(f"step {event.step}: saved {event.path} in {event.seconds:.1f} s")
            case Warned():
                self._line(f"warning: {event.message}")
            case Finished():
                self._finished(event)
            case Failed():
                again = "; it can be resumed" if event.resumable else ""
                self._line(f"stopped at step {event.step}{again}")

    def _started(self, event: RunStarted) -> None:
        self._tally.total, self._tally.step, self._tally.folder = event.total_steps, event.step, event.folder
        resumed = f", from step {event.step}" if event.step else ""
        self._line(f"training {event.total_steps} steps on {event.samples} samples an epoch{resumed}: {event.folder}")
        if self._bars is not None:
            self._bars.clear()

    def _advance(self, task: str, done: int, total: int, figures: str) -> None:
        if self._bars is None:
            if self._due(task, done, total, share=_QUIET_SHARE if figures else 1.0):
                self._line(f"{task} {done}/{total}  {figures}".rstrip())
            return
        self._bars.advance(task, done, total, figures)

    def _due(self, task: str, done: int, total: int, *, share: float) -> bool:
        """Whether a line is due without a terminal: for the last item, and after 10 s or this share of the work."""
        now, part = time.monotonic(), done / max(total, 1)
        when, before = self._printed.setdefault(task, (now, 0.0))
        due = now - when >= _QUIET_SECONDS or part - before >= share - 1e-9 or done >= total
        if due:
            self._printed[task] = (now, part)
        return due

    def _finished(self, event: Finished) -> None:
        tally = self._tally
        if event.reason:
            self._line(f"stopped early, after step {event.step} of {tally.total}: {event.reason}")
        self._line(f"done: {event.step} steps in {duration(event.seconds)}, peak memory {size(event.peak_memory)}")
        if tally.first_loss is not None:
            self._line(f"  loss {tally.first_loss:.4f} at first, {tally.loss:.4f} at last (smoothed)")
        if tally.held_out:
            (_, first), (_, last) = tally.held_out[0], tally.held_out[-1]
            best_step, best = min(tally.held_out, key=lambda pair: pair[1])
            self._line(
                f"  validation loss {first:.4f} at first, {last:.4f} at last, lowest {best:.4f} at step {best_step}"
            )
        for line in components_table(event.components):
            self._line(f"  {line}")
        for name, path in event.outputs.items():
            self._line(f"  {name}: {path}")
        folder = tally.folder or event.outputs.get("run folder", "RUN")
        self._line(f'try it: gesso sample {folder} --prompt "..."')

    def _line(self, text: str) -> None:
        if self._bars is not None:
            self._bars.screen.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


class _Bars:
    """A bar for each task, and the figures of the run on a line below; made only on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console as Screen
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bars

        self.screen = Screen(file=stream)
        columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=30), MofNCompleteColumn()
        self._bars = Bars(*columns, console=self.screen, auto_refresh=False)
        self._live: Live | None = None
        self._tasks: dict[str, TaskID] = {}
        self._figures = ""

    def start(self) -> None:
        from rich.live import Live

        self._live = Live(get_renderable=self._picture, console=self.screen, refresh_per_second=4)
        self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()

    def advance(self, task: str, done: int, total: int, figures: str) -> None:
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total)
        self._bars.update(self._tasks[task], completed=done, total=total)
        self._figures = figures

    def clear(self) -> None:
        for task in self._tasks.values():
            self._bars.update(task, visible=False)

    def _picture(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        figures = [Text(self._figures)] if self._figures else []
        return Group(self._bars.get_renderable(), *figures)
