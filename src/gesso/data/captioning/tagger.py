"""Tags by the WD taggers (SmilingWolf's models) and others with the same two files: model.onnx, selected_tags.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gesso.data.captioning.plugins import Settings
from gesso.data.texts import read_text
from gesso.errors import ResourceError, UserError

_MODEL = "SmilingWolf/wd-vit-tagger-v3"
_FILES = ("model.onnx", "selected_tags.csv")
_GENERAL, _CHARACTER = 0, 4
_FACE = 3
"""Names up to this length are faces such as 0_0, where the underscore is no space."""


class Tagger:
    """Characters first, then general tags, each by falling score, as "1girl, long hair"."""

    def __init__(self, settings: Settings) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ResourceError(
                "onnxruntime is not installed", where="--with wd", fix='pip install "gesso[captions]"'
            ) from error
        model, table = _files(settings.model or _MODEL)
        try:
            self._session = onnxruntime.InferenceSession(str(model), providers=_providers(settings.device))
        except Exception as error:  # whatever the runtime makes of a file that is no model
            raise UserError(f"this model cannot be loaded: {error}", where=str(model)) from error
        given = self._session.get_inputs()[0]
        self._input, self._side = given.name, given.shape[1]
        self._batch = given.shape[0] if isinstance(given.shape[0], int) else None
        outputs = self._session.get_outputs()[0].shape[-1]
        self._names, self._categories = _tags(table)
        if len(given.shape) != 4 or given.shape[3] != 3 or not isinstance(self._side, int):
            raise UserError(f"its input is {given.shape}, not [N, side, side, 3]", where=str(model))
        if outputs != len(self._names):
            raise UserError(
                f"the model gives {outputs} scores, but there are {len(self._names)} tags", where=str(table)
            )
        self._least = {_GENERAL: settings.threshold, _CHARACTER: settings.character_threshold}

    def caption(self, pictures: Sequence[Image.Image]) -> list[str | UserError]:
        """One batch, or one picture after another where the model takes no more."""
        inputs = np.stack([self._pixels(picture) for picture in pictures])
        step = self._batch or len(inputs)
        runs = [self._session.run(None, {self._input: inputs[i : i + step]})[0] for i in range(0, len(inputs), step)]
        return [self._text(scores) for scores in np.concatenate(runs)]

    def _pixels(self, picture: Image.Image) -> NDArray[np.float32]:
        """BGR in [0, 255], [side, side, 3]: what these models were trained on; padded with white to a square."""
        side = max(picture.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        small = square.resize((self._side, self._side), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(small, np.float32)[..., ::-1])

    def _text(self, scores: NDArray[np.float32]) -> str | UserError:
        order = np.argsort(-scores, kind="stable")
        chosen = [
            self._names[i]
            for category in (_CHARACTER, _GENERAL)
            for i in order
            if self._categories[i] == category and scores[i] >= self._least[category]
        ]
        return ", ".join(chosen) or UserError("no tag scored high enough", fix="lower --threshold")


def _files(model: str) -> tuple[Path, Path]:
    folder = Path(model).expanduser()
    if folder.is_dir():
        missing = [name for name in _FILES if not (folder / name).is_file()]
        if missing:
            raise UserError(f"there is no {missing[0]} in it", where=str(folder), fix="name a WD tagger's folder")
        return folder / _FILES[0], folder / _FILES[1]
    from huggingface_hub import hf_hub_download

    try:
        found = [Path(hf_hub_download(model, name)) for name in _FILES]
    except Exception as error:  # whatever the hub's client and its network library raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"this model cannot be had: {reason}", where=model, fix="name a folder or hub id with --model"
        ) from error
    return found[0], found[1]


def _tags(table: Path) -> tuple[list[str], list[int]]:
    rows = list(csv.DictReader(io.StringIO(read_text(table))))
    try:
        names = [row["name"] for row in rows]
        categories = [int(row["category"]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("not a table of tags with name and category", where=str(table)) from error
    return [name if len(name) <= _FACE else name.replace("_", " ") for name in names], categories


def _providers(device: str | None) -> list[str]:
    import onnxruntime

    there = onnxruntime.get_available_providers()
    wanted = ["CUDAExecutionProvider"] if device is None or device.startswith("cuda") else []
    if device is not None and device.startswith("cuda") and wanted[0] not in there:
        raise ResourceError(
            "this onnxruntime has no CUDA", where="--device", fix="pip install onnxruntime-gpu, or --device cpu"
        )
    return [name for name in wanted if name in there] + ["CPUExecutionProvider"]
