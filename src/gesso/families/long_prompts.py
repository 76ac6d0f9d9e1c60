"""An SDXL pipeline that reads long prompts and weights of words in the way the model was trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from gesso.core.seams import Cond, Parts

Encode = Callable[[Parts, Sequence[str]], Cond]
Encoded = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class ChunkingPipeline(StableDiffusionXLPipeline):
    """The diffusers pipeline with the family's own text encoding in the place of its `encode_prompt`."""

    encode: ClassVar[Encode]

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> Encoded:
        """As the pipeline's own, for one text for both encoders; given embeddings are passed through."""
        if prompt_embeds is not None or prompt is None:
            encoded: Encoded = super().encode_prompt(
                prompt,
                prompt_2,
                device,
                num_images_per_prompt,
                do_classifier_free_guidance,
                negative_prompt,
                negative_prompt_2,
                prompt_embeds,
                negative_prompt_embeds,
                pooled_prompt_embeds,
                negative_pooled_prompt_embeds,
                lora_scale,
                clip_skip,
            )
            return encoded
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        positive = self._encoded(prompts, num_images_per_prompt)
        if not do_classifier_free_guidance:
            return positive[0], None, positive[1], None
        if negative_prompt is None and self.config.force_zeros_for_empty_prompt:
            negative = (torch.zeros_like(positive[0]), torch.zeros_like(positive[1]))
        else:
            words = negative_prompt or ""
            texts = [words] * len(prompts) if isinstance(words, str) else list(words)
            negative = self._encoded(texts, num_images_per_prompt)
        return positive[0], negative[0], positive[1], negative[1]

    def _encoded(self, texts: Sequence[str], copies: int) -> tuple[Tensor, Tensor]:
        parts = Parts(
            text_encoders=[self.text_encoder, self.text_encoder_2], tokenizers=[self.tokenizer, self.tokenizer_2]
        )
        found = type(self).encode(parts, texts)
        return found["prompt_embeds"].repeat_interleave(copies, 0), found["pooled"].repeat_interleave(copies, 0)


def chunking(encode: Encode) -> type[ChunkingPipeline]:
    """A `ChunkingPipeline` class that encodes with `encode(parts, texts)`: diffusers allows no argument for it."""
    return type("ChunkingPipeline", (ChunkingPipeline,), {"encode": staticmethod(encode)})
