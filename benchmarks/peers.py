"""Measure gesso beside a public trainer on the same model and the same images, in one run.

    python benchmarks/peers.py --diffusers-script train_text_to_image_lora_sdxl.py

The repeats of the trainers alternate, so that what else the machine does meets both alike. Every figure of every
repeat goes to `benchmarks/results/<name>.json`; README.md says what each one means.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers import TRAINERS, Cell, Task

HERE = Path(__file__).resolve().parent
PACKAGES = ("gesso", "torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "datasets", "numpy")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
COSTS = {
    "step_cpu_seconds": ("CPU seconds a step (median)", "{:.3f}", 1.0),
    "step_seconds": ("wall seconds a step (median)", "{:.3f}", 1.0),
    "first_step_seconds": ("seconds to the first step", "{:.1f}", 1.0),
    "first_step_cpu_seconds": ("CPU seconds to the first step", "{:.1f}", 1.0),
    "process_seconds": ("wall seconds, whole process", "{:.1f}", 1.0),
    "process_cpu_seconds": ("CPU seconds, whole process", "{:.1f}", 1.0),
    "training_peak_rss": ("peak RSS until the last step, MiB", "{:.0f}", 2**-20),
    "peak_rss": ("peak RSS, whole process, MiB", "{:.0f}", 2**-20),
    "peak_vram": ("peak VRAM allocated, MiB", "{:.0f}", 2**-20),
    "peak_vram_reserved": ("peak VRAM reserved, MiB", "{:.0f}", 2**-20),
}
"""Figures where less is better: label, format and unit factor of the printed table."""
RATES = {"steps_per_second": ("steps a second", "{:.2f}", 1.0)}
"""Figures where more is better."""


@dataclass(frozen=True)
class Plan:
    """What is measured, how often, and where files go."""

    task: Task
    trainers: tuple[str, ...]
    cells: tuple[Cell, ...]
    warmup: int
    repeats: int
    threads: int
    work: Path


def figures(report: dict[str, Any], *, warmup: int, process_seconds: float, process_cpu: float) -> dict[str, Any]:
    """One repeat's figures from the stamps of its steps; seconds and bytes.

    The measured window runs from the end of step `warmup` to the end of the last step.
    """
    wall, cpu = report["wall"][warmup - 1 :], report["cpu"][warmup - 1 :]
    step_cpu = [round(after - before, 5) for before, after in itertools.pairwise(cpu)]
    step_wall = [after - before for before, after in itertools.pairwise(wall)]
    found = {
        "step_cpu_seconds": statistics.median(step_cpu),
        "step_seconds": statistics.median(step_wall),
        "steps_per_second": len(step_wall) / (wall[-1] - wall[0]),
        "first_step_seconds": report["wall"][0],
        "first_step_cpu_seconds": report["cpu"][0],
        "process_seconds": process_seconds,
        "process_cpu_seconds": process_cpu,
        "training_peak_rss": report["training_peak_rss"],
        "peak_rss": report["peak_rss"],
    }
    if report["gpu"]:
        found["peak_vram"] = report["gpu"]["peak_allocated"]
        found["peak_vram_reserved"] = report["gpu"]["peak_reserved"]
    rounded = {name: round(value, 5) for name, value in found.items()}
    return rounded | {"trained_parameters": report["trained"], "cpu_seconds_of_each_step": step_cpu}


def summary(repeats: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the repeats of each trainer, and how many times better gesso is (above 1: gesso is ahead)."""
    ours, *others = repeats
    names = [name for name in (*COSTS, *RATES) if name in repeats[ours][0]]
    medians = {
        trainer: {name: statistics.median(repeat[name] for repeat in rows) for name in names}
        for trainer, rows in repeats.items()
    }
    ratios = {}
    for other in others:
        a, b = medians[ours], medians[other]
        ratios[f"{ours} against {other}"] = {
            name: round(b[name] / a[name] if name in COSTS else a[name] / b[name], 3) for name in names
        }
    return {"medians": medians, "ratios": ratios}


