"""The Python API.

    import gesso

    run = gesso.load_run("run.yaml", ["training.steps=500"])
    folder = gesso.train(run)

`DiffusionTrainer`, `StoryboardDataset`, `collate_fn` and `SDXLEngine` keep the names of an older framework: its users'
scripts run as they are, on the loop that `gesso train` uses.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from ruamel.yaml import YAML
from torch.utils.data import DataLoader, Dataset

from gesso.config import files
from gesso.config.run import RunConfig, Source
from gesso.core.runtime import Precision, Runtime
from gesso.data import sources
from gesso.data.buckets import assign
from gesso.data.images import decode_bytes, fit
from gesso.errors import UserError
from gesso.evaluation import sample as sampling
from gesso.stages import export as export_lora
from gesso.stages import sample, train

__all__ = [
    "DiffusionTrainer",
    "SDXLEngine",
    "StoryboardDataset",
    "collate_fn",
    "export_lora",
    "load_run",
    "sample",
    "train",
]


def load_run(path: str | Path, sets: Sequence[str] = ()) -> RunConfig:
    """Read a run file, in our format or in a dialect, with `sets` such as "adapter.rank=32" laid over it."""
    return files.load(path, sets=sets).run


class StoryboardDataset(Dataset[dict[str, Any]]):
    """Captioned pictures of a folder, cropped to squares of `resolution` pixels.

    `data_dir` takes every layout that a run file's `data.sources` takes. Items: `pixel_values` [3, R, R] float32 in
    [-1, 1], `prompt`, and `input_ids` [77] where a tokenizer is given.
    """

    def __init__(
        self,
        data_dir: str | Path,
        tokenizer: Any = None,
        resolution: int = 1024,
        metadata_file: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        self.source = Source(
            path=os.fspath(data_dir),
            metadata=metadata_file,
            image_column=image_column,
            caption_column=caption_column,
        )
        self.resolution, self.tokenizer = resolution, tokenizer
        self.records, _ = sources.records([self.source])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        image = decode_bytes(record.place.read(), path=record.place).image
        side = self.resolution // 8 * 8
        pixels, _ = fit(image, assign(*image.size, sizes=[(side, side)], step=8))
        item: dict[str, Any] = {"pixel_values": torch.from_numpy(pixels), "prompt": record.caption}
        if self.tokenizer is not None:
            item["input_ids"] = self.tokenizer(
                record.caption, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids[0]
        return item


def collate_fn(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack the items of a `StoryboardDataset`: tensors along a new first axis, prompts as a list."""
    batch: dict[str, Any] = {"prompts": [item["prompt"] for item in items]}
    for name in ("pixel_values", "input_ids"):
        if name in items[0]:
            batch[name] = torch.stack([item[name] for item in items])
    return batch


class DiffusionTrainer:
    """Train from a configuration mapping: a run file's, or one of a dialect, as `yaml.safe_load` reads it."""

    def __init__(self, config: Mapping[str, Any] | RunConfig) -> None:
        self._config = config

    @property
    def tokenizer(self) -> Any:
        """The base model's first tokenizer."""
        model = self._run({}).model
        return model.load({"text"}, dtype=torch.float32, device=torch.device("cpu")).tokenizers[0]

    def train(self, loader: DataLoader[Any] | None = None, *, resume: str | None = None) -> Path:
        """Carry out the run and return its folder.

        A loader over a `StoryboardDataset` says which pictures, at what resolution and batch size; their order comes
        from the run's seed, so that it can be resumed exactly. Raises `UserError` for a loader over anything else.
        """
        return train(self._run({} if loader is None else _loader_settings(loader)), resume=resume)

    def _run(self, overrides: Mapping[str, Any]) -> RunConfig:
        if isinstance(self._config, RunConfig):
            values = self._config.model_dump(mode="json")
            for key, value in overrides.items():
                section, name = key.split(".")
                values[section][name] = value
            return RunConfig.model_validate(values)
        text = io.StringIO()
        YAML().dump(_plain(self._config), text)
        sets = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
        return files.load_text(text.getvalue(), folder=Path.cwd(), file="config", sets=sets).run


class SDXLEngine:
    """Draw with a checkpoint, a run, or a base model: `SDXLEngine("output/checkpoint-500").txt2img("a photo")`."""

    def __init__(
        self,
        model_id: str | Path,
        device: str | None = None,
        *,
        precision: Precision | None = None,
        loras: Sequence[tuple[str, float]] = (),
    ) -> None:
        self._runtime = Runtime.for_inference(precision, device)
        self.pipeline, self.description = sampling.open_pipeline(str(model_id), loras=loras, runtime=self._runtime)

    def txt2img(
        self,
        prompt: str,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_steps: int = 30,
        guidance_scale: float = 7.5,
        seed: int = 0,
    ) -> Image.Image:
        """Draw one picture; the same seed and settings give the same picture in diffusers."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        shot = sampling.Shot(
            prompt, negative_prompt, seed, num_steps, guidance_scale, width=width or side, height=height or side
        )
        return sampling.draw(self.pipeline, [shot])[0]


def _loader_settings(loader: DataLoader[Any]) -> dict[str, Any]:
    if not isinstance(loader.dataset, StoryboardDataset):
        raise UserError(
            f"the loader is over a {type(loader.dataset).__name__}, whose pictures cannot be cached and resumed",
            where="DiffusionTrainer.train",
            fix="use a gesso.StoryboardDataset, or list the folder under data.sources",
        )
    source = loader.dataset.source.model_dump(mode="json")
    settings: dict[str, Any] = {"data.sources": [source], "data.resolution": loader.dataset.resolution}
    return settings | ({"training.batch_size": loader.batch_size} if loader.batch_size else {})


def _plain(value: Any) -> Any:
    """Mappings and sequences of any kind as dict and list, which the YAML writer knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
