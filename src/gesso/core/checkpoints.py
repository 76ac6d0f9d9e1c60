"""Finding checkpoints in a run folder and proving that they are as they were written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gesso.core import history
from gesso.core.resolve import file_sha256
from gesso.core.seams import Layout
from gesso.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST, AVERAGE, STATE = "manifest.json", "ema", "state"
OPTIMIZER, SHADOW, POSITION = f"{STATE}/optimizer.safetensors", f"{STATE}/average.safetensors", f"{STATE}/position.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def listed(folder: Path) -> dict[int, Path]:
    """Checkpoint folders of a run by step, oldest first, whole or not."""
    found = {int(m[1]): p for p in folder.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name))}
    return dict(sorted(found.items()))


def newest(folder: Path) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint whose every byte is as written, and why newer ones were passed over."""
    refused: dict[Path, list[str]] = {}
    for path in reversed(listed(folder).values()):
        problems = faults(path)
        if not problems:
            return path, refused
        refused[path] = problems
    return None, refused


def chosen(run: Path, which: str) -> Path:
    """A checkpoint of a run folder: `latest`, `best`, or the one of a step.

    best is by the measure that the run keeps its best by, else by the validation loss among the checkpoints that are
    there. Raises `UserError` where there is none.
    """
    run = run.expanduser()
    steps = listed(run)
    if which.isdecimal():
        if int(which) in steps:
            return steps[int(which)]
        fix = f"there are {', '.join(map(str, steps))}" if steps else "this run has none yet"
        raise UserError(f"there is no checkpoint of step {which}", where=str(run), fix=fix)
    if which not in ("latest", "best"):
        raise UserError(
            f"{which} is no checkpoint", where="--checkpoint", fix="write latest, best or the number of a step"
        )
    last, _ = newest(run)
    if last is None:
        raise UserError("this run has no whole checkpoint", where=str(run), fix="wait for its first one")
    if which == "latest":
        return last
    position = json.loads((last / POSITION).read_text())
    found = position.get("best")
    if found not in steps:
        lowest = history.best(history.from_json(position.get("history", [])), "loss", among=steps)
        found = None if lowest is None else lowest.step
    if found is None:
        what = "nothing was measured on held-out images, so no checkpoint is known to be the best"
        raise UserError(what, where=str(run), fix="set data.validation.fraction in the next run, or name a step")
    return steps[found]


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint holds trained weights; their average does not count."""
    return is_model(name) and name.endswith(".safetensors")


def is_model(name: str) -> bool:
    """Whether a file of a checkpoint belongs to the trained model: its weights and configurations."""
    return name != MANIFEST and name.split("/")[0] not in (AVERAGE, STATE)


def read_state(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a checkpoint's folder (or of its averages'), under the names that an adapter knows them by."""
    from safetensors.torch import load_file

    return {f"{layout.prefix(file)}{key}": t for file in layout.headers for key, t in load_file(folder / file).items()}


def tensors(folder: Path) -> dict[str, Tensor]:
    """The trained tensors in a checkpoint folder, or in that of the averaged weights, by the names of `Layout`."""
    from safetensors.torch import load_file

    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.safetensors"))
    return {f"{Layout.prefix(n)}{k}": t for n in names if is_weights(n) for k, t in load_file(folder / n).items()}


def faults(path: Path) -> list[str]:
    """What is wrong with a checkpoint folder: missing, resized or altered files. Empty if it is as written."""
    if not path.is_dir():
        return ["there is no such folder"]
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        expected = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{MANIFEST} is unreadable ({type(error).__name__})"]
    problems = [f"{name} is not listed" for name in (OPTIMIZER, POSITION) if name not in expected]
    problems += [] if any(is_weights(name) for name in expected) else ["no trained weights are listed"]
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif file.stat().st_size != size:
            problems.append(f"{name} has {file.stat().st_size} bytes instead of {size}")
        elif file_sha256(file) != digest:
            problems.append(f"{name} was altered after it was written")
    return problems
