"""Job files of ai-toolkit: every key is taken, refused or reported, with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gesso.config import dialects, document, files
from gesso.config.dialects import Converted, DialectReport
from gesso.config.dialects import aitoolkit_tables as tables
from gesso.config.files import Loaded
from gesso.errors import Problems, UserError

NAME = "a job file of ai-toolkit"

JOB = """\
job: extension
config:
  name: hare_lora
  process:
    - type: sd_trainer
      training_folder: output
      device: cuda:0
      trigger_word: sks
      network: {type: lora, linear: 16, linear_alpha: 16}
      save: {dtype: float16, save_every: 250, max_step_saves_to_keep: 4}
      datasets:
        - folder_path: "/data/[name]"
          caption_ext: txt
          caption_dropout_rate: 0.05
          shuffle_tokens: false
          cache_latents_to_disk: true
          resolution: [512, 768, 1024]
      train:
        batch_size: 1
        steps: 2000
        gradient_accumulation: 2
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: ddpm
        optimizer: adamw8bit
        lr: 1e-4
        ema_config: {use_ema: true, ema_decay: 0.99}
        dtype: bf16
      model: {name_or_path: stabilityai/stable-diffusion-xl-base-1.0, arch: sdxl}
      sample:
        sampler: ddpm
        sample_every: 250
        width: 1024
        height: 1024
        prompts: ["[trigger] holding a sign", "a dog"]
        neg: blurry
        seed: 42
        walk_seed: true
        guidance_scale: 7
        sample_steps: 20
