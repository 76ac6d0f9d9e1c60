"""What a model answers to fixed inputs: the proof that a written file or folder is the trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gesso.core.batch import Geometry
from gesso.core.random import generator
from gesso.core.seams import Cond, Family, Parts

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
AGREEMENT = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""How far predictions may differ, relative to the largest, where the coarser of file and model has each dtype."""
_PROMPTS = ("a photo of a person, 3/4 view", "")


@dataclass(frozen=True)
class Probe:
    """A model's answers to fixed inputs, on the CPU: text embeddings, and the denoiser's prediction under `cond`."""

    text: Cond
    cond: Cond
    prediction: Tensor


def probe(family: Family, parts: Parts, *, cond: Cond | None = None) -> Probe:
    """Answers to fixed prompts and a fixed noisy latent; the networks' modes are as found afterwards.

    With `cond` the denoiser answers under that condition, so that its error is its own. Where `parts` holds no text
    encoders they did not train, and the base model's are loaded for the moment.
    """
    denoiser: Any = parts.denoiser
    readers = parts
    if not parts.text_encoders:
        readers = family.load(("text",), dtype=denoiser.dtype, device=denoiser.device)
    networks = [denoiser, *readers.text_encoders]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    side, count = 16 * family.latent_factor, len(_PROMPTS)
    shape = (count, int(denoiser.config.in_channels), 16, 16)
    noisy = torch.from_numpy(generator(0, "export probe").standard_normal(shape)).to(denoiser.device, torch.float32)
    try:
        for network in networks:
            network.eval()
        with torch.no_grad():
            text = family.encode_text(readers, list(_PROMPTS))
            if cond is None:
                cond = family.condition(text, [Geometry(side, side, 0, 0, side, side)] * count)
            on_device = {k: v.to(denoiser.device) for k, v in cond.items()}
            t = torch.full((count,), 500, device=denoiser.device)
            prediction = family.predict(denoiser, noisy, t, on_device)
    finally:
        for module, mode in modes:
            module.training = mode
    return Probe(
        {k: v.float().cpu() for k, v in text.items()},
        {k: v.cpu() for k, v in cond.items()},
        prediction.float().cpu(),
    )


def deviation(tensor: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value of `reference`."""
    return float((tensor - reference).abs().max() / reference.abs().max())
