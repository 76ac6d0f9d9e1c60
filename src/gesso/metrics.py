"""How good pictures are, in numbers. Each metric is one class; `AnyMetric` is the registry."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from gesso.core import resolve
from gesso.core.seams import Spec

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_BATCH = 64


class CLIPScore(Spec):
    """100 x cosine of picture and text in CLIP's space, at least 0 (Hessel et al. 2021, arXiv:2104.08718)."""

    type: Literal["clip-score"] = "clip-score"
    model: str = "micro:clip"
    """A CLIP: folder, hub id such as openai/clip-vit-large-patch14, or the small one in the package, which knows the
    painted world only."""

    def scores(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> list[float]:
        """The score of each picture with its text."""
        return (100 * (self._images(pictures) * self._texts(texts)).sum(1)).clamp(min=0).tolist()

    def cosines(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Of each picture with each text, [N, M] float32."""
        return self._images(pictures) @ self._texts(texts).T

    def _images(self, pictures: Sequence[Image.Image]) -> Tensor:
        network, prepare, _ = self._loaded

        def features(rows: Sequence[Image.Image]) -> Any:
            return network.get_image_features(**prepare(images=rows, return_tensors="pt"))

        return _in_batches(features, pictures)

    def _texts(self, texts: Sequence[str]) -> Tensor:
        network, _, tokenizer = self._loaded

        def features(rows: Sequence[str]) -> Any:
            return network.get_text_features(**tokenizer(rows, padding=True, truncation=True, return_tensors="pt"))

        return _in_batches(features, texts)

    @cached_property
    def _loaded(self) -> tuple[Any, Any, Any]:
        import torch
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        folder = resolve.locate(self.model, key="model")
        network = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
        return network, CLIPImageProcessor.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)


class Identity(Spec):
    """Cosine of the embeddings of two pictures: how much they show the same character, from -1 to 1."""

    type: Literal["identity"] = "identity"
    model: str = "micro:identity"
    """An encoder of pictures with a projection, as transformers' CLIPVisionModelWithProjection reads it: folder or
    hub id. The one in the package knows people of the painted world only."""

    def scores(self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float]:
        """For each picture its mean similarity to the references."""
        return (self.embeddings(pictures) @ self.embeddings(references).T).mean(1).tolist()

    def embeddings(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors, [N, D] float32."""
        network, prepare = self._loaded
        return _in_batches(lambda rows: network(**prepare(images=rows, return_tensors="pt")).image_embeds, pictures)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        folder = resolve.locate(self.model, key="model")
        network = CLIPVisionModelWithProjection.from_pretrained(folder, dtype=torch.float32).eval()
        return network, CLIPImageProcessor.from_pretrained(folder)


AnyMetric = Annotated[CLIPScore | Identity, Field(discriminator="type")]


def _in_batches(function: Any, rows: Sequence[Any]) -> Tensor:
    """The function's rows at unit length, without gradients; of a model's output the pooled part is taken."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        found = [function(list(rows[i : i + _BATCH])) for i in range(0, len(rows), _BATCH)]
    rows_of = [f if isinstance(f, torch.Tensor) else f.pooler_output for f in found]
    return F.normalize(torch.cat(rows_of), dim=1)
