"""Captions by the vision models in transformers: BLIP, BLIP-2 and Florence-2. No code from the hub is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from gesso.core.runtime import Runtime
from gesso.data.captioning.plugins import Settings
from gesso.errors import ResourceError, UserError

_MODELS = {"blip": "Salesforce/blip-image-captioning-large", "florence": "florence-community/Florence-2-large"}
_TASK = "<MORE_DETAILED_CAPTION>"


class Vision:
    """An image-to-text model. Beam search without sampling: the same picture gets the same caption."""

    def __init__(self, name: str, settings: Settings) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        runtime = Runtime.for_inference(device=settings.device)
        self._device, self._max_tokens = runtime.device, settings.max_tokens
        self._prompt = settings.prompt or (_TASK if name == "florence" else None)
        model = settings.model or _MODELS[name]
        model = str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
        try:
            self._processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
            loaded = AutoModelForImageTextToText.from_pretrained(
                model, dtype=runtime.dtype, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"this model cannot be loaded: {reason}",
                where=model,
                fix=f"name a folder or hub id with --model, such as {_MODELS[name]}",
            ) from error
        self._model = loaded.to(self._device).eval()

    def caption(self, pictures: Sequence[Image.Image]) -> list[str | UserError]:
        """One batch."""
        import torch

        texts = None if self._prompt is None else [self._prompt] * len(pictures)
        inputs = self._processor(images=list(pictures), text=texts, return_tensors="pt")
        inputs = inputs.to(self._device, self._model.dtype)
        try:
            with torch.inference_mode():
                tokens = self._model.generate(**inputs, max_new_tokens=self._max_tokens, num_beams=3, do_sample=False)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "the device is out of memory", where="gesso dataset caption", fix="lower --batch-size"
            ) from error
        return list(self._processor.batch_decode(tokens, skip_special_tokens=True))
