"""A machine that cannot do what is asked says so before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from gesso.core.runtime import Runtime
from gesso.errors import ResourceError, UserError


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_one_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one of several processes") as caught:
        Runtime.detect("fp32", "cpu")
    assert (caught.value.exit_code, caught.value.where) == (2, "WORLD_SIZE")
    monkeypatch.setenv("WORLD_SIZE", "1")  # as `accelerate launch --num_processes 1` sets it
    assert Runtime.detect("fp32", "cpu").device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_an_absent_device_is_a_lack_of_resources(device: str) -> None:
    with pytest.raises(ResourceError) as caught:
        Runtime.detect("bf16", device)
    assert (caught.value.exit_code, caught.value.where) == (3, device)
    assert caught.value.fix


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "cpu "])
def test_a_name_of_no_device(device: str) -> None:
    with pytest.raises(UserError, match=f"there is no device '{device}'") as caught:
        Runtime.detect("fp32", device)
    assert (caught.value.exit_code, caught.value.where) == (2, "training.device")


@pytest.mark.parametrize("device", ["cpu", None])
def test_fp16_is_not_for_a_cpu(device: str | None) -> None:
    with pytest.raises(UserError, match="fp16 training needs a GPU") as caught:
        Runtime.detect("fp16", device)
    assert (caught.value.exit_code, caught.value.where) == (2, "training.precision")
    assert "bf16 or fp32" in caught.value.fix


def test_the_best_device_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Runtime.detect().device.type == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert Runtime.detect().device.type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Runtime.detect("fp16").device.type == "cuda"
    assert Runtime.detect("fp16", "cuda:0").device.index == 0


@pytest.mark.parametrize(
    ("asked", "on_cpu", "on_gpu"),
    [(None, "fp32", "fp16"), ("fp16", "fp32", "fp16"), ("bf16", "bf16", "bf16"), ("fp32", "fp32", "fp32")],
)
def test_drawing_takes_what_suits_the_device(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, on_cpu: str, on_gpu: str
) -> None:
    assert Runtime.for_inference(asked).precision == on_cpu  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Runtime.for_inference(asked).precision == on_gpu  # type: ignore[arg-type]


def test_precision_decides_dtype_and_scaler() -> None:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for precision, dtype in dtypes.items():
        runtime = Runtime(torch.device("cpu"), precision)  # type: ignore[arg-type]
        assert runtime.dtype == dtype
        assert runtime.scaler().is_enabled() is (precision == "fp16")


def test_the_networks_own_draws_follow_the_position() -> None:
    runtime = Runtime.detect("fp32", "cpu")

    def drawn(*position: int) -> tuple[float, ...]:
        runtime.seed_model(*position)
        return tuple(torch.rand(4).tolist())

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2**40, 0, 0)]
    state = torch.get_rng_state()
    first = [drawn(*place) for place in places]
    assert len(set(first)) == len(places)
    assert [drawn(*place) for place in reversed(places)] == first[::-1]
    torch.set_rng_state(state)


def test_peak_memory_is_in_bytes() -> None:
    import psutil

    found = Runtime.detect("fp32", "cpu").peak_memory()
    resident = psutil.Process().memory_info().rss
    assert resident * 0.5 < found < resident * 50
