"""What an exported file says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import gesso
from gesso.config.run import RunConfig
from gesso.families.lora_names import KOHYA_BASE_VERSION


@dataclass(frozen=True)
class About:
    """Origin and use of a LoRA, for the headers of its file and for its model card. Empty values are left out.

    `architecture` is ModelSpec's name of the base's architecture, `tags` counts captions or tags by data folder,
    `date` is ISO 8601, and `training` holds further kohya header values under their `ss_` names.
    """

    title: str
    architecture: str
    base: str = ""
    prediction: str = "epsilon"
    resolution: tuple[int, int] | None = None
    """Width and height in pixels."""
    triggers: tuple[str, ...] = ()
    """The word of each concept."""
    license: str = ""
    author: str = ""
    description: str = ""
    date: str = ""
    tags: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, run: RunConfig) -> About:
        """What a run says of the file that comes from it, dated now."""
        training = run.training
        # What is written before the captions of class images calls up no concept.
        triggers = (source.trigger for source in run.data.sources if source.trigger and source.role == "instance")
        return cls(
            title=run.name,
            architecture=run.model.architecture,
            base=run.model.base,
            prediction=run.model.noise.prediction,
            resolution=(run.data.resolution, run.data.resolution),
            triggers=tuple(dict.fromkeys(triggers)),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            training={
                "ss_learning_rate": str(training.learning_rate),
                "ss_seed": str(run.seed),
                "ss_batch_size_per_device": str(training.batch_size),
                "ss_gradient_accumulation_steps": str(training.accumulation),
                "ss_mixed_precision": training.precision,
                "ss_lr_scheduler": training.schedule.type,
                "ss_optimizer": training.optimizer.type,
            },
        )

    @property
    def trigger(self) -> str:
        """All of them, for headers that have one line for it."""
        return ", ".join(self.triggers)

    @property
    def base_name(self) -> str:
        """The base model without the folders of this machine: a hub id as it is, of a path only the last part."""
        return self.base if self.base_on_hub else Path(self.base).name

    @property
    def base_on_hub(self) -> bool:
        """Whether the base model is named by a hub id."""
        local = self.base.startswith((".", "/", "~")) or Path(self.base).expanduser().exists()
        return self.base.count("/") == 1 and not local and not self.base.endswith(".safetensors")

    def modelspec(self, *, whole: bool = False) -> dict[str, str]:
        """ModelSpec 1.0.0 header keys (github.com/Stability-AI/ModelSpec), of a LoRA or of a whole model."""
        size = "" if self.resolution is None else f"{self.resolution[0]}x{self.resolution[1]}"
        words = ", ".join(dict.fromkeys(tag for counts in self.tags.values() for tag in counts))
        values = {
            "sai_model_spec": "1.0.0",
            "architecture": self.architecture if whole else f"{self.architecture}/lora",
            "implementation": "diffusers",
            "title": self.title,
            "resolution": size,
            "date": self.date,
            "author": self.author,
            "license": self.license,
            "description": self.description,
            "trigger_phrase": self.trigger,
            "tags": words,
            "prediction_type": "v" if self.prediction == "v_prediction" else self.prediction,
        }
        return {f"modelspec.{key}": value for key, value in values.items() if value}

    def kohya(self, network: Mapping[str, str]) -> dict[str, str]:
        """kohya's `ss_` header keys; all values are strings. `network` holds those that describe the adapter."""
        values = {
            "ss_v2": "False",
            "ss_base_model_version": KOHYA_BASE_VERSION.get(self.architecture, self.architecture),
            **network,
            "ss_output_name": self.title,
            "ss_sd_model_name": self.base_name,
            "ss_resolution": "" if self.resolution is None else str(self.resolution),
            "ss_tag_frequency": json.dumps(self.tags, ensure_ascii=False) if self.tags else "",
            "ss_training_comment": f"trained with gesso {gesso.__version__}",
        }
        return {key: value for key, value in {**values, **self.training}.items() if value}
