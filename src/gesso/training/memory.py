"""Trading memory against time: attention kernels and gradient checkpointing."""

from __future__ import annotations

from typing import Any

from gesso.config.run import Training
from gesso.core.seams import Parts
from gesso.errors import ResourceError


def prepare(parts: Parts, training: Training) -> None:
    """Set attention kernels and checkpointing on the networks that run in a training step.

    Raises `ResourceError` when xformers is asked for and missing or unusable here.
    """
    assert parts.denoiser is not None
    if training.gradient_checkpointing:
        parts.denoiser.enable_gradient_checkpointing()
        for encoder in parts.text_encoders:
            # The other kind, which older transformers have by default, gives nothing to weights whose input is frozen.
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
    if training.attention == "xformers":
        _use_xformers(parts.denoiser)


def _use_xformers(denoiser: Any) -> None:
    try:
        denoiser.enable_xformers_memory_efficient_attention()
    except (ImportError, ModuleNotFoundError, ValueError, NotImplementedError) as error:
        raise ResourceError(
            f"xformers attention cannot be used here ({str(error).splitlines()[0]})",
            where="training.attention",
            fix="pip install 'gesso[gpu]' on a CUDA machine, or set training.attention to sdpa",
        ) from error
