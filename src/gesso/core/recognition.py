"""Networks that tell faces or characters apart, as differentiable functions from pixels to unit vectors."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gesso.core import resolve
from gesso.errors import ResourceError, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_INSIGHTFACE = Path("~/.insightface/models")
_ARCFACE_SIDE = 112
_ARCFACE_MARKS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where eyes, nose and corners of the mouth belong in ArcFace's pictures (Deng et al. 2019, arXiv:1801.07698)."""

OnPixels = Callable[["Tensor"], "Tensor"]


@dataclass(frozen=True)
class Recogniser:
    """An identity model; both of what it does let gradients through to the pixels."""

    find: Callable[[Tensor], OnPixels | None]
    """One picture [1, 3, H, W] in [-1, 1] -> what cuts its face out of such a picture, None where there is no face."""
    embed: OnPixels
    """What was cut out -> unit vectors [1, D] float32."""


def problem(name: str) -> UserError | None:
    """Why this model cannot be used here, without loading it."""
    if not _is_insightface(name):
        return None
    missing = [package for package in ("insightface", "onnx2torch") if importlib.util.find_spec(package) is None]
    if missing:
        return ResourceError(
            f"{name} has no differentiable form here: {' and '.join(missing)} missing",
            where="objective.identity.model",
            fix=f"pip install {' '.join(missing)}, or name a folder that transformers' CLIPVisionModelWithProjection "
            "reads; micro:identity is the one in the package, for the painted world",
        )
    if not _weights(name).is_file():
        return ResourceError(
            f"{_weights(name)} does not exist",
            where="objective.identity.model",
            fix=f"run: python -c \"from insightface.app import FaceAnalysis; FaceAnalysis('{name}')\"",
        )
    return None


@lru_cache(maxsize=2)
def load(name: str, device: torch.device) -> Recogniser:
    """The identity model of this name, frozen: `micro:identity`, a folder or hub id of a CLIP vision model with a
    projection, or one of insightface's, such as buffalo_l. Raises what `problem` says."""
    if (found := problem(name)) is not None:
        raise found
    return _arcface(name, device) if _is_insightface(name) else _clip_vision(name, device)


def _is_insightface(name: str) -> bool:
    return name.startswith(("buffalo_", "antelope"))


def _weights(name: str) -> Path:
    folder = (_INSIGHTFACE / name).expanduser()
    found = [*folder.glob("w600k_*.onnx"), *folder.glob("glintr*.onnx")]
    return found[0] if found else folder / "w600k_r50.onnx"


def _clip_vision(name: str, device: torch.device) -> Recogniser:
    """A CLIP-like encoder of whole pictures."""
    import torch
    from torch.nn.functional import interpolate, normalize
    from transformers import CLIPVisionModelWithProjection
    from transformers.utils import logging

    folder = resolve.locate(name, key="objective.identity.model")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it would tear ours apart
    try:
        network: Any = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32)
    finally:
        if bars:
            logging.enable_progress_bar()
    network = network.to(device).eval().requires_grad_(False)
    settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    mean, std = (torch.tensor(settings[key], device=device).view(1, 3, 1, 1) for key in ("image_mean", "image_std"))
    side = network.config.image_size

    def embed(pixels: Tensor) -> Tensor:
        fitted = interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
        return normalize(network((fitted / 2 + 0.5 - mean) / std).image_embeds, dim=1)

    return Recogniser(find=lambda _: lambda pixels: pixels, embed=embed)


def _arcface(name: str, device: torch.device) -> Recogniser:
    """insightface's recogniser through onnx2torch; its detector finds the face, which costs no gradient."""
    import torch
    from insightface.app import FaceAnalysis
    from onnx2torch import convert
    from torch.nn.functional import affine_grid, grid_sample, normalize

    network = convert(str(_weights(name))).to(device).eval().requires_grad_(False)
    finder = FaceAnalysis(name, allowed_modules=["detection"])
    finder.prepare(ctx_id=-1)

    def embed(pixels: Tensor) -> Tensor:
        return normalize(network(pixels.float()), dim=1)

    def find(pixels: Tensor) -> OnPixels | None:
        height, width = pixels.shape[-2:]
        seen = ((pixels[0].clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy()[:, :, ::-1]
        faces = finder.get(seen)
        if not faces:
            return None
        largest = max(faces, key=lambda face: float((face.bbox[2] - face.bbox[0]) * (face.bbox[3] - face.bbox[1])))
        theta = similarity(_ARCFACE_MARKS, largest.kps.tolist(), size=(width, height))
        shape = [1, 3, _ARCFACE_SIDE, _ARCFACE_SIDE]
        grid = affine_grid(torch.tensor([theta], dtype=torch.float32), shape, align_corners=False).to(device)
        return lambda other: grid_sample(other.float(), grid, align_corners=False)

    return Recogniser(find, embed)


def similarity(
    model: tuple[tuple[float, float], ...], seen: list[list[float]], *, size: tuple[int, int]
) -> list[list[float]]:
    """The `theta` of `affine_grid` that samples a picture of `size` so that its marks `seen` come to lie at `model`.

    The similarity transform (rotation, scale, shift) from the model's pixels to the picture's, by least squares
    (Umeyama 1991), in coordinates from -1 to 1.
    """
    import numpy as np

    to, of = np.array(seen), np.array(model)
    centre_to, centre_of = to.mean(0), of.mean(0)
    a, b = of - centre_of, to - centre_to
    # As complex numbers a rotation with a scale is one factor, and its least squares one division.
    one, two = a[:, 0] + 1j * a[:, 1], b[:, 0] + 1j * b[:, 1]
    factor = (np.conj(one) * two).sum() / (np.abs(one) ** 2).sum()
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    shift = centre_to - linear @ centre_of
    # Pixel p of a side s lies at (2 p + 1) / s - 1.
    half = _ARCFACE_SIDE / 2
    scale = np.array([[2 / size[0]], [2 / size[1]]])
    offset = (linear @ np.array([half - 0.5, half - 0.5]) + shift + 0.5)[:, None] * scale - 1
    return np.hstack([linear * half * scale, offset]).tolist()  # type: ignore[no-any-return]
