"""The machine: device, dtypes, ranks and memory. The only module that knows about processes and devices."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gesso.core.random import key
from gesso.errors import ResourceError, UserError

Precision = Literal["fp32", "bf16", "fp16"]
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Runtime:
    """Where a run computes, and in what precision.

    `dtype` is that of the frozen networks and the activations; trained parameters, their gradients and losses stay
    float32, unless a full fine-tune keeps its weights in bf16.
    """

    device: torch.device
    precision: Precision

    @classmethod
    def detect(cls, precision: Precision = "fp32", device: str | None = None) -> Runtime:
        """The best device here, or the named one; refuses a precision the device cannot do.

        Raises `ResourceError` for a device that is absent and `UserError` for fp16 on a CPU.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                "started as one of several processes; this version trains with one",
                where="WORLD_SIZE",
                fix="start it without torchrun or accelerate launch, or set --num_processes 1",
            )
        name = device or _best_device()
        if not _DEVICE.fullmatch(name):
            raise UserError(f"there is no device '{name}'", where="training.device", fix="use cuda, cuda:1, mps or cpu")
        if name == "mps" and not torch.backends.mps.is_available():
            raise ResourceError("no Apple GPU is there", where=name, fix="leave the device empty for the best there is")
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ResourceError("no CUDA device is visible", where=name, fix="gesso doctor shows what is missing")
        if precision == "fp16" and name == "cpu":
            raise UserError("fp16 training needs a GPU", where="training.precision", fix="use bf16 or fp32 on a CPU")
        return cls(torch.device(name), precision)

    @classmethod
    def for_inference(cls, precision: Precision | None = None, device: str | None = None) -> Runtime:
        """As `detect`, with what suits the device where nothing fits better: fp16 on a GPU, float32 on a CPU."""
        device = device or _best_device()
        if device == "cpu":
            return cls.detect("bf16" if precision == "bf16" else "fp32", device)
        return cls.detect(precision or "fp16", device)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the frozen networks."""
        return _DTYPES[self.precision]

    def autocast(self, network: nn.Module) -> None:
        """Make a network whose weights or inputs may be float32 compute in `dtype`, wherever it is called from.

        Matrix products and convolutions do; norms, sums and the gradients of float32 weights stay float32.
        """
        network.forward = torch.autocast(self.device.type, self.dtype)(network.forward)

    def seed_model(self, seed: int, step: int, micro: int) -> None:
        """Seed torch's own generators, which only dropout inside the networks uses, as a function of the position."""
        torch.manual_seed(key(seed, "model", step, micro) & 0xFFFFFFFF)

    def scaler(self) -> torch.amp.GradScaler:
        """A gradient scaler, doing nothing unless the precision is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def peak_memory(self) -> int:
        """Peak bytes so far: of the GPU where there is one, of the process otherwise."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def release(self) -> None:
        """Give freed blocks back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def out_of_memory_explained() -> Iterator[None]:
    """Turn a device's out-of-memory error into a `ResourceError` that says which settings help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the device is out of memory ({str(error).splitlines()[0]})",
            where="training",
            fix="lower training.batch_size (and raise training.accumulation by as much), set "
            "training.gradient_checkpointing to true, or lower data.resolution or adapter.rank; what was saved is kept",
        ) from error


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
