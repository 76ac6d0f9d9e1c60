"""Preference training under the names of an older framework: `TrainingConfig`, `DPODataset`, `DPOTrainer`.

    config = TrainingConfig(train_data_dir="pairs", output_dir="runs/dpo")
    trainer = DPOTrainer(config)
    trainer.train()

Everything here is a view of a run file with `objective.type: dpo`, and `DPOTrainer.train` is `gesso train` of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gesso import stages
from gesso.config import problems
from gesso.config.document import dotted
from gesso.config.problems import Place
from gesso.config.run import RunConfig, Source
from gesso.core.batch import Batch, Geometry
from gesso.core.events import Event, StepDone
from gesso.core.random import Draws, SampleKey
from gesso.core.runtime import Precision, Runtime
from gesso.data import sources
from gesso.data.buckets import assign
from gesso.data.images import decode_bytes, fit
from gesso.errors import Problems, UserError
from gesso.training import loop
from gesso.training.session import Session

Item = dict[str, Any]

_NAMES = {
    "model.base": "pretrained_model_name_or_path",
    "model.vae": "pretrained_vae_model_name_or_path",
    "data.sources.0.path": "train_data_dir",
    "data.resolution": "resolution",
    "data.validation.fraction": "validation_fraction",
    "data.workers": "dataloader_num_workers",
    "data.cache": "cache_dir",
    "name": "output_dir",
    "output": "output_dir",
    "adapter.rank": "rank",
    "adapter.alpha": "lora_alpha",
    "objective.beta": "beta_dpo",
    "training.steps": "max_train_steps",
    "training.batch_size": "train_batch_size",
    "training.accumulation": "gradient_accumulation_steps",
    "training.learning_rate": "learning_rate",
    "training.schedule.type": "lr_scheduler",
    "training.schedule.warmup": "lr_warmup_steps",
    "training.precision": "mixed_precision",
    "training.gradient_checkpointing": "gradient_checkpointing",
    "training.device": "device",
    "preview.prompts": "validation_prompts",
    "checkpoint.every": "checkpointing_steps",
    "seed": "seed",
}
"""What the keys of a run file are called in `TrainingConfig`, for messages."""


@dataclass
class TrainingConfig:
    """The settings of a preference training; `run` gives them as a run file's."""

    pretrained_model_name_or_path: str = "stabilityai/stable-diffusion-xl-base-1.0"
    pretrained_vae_model_name_or_path: str | None = None
    train_data_dir: str = "data/pairs"
    """Pairs: a folder, a table, or hub:OWNER/NAME, as `data.sources` of a run file takes them."""
    output_dir: str = "runs/dpo"
    resolution: int = 1024
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 4
    max_train_steps: int = 1000
    learning_rate: float = 1e-5
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    beta_dpo: float = 5000.0
    rank: int = 16
    lora_alpha: float | None = None
    use_lora: bool = True
    mixed_precision: Precision | Literal["no"] = "fp16"
    gradient_checkpointing: bool = True
    enable_xformers: bool = False
    use_8bit_adam: bool = False
    vae_batch_size: int = 4
    """Pictures that `DPOTrainer.process_vae_batch` encodes at once."""
    checkpointing_steps: int = 500
    validation_prompts: tuple[str, ...] = ()
    validation_fraction: float = 0.05
    """Share of the pairs that is held out, for accuracy and margin."""
    dataloader_num_workers: int = 1
    use_wandb: bool = False
    wandb_project: str | None = None
    seed: int = 42
    device: str | None = None
    cache_dir: str | None = None

    @property
    def run(self) -> RunConfig:
        """The same as a run; raises `UserError` for a value that cannot be."""
        try:
            return RunConfig.model_validate(self._keys())
        except ValidationError as error:
            found = problems.translate(
                error, locate=lambda path: Place("TrainingConfig", _NAMES.get(dotted(path))), foreign={}
            )
            raise (found[0] if len(found) == 1 else Problems(found)) from error

    def _keys(self) -> dict[str, Any]:
        trackers: list[dict[str, Any]] = [{"type": "tensorboard"}]
        if self.use_wandb:
            trackers.append({"type": "wandb", **({"project": self.wandb_project} if self.wandb_project else {})})
        lora = {"type": "lora", "rank": self.rank, "alpha": self.lora_alpha}
        return {
            "name": Path(self.output_dir).name,
            "output": self.output_dir,
            "seed": self.seed,
            "model": {"base": self.pretrained_model_name_or_path, "vae": self.pretrained_vae_model_name_or_path},
            "data": {
                "sources": [{"path": self.train_data_dir}],
                "validation": {"fraction": self.validation_fraction},
                "resolution": self.resolution,
                "workers": self.dataloader_num_workers,
                "cache": self.cache_dir,
            },
            "adapter": lora if self.use_lora else {"type": "full"},
            "objective": {"type": "dpo", "beta": self.beta_dpo},
            "training": {
                "steps": self.max_train_steps,
                "batch_size": self.train_batch_size,
                "accumulation": self.gradient_accumulation_steps,
                "learning_rate": self.learning_rate,
                "schedule": {"type": self.lr_scheduler, "warmup": self.lr_warmup_steps},
                "optimizer": {"type": "adamw8bit" if self.use_8bit_adam else "adamw"},
                "precision": "fp32" if self.mixed_precision == "no" else self.mixed_precision,
                "gradient_checkpointing": self.gradient_checkpointing,
                "attention": "xformers" if self.enable_xformers else "sdpa",
                "device": self.device,
            },
            "preview": {"prompts": list(self.validation_prompts)},
            "checkpoint": {"every": self.checkpointing_steps},
            "trackers": trackers,
        }


