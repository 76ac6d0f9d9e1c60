"""Every kind of adapter, a tiny model to put them on, and numpy's answer to what they do to a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gesso.adapters import OFT, LoHa, LoKr, LoRA
from gesso.core.batch import Geometry
from gesso.core.seams import Attached, Parts
from gesso.families.sdxl import SDXL

CPU = torch.device("cpu")
KINDS: dict[str, LoRA | LoHa | LoKr | OFT] = {
    "lora-conv": LoRA(rank=4, alpha=6, conv_rank=2, conv_alpha=3),
    "lora-all": LoRA(rank=3, targets="all"),
    "rslora": LoRA(rank=4, alpha=6, rslora=True),
    "dora": LoRA(rank=4, alpha=6, dora=True, targets="attention-mlp"),
    "dora-conv": LoRA(rank=4, alpha=6, dora=True, conv_rank=2),
    "patterns": LoRA(rank=4, alpha=6, rank_pattern={"mid_block": 2, "attn2": 0}, alpha_pattern={r"up_blocks\.0": 1}),
    "loha": LoHa(rank=3, alpha=2, targets="all"),
    "loha-tucker": LoHa(rank=3, alpha=2, targets="all", tucker=True),
    "lokr": LoKr(rank=2, alpha=1, factor=4, targets="all"),
    "lokr-both": LoKr(rank=2, alpha=3, decompose_both=True, targets="all", tucker=True),
    "lokr-whole": LoKr(rank=512, alpha=256, factor=4),
    "oft": OFT(block_size=8, targets="attention-mlp"),
    "oft-exact": OFT(block_size=8, exact=True, share=True),
}


def loaded(base: Path, dtype: torch.dtype = torch.float32) -> tuple[SDXL, Parts]:
    """A fresh tiny model."""
    family = SDXL(base=str(base))
    return family, family.load(("denoiser", "text"), dtype=dtype, device=CPU)


def answer(family: SDXL, parts: Parts) -> Tensor:
    """The prediction for two fixed samples, text encoders included."""
    noisy = torch.from_numpy(np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32))
    with torch.no_grad():
        text = family.encode_text(parts, ["a photo of sks aldar", "red circle"])
        cond = family.condition(text, [Geometry(64, 64, 0, 0, 64, 64)] * 2)
        return family.predict(parts.denoiser, noisy.to(parts.denoiser.dtype), torch.tensor([700, 3]), cond)


def fill(attached: Attached, scale: float = 0.3) -> None:
    """Other numbers in every trained tensor, as after training."""
    numbers = np.random.default_rng(7)
    with torch.no_grad():
        for tensor in attached.state().values():
            tensor.add_(torch.from_numpy(scale * numbers.standard_normal(tuple(tensor.shape))).to(tensor))


def grown(layer: Any) -> np.ndarray[Any, Any]:
    """The weight that a layer in place acts with, by the papers' formulas in float64, from peft's own tensors."""
    p = {n.replace(".default", ""): t.detach().double().numpy() for n, t in layer.named_parameters()}
    weight = p["base_layer.weight"]
    scale = layer.scaling["default"] if "oft_R.weight" not in p else 1.0
    if "oft_R.weight" in p:
        return weight @ _rotation(p["oft_R.weight"], weight.shape[1], layer.oft_R["default"]).T
    if "hada_w1_a" in p:
        a, b = (_product(p[f"hada_w{i}_a"], p[f"hada_w{i}_b"], p.get(f"hada_t{i}")) for i in (1, 2))
        return weight + scale * (a * b).reshape(weight.shape)
    if "lokr_w1" in p or "lokr_w1_a" in p:
        first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
        second = p["lokr_w2"] if "lokr_w2" in p else _product(p["lokr_w2_a"], p["lokr_w2_b"], p.get("lokr_t2"))
        second = second.reshape(second.shape[0], weight.shape[1] // first.shape[1], *weight.shape[2:])
        whole = np.einsum("oi,pj...->opij...", first, second)
        return weight + scale * whole.reshape(weight.shape)
    a, b = p["lora_A.weight"], p["lora_B.weight"]
    rows = weight.reshape(len(weight), -1) + scale * b.reshape(len(b), -1) @ a.reshape(len(a), -1)
    if "lora_magnitude_vector.weight" in p:
        rows *= p["lora_magnitude_vector.weight"].reshape(-1, 1) / np.sqrt((rows**2).sum(1, keepdims=True))
    return rows.reshape(weight.shape)


def merged(parts: Parts, base: Path) -> Parts:
    """A fresh model whose weights are those that the adapted one acts with."""
    _, fresh = loaded(base)
    pairs = zip([parts.denoiser, *parts.text_encoders], [fresh.denoiser, *fresh.text_encoders], strict=True)
    for live, plain in pairs:
        own = dict(plain.named_modules())
        for path, layer in live.named_modules():
            if isinstance(own.get(path), nn.Linear | nn.Conv2d) and not isinstance(layer, nn.Linear | nn.Conv2d):
                own[path].weight.data = torch.from_numpy(grown(layer)).float()
    return fresh


def _product(a: Any, b: Any, core: Any) -> np.ndarray[Any, Any]:
    product: np.ndarray[Any, Any] = a @ b if core is None else np.einsum("ijkl,ip,jr->prkl", core, a, b)
    return product


def _rotation(vectors: Any, inputs: int, module: Any) -> np.ndarray[Any, Any]:
    """Cayley's (I - Q)(I + Q)^-1 of each block's skew matrix, or its series I + 2Q + 2Q^2 + 2Q^3 + Q^4."""
    size = module.block_size
    blocks = []
    for vector in vectors:
        q = np.zeros((size, size))
        q[np.triu_indices(size, 1)] = vector
        q = q - q.T
        one = np.eye(size)
        series = one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        blocks.append(series if module.use_cayley_neumann else (one - q) @ np.linalg.inv(one + q))
    blocks *= inputs // size // len(blocks)
    whole = np.zeros((inputs, inputs))
    for i, block in enumerate(blocks):
        whole[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
    return whole
