"""The sampler that a model's scheduler_config.json names."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from gesso.errors import UserError

_WHERE = "scheduler_config.json"


def build(config: Mapping[str, Any]) -> Any:
    """Make it; raises `UserError` for one that diffusers lacks, or that cannot begin at a zero-terminal schedule."""
    import diffusers

    name = config.get("_class_name", "EulerDiscreteScheduler")
    kind = getattr(diffusers, name) if name in dir(diffusers) else None
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        raise UserError(f"diffusers has no sampler '{name}'", where=_WHERE, fix="update diffusers")
    zero_terminal = "rescale_betas_zero_snr"
    if config.get(zero_terminal) and zero_terminal not in inspect.signature(kind).parameters:
        raise UserError(
            f"{name} cannot sample with a zero-terminal-SNR schedule",
            where=_WHERE,
            fix="write EulerDiscreteScheduler or DDIMScheduler there, or set model.zero_terminal_snr: false",
        )
    sampler: Any = kind
    return sampler.from_config(dict(config))