class DPODataset(Dataset[Item]):
    """Pairs of pictures, cropped alike to squares of `resolution` pixels.

    Items: `preferred` and `rejected` [3, R, R] float32 in [-1, 1], `prompt`, `geometry` (six numbers) and `id`.
    """

    def __init__(self, data_dir: str | Path, resolution: int = 1024) -> None:
        found, self.notices = sources.records([Source(path=str(data_dir))])
        self.records = [record for record in found if record.rejected is not None]
        if not self.records:
            raise UserError(
                "there are no pairs here",
                where=str(data_dir),
                fix="give a table with chosen, rejected and caption, or folders chosen/ and rejected/",
            )
        self.side = resolution // 8 * 8

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        record = self.records[index]
        assert record.rejected is not None
        preferred, rejected = (decode_bytes(p.read(), path=p).image for p in (record.place, record.rejected))
        if preferred.size != rejected.size:
            raise UserError(
                f"the pictures of this pair are {preferred.size} and {rejected.size} pixels large",
                where=str(record.place),
                fix="make them equal; one must not be stretched to the other",
            )
        place = assign(*preferred.size, sizes=[(self.side, self.side)], step=8)
        return {
            "preferred": torch.from_numpy(fit(preferred, place)[0]),
            "rejected": torch.from_numpy(fit(rejected, place)[0]),
            "prompt": record.caption,
            "geometry": tuple(place.geometry(*preferred.size)),
            "id": str(record.place),
        }


def create_dataloader(
    dataset: DPODataset, batch_size: int = 1, *, num_workers: int = 0, shuffle: bool = True, seed: int = 0
) -> DataLoader[Item]:
    """Batches of a `DPODataset`: tensors stacked, the rest as lists."""
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )


