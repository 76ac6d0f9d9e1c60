"""Weights updated inside the backward pass end where those updated after it do, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gesso import stages
from gesso.training import optim
from run_helpers import MakeRun, Stop, checkpoint_bytes, stop_after

BOTH = {"type": "full", "train_text_encoders": True}
BF16 = {"training__precision": "bf16"}
RATES = {"training__text_encoder_learning_rates": [3e-4, 5e-5]}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bf16 weights": {"adapter": BOTH | {"weights": "bf16"}, **BF16},
    "float32 weights in bf16": {"adapter": BOTH, **BF16},
    "adafactor": {"training__optimizer": {"type": "adafactor"}},
    "came": {"training__optimizer": {"type": "came"}},
    "soap": {"training__optimizer": {"type": "soap"}},
    "lion": {"training__optimizer": {"type": "lion"}},
    "text encoders": {"adapter": BOTH, **RATES},
    "text encoders by adafactor": {"adapter": BOTH, "training__optimizer": {"type": "adafactor"}, **RATES},
    "one encoder still": {"adapter": BOTH, "training__text_encoder_learning_rates": [0, 3e-4]},
    "encoders that stop": {"adapter": BOTH, "training__text_encoder_stop": 4},
    "encoders alone": {"adapter": BOTH | {"train_denoiser": False}},
    "some layers": {"adapter": {"type": "full", "targets": ["attn2", "conv_in"]}},
    "checkpointing": {"adapter": BOTH, "training__gradient_checkpointing": True},
    "checkpointing in bf16": {
        "adapter": BOTH | {"weights": "bf16"},
        "training__gradient_checkpointing": True,
        **BF16,
    },
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tiny model has many, and parameters lie across their borders."""
    monkeypatch.setattr(optim, "PIECE", 4096)


def full(make_run: MakeRun, name: str, *, fused: bool, **overrides: Any) -> Any:
    common: dict[str, Any] = {"adapter": {"type": "full"}, "training__accumulation": 1, "training__clip": None}
    return make_run(name, **{**common, "training__fused_backward": fused, **overrides})


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_equals_unfused(make_run: MakeRun, variant: str) -> None:
    overrides = VARIANTS[variant]
    plain = checkpoint_bytes(stages.train(full(make_run, "plain", fused=False, **overrides)), 8)
    fused = checkpoint_bytes(stages.train(full(make_run, "fused", fused=True, **overrides)), 8)
    assert fused.keys() == plain.keys()
    assert [name for name in plain if fused[name] != plain[name]] == []
