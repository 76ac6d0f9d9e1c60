"""The run file as data. The documentation under a field feeds --help, the reference and the web form."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gesso.adapters import AnyAdapter, Embedding, LoRA
from gesso.config.optimizer import Optimizer
from gesso.core.schedule import Schedule, whole_steps
from gesso.core.seams import Spec
from gesso.core.tokens import NewToken
from gesso.families import AnyFamily
from gesso.objectives import AnyObjective, Denoise
from gesso.trackers import AnyTracker, TensorBoard


class Captions(Spec):
    """How captions are read and varied. What is random is drawn anew at each visit, by seed, epoch and image."""

    prefix: str = ""
    """Put before every caption, as it stands."""
    suffix: str = ""
    """Put after every caption, as it stands."""
    lines: Literal["join", "first", "choose"] = "join"
    """What several lines in a caption file are: one caption, the first alone counts, or one is drawn at each visit."""
    wildcards: bool = False
    """Read {a|b} as a choice that is drawn at each visit; {3::a|b} weighs it, and \\{ is a brace."""
    separator: str = Field(default=",", min_length=1)
    """What stands between tags."""
    shuffle: bool = False
    """Draw a new order of the tags at each visit."""
    keep: int = Field(default=0, ge=0)
    """Tags at the front that are neither shuffled nor dropped; the trigger word in front counts as one."""
    keep_separator: str | None = None
    """Text, such as |||, that ends the part which stays as it is; a second one begins a tail that stays. Both are taken
    out. `keep` counts for captions without it."""
    tag_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the tags that are left out at each visit."""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of visits with an empty caption, which keeps classifier-free guidance working."""


class Source(Spec):
    """One set of captioned images."""

    path: str
    """A folder, a .zip or .tar file, a .parquet, .jsonl or .csv table, shards such as "set-{000..099}.tar", a URL
    (s3://, gs://, https://, hf://), or hub:OWNER/NAME for a Hugging Face data set. Relative to the run file."""
    layout: Literal["auto", "folder", "kohya", "metadata", "parquet", "webdataset", "dataset"] = "auto"
    """How it is laid out: caption files beside the images (folder), the same in sub-folders named REPEATS_CONCEPT
    (kohya), a table beside the images (metadata), images inside tables (parquet), tar shards (webdataset), or what
    `datasets` saves (dataset)."""
    split: str = "train"
    """Which split of a Hugging Face data set."""
    metadata: str | None = None
    """A .jsonl, .csv or .parquet file inside the folder that lists images and captions. Empty: metadata.jsonl, .csv or
    .parquet if there is one, else caption files beside the images."""
    image_column: str | None = None
    """Column with the image, or with its path in the folder. Empty: file_name, image_path, image and so on, whichever
    is there."""
    caption_column: str | None = None
    """Column with the caption. Empty: text, prompt, caption and so on, whichever is there."""
    weight_column: str | None = None
    """Column of a table with the loss weight of each image, or of each pair, which is multiplied by `weight`: a number,
    0 or more, in every row. Empty: no column is read, whatever the columns are called."""
    pairs: Literal["auto", "chosen", "none"] = "auto"
    """Pictures of which one was preferred to the other, for preference training. auto: where a table has columns chosen
    and rejected, or jpg_0, jpg_1 and label_0, or where all lies in two folders named so. chosen: of such pairs the
    preferred picture alone, as a plain one. none: these names mean nothing."""
    rejected_column: str | None = None
    """Column with the picture of a pair that was not preferred; the preferred one is in `image_column`. Empty:
    rejected, loser or jpg_1, if chosen, winner or jpg_0 is there."""
    label_column: str | None = None
    """Column that says which picture of a pair is preferred: 1 that of `image_column`, 0 that of `rejected_column`;
    with 0.5 the pair is left out. Empty: label_0, where the pictures are in jpg_0 and jpg_1."""
    caption_extension: str | None = None
    """Ending of caption files beside the images. Empty: .txt, .caption or .json, whichever is there."""
    concept: str | None = None
    """Name of what these images show, for balancing and reports. Empty: the first sub-folder's name."""
    trigger: str | None = None
    """Word put before every caption that does not contain it yet; [trigger] in a caption stands for it."""
    missing_captions: Literal["error", "empty", "trigger", "concept", "drop"] = "error"
    """What an image without a caption means: a mistake, an empty caption, the trigger word or the concept's name alone,
    or an image to leave out."""
    captions: Captions | None = None
    """How captions are varied. Empty: as `data.captions` says."""
    role: Literal["instance", "prior"] = "instance"
    """prior: regularisation images of the class, which keep what the model knew; for `objective.type: dreambooth`."""
    class_prompt: str | None = None
    """What the class of these images is called, where a run has several, such as "a photo of a dog". With `role: prior`
    the class images that are missing are drawn from it; with `objective.prior: model` these images are seen again under
    it. Empty: `objective.class_prompt`."""
    class_images: int | None = Field(default=None, ge=1)
    """How many class images this folder is to have, with `role: prior`. Empty: `objective.class_images`."""
    repeats: float = Field(default=1.0, gt=0)
    """How often each image is seen in an epoch; with 2.5 every other image comes a third time."""
    share: float | None = Field(default=None, gt=0)
    """Share of the samples of an epoch, in proportion to the other sources' shares. Instead of `repeats`."""
    weight: float = Field(default=1.0, ge=0)
    """Loss weight of these images."""
    resolution: int | tuple[int, ...] | None = None
    """Side of the square whose area the buckets have; with several, each image is seen at each. Empty:
    `data.resolution`."""
    crop: Literal["center", "random"] | None = None
    """Empty: as `data.crop` says."""
    flip: bool | None = None
    """Empty: as `data.flip` says."""
    mask: Literal["none", "alpha", "file"] = "none"
    """Where the loss counts: everywhere, where the image is not transparent, or where NAME-masklabel.png beside the
    image is white."""

    @model_validator(mode="after")
    def _paired(self) -> Source:
        if self.pairs == "none" and (self.rejected_column is not None or self.label_column is not None):
            raise ValueError("pairs is none, so rejected_column and label_column have no effect: take them out")
        return self

    @field_validator("trigger", "class_prompt")
    @classmethod
    def _word(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not value.strip():
            raise ValueError(f"the {info.field_name} is blank")
        return value

    @field_validator("path", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("resolution", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("resolution")
    @classmethod
    def _sides(cls, value: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        sides = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(side < 16 for side in sides) or value == () or len(set(sides)) < len(sides):
            raise ValueError("resolution must be 16 or more, each side once")
        return value


class Buckets(Spec):
    """Aspect-ratio buckets: pictures are resized to cover the nearest bucket and cropped."""

    enabled: bool = True
    """Off: every picture is cropped to a square of `data.resolution`."""
    step: int = Field(default=64, ge=8)
    """Bucket sides are multiples of this."""
    smallest: int | None = Field(default=None, ge=8)
    """Shortest side allowed. Empty: half the resolution."""
    largest: int | None = Field(default=None, ge=8)
    """Longest side allowed. Empty: twice the resolution."""
    upscale: bool = True
    """Off: pictures smaller than their bucket go to a smaller bucket instead of being enlarged."""


class Holdout(Spec):
    """Which pictures are kept from training to measure the validation loss."""

    fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the images, chosen by content, so that adding images moves no other image across. At least one
    image if above 0."""
    path: Path | None = None
    """A separate folder of validation images, in any layout that `sources` takes."""


class Data(Spec):
    """Images and captions, and how they become training samples."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Sets of captioned images."""
    resolution: int = Field(default=1024, ge=16)
    """Side of the square whose area every bucket has, in pixels."""
    buckets: Buckets = Buckets()
    crop: Literal["center", "random"] = "center"
    """Where to crop what sticks out of the bucket."""
    flip: bool = False
    """Mirror half of the visits. Not for faces with a parting, text or asymmetric clothes."""
    rotation: float = Field(default=0.0, ge=0, le=45)
    """Turn by up to so many degrees either way; the picture is enlarged so that no corner is empty."""
    colour: float = Field(default=0.0, ge=0, lt=1)
    """Change brightness, contrast and saturation by up to this share either way."""
    variants: int = Field(default=0, ge=0)
    """How many versions of an image and of its caption there are where crop, rotation, colour or words are random. 0:
    a new one at each visit, which caches an encoding for each visit."""
    captions: Captions = Captions()
    """How captions are varied, where a source does not say otherwise."""
    balance: bool = False
    """Give every concept as many samples in an epoch as the largest one has, by more repeats of the others."""
    validation: Holdout = Holdout()
    background: str = "white"
    """Colour put behind transparent pictures."""
    skip_bad: bool = False
    """Go on without unreadable pictures (each is reported) instead of stopping."""
    encoding: Literal["cached", "live"] = "cached"
    """cached: images and captions are encoded once, before training. live: at every visit, which is slower, keeps the
    encoders in memory and writes nothing."""
    cache: Path | None = None
    """Folder for cached latents and text embeddings, shared between runs. Empty: ~/.cache/gesso."""
    workers: int = Field(default=1, ge=0)
    """Background threads that prepare batches; 0 prepares them in the loop."""


class EMA(Spec):
    """Exponential moving average of the trained weights, kept in float64."""

    enabled: bool = False
    """Keep one; it is saved under `ema/` in every checkpoint."""
    decay: float = Field(default=0.9999, ge=0, lt=1)
    """Upper bound of the decay."""
    warmup: bool = True
    """Rise to it as (1 + k) / (10 + k), so that the average forgets the start quickly."""
    use_for_samples: bool = True
    """Previews and the final export take the averaged weights."""

    def decay_at(self, update: int) -> float:
        """Decay of optimiser update `update` (1-based): 0 at the first, which copies the weights."""
        k = update - 1
        if k <= 0:
            return 0.0
        return min(self.decay, (1 + k) / (10 + k)) if self.warmup else self.decay


class EarlyStopping(Spec):
    """When to end a run because validation gets no better."""

    patience: int = Field(default=5, ge=1)
    """Measurements in a row without a gain that end the run."""
    min_delta: float = Field(default=0.0, ge=0)
    """What counts as a gain: better than the best so far by more than this."""
    metric: str = Field(default="loss", min_length=1)
    """What is looked at: the validation loss, or another measure of the objective, such as accuracy."""
    mode: Literal["min", "max"] | None = None
    """Which way is better. Empty: min for a loss, max for anything else."""


class Training(Spec):
    """How long, how fast and in what precision."""

    steps: int | None = Field(default=None, ge=1)
    """Length in optimiser steps. Give this or `epochs`."""
    epochs: int | None = Field(default=None, ge=1)
    """Length in passes over the data. Give this or `steps`; with both, the shorter one ends the run."""
    batch_size: int = Field(default=1, ge=1)
    """Samples that go through the model at once."""
    accumulation: int = Field(default=1, ge=1)
    """Batches per optimiser step."""
    learning_rate: float = Field(default=1e-4, ge=0)
    """Of the denoiser, and of everything that has no rate of its own."""
    text_encoder_learning_rates: tuple[float, ...] | None = None
    """One rate per text encoder; a single number serves all; 0 leaves that encoder exactly as it is."""
    text_encoder_stop: int | float | None = Field(default=None, gt=0)
    """Train the text encoders for so many optimiser steps only, or for this fraction of the run if below 1; then they
    stand exactly still. Empty: to the end."""
    token_learning_rate: float | None = Field(default=None, ge=0)
    """Of the vectors of new words (`adapter.tokens`), which take more than matrices do: 5e-4 to 5e-3 is usual. Empty:
    `learning_rate`."""
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; longer ones are scaled down. Empty: no clipping."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Of the frozen model and the activations. Trained weights and the loss are float32; of a full fine-tune,
    `adapter.weights` can say otherwise."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third slower."""
    fused_backward: bool = False
    """Update each weight inside the backward pass, as soon as its gradient is there, and free the gradient: of a full
    fine-tune, that saves nearly as many bytes as the weights have. The numbers are the same. It takes
    `accumulation: 1`, an empty `clip`, and an optimizer that looks at one tensor at a time."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention kernels; sdpa is torch's own and needs nothing installed."""
    device: str | None = None
    """cuda, cuda:1, mps or cpu. Empty: the best there is."""
    ema: EMA = EMA()
    early_stopping: EarlyStopping | None = None
    """End the run before its length is up, once validation gets no better. Empty: never."""

    @field_validator("text_encoder_learning_rates", mode="before")
    @classmethod
    def _one_rate(cls, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("text_encoder_stop")
    @classmethod
    def _whole_stop(cls, value: int | float | None) -> int | float | None:
        return None if value is None else whole_steps(value)

    @model_validator(mode="after")
    def _length(self) -> Training:
        if self.steps is None and self.epochs is None:
            raise ValueError("give the length of the run: steps or epochs")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Length of the run in optimiser steps."""
        lengths = [self.steps, None if self.epochs is None else self.epochs * steps_per_epoch]
        return min(length for length in lengths if length is not None)


class Validation(Spec):
    """The held-out loss: the same images, noise and timesteps every time."""

    every: int | None = Field(default=None, ge=1)
    """Optimiser steps between measurements. Empty: at every checkpoint, if images are held out."""
    timesteps: int = Field(default=4, ge=1)
    """How many fixed timesteps each held-out image is measured at."""


class Preview(Spec):
    """Pictures made while training, from fixed prompts and seeds, the untrained model (step 0) included."""

    prompts: tuple[str, ...] = ()
    """What to draw. Empty: no previews."""
    negative: str = ""
    """Negative prompt of all previews."""
    every: int | None = Field(default=None, ge=1)
    """Optimiser steps between previews. Empty: at every checkpoint."""
    seed: int = 42
    """Seed of the first picture; picture i of a prompt list uses seed + i."""
    inference_steps: int = Field(default=25, ge=1)
    """Sampling steps."""
    guidance: float = Field(default=7.0, ge=1)
    """Classifier-free guidance scale."""
    width: int | None = Field(default=None, ge=8)
    """Empty: data.resolution."""
    height: int | None = Field(default=None, ge=8)
    """Empty: data.resolution."""


class Checkpoint(Spec):
    """When to save, and what to keep."""

    every: int = Field(default=500, ge=1)
    """Optimiser steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(default=3, ge=1)
    """Newest checkpoints to keep. The only good one is never deleted."""
    keep_every: int | None = Field(default=None, ge=1)
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_best: str | None = Field(default=None, min_length=1)
    """A measure of validation, such as loss: each step that is the best so far by it is saved, and the best one is
    kept. `--checkpoint best` takes it."""


class RunConfig(Spec):
    """A whole run."""

    name: str = Field(default="run", pattern=r"^[\w][\w .-]*$")
    """Name of the run and of the exported files."""
    output: Path | None = None
    """The run folder, relative to the working directory. Empty: runs/<name>."""
    seed: int = Field(default=0, ge=0)
    """Every random number of the run is a function of this, the epoch and the image."""
    model: AnyFamily = AnyFamily()
    data: Data
    adapter: AnyAdapter = LoRA()
    """What is trained: low-rank matrices beside the weights (lora) or something else beside them (loha, lokr, oft), the
    weights themselves (full), or only the vectors of new words (embedding)."""
    objective: AnyObjective = Denoise()
    training: Training
    validation: Validation = Validation()
    preview: Preview = Preview()
    checkpoint: Checkpoint = Checkpoint()
    trackers: tuple[AnyTracker, ...] = (TensorBoard(),)
    """Where metrics go beside events.jsonl, which is always written."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output if self.output is not None else Path("runs") / self.name

    @property
    def tokens(self) -> tuple[NewToken, ...]:
        """The new words that are trained."""
        return self.adapter.tokens if isinstance(self.adapter, LoRA | Embedding) else ()
