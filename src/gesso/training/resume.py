"""Is this still the same run? What may change between a checkpoint and the run that goes on from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gesso.config.run import RunConfig
from gesso.errors import UserError

_IDENTITY = ("seed", "model", "data", "adapter", "objective")
OPTIMIZER = "training.optimizer.type"
"""What one optimiser remembers says nothing to another: going on with it in spite of that starts it afresh."""
_HARMLESS = ("data.cache", "data.workers", "data.skip_bad", "adapter.init_from")


@dataclass(frozen=True)
class Change:
    """A setting that differs; `blocking` where going on with it would be another run."""

    key: str
    old: Any
    new: Any
    blocking: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def identity(run: RunConfig, *, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What makes the run this run, as flat keys: its settings, and hashes of the base model and the data."""
    flat = _flatten(run.model_dump(mode="json", exclude={"name", "output", "trackers"}))
    # Files may move; their contents are in the hashes.
    for key in [k for k in flat if k.startswith(("data.sources.", "model.fuse.")) and k.endswith(".path")]:
        del flat[key]
    flat["data.validation.path"] = flat["data.validation.path"] is not None
    batch, accumulation = flat.pop("training.batch_size"), flat.pop("training.accumulation")
    return flat | {"training.samples_per_step": batch * accumulation} | {f"hash.{k}": v for k, v in hashes.items()}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two identities."""
    return [
        Change(key, old.get(key), new.get(key), _blocks(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def refuse(found: Collection[Change], accepted: Collection[str]) -> None:
    """Raise `UserError` with a diff if a blocking change is not accepted by name."""
    blocking = [c for c in found if c.blocking and not any(_covers(name, c.key) for name in accepted)]
    if blocking:
        diff = "\n".join(f"    {change}" for change in blocking)
        flags = " ".join(f"--accept-change {change.key}" for change in blocking)
        raise UserError(
            f"this is not the run that was saved; it would no longer be an exact continuation:\n{diff}",
            where="--resume",
            fix=f"put the old values back, start a new run in another folder, or go on regardless with: {flags}",
        )


def _blocks(key: str) -> bool:
    section = key.split(".", 1)[0]
    named = section == "hash" or key.endswith("per_step") or key == OPTIMIZER
    return named or (section in _IDENTITY and not key.startswith(_HARMLESS))


def _covers(name: str, key: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    match value:
        case dict():
            items = [(str(k), v) for k, v in value.items()]
        case list() | tuple():
            items = [(str(i), v) for i, v in enumerate(value)]
        case _:
            return {prefix.removesuffix("."): value}
    flat: dict[str, Any] = {}
    for key, inner in items:
        flat |= _flatten(inner, f"{prefix}{key}.")
    return flat
