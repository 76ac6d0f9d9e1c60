"""Training on a GPU that has no numbers: nothing is left on the CPU, and a step asks for two numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gesso.micro.models import Size, build_sdxl
from run_helpers import settings

_TOKENS = [{"token": "<new>", "initial": "thing", "vectors": 2, "keep_norm": True}]
_NOISE = {
    "noise_offset": 0.1, "pyramid_noise_iterations": 2, "input_perturbation": 0.1,
    "timesteps": {"type": "beta", "alpha": 2, "beta": 3}, "timestep_bias": {"begin": 0.5, "multiplier": 2},
}  # fmt: skip
_FUSED = {"training__fused_backward": True, "training__accumulation": 1, "training__clip": None}
RUNS: dict[str, dict[str, Any]] = {
    "lora, everything at once": {
        "adapter": {
            "type": "lora", "rank": 16, "targets": "all", "conv_rank": 2, "train_text_encoders": True, "dropout": 0.1,
            "rank_dropout": 0.1, "module_dropout": 0.1, "lora_plus_ratio": 4, "max_norm": 1.0,
        },
        "objective": {"type": "denoise", "loss_type": "huber", "huber_schedule": "snr", **_NOISE},
        "training__optimizer": {"type": "muon"},
    },
    "dora, dpo": {
        "adapter": {"type": "lora", "rank": 2, "dora": True, "dropout": 0.1},
        "objective": {"type": "dpo", "sft_weight": 0.1, "label_smoothing": 0.1, "noise_offset": 0.1},
    },
    "loha, dreambooth": {
        "adapter": {"type": "loha", "rank": 2, "rank_dropout": 0.1, "conv_rank": 2, "tucker": True},
        "objective": {"type": "dreambooth", "timesteps": {"type": "custom", "weights": [1, 0, 2]}},
    },
    "lokr, prior of the model": {
        "adapter": {"type": "lokr", "rank": 2, "rank_dropout": 0.1, "decompose_both": True},
        "objective": {
            "type": "dreambooth", "prior": "model", "class_prompt": "a thing", "timesteps": {"type": "logit_normal"},
        },
    },
    "oft, weighting": {
        "adapter": {"type": "oft", "block_size": 8, "exact": True},
        "objective": {"type": "denoise", "weighting": {"type": "debiased"}, "timesteps": {"type": "mode"}},
        "model__prediction": "v_prediction",
        "model__zero_terminal_snr": True,
    },
    "full, text encoders, dpo": {
        "adapter": {"type": "full", "train_text_encoders": True},
        "objective": {"type": "dpo", "variant": "ipo"},
        "training__text_encoder_learning_rates": [1e-4, 0],
    },
    "full, bf16": {"adapter": {"type": "full", "weights": "bf16", "targets": "attention"}},
    "full, updated in the backward pass": {
        "adapter": {"type": "full", "train_text_encoders": True},
        "training__gradient_checkpointing": True,
        **_FUSED,
    },
    "full, bf16, updated in the backward pass": {"adapter": {"type": "full", "weights": "bf16"}, **_FUSED},
    "lora, new words": {
        "adapter": {"type": "lora", "rank": 2, "train_text_encoders": True, "tokens": _TOKENS},
        "model__prompt_weights": True,
        "training__gradient_checkpointing": True,
    },
    "identity": {"objective": {"type": "denoise", "identity": {"side": 32}}},
}  # fmt: skip
ASKED = {"identity": 4}
"""How many numbers a step asks for: its loss and norm, at once. Which samples have little noise decides what the
identity loss computes, so it has to know."""


def test_every_kind_of_run_stays_on_the_device_and_asks_for_two_numbers_a_step(tmp_path: Path) -> None:
    base = build_sdxl(
        tmp_path / "base",
        size=Size(unet_channels=(16, 32), unet_layers=1, unet_transformers=(1, 1), unet_heads=(2, 2)),
    )
    shared = {
        "training__precision": "bf16",
        "training__steps": 1,
        "training__optimizer": {"type": "adamw", "options": {"fused": True}},  # as on a real GPU
    }
    runs = {name: settings("run", base, tmp_path, tmp_path, tmp_path, {**shared, **own}) for name, own in RUNS.items()}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    program = Path(__file__).with_name("imaginary_gpu.py")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "runs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    errors = [f"{name}: {error}" for name, error in found.items() if isinstance(error, str)]
    assert not errors, "\n".join(errors)
    assert found == {name: ASKED.get(name, 2) for name in RUNS}
