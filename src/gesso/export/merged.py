"""A trained adapter in the weights of its base model -> a whole model, as a diffusers folder or as one file.

Nothing reaches its place before diffusers has loaded it and it has answered like the base with the adapter beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from gesso.core.runtime import Precision, Runtime
from gesso.export import lora, pipeline, single_file
from gesso.export.about import About
from gesso.export.pipeline import Checked
from gesso.families import lora_names


def write(
    trained: lora.Trained,
    path: Path,
    *,
    format: Literal["merged", "single-file"],
    precision: Precision,
    runtime: Runtime,
) -> Checked:
    """Write the base model with a trained adapter of any kind in its weights; raises as `pipeline.export` does."""
    family = trained.run.model
    parts = family.load(("denoiser", "vae", "text"), dtype=torch.float32, device=torch.device("cpu"))
    networks = dict(zip(family.part_names, [parts.denoiser, *parts.text_encoders], strict=True))
    lora_names.merge(networks, trained.file.match(lora_names.modules(networks)))
    if format == "merged":
        return pipeline.export(
            path, parts, precision=precision, family=family, expected=trained.expected, runtime=runtime
        )
    return single_file.export(
        path,
        parts,
        precision=precision,
        about=About.of(trained.run),
        family=family,
        expected=trained.expected,
        runtime=runtime,
    )
