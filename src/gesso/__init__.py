"""Gesso fine-tunes diffusion image models.

    run = gesso.load_run("run.yaml")
    gesso.train(run)

Names are imported when they are first used, so that `import gesso` loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gesso.api import (
        DiffusionTrainer,
        SDXLEngine,
        StoryboardDataset,
        collate_fn,
        export_lora,
        load_run,
        sample,
        train,
    )
    from gesso.preference import DPODataset, DPOTrainer, TrainingConfig, create_dataloader

__version__ = "0.1.0"
_PREFERENCE = ("DPODataset", "DPOTrainer", "TrainingConfig", "create_dataloader")
__all__ = [
    "DPODataset",
    "DPOTrainer",
    "DiffusionTrainer",
    "SDXLEngine",
    "StoryboardDataset",
    "TrainingConfig",
    "collate_fn",
    "create_dataloader",
    "export_lora",
    "load_run",
    "sample",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "gesso.preference" if name in _PREFERENCE else "gesso.api"
        return vars(import_module(module))[name]
    raise AttributeError(f"module 'gesso' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
