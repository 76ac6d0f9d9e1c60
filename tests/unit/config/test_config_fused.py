"""`training.fused_backward`: what it does not go with is refused by name, and the forecast counts what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gesso.config import advice
from gesso.config.advice import Machine
from gesso.config.forecast import GIB, forecast
from gesso.config.optimizer import KINDS, Optimizer
from gesso.config.run import RunConfig

UNET = 2_567_000_000
FUSED = {"fused_backward": True, "clip": None}
PRIOR = {"type": "dreambooth", "class_prompt": "a thing"}


def run(pictures: Path, folder: Path, *, adapter: Any = None, objective: Any = None, **training: Any) -> RunConfig:
    sources: list[dict[str, Any]] = [{"path": str(pictures)}]
    if objective is PRIOR:
        sources.append({"path": str(folder / "class"), "role": "prior"})
    return RunConfig.model_validate(
        {
            "output": str(folder / "run"),
            "data": {"sources": sources, "resolution": 1024, "cache": str(folder)},
            "adapter": adapter or {"type": "full"},
            "objective": objective or {"type": "denoise"},
            "training": {"steps": 10, "learning_rate": 1e-5, **FUSED, **training},
        }
    )


def errors(made: RunConfig) -> dict[str, str]:
    return {f.key: f"{f.what} -> {f.fix}" for f in advice.check(made).errors if "is not installed" not in f.what}


ADAPTERS: list[dict[str, Any]] = [
    {"type": "lora"},
    {"type": "lokr"},
    {"type": "embedding", "tokens": [{"token": "<x>", "initial": "dog"}]},
]
OPTIMIZERS = ["muon", "prodigy", "dadapt_adam", "dadapt_lion", "schedule_free", "torch.optim.NAdam"]
REFUSED: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    **{a["type"]: ({"adapter": a}, "training.fused_backward", (a["type"], "take it out")) for a in ADAPTERS},
    "accumulation": ({"accumulation": 3}, "training.accumulation", ("3 batches", "training.batch_size")),
    "class images": ({"objective": PRIOR}, "objective.type", ("dreambooth takes two", "denoise")),
    "the model's prior": ({"objective": PRIOR | {"prior": "model"}}, "objective.type", ("dreambooth takes two",)),
    "clip": ({"clip": 1.0}, "training.clip", ("norm of the whole gradient", "clip: null")),
    "fp16": ({"precision": "fp16"}, "training.precision", ("overflows", "bf16 or fp32")),
    **{o: ({"optimizer": {"type": o}}, "training.optimizer.type", (o, "adafactor")) for o in OPTIMIZERS},
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(pictures: Path, tmp_path: Path, name: str) -> None:
    overrides, key, words = REFUSED[name]
    found = errors(run(pictures, tmp_path, **overrides))
    assert all(word in found[key] for word in words), found
    assert key == "training.fused_backward" or found[key].endswith("or training.fused_backward: false")
    off: dict[str, Any] = {"fused_backward": False, **overrides}
    assert "fused_backward" not in str(errors(run(pictures, tmp_path, **off)))


@pytest.mark.parametrize(
    "overrides",
    [
        *({"optimizer": {"type": name}} for name in KINDS if Optimizer(type=name).by_piece),
        *({"precision": precision} for precision in ("fp32", "bf16")),
        {"adapter": {"type": "full", "weights": "bf16"}, "precision": "bf16"},
        {"adapter": {"type": "full", "train_text_encoders": True}, "text_encoder_stop": 3},
        {"batch_size": 4, "gradient_checkpointing": True},
        {"objective": {"type": "dpo"}},
    ],
    ids=str,
)
def test_taken(pictures: Path, tmp_path: Path, overrides: dict[str, Any]) -> None:
    assert not [what for what in errors(run(pictures, tmp_path, **overrides)).values() if "fused_backward" in what]


def test_what_works_by_piece() -> None:
    assert {name for name in KINDS if Optimizer(type=name).by_piece} == {
        *("adamw", "adamw8bit", "paged_adamw8bit", "lion", "lion8bit", "adafactor", "came", "soap"),
    }


@pytest.mark.parametrize(("weights", "wide"), [("fp32", 4), ("bf16", 2)])
def test_the_gradient_is_not_counted_but_for_what_passes_by(
    pictures: Path, tmp_path: Path, weights: str, wide: int
) -> None:
    adapter = {"type": "full", "weights": weights}
    one, other = (
        forecast(run(pictures, tmp_path, adapter=adapter, precision="bf16", fused_backward=fused))
        for fused in (False, True)
    )
    assert one is not None
    assert other is not None
    assert one.memory_bytes is not None
    assert other.memory_bytes is not None
    assert one.memory_bytes - other.memory_bytes == pytest.approx(wide * UNET, rel=0.05)
    assert one.memory_bytes - other.memory_bytes < wide * UNET
    assert one.checkpoint_bytes == other.checkpoint_bytes


def test_a_gpu_that_is_too_small_is_told_of_it(pictures: Path, tmp_path: Path) -> None:
    small = Machine(gpu="L4", gpu_memory=24 * GIB, memory=64 * GIB)
    for fused in (False, True):
        found = advice.check(run(pictures, tmp_path, fused_backward=fused), small)
        (said,) = (f.fix for f in found.warnings if f.key == "training")
        assert ("training.fused_backward: true" in said) is not fused
