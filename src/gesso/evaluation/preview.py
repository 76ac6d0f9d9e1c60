"""Preview pictures of a running training: fixed prompts, fixed seeds, one folder a step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gesso.config.run import RunConfig
from gesso.core.events import PreviewReady
from gesso.core.folder import RunFolder
from gesso.evaluation.sample import Embeddings, Shot, draw, save_png, settings


def shots(run: RunConfig) -> list[Shot]:
    """What the run file asks to see."""
    preview, side = run.preview, run.data.resolution // 8 * 8
    return [
        Shot(
            prompt=prompt,
            negative=preview.negative,
            seed=preview.seed + i,
            steps=preview.inference_steps,
            guidance=preview.guidance,
            width=preview.width or side,
            height=preview.height or side,
        )
        for i, prompt in enumerate(preview.prompts)
    ]


@dataclass(frozen=True)
class Previewer:
    """Draws the shots with the model as it is; `embeddings` are None where text encoders train."""

    shots: Sequence[Shot]
    embeddings: Sequence[Embeddings] | None
    folder: RunFolder
    model: str

    def draw(self, pipeline: Any, step: int) -> PreviewReady:
        """Write `samples/step-NNNNNNNN/NN.png` and add a line for each to `samples/index.jsonl`."""
        pictures = draw(pipeline, self.shots, embeddings=self.embeddings)
        names = []
        with (self.folder.samples / "index.jsonl").open("a", encoding="utf-8") as index:
            for i, (shot, picture) in enumerate(zip(self.shots, pictures, strict=True)):
                name = f"samples/step-{step:08d}/{i:02d}.png"
                made = settings(shot, pipeline=pipeline, model=self.model) | {"step": step}
                save_png(picture, self.folder.path / name, made)
                index.write(json.dumps({"file": name, **made}, ensure_ascii=False) + "\n")
                names.append(name)
        return PreviewReady(step, tuple(names), tuple(shot.prompt for shot in self.shots))
