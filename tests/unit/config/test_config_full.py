"""Advice and forecast of a full fine-tune: what goes together, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gesso.config import advice
from gesso.config.advice import Advice, Forecast, Machine
from gesso.config.forecast import GIB, forecast
from gesso.config.run import RunConfig

Run = Callable[..., RunConfig]
UNET, TEXT = 2_567_000_000, 818_000_000


@pytest.fixture
def run(pictures: Any, tmp_path: Any) -> Run:
    """A full fine-tune of SDXL, with changes."""

    def make(adapter: dict[str, Any] | None = None, **training: Any) -> RunConfig:
        return RunConfig.model_validate(
            {
                "output": str(tmp_path / "run"),
                "data": {"sources": [{"path": str(pictures)}], "resolution": 1024, "cache": str(tmp_path)},
                "adapter": {"type": "full"} | (adapter or {}),
                "training": {"steps": 10, "learning_rate": 1e-5} | training,
            }
        )

    return make


def errors(found: Advice) -> dict[str, str]:
    return {f.key: f"{f.what} -> {f.fix}" for f in found.errors}


def numbers(found: Advice) -> Forecast:
    assert not found.errors
    assert found.forecast is not None
    return found.forecast


def bytes_each(made: RunConfig, other: RunConfig) -> float:
    """How much more memory the one takes, a parameter of the UNet."""
    one, two = forecast(made), forecast(other)
    assert one is not None
    assert one.memory_bytes is not None
    assert two is not None
    assert two.memory_bytes is not None
    return (one.memory_bytes - two.memory_bytes) / UNET


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_goes_with_float32_weights(run: Run, precision: str) -> None:
    assert numbers(advice.check(run(precision=precision))).parameters == UNET


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bf16_weights_compute_in_bf16(run: Run, precision: str) -> None:
    assert not advice.check(run({"weights": "bf16"}, precision="bf16")).errors
    found = errors(advice.check(run({"weights": "bf16"}, precision=precision)))
    assert f"training.precision is {precision} -> set training.precision: bf16" in found["adapter.weights"]


def test_bf16_weights_want_an_optimizer_that_works_number_by_number(run: Run) -> None:
    found = errors(advice.check(run({"weights": "bf16"}, optimizer={"type": "muon"})))
    assert "muon looks at whole tensors" in found["training.optimizer.type"]
    assert "or adapter.weights: fp32" in found["training.optimizer.type"]


def test_something_must_train(run: Run) -> None:
    alone = {"train_denoiser": False, "train_text_encoders": True}
    assert not advice.check(run(alone)).errors
    assert not advice.check(run(alone, learning_rate=0, text_encoder_learning_rates=[0, 1e-5])).errors
    for made in (run(alone, text_encoder_learning_rates=[0]), run(learning_rate=0), run(alone, learning_rate=0)):
        assert "every learning rate is 0" in errors(advice.check(made))["training.learning_rate"]


@pytest.mark.parametrize(
    ("adapter", "training", "parameters"),
    [
        ({"train_text_encoders": True}, {}, UNET + TEXT),
        ({"train_text_encoders": True, "train_denoiser": False}, {}, TEXT),
        ({"train_text_encoders": True}, {"learning_rate": 0, "text_encoder_learning_rates": [1e-5]}, TEXT),
        ({"targets": "attention"}, {}, 955_000_000),
        ({"targets": "attention-mlp", "train_text_encoders": True}, {}, 2_209_000_000 + TEXT),
        ({"targets": ["up_blocks.1"]}, {}, UNET),
    ],
)
def test_what_trains_is_counted(run: Run, adapter: Any, training: Any, parameters: int) -> None:
    assert numbers(advice.check(run(adapter, **training))).parameters == parameters


def test_the_bytes_of_a_parameter(run: Run) -> None:
    """Weight, gradient and two moments are 16 bytes in float32, 12 with bf16 ones; a pass in bf16 casts to 2 more."""
    lora = RunConfig.model_validate(run().model_dump() | {"adapter": {"rank": 1, "targets": "all-linear"}})
    frozen = 2
    assert bytes_each(run(precision="bf16"), lora) + frozen == pytest.approx(18, abs=0.05)
    assert bytes_each(run({"weights": "bf16"}), lora) + frozen == pytest.approx(12, abs=0.05)
    small = {"optimizer": {"type": "adamw8bit"}}
    assert bytes_each(run(), run(**small)) == pytest.approx(6, abs=0.01)
    assert bytes_each(run(ema={"enabled": True}), run()) == pytest.approx(8, abs=0.01)
    attention, still = 955 / 2567, 1612 / 2567
    some = run({"targets": "attention"}, precision="fp32")
    whole = run(precision="fp32")
    assert bytes_each(some, whole) == pytest.approx(16 * attention + 4 * still - 16, abs=0.01)
    text = run({"train_denoiser": False, "train_text_encoders": True})
    assert bytes_each(text, lora) == pytest.approx(18 * TEXT / UNET, abs=0.05)


def test_checkpoints_hold_what_does_not_train_beside_what_does(run: Run) -> None:
    some = numbers(advice.check(run({"targets": "attention"})))
    assert some.checkpoint_bytes == 955_000_000 * 12 + 1_612_000_000 * 4
    narrow = numbers(advice.check(run({"weights": "bf16"})))
    assert narrow.checkpoint_bytes == UNET * 10


def test_a_gpu_that_is_too_small_is_told_what_helps(run: Run) -> None:
    small = Machine(gpu="L4", gpu_memory=24 * GIB, memory=64 * GIB)
    (said,) = (f.fix for f in advice.check(run(precision="fp32"), small).warnings if f.key == "training")
    assert "training.precision: bf16" in said
    assert "adapter.weights: bf16" in said
    (said,) = (f.fix for f in advice.check(run({"weights": "bf16"}), small).warnings if f.key == "training")
    assert "adapter.weights: bf16" not in said