meta: {name: "[name]", version: "1.0"}
"""

# Every key with a value that asks for something, and what becomes of it: our key and value, or a word of the reason why
# it has no effect (!) or of the refusal (?).
KEYS: dict[str, dict[str, tuple[Any, str]]] = {
    "network": {
        "type": ("lora", "adapter.type=lora"),
        "linear": (8, "adapter.rank=8"),
        "rank": (8, "adapter.rank=8"),
        "linear_alpha": (4, "adapter.alpha=4"),
        "alpha": (4, "adapter.alpha=4"),
        "conv": (16, "?convolutions"),
        "conv_alpha": (16, "!belongs to conv"),
        "dropout": (0.1, "adapter.dropout=0.1"),
        "lokr_full_rank": (True, "!lokr"),
        "lokr_factor": (8, "!lokr"),
        "pretrained_lora_path": ("x", "?another LoRA"),
        "network_kwargs": ({"only_if_contains": ["up"]}, "?end of their name"),
        "transformer_only": (True, "!FLUX"),
    },
    "save": {
        "dtype": ("float16", "!float32"),
        "save_every": (7, "checkpoint.every=7"),
        "max_step_saves_to_keep": (2, "checkpoint.keep_last=2"),
        "save_format": ("diffusers", "!export"),
        "push_to_hub": (False, "--push-to-hub"),
        "hf_repo_id": ("me/it", "!push_to_hub is off"),
        "hf_private": (True, "!private"),
    },
    "train": {
        "batch_size": (2, "training.batch_size=2"),
        "steps": (9, "training.steps=9"),
        "gradient_accumulation": (4, "training.accumulation=4"),
        "gradient_accumulation_steps": (4, "training.accumulation=4"),
        "train_unet": (False, "?denoiser always trains"),
        "train_text_encoder": (True, "adapter.train_text_encoders=True"),
        "gradient_checkpointing": (False, "training.gradient_checkpointing=False"),
        "noise_scheduler": ("flowmatch", "?flow matching"),
        "timestep_type": ("sigmoid", "!flow matching"),
        "content_or_style": ("style", "?drawn evenly"),
        "optimizer": ("adamw8bit", "training.optimizer.type=adamw8bit"),
        "optimizer_params": ({"weight_decay": 0.1}, "training.optimizer.weight_decay=0.1"),
        "lr": (1e-4, "training.learning_rate=0.0001"),
        "learning_rate": (1e-4, "training.learning_rate=0.0001"),
        "unet_lr": (1e-4, "training.learning_rate=0.0001"),
        "text_encoder_lr": (1e-5, "!do not train"),
        "lr_scheduler": ("cosine", "training.schedule.type=cosine"),
        "lr_scheduler_params": ({"x": 1}, "?no settings"),
        "warmup_steps": (100, "!no warm-up"),
        "lr_end": (1e-6, "training.schedule.floor=0.1"),
        "dtype": ("float16", "training.precision=fp16"),
        "mixed_precision": ("bf16", "training.precision=bf16"),
        "loss_type": ("mae", "objective.loss_type=l1"),
        "snr_gamma": (5, "?gamma / SNR"),
        "min_snr_gamma": (5, "objective.min_snr_gamma=5"),
        "noise_offset": (0.1, "objective.noise_offset=0.1"),
        "max_grad_norm": (2, "training.clip=2"),
        "min_denoising_steps": (100, "objective.timestep_low=0.1"),
        "max_denoising_steps": (899, "objective.timestep_high=0.9"),
        "skip_first_sample": (True, "!always drawn"),
        "disable_sampling": (True, "!no previews"),
        "unload_text_encoder": (True, "?without the captions"),
        "cache_text_embeddings": (True, "!always cached"),
        "reg_weight": (0.5, "!no data set has is_reg"),
        "diff_output_preservation": (True, "?preservation"),
        "diff_output_preservation_multiplier": (1.0, "!belongs to"),
        "diff_output_preservation_class": ("dog", "!belongs to"),
        "ema_config": ({"use_ema": True, "ema_decay": 0.9}, "training.ema.decay=0.9"),
        "validation_config": ({"resolution": 512}, "?folder"),
    },
    "model": {
        "name_or_path": ("a/b", "model.base=a/b"),
        "arch": ("sdxl", "model.family=sdxl"),
        "is_xl": (True, "model.family=sdxl"),
        **dict.fromkeys(tables.OTHER_MODELS, (True, "?only model so far")),
        "is_v_pred": (True, "model.prediction=v_prediction"),
        "vae_path": ("a/vae", "model.vae=a/vae"),
        "lora_path": ("x", "?merging a LoRA"),
        "assistant_lora_path": ("x", "?distilled"),
        "quantize": (True, "?quantised base"),
        "qtype": ("qfloat8", "!quantize"),
        "quantize_te": (True, "?quantised text"),
        "qtype_te": ("qfloat8", "!quantize_te"),
        "low_vram": (True, "!leave the memory"),
        "layer_offloading": (True, "?offloading"),
        "compile": (True, "!speed"),
        "attn_masking": (True, "?FLUX"),
        "dtype": ("fp16", "!train.dtype"),
    },
    "sample": {
        "sampler": ("ddpm", "!own sampler"),
        "sample_every": (10, "preview.every=10"),
        "width": (640, "preview.width=640"),
        "height": (640, "preview.height=640"),
        "prompts": (["[trigger] x"], "preview.prompts=['sks x']"),
        "samples": ([{"prompt": "[trigger] y", "seed": 3}], "preview.prompts=['sks y']"),
        "neg": ("bad", "preview.negative=bad"),
        "seed": (5, "preview.seed=5"),
        "walk_seed": (False, "!seed + i"),
        "guidance_scale": (4, "preview.guidance=4"),
        "sample_steps": (12, "preview.inference_steps=12"),
    },
    "logging": {
        "log_every": (1, "!every step"),
        "use_wandb": (True, "trackers"),
        "project_name": ("p", "!Weights & Biases is off"),
        "run_name": ("r", "!Weights & Biases is off"),
        "use_ui_logger": (True, "!run folder"),
        "verbose": (True, "!run folder"),
    },
    "datasets": {
        "folder_path": ("/x", "data.sources.0.path=/x"),
        "dataset_path": ("/x", "data.sources.0.path=/x"),
        "mask_path": ("/m", "?masklabel"),
        "mask_min_value": (0.1, "objective.unmasked_weight=0.1"),
        "control_path": ("/c", "?control images"),
        "inpaint_path": ("/c", "?control images"),
        "caption_ext": ("caption", "data.sources.0.caption_extension=.caption"),
        "default_caption": ("[trigger] hare", "data.sources.0.concept=sks hare"),
        "trigger_word": ("ohwx", "data.sources.0.trigger=ohwx"),
        "caption_dropout_rate": (0.1, "data.captions.dropout=0.1"),
        "token_dropout_rate": (0.2, "data.captions.tag_dropout=0.2"),
        "shuffle_tokens": (True, "data.captions.shuffle=True"),
        "keep_tokens": (2, "data.captions.keep=2"),
        "resolution": ([512, 768], "data.sources.0.resolution=[512, 768]"),
        "num_repeats": (3, "data.sources.0.repeats=3"),
        "is_reg": (True, "data.sources.0.role=prior"),
        "prior_reg": (True, "?prior"),
        "network_weight": (0.5, "?loss_multiplier"),
        "loss_multiplier": (0.5, "data.sources.0.weight=0.5"),
        "flip_x": (True, "data.sources.0.flip=True"),
        "flip_y": (True, "?upside down"),
        "alpha_mask": (True, "data.sources.0.mask=alpha"),
        "cache_latents": (True, "!always cached"),
        "cache_latents_to_disk": (True, "!always cached"),
        "cache_text_embeddings": (True, "!always cached"),
        "buckets": (False, "data.buckets.enabled=False"),
        "bucket_tolerance": (32, "data.buckets.step=32"),
        "random_crop": (True, "data.sources.0.crop=random"),
        "num_frames": (8, "?images"),
        "shrink_video_to_frames": (True, "!images"),
        "controls": (["depth"], "?control images"),
    },
    "": {
        "type": ("slider", "?only sd_trainer"),
        "training_folder": ("out", "output=out/n"),
        "device": ("cpu", "training.device=cpu"),
        "trigger_word": ("abc", "data.sources.0.trigger=abc"),
        "performance_log_every": (10, "!always logged"),
        "sqlite_db_path": ("x", "!run folder"),
    },
}
ALL = [(block, key) for block, keys in KEYS.items() for key in keys]
BASE: dict[str, Any] = {
    "trigger_word": "sks",
    "network": {"type": "lora"},
    "datasets": [{"folder_path": "/other"}],
    "train": {"lr": 1e-5},
    "model": {"name_or_path": "c/d", "arch": "sdxl"},
}
SAME = {"dataset_path": "folder_path", "learning_rate": "lr"}


def lines_of(error: UserError) -> list[str]:
    found = error.problems if isinstance(error, Problems) else (error,)
    return [" ".join(" ".join(problem.lines()).split()) for problem in found]


def load(text: str, folder: Path = Path("/jobs")) -> Loaded:
    return files.load_text(text, folder=folder, file="job.yaml")


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text)
    return lines_of(caught.value)


def notes(report: DialectReport | None) -> dict[str, str]:
    assert report is not None
    return {e.key: e.note for part in (report.mapped, report.ignored, report.refused) for e in part}


def at(data: Any, path: str) -> Any:
    for part in path.split("."):
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def convert(process: dict[str, Any]) -> Converted:
    text = document.emit({"job": "extension", "config": {"name": "n", "process": [process]}})
    return dialects.convert(NAME, document.parse(text, file="job.yaml"), folder=Path("/jobs"))


def test_the_tables_name_every_key() -> None:
    assert {block: set(keys) for block, keys in KEYS.items()} == {
        **{name: set(keys) for name, keys in tables.BLOCKS.items()},
        "datasets": set(tables.DATASET),
        "": set(tables.PROCESS),
    }


@pytest.mark.parametrize(("block", "key"), ALL)
def test_every_key(block: str, key: str) -> None:
    value, expected = KEYS[block][key]
    process = document.parse(document.emit(BASE), file="x").data
    if block == "datasets":
        process["datasets"][0].pop(SAME.get(key, key), None)
        process["datasets"][0][key] = value
    elif block:
        process.setdefault(block, {}).pop(SAME.get(key, key), None)
        process[block] = {**process[block], key: value}
        if key == "unet_lr":
            del process["train"]["lr"]
    else:
        process[key] = value
    converted = convert(process)
    said = [line for problem in converted.problems for line in lines_of(problem)]
    own = ".".join(part for part in ("config.process.0", f"{block}.0" if block == "datasets" else block, key) if part)
    report = converted.report
    entries = [e for part in (report.mapped, report.ignored, report.refused) for e in part if e.key.startswith(own)]
    assert entries
    assert all(e.line is not None for e in entries)
    if expected[0] == "?":
        assert any(expected[1:] in line and f"{own}" in line for line in said), said
    elif expected[0] == "!":
        assert any(expected[1:] in e.note for e in entries if e in report.ignored), entries
    elif "=" in expected:
        native, _, wanted = expected.partition("=")
        assert str(at(converted.data, native)) == wanted
        assert any(e.key.startswith(own) for e in report.mapped)
    else:
        assert any(expected in e.note for e in entries)
    if expected[0] != "?":
        assert not said


def test_a_whole_job() -> None:
    loaded = load(JOB)
    run = loaded.run
    assert loaded.report is not None
    assert loaded.report.tool == NAME
    (source,) = run.data.sources
    assert (source.path, source.layout, source.caption_extension) == ("/data/hare_lora", "folder", ".txt")
    assert (source.trigger, source.missing_captions, source.resolution) == ("sks", "trigger", (512, 768, 1024))
    assert (run.data.captions.dropout, run.data.captions.shuffle, run.data.captions.lines) == (0.05, False, "join")
    assert run.data.buckets.enabled
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.targets) == (16, 16, "attention-mlp")
    training = run.training
    assert (training.steps, training.batch_size, training.accumulation, training.learning_rate) == (2000, 1, 2, 1e-4)
    assert (training.optimizer.type, training.precision, training.gradient_checkpointing) == ("adamw8bit", "bf16", True)
    assert (training.ema.enabled, training.ema.decay, training.device) == (True, 0.99, "cuda:0")
    assert run.preview.prompts == ("sks holding a sign", "a dog")
    assert (run.preview.negative, run.preview.every, run.preview.inference_steps) == ("blurry", 250, 20)
    assert (run.checkpoint.every, run.checkpoint.keep_last) == (250, 4)
    assert (run.name, str(run.output)) == ("hare_lora", "output/hare_lora")
    assert loaded.origins["training.steps"] == "job.yaml:20"
    said = set(notes(loaded.report))
    process = document.parse(JOB, file="x").data["config"]["process"][0]
    for key, value in process.items():
        inside = value[0] if key == "datasets" else value if isinstance(value, dict) else {}
        place = f"{key}.0" if key == "datasets" else key
        assert {f"config.process.0.{place}.{inner}" for inner in inside} <= said
        assert inside or f"config.process.0.{key}" in said
    again = files.load_text(files.dump(run), folder=Path("/jobs")).run
    assert again == run.model_copy(update={"output": run.folder.absolute()})


def test_defaults_of_ai_toolkit_where_the_file_says_nothing() -> None:
    text = document.emit({"job": "train", "config": {"name": "n", "process": [{**BASE, "sample": {"prompts": ["x"]}}]}})
    loaded = load(text.replace("lr: 1e-05", "batch_size: 1"))
    run = loaded.run
    assert (run.data.sources[0].resolution, run.training.gradient_checkpointing) == (512, True)
    assert (run.training.steps, run.training.learning_rate, run.training.precision) == (1000, 1e-6, "fp32")
    assert (run.adapter.rank, run.adapter.alpha) == (4, 1)
    assert (run.checkpoint.every, run.checkpoint.keep_last) == (1000, 5)
    assert (run.preview.width, run.preview.height, run.preview.every) == (512, 512, 100)
    assert loaded.report is not None
    assert {"save.dtype", "training.gradient_checkpointing"} <= {e.key for e in loaded.report.assumed}


def test_without_a_network_all_weights_train() -> None:
    process = {key: value for key, value in BASE.items() if key != "network"}
    assert convert(process).data["adapter"]["type"] == "full"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (JOB.replace("arch: sdxl", "arch: flux"), "arch: 'flux': SDXL is the only model so far"),
        (JOB.replace("arch: sdxl", "is_flux: true"), "is_flux: true: SDXL is the only model so far"),
        (JOB.replace(", arch: sdxl", ""), "no arch is named, which ai-toolkit takes for Stable Diffusion 1"),
        (JOB.replace("job: extension", "job: extract"), "job.yaml:1: job: 'extract': only training jobs are read"),
        (JOB.replace("batch_size: 1", "bach_size: 1"), "job.yaml:19: unknown key config.process.0.train.bach_size"),
        (JOB.replace("steps: 2000", "steps: many"), "config.process.0.train.steps must be a whole number, not 'many'"),
        (JOB.replace("optimizer: adamw8bit", "optimizer: prodigy"), "this optimizer comes in a later version"),
        (JOB.replace("type: lora,", "type: lokr,"), "only lora is there so far"),
        (JOB.replace("gradient_accumulation: 2", "gradient_accumulation: 2\n        gradient_accumulation_steps: 3"),
         "gradient_accumulation_steps is 3 but config.process.0.train.gradient_accumulation (line 21) is 2"),
        (JOB.replace('folder_path: "/data/[name]"', "num_repeats: 1"), "job.yaml:12: folder_path is missing"),
        (JOB.replace("meta:", "mete:"), "unknown key mete"),
    ],
)  # fmt: skip
def test_what_a_job_cannot_be(text: str, words: str) -> None:
    (found,) = problems(text)
    assert words in found


def test_several_processes_are_refused_by_name() -> None:
    data = document.parse(JOB, file="x").data
    data["config"]["process"] *= 2
    (found,) = problems(document.emit(data))
    assert "config.process: 2 processes, and a run has one -> write a file for each" in found


FLUX = """\
job: "extension"
config:
  name: "flux_lora_training"
  process:
    - type: "diffusion_trainer"
      training_folder: "/workspace/outputs/ai-toolkit"
      device: "cuda"
      trigger_word: "your_trigger_word"
      network:
        type: "lora"
        linear: 32
        linear_alpha: 32
      datasets:
        - folder_path: "/workspace/datasets/images/1_your_dataset"
          resolution: [1024]
          num_repeats: 1
      train:
        batch_size: 1
        steps: 3000
        lr: 0.0001
        gradient_checkpointing: true
        optimizer: "adamw8bit"
        dtype: "bf16"
      model:
        name_or_path: "black-forest-labs/FLUX.1-schnell"
        low_vram: false
