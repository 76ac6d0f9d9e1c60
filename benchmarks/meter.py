"""Run a training program under a meter: one stamp at each optimiser step, the same code for every trainer.

    python benchmarks/meter.py --report r.json --steps 30 --warmup 5 script.py -- --flags of the script
    python benchmarks/meter.py --report r.json --steps 30 --warmup 5 -m gesso -- train run.yaml

The program runs in this process with its arithmetic untouched: a hook that torch offers for the purpose is called
after every optimiser step.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

START = "BENCHMARK_START"
"""Environment variable: `time.monotonic()` of the harness just before it started this process."""


def peak_rss() -> int:
    """Peak resident memory of this process so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except FileNotFoundError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Meter:
    """Stamps every optimiser step of the process with wall time and CPU time (all threads).

    A GPU is waited for only where the measured window begins (after `warmup` steps) and where it ends (the last
    step), so that a trainer which never waits for the GPU is measured as it runs.
    """

    def __init__(self, *, steps: int, warmup: int) -> None:
        self.steps, self.warmup = steps, warmup
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.trained: dict[str, int] = {}
        self.training_peak = 0
        self._depth = 0

    def install(self) -> None:
        """Start stamping: every `torch.optim` optimiser reports here before and after its step."""
        register_optimizer_step_pre_hook(self._enter)
        register_optimizer_step_post_hook(self._stamp)

    def _enter(self, _optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        self._depth += 1

    def _stamp(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        self._depth -= 1
        if self._depth:  # one of several that are stepped together
            return
        if not self.trained:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = str(parameter.dtype).removeprefix("torch.")
                    self.trained[name] = self.trained.get(name, 0) + parameter.numel()
        if torch.cuda.is_available() and len(self.wall) + 1 in (1, self.warmup, self.steps):
            torch.cuda.synchronize()
        self.wall.append(time.monotonic())
        self.cpu.append(time.process_time())
        if len(self.wall) == self.steps:
            self.training_peak = peak_rss()

    def report(self, path: Path) -> None:
        """Write the stamps and peaks as JSON; an unexpected number of steps is an error."""
        if len(self.wall) != self.steps:
            raise RuntimeError(f"{len(self.wall)} optimiser steps were seen where {self.steps} were asked for")
        start = float(os.environ[START])
        gpu: dict[str, Any] = {}
        if torch.cuda.is_available():
            gpu = {
                "name": torch.cuda.get_device_name(),
                "peak_allocated": torch.cuda.max_memory_allocated(),
                "peak_reserved": torch.cuda.max_memory_reserved(),
            }
        document = {
            "wall": [round(stamp - start, 6) for stamp in self.wall],
            "cpu": [round(stamp, 6) for stamp in self.cpu],
            "trained": self.trained,
            "training_peak_rss": self.training_peak,
            "peak_rss": peak_rss(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
        }
        path.write_text(json.dumps(document), encoding="utf-8")


def offer_torchvision() -> None:
    """Where torchvision is missing, let a script import the stand-in under `shims`.

    First the libraries find out that torchvision is absent and remember it, so that none of them tries the stand-in.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return
    import datasets  # noqa: F401  looks for torchvision when it is imported
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        raise RuntimeError("transformers sees a torchvision that Python does not")
    sys.path.insert(0, str(Path(__file__).parent / "shims"))


def run(program: str, flags: list[str], *, module: bool) -> None:
    """Run a script or a module as `python program flags` would; a failing exit status goes through."""
    sys.argv = [program, *flags]
    try:
        if module:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            offer_torchvision()
            runpy.run_path(program, run_name="__main__")
    except SystemExit as finished:
        if finished.code not in (None, 0):
            raise


def main() -> None:
    """Run the program under the meter and write its report."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--report", type=Path, required=True, help="JSON file for the stamps")
    command.add_argument("--steps", type=int, required=True, help="optimiser steps that the program takes")
    command.add_argument("--warmup", type=int, required=True, help="steps before the measured window")
    command.add_argument("-m", dest="module", action="store_true", help="the program is a module, not a file")
    command.add_argument("program")
    command.add_argument("flags", nargs="*")
    arguments = command.parse_args()
    meter = Meter(steps=arguments.steps, warmup=arguments.warmup)
    meter.install()
    run(arguments.program, arguments.flags, module=arguments.module)
    meter.report(arguments.report)


if __name__ == "__main__":
    main()
