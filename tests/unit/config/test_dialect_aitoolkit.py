"""Job files of ai-toolkit: whole jobs, fragments of the guide, and what a job cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from aitoolkit_helpers import BASE, NAME, convert
from dialect_helpers import lines_of

from gesso.config import dialects, document, files
from gesso.config.dialects import DialectReport
from gesso.config.files import Loaded
from gesso.errors import Problems, UserError

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


def load(text: str, folder: Path = Path("/jobs")) -> Loaded:
    return files.load_text(text, folder=folder, file="job.yaml")


def problems(text: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text)
    return lines_of(caught.value)


def notes(report: DialectReport | None) -> dict[str, str]:
    assert report is not None
    return {e.key: e.note for part in (report.mapped, report.ignored, report.refused) for e in part}


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
        (JOB.replace("optimizer: adamw8bit", "optimizer: automagic"), "this optimizer is not there by this name"),
        (JOB.replace("type: lora,", "type: lorm,"), "of its networks only lora, locon, lokr are there"),
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