"""


def test_the_guides_job_for_flux_is_refused_with_the_reason() -> None:
    (found,) = problems(FLUX)
    assert found.startswith("job.yaml:25: config.process.0.model.name_or_path: 'black-forest-labs/FLUX.1-schnell'")
    assert "this looks like FLUX or SD 3, and SDXL is the only model so far" in found
    run = load(
        FLUX.replace("black-forest-labs/FLUX.1-schnell", "a/sdxl").replace("low_vram", "is_xl: true\n        low_vram")
    ).run
    assert (run.data.resolution, run.adapter.rank, run.training.steps) == (1024, 32, 3000)


CONCEPTS = """\
datasets:
  - folder_path: "/workspace/datasets/images/1_concept_a"
    network_weight: 1.0
  - folder_path: "/workspace/datasets/images/2_concept_b"
    network_weight: 0.8
"""
REGULAR = """\
datasets:
  - folder_path: "/workspace/datasets/images/1_main_concept"
    is_reg: false
  - folder_path: "/workspace/datasets/images/2_regularization"
    is_reg: true
    network_weight: 0.1
"""
CACHED = "datasets:\n  - cache_latents_to_disk: true\n"
SCHEDULE = "train:\n  lr_scheduler: cosine\n  warmup_steps: 100\n  lr_end: 1e-6\n"
PRECISION = 'train:\n  mixed_precision: "fp16"\n  dtype: "bf16"\n'
SAMPLES = """\
sample:
  sample_every: 100
  prompts:
    - "photo of your_trigger_word subject"
    - "artistic style of your_trigger_word"
  seed: 42
