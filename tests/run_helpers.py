"""Quick runs on the tiny model, and how to compare what they leave behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gesso.core.events import Event
    from gesso.training.session import Session

Settings = dict[str, Any]
MakeRun = Callable[..., Any]


def settings(
    name: str, base: Path, pictures: Path, encodings: Path, folder: Path, overrides: dict[str, Any]
) -> Settings:
    """The settings of a quick run on the tiny model, with overrides laid over them."""
    values: Settings = {
        "name": name,
        "output": str(folder / name),
        "seed": 3,
        "model": {"base": str(base)},
        "data": {
            "sources": [{"path": str(pictures)}],
            "resolution": 64,
            "buckets": {"step": 16},
            "captions": {"dropout": 0.2},
            "flip": True,
            "cache": str(encodings),
            "workers": 0,
        },
        "adapter": {"rank": 4, "alpha": 6},
        "training": {
            "steps": 8,
            "batch_size": 2,
            "accumulation": 2,
            "learning_rate": 1e-3,
            "precision": "fp32",
            "device": "cpu",
            "schedule": {"type": "cosine", "warmup": 2},
            "ema": {"enabled": True, "decay": 0.95},
        },
        "checkpoint": {"every": 3},
        "trackers": [],
    }
    for dotted, value in overrides.items():
        *parents, leaf = dotted.split("__")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return values


def checkpoint_bytes(folder: Path, step: int) -> dict[str, tuple[Settings, bytes]]:
    """Header and tensor bytes of every tensor file of a checkpoint, to compare runs bit for bit.

    The header is parsed because the library writes the keys of its metadata in any order.
    """
    found = folder / f"checkpoint-{step}"
    files = {}
    for path in found.rglob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        files[str(path.relative_to(found))] = (json.loads(content[8:start]), content[start:])
    assert "state/optimizer.safetensors" in files
    assert any(not name.startswith(("state/", "ema/")) for name in files)
    return files


class Stop(Exception):
    """Ends a run from inside its event sink, as abruptly as an exception can."""


def stop_after(step: int) -> Callable[[Event], None]:
    """An event sink that ends the run once `step` is done."""
    from gesso.core.events import StepDone

    def sink(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == step:
            raise Stop

    return sink


def in_memory(run: Any) -> tuple[Session, Any]:
    """A run on the CPU, about to train, and its prepared data."""
    from gesso import stages
    from gesso.core.folder import RunFolder
    from gesso.core.runtime import Runtime
    from gesso.training.session import Session

    folder = RunFolder(run.folder)
    folder.prepare()
    runtime = Runtime.detect(run.training.precision, "cpu")
    data = stages.prepare(run, folder, runtime, stages.ignore)
    return Session.build(run, data.parts, runtime), data


def fit(run: Any, session: Session, data: Any) -> None:
    """All steps of a run in memory, with nothing between them."""
    from gesso import stages
    from gesso.core.runtime import Runtime
    from gesso.training import loop

    session.policy.train()
    loop.fit(
        run.training,
        name=run.name,
        seed=run.seed,
        loss=partial(run.objective.loss, session.policy),
        learner=session.learner,
        stream=data.stream,
        runtime=Runtime.detect(run.training.precision, "cpu"),
        actions=[],
        emit=stages.ignore,
        stopping=lambda: False,
    )