class DPOTrainer:
    """Train a model to prefer pictures. The set-up happens when it is made; networks load when they are first used.

    `train` carries out the whole run, with caches, checkpoints, validation and exact resume. `train_step` and
    `compute_loss` take batches of `create_dataloader` one by one, for those who write their own loop.
    """

    def __init__(self, config: TrainingConfig | None = None) -> None:
        self.config = config if config is not None else TrainingConfig()
        self.run = self.config.run
        self.metrics: list[dict[str, float]] = []
        self.trained: Path | None = None
        self.setup_accelerator()
        self.setup_models()
        self.setup_data()
        self.setup_optimization()

    def setup_accelerator(self) -> None:
        """Choose the device and the precision."""
        self.runtime = Runtime.detect(self.run.training.precision, self.run.training.device)

    def setup_models(self) -> None:
        """Find the base model's files, so that a wrong name is told now."""
        self.model_fingerprint = self.run.model.fingerprint("denoiser")

    def setup_data(self) -> None:
        """Read the pairs and make their loader."""
        self.dataset = DPODataset(self.config.train_data_dir, self.config.resolution)
        self.train_dataloader = create_dataloader(self.dataset, self.config.train_batch_size, seed=self.config.seed)

    def setup_optimization(self) -> None:
        """Say how long and how fast it trains; the optimiser itself is made with the networks."""
        per_epoch = -(-len(self.dataset) // (self.config.train_batch_size * self.config.gradient_accumulation_steps))
        self.total_steps = self.run.training.total_steps(per_epoch)

    def train(self, *, resume: str | None = None) -> Path:
        """The whole run; returns its folder. What `train_step` did before is not part of it."""
        self.__dict__.pop("session", None)  # its networks would take the memory of the run's
        self.runtime.release()

        def keep(event: Event) -> None:
            if isinstance(event, StepDone):
                self.log_metrics({"step": event.step, "loss": event.loss, "learning_rate": event.learning_rate})

        self.trained = stages.train(self.run, resume=resume, emit=keep)
        return self.trained

    @cached_property
    def session(self) -> Session:
        """The networks with the adapter, and the optimiser."""
        parts = self.run.model.load({"vae", "text"}, dtype=self.runtime.dtype, device=self.runtime.device)
        session = Session.build(self.run, parts, self.runtime)
        session.policy.train()
        return session

    def process_vae_batch(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] -> moments [N, 2C, h, w], `vae_batch_size` pictures at a time."""
        family, parts = self.run.model, self.session.parts
        return torch.cat([family.encode_images(parts, some) for some in pixels.split(self.config.vae_batch_size)])

    def compute_loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Mean loss of a batch, with gradients, and its accuracy and margin."""
        ready = self._batch(batch)
        objective, policy = self.run.objective, self.session.policy
        loss = objective.loss(policy, ready).mean()
        with torch.no_grad(), policy.evaluating():
            measured = objective.measure(policy, ready)
        return loss, {name: float(value.mean()) for name, value in measured.items()}

    def train_step(self, batch: Mapping[str, Any]) -> dict[str, float]:
        """One optimiser step on one batch; returns loss, gradient norm and learning rate."""
        learner, run = self.session.learner, self.run
        before = learner.step
        seen: list[Event] = []
        loop.fit(
            run.training,
            name=run.name,
            seed=run.seed,
            loss=lambda ready: run.objective.loss(self.session.policy, ready),
            learner=learner,
            stream=_Given(self._batch(batch), self.total_steps),
            runtime=self.runtime,
            actions=[],
            emit=seen.append,
            stopping=lambda: learner.step > before,
        )
        done = [event for event in seen if isinstance(event, StepDone)]
        if not done:
            raise UserError(
                f"all {self.total_steps} steps are done", where="TrainingConfig.max_train_steps", fix="raise it"
            )
        self.log_metrics(
            {
                "step": done[0].step,
                "loss": done[0].loss,
                "gradient_norm": done[0].gradient_norm,
                "learning_rate": done[0].learning_rate,
            }
        )
        return self.metrics[-1]

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Keep the figures of a step in `metrics`."""
        self.metrics.append(dict(metrics))

    def save_checkpoint(self, folder: str | Path) -> Path:
        """Write the weights trained so far by `train_step`, as diffusers' `load_lora_weights` reads them."""
        from safetensors.torch import save_file

        if self.trained is not None and "session" not in self.__dict__:
            what = "train has saved what it trained, and train_step trained nothing since"
            raise UserError(what, where="save_checkpoint", fix=f"take a checkpoint of {self.trained}")
        adapter, target = self.session.adapter, Path(folder)
        layout = adapter.layout()
        state = {name: tensor.contiguous().cpu() for name, tensor in adapter.state().items()}
        for file, tensors in layout.split(state).items():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, target / file, metadata=dict(layout.headers[file]))
        for file, text in layout.texts.items():
            (target / file).write_text(text, encoding="utf-8")
        return target

    def generate_samples(self, prompts: Sequence[str] = (), *, seed: int = 0, steps: int = 25) -> list[Image.Image]:
        """A picture of each prompt, or of `validation_prompts`, with what `train_step` or `train` left."""
        from gesso.evaluation import models
        from gesso.evaluation import sample as sampling

        prompts, side = prompts or self.config.validation_prompts, self.config.resolution
        if not prompts:
            raise UserError(
                "there are no prompts", where="generate_samples", fix="give some, or set validation_prompts"
            )
        shots = [sampling.Shot(text, "", seed + i, steps, 7.0, side, side) for i, text in enumerate(prompts)]
        if self.trained is not None and "session" not in self.__dict__:
            pipeline, _ = models.open_pipeline(str(self.trained), runtime=self.runtime)
            return sampling.draw(pipeline, shots)
        with self.session.as_sampled():
            return sampling.draw(self.run.model.pipeline(self.session.parts), shots)

    def _batch(self, items: Mapping[str, Any]) -> Batch:
        count, step = len(items["prompt"]), self.session.learner.step
        draws = Draws(self.config.seed, step, tuple(SampleKey(name) for name in items["id"]))
        moments = self.process_vae_batch(torch.cat([items["preferred"], items["rejected"]])).cpu()
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        posterior = torch.from_numpy(draws.normal("vae posterior", shape)).repeat(2, 1, 1, 1)
        preferred, rejected = self.run.model.latents(moments, posterior).chunk(2)
        return Batch(
            latents=preferred,
            noise=torch.from_numpy(draws.normal("noise", shape)),
            u=torch.from_numpy(draws.uniform("timestep")).float(),
            weights=torch.ones(count),
            geometry=tuple(Geometry(*numbers) for numbers in items["geometry"]),
            captions=tuple(items["prompt"]),
            text=None,
            files=tuple(items["id"]),
            draws=draws,
            rejected=rejected,
        ).to(self.runtime.device)


@dataclass(frozen=True)
class _Given:
    """A stream whose every step is one batch; a `core.seams.Stream`."""

    batch: Batch
    steps_per_epoch: int

    def window(self, step: int) -> Iterator[Batch]:
        del step
        return iter([self.batch])

    def window_size(self, step: int) -> int:
        del step
        return len(self.batch)


def _collate(items: Sequence[Item]) -> Item:
    stacked = {name: torch.stack([item[name] for item in items]) for name in ("preferred", "rejected")}
    return {**stacked, **{name: [item[name] for item in items] for name in ("prompt", "geometry", "id")}}