"""
BATCH = "train:\n  batch_size: 1\n  gradient_accumulation_steps: 4\n"


def merged(fragment: str) -> str:
    base = document.parse(document.emit(BASE), file="x").data
    for name, block in document.parse(fragment, file="x").data.items():
        base[name] = block if isinstance(block, list) else {**base.get(name, {}), **block}
    return document.emit(base)


def test_fragments_of_the_guide_with_weights_of_the_adapter() -> None:
    (found,) = problems(merged(CONCEPTS))
    assert "datasets.1.network_weight: 0.8: a strength of the adapter of its own" in found
    assert "loss_multiplier" in found
    assert len(problems(merged(REGULAR))) == 1
    run = load(merged(REGULAR.replace("network_weight", "loss_multiplier"))).run
    assert [(s.role, s.weight, s.trigger) for s in run.data.sources] == [("instance", 1, "sks"), ("prior", 0.1, None)]


def test_other_fragments_of_the_guide() -> None:
    (found,) = problems(merged(CACHED))
    assert "folder_path is missing" in found
    schedule = load(merged(SCHEDULE)).run.training.schedule
    assert (schedule.type, schedule.warmup, schedule.floor) == ("cosine", 100, pytest.approx(0.1))
    (found,) = problems(merged(PRECISION))
    assert "is 'bf16' but train.mixed_precision" in found
    preview = load(merged(SAMPLES)).run.preview
    assert (preview.every, preview.seed, len(preview.prompts)) == (100, 42, 2)
    assert load(merged(BATCH)).run.training.accumulation == 4
    assert load(merged("train:\n  gradient_checkpointing: true\nmodel:\n  low_vram: true\n")).run


@pytest.mark.parametrize("text", [FLUX, CONCEPTS, REGULAR, CACHED, SCHEDULE, PRECISION, SAMPLES, BATCH, JOB])
def test_detection(text: str) -> None:
    assert dialects.detect(document.parse(text, file="x").data) == NAME


def test_the_datasets_block_as_the_data_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "sets.yaml").write_text(REGULAR.replace("network_weight", "loss_multiplier"))
    (tmp_path / "run.yaml").write_text("data: sets.yaml\ntraining:\n  steps: 5\n")
    loaded = files.load(tmp_path / "run.yaml")
    assert [source.role for source in loaded.run.data.sources] == ["instance", "prior"]
    assert loaded.origins["data.sources.1.weight"] == f"{tmp_path}/sets.yaml:6"
    (tmp_path / "sets.yaml").write_text(REGULAR)
    with pytest.raises(Problems, match=r"sets.yaml:6: datasets.1.network_weight"):
        files.load(tmp_path / "run.yaml")


def test_samples_with_settings_of_their_own() -> None:
    samples = [
        {"prompt": "a", "seed": 3, "width": 640, "neg": "n"},
        {"prompt": "b", "seed": 9, "width": 640, "network_multiplier": 0.5},
    ]
    converted = convert({**BASE, "sample": {"samples": samples}})
    preview = converted.data["preview"]
    assert (preview["prompts"], preview["seed"], preview["width"], preview["negative"]) == (["a", "b"], 3, 640, "n")
    ignored = {e.key: e.note for e in converted.report.ignored}
    assert "settings of the first" in ignored["config.process.0.sample.samples.1.seed"]
    (found,) = [line for problem in converted.problems for line in lines_of(problem)]
    assert "network_multiplier: 0.5: previews have the adapter at its full strength" in found


def test_push_to_the_hub_and_trackers() -> None:
    save = {"push_to_hub": True, "hf_repo_id": "me/it"}
    logging = {"use_wandb": True, "project_name": "p", "run_name": "r"}
    converted = convert({**BASE, "save": save, "logging": logging})
    assert converted.report.hub_repo == "me/it"
    assert converted.data["trackers"] == [{"type": "tensorboard"}, {"type": "wandb", "project": "p", "run_name": "r"}]