def measure(plan: Plan, cell: Cell, trainer: str, *, steps: int) -> dict[str, Any]:
    """Train once in a fresh process with empty caches; raises `SystemExit` with the log's end where it fails."""
    folder = Path(tempfile.mkdtemp(prefix=f"{trainer}-", dir=plan.work))
    report, log = folder / "report.json", folder / "log.txt"
    task = dataclasses.replace(plan.task, steps=steps)
    warmup = min(plan.warmup, steps - 1)
    command = [sys.executable, str(HERE / "meter.py"), "--report", str(report)]
    command += ["--steps", str(steps), "--warmup", str(warmup), *TRAINERS[trainer](task, cell, folder)]
    load = os.getloadavg()[0]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        status = subprocess.run(
            command, cwd=folder, env=environment(plan, folder, start), stdout=stream, stderr=subprocess.STDOUT
        ).returncode
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if status:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])
        raise SystemExit(f"{trainer}, {cell}: exit status {status}; the end of its output:\n{tail}")
    cpu = (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime)
    found = json.loads(report.read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    row = figures(found, warmup=warmup, process_seconds=seconds, process_cpu=cpu)
    return row | {"threads": found["threads"], "load_before": round(load, 2), "gpu": found["gpu"].get("name", "")}


def environment(plan: Plan, folder: Path, start: float) -> dict[str, str]:
    """The environment of a measured process: offline, its own caches, a fixed number of threads."""
    threads = str(plan.threads)
    chosen = {
        "BENCHMARK_START": repr(start),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
    }
    if plan.task.device == "cpu":
        chosen["CUDA_VISIBLE_DEVICES"] = ""
    return {**os.environ, **chosen}


def compare(plan: Plan) -> list[dict[str, Any]]:
    """All repeats of all cells, the trainers taking turns; prints each cell's table as it is finished."""
    for trainer in plan.trainers:
        measure(plan, plan.cells[0], trainer, steps=2)  # not counted: brings programs and weights into the disk cache
    results = []
    for cell in plan.cells:
        repeats: dict[str, list[dict[str, Any]]] = {trainer: [] for trainer in plan.trainers}
        for number in range(plan.repeats):
            turn = plan.trainers if number % 2 == 0 else plan.trainers[::-1]
            for trainer in turn:
                repeats[trainer].append(measure(plan, cell, trainer, steps=plan.task.steps))
        found = summary(repeats)
        trained = {trainer: rows[0]["trained_parameters"] for trainer, rows in repeats.items()}
        results.append({**vars(cell), "trained_parameters": trained, **found, "repeats": repeats})
        print(table(str(cell), results[-1]), flush=True)
    return results


def table(title: str, found: dict[str, Any]) -> str:
    """The medians of one cell as text."""
    medians, ratios = found["medians"], found["ratios"]
    head = f"{title:<36}" + "".join(f"{trainer:>12}" for trainer in medians)
    lines = ["", head + "".join(f"{'ratio':>8}" for _ in ratios)]
    for name, (label, form, unit) in (COSTS | RATES).items():
        rows = [row[name] for row in medians.values() if name in row]
        if rows:
            cells = "".join(f"{form.format(value * unit):>12}" for value in rows)
            lines.append(f"{label:<36}{cells}" + "".join(f"{ratio[name]:>8.2f}" for ratio in ratios.values()))
    for trainer, sizes in found["trained_parameters"].items():
        lines.append(f"{trainer} trained " + ", ".join(f"{count} {dtype} parameters" for dtype, count in sizes.items()))
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """The processor and system, without anything that names the machine or its owner."""
    described: dict[str, Any] = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        values = dict(
            re.findall(r"^(model name|cpu family|model|stepping|flags)\s*:\s*(.*)$", cpuinfo.read_text(), re.M)
        )
        described["processor"] = "{} (family {}, model {})".format(
            values.get("model name", described["processor"]), values.get("cpu family"), values.get("model")
        )
        described["cpu_flags"] = [flag for flag in CPU_FLAGS if flag in values.get("flags", "").split()]
    return described


def versions() -> dict[str, str]:
    """Installed versions of everything that takes part."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "absent" if package != "torchvision" else "absent: benchmarks/shims in its place"
    return installed


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether the source differed from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "source_changed": bool(git("status", "--porcelain", "../src"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": "not a git checkout", "source_changed": True}


def document(plan: Plan, built: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    """The result file: enough to judge the figures and to repeat them."""
    task = plan.task
    settings = {
        "model": built,
        "resolution": task.resolution,
        "rank": task.rank,
        "learning_rate": task.learning_rate,
        "seed": task.seed,
        "device": task.device,
        "steps": task.steps,
        "warmup": plan.warmup,
        "repeats": plan.repeats,
        "threads": plan.threads,
        "peer_script_sha256": hashlib.sha256(task.peer_script.read_bytes()).hexdigest(),
    }
    canonical = json.dumps(settings, sort_keys=True).encode()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(),
        **commit(),
        "peer_script": task.peer_script.name,
        "settings": settings,
        "config_hash": hashlib.sha256(canonical).hexdigest()[:16],
        "cells": cells,
    }


def as_text(document: dict[str, Any]) -> str:
    """JSON with one line for each list of numbers."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\[\s+([-+\d.e,\s]+?)\s+\]", lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def build(arguments: argparse.Namespace, work: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Make the model (unless one is given) and the images in a process of their own; this one stays small."""
    model = arguments.model or work / "model"
    command = [sys.executable, str(HERE / "model.py"), "--images", str(work / "images")]
    command += ["--count", str(arguments.images), "--side", str(arguments.resolution)]
    if arguments.model is None:
        command += ["--model", str(model), "--size", arguments.size]
    made = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    name = arguments.size if arguments.model is None else model.name
    return model, work / "images", {"name": name, "images": arguments.images, **json.loads(made)}


def arguments_of(words: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--diffusers-script", type=Path, required=True, help="train_text_to_image_lora_sdxl.py")
    command.add_argument("--trainers", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    command.add_argument("--size", choices=("tenth", "full", "smoke"), default="tenth", help="random SDXL to build")
    command.add_argument("--model", type=Path, help="use this diffusers folder instead of building one")
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument("--resolution", type=int, default=256)
    command.add_argument("--images", type=int, default=24)
    command.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    command.add_argument("--precisions", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"])
    command.add_argument("--rank", type=int, default=8)
    command.add_argument("--steps", type=int, default=30)
    command.add_argument("--warmup", type=int, default=5)
    command.add_argument("--repeats", type=int, default=2)
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--name", help="name of the result file; empty: device, size and date")
    command.add_argument("--results", type=Path, default=HERE / "results")
    command.add_argument("--work", type=Path, help="folder for temporary files, such as a fast disk")
    arguments = command.parse_args(words)
    if not arguments.diffusers_script.is_file():
        command.error(f"--diffusers-script: there is no file {arguments.diffusers_script} (README.md says where it is)")
    if not 1 <= arguments.warmup < arguments.steps:
        command.error("--warmup must be at least 1 and below --steps")
    if arguments.repeats < 1:
        command.error("--repeats must be at least 1")
    return arguments


def main(words: Sequence[str] | None = None) -> Path:
    """Build, measure, write the result file and print the table; returns the file's path."""
    arguments = arguments_of(words)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=arguments.work, ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        model, images, built = build(arguments, work)
        task = Task(
            model=model.resolve(),
            images=images,
            resolution=arguments.resolution,
            steps=arguments.steps,
            rank=arguments.rank,
            learning_rate=1e-4,
            seed=0,
            device=arguments.device,
            peer_script=arguments.diffusers_script.resolve(),
        )
        cells = tuple(Cell(batch, name) for name in arguments.precisions for batch in arguments.batch_sizes)
        trainers = tuple(name for name in TRAINERS if name in arguments.trainers)
        plan = Plan(task, trainers, cells, arguments.warmup, arguments.repeats, arguments.threads, work)
        result = document(plan, built, compare(plan))
    name = arguments.name or f"{arguments.device}-{built['name']}-{result['date'][:10]}"
    file: Path = arguments.results / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(as_text(result), encoding="utf-8")
    print(f"\nratio: how many times better gesso is. Every figure: {file}")
    return file


if __name__ == "__main__":
    main()
