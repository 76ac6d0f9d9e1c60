"""Options of sd-scripts: every key is taken, refused or reported, with its line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from dialect_helpers import at
from kohya_helpers import DATASET, LEVELS, judge, lines_of_all, load, notes, problems

from gesso.config import dialects, document, files
from gesso.config.dialects import toml

OPTIONS = {
    "pretrained_model_name_or_path": ('"a/b"', "model.base=a/b"),
    "vae": ('"a/vae"', "model.vae=a/vae"),
    "output_dir": ('"out"', "output=out"),
    "output_name": ('"my lora"', "name=my lora"),
    "network_module": ('"networks.lora"', "adapter.type=lora"),
    "network_dim": ("32", "adapter.rank=32"),
    "network_alpha": ("16", "adapter.alpha=16"),
    "network_args": ('["conv_dim=16", "conv_alpha=8", "loraplus_lr_ratio=4"]', "adapter.conv_rank=16"),
    "network_dropout": ("0.1", "adapter.dropout=0.1"),
    "network_train_unet_only": ("true", "adapter.train_text_encoders=False"),
    "unet_lr": ("2e-4", "training.learning_rate=0.0002"),
    "text_encoder_lr": ("[1e-5, 0]", "training.text_encoder_learning_rates=[1e-05, 0]"),
    "learning_rate": ("1e-4", "training.learning_rate=0.0001"),
    "optimizer_type": ('"AdamW8bit"', "training.optimizer.type=adamw8bit"),
    "optimizer_args": ('["weight_decay=0.1", "betas=0.9,0.99"]', "training.optimizer.beta2=0.99"),
    "lr_scheduler": ('"cosine"', "training.schedule.type=cosine"),
    "max_train_steps": ("500", "training.steps=500"),
    "max_train_epochs": ("7", "training.epochs=7"),
    "mixed_precision": ('"bf16"', "training.precision=bf16"),
    "save_precision": ('"fp16"', "!float32"),
    "gradient_checkpointing": ("true", "training.gradient_checkpointing=True"),
    "gradient_accumulation_steps": ("4", "training.accumulation=4"),
    "cache_latents": ("true", "!always cached"),
    "cache_latents_to_disk": ("true", "!always cached"),
    "cache_text_encoder_outputs": ("true", "adapter.train_text_encoders=False"),
    "min_snr_gamma": ("5", "objective.min_snr_gamma=5"),
    "noise_offset": ("0.05", "objective.noise_offset=0.05"),
    "debiased_estimation_loss": ("true", "objective.weighting.type=debiased"),
    "scale_v_pred_loss_like_noise_pred": ("true", "!models that predict v"),
    "multires_noise_iterations": ("6", "objective.pyramid_noise_iterations=6"),
    "multires_noise_discount": ("0.8", "!multires_noise_iterations"),
    "zero_terminal_snr": ("true", "model.zero_terminal_snr=True"),
    "v_pred_like_loss": ("0.1", "?share of the loss"),
    "huber_c": ("0.2", "!neither huber"),
    "huber_schedule": ('"snr"', "!neither huber"),
    "min_timestep": ("100", "objective.timestep_low=0.1"),
    "ip_noise_gamma": ("0.1", "objective.input_perturbation=0.1"),
    "max_timestep": ("900", "objective.timestep_high=0.9"),
    "max_grad_norm": ("0", "training.clip=None"),
    "max_token_length": ("225", "model.max_chunks=3"),
    "loss_type": ('"l1"', "objective.loss_type=l1"),
    "seed": ("42", "seed=42"),
    "save_every_n_steps": ("100", "checkpoint.every=100"),
    "save_every_n_epochs": ("1", "!optimiser steps"),
    "sample_every_n_steps": ("100", "preview.every=100"),
    "xformers": ("true", "training.attention=xformers"),
    "v_parameterization": ("true", "model.prediction=v_prediction"),
    "full_bf16": ("true", "?always float32"),
    "fused_backward_pass": ("true", "training.fused_backward=True"),
    "fused_optimizer_groups": ("10", "?fused_backward_pass"),
    "network_weights": ('"x.safetensors"', "adapter.init_from=x.safetensors"),
    "huggingface_token": ('"hf_x"', "?token"),
}

BARE = 'pretrained_model_name_or_path = "a/b"\nnetwork_module = "networks.lora"\nresolution = "1024,1024"\n'


def without(key: str, text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"{key} "))


@pytest.mark.parametrize("key", OPTIONS)
def test_core_options(key: str, tmp_path: Path) -> None:
    value, expected = OPTIONS[key]
    text = f"{key} = {value}\n" + without(key, BARE + 'train_data_dir = "/x"\n')
    converted = dialects.convert("options of sd-scripts", toml.parse(text, file="t.toml"), folder=tmp_path)
    judge(converted, key, 1, expected)
    assert bool(converted.problems) == (expected[0] == "?"), lines_of_all(converted)


@pytest.mark.parametrize("key", LEVELS)
def test_options_of_images_mean_what_they_mean_in_a_dataset_file(key: str, tmp_path: Path) -> None:
    value, expected = LEVELS[key]
    name = "train_batch_size" if key == "batch_size" else key
    text = f"{name} = {value}\n" + without(key, BARE + 'train_data_dir = "/x"\n')
    text += "enable_bucket = true\n" if "bucket" in key and key != "enable_bucket" else ""
    converted = dialects.convert("options of sd-scripts", toml.parse(text, file="t.toml"), folder=tmp_path)
    judge(converted, name, 1, expected)


def test_every_option_is_read_by_itself(tmp_path: Path) -> None:
    """Whatever option a file has, it is in the report, or among the problems with its line."""
    from gesso.config.dialects.kohya_tables import KEYS

    for key in KEYS:
        text = f"{key} = 1\n" + without(key, BARE + 'train_data_dir = "/x"\n')
        converted = dialects.convert("options of sd-scripts", toml.parse(text, file="t.toml"), folder=tmp_path)
        seen = {e.key.split(".")[0] for e in (*converted.report.mapped, *converted.report.ignored)}
        refused = {e.key.split(".")[0] for e in converted.report.refused}
        assert key in seen | refused or any("t.toml:1" in p for p in lines_of_all(converted)), key


def test_a_whole_file_of_options(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(
        "# first\nsks hare --n blurry --w 768 --h 512 --d 7 --s 30 --l 6.5\na dog --n blurry --d 8\n"
    )
    text = f"""\
[model]
pretrained_model_name_or_path = "a/b"
[data]
train_data_dir = "{tmp_path}/img"
reg_data_dir = "{tmp_path}/reg"
prior_loss_weight = 0.5
resolution = "1024"
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
[training]
train_batch_size = 2
max_train_steps = 900
max_train_epochs = 10
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.05
unet_lr = 1e-4
text_encoder_lr = 5e-5
[saving]
output_dir = "out"
output_name = "hare"
save_every_n_steps = 200
save_last_n_steps = 600
sample_prompts = "{tmp_path}/prompts.txt"
log_with = "wandb"
"""
    loaded = load(text, tmp_path)
    run = loaded.run
    train, prior = run.data.sources
    assert (train.path, train.layout, train.missing_captions) == (f"{tmp_path}/img", "kohya", "concept")
    assert (prior.path, prior.layout, prior.role, prior.weight) == (f"{tmp_path}/reg", "kohya", "prior", 1)
    assert (run.data.captions.shuffle, run.data.captions.keep, run.data.buckets.enabled) == (True, 1, False)
    assert (run.training.steps, run.training.epochs, run.training.batch_size) == (None, 10, 2)
    assert (run.training.schedule.cycles, run.training.schedule.warmup) == (3, 0.05)
    assert (run.training.learning_rate, run.training.text_encoder_learning_rates) == (1e-4, (5e-5,))
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.targets) == (4, 1, "attention-mlp")
    assert run.adapter.train_text_encoders
    assert (run.name, str(run.output)) == ("hare", "out/hare")
    assert (run.checkpoint.every, run.checkpoint.keep_last, run.checkpoint.keep_every) == (200, 3, None)
    preview = run.preview
    assert preview.prompts == ("sks hare", "a dog")
    assert (preview.negative, preview.width, preview.height, preview.seed) == ("blurry", 768, 512, 7)
    assert (preview.inference_steps, preview.guidance, run.training.precision) == (30, 6.5, "fp32")
    assert loaded.report is not None
    said = notes(loaded.report)
    assert said["training.max_train_steps"] == "training.max_train_epochs wins over it, as in sd-scripts"
    assert {f"{s}.{k}" for s, keys in tomllib.loads(text).items() for k in keys} <= set(said)


def test_options_with_a_dataset_file(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(DATASET.replace("{root}", str(tmp_path)))
    text = (
        BARE + 'dataset_config = "dataset.toml"\ntrain_data_dir = "/x"\ntrain_batch_size = 5\nshuffle_caption = true\n'
    )
    loaded = load(text, tmp_path)
    assert [source.path for source in loaded.run.data.sources] == [f"{tmp_path}/hare", f"{tmp_path}/dogs"]
    assert loaded.run.training.batch_size == 2, "the dataset file overrules the options"
    assert all(source.captions is not None and source.captions.shuffle for source in loaded.run.data.sources)
    assert loaded.report is not None
    said = notes(loaded.report)
    assert said["train_data_dir"] == "dataset_config says what the images are"
    assert said["train_batch_size"] == "what is nearer to the images says otherwise"
    assert said["dataset.toml: datasets.0.batch_size"] == "training.batch_size"
    assert loaded.origins["data.sources.0.repeats"] == f"{tmp_path}/dataset.toml:12"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "lerning_rate = 1",
            "train.toml:1: unknown key lerning_rate (read as options of sd-scripts) -> did you mean le",
        ),
        ('network_module = "networks.oft"', "of the networks of sd-scripts only networks.lora"),
        ('network_args = ["conv_dmi=3"]', "unknown key network_args.conv_dmi"),
        ('network_args = ["algo=loha"]', "network_args.algo: 'loha': it belongs to lycoris.kohya"),
        ('network_args = ["block_dims=3,4"]', "ranks per block are written by names here -> set adapter.rank_pattern"),
        ('optimizer_type = "Adan"', "optimizer_type: 'Adan': this optimizer is not there by this name"),
        ('optimizer_args = ["d_coef=2"]', "optimizer_args.d_coef: '2': the optimizers here have no such setting"),
        ("v2 = true", "this is for Stable Diffusion 2"),
        ('sample_prompts = "none.txt"', "none.txt cannot be read (FileNotFoundError)"),
        ('sample_prompts = "p.toml"', ".toml files of prompts are not read"),
        ('loss_type = "l3"', "loss_type must be one of l2, l1, smooth_l1, huber, not 'l3'"),
        ('in_json = "meta.json"', "a JSON file of captions is not read -> write it as metadata.jsonl"),
    ],
)
def test_what_options_cannot_be(line: str, words: str, tmp_path: Path) -> None:
    key = line.split()[0]
    (found,) = problems(f"{line}\n" + without(key, BARE + 'train_data_dir = "/x"\nnetwork_dim = 4\n'), tmp_path)
    assert words in found


@pytest.mark.parametrize(
    ("lines", "rate", "text", "trained"),
    [
        ("learning_rate = 1e-4", 1e-4, None, True),
        ("unet_lr = 1e-4", 1e-4, (2e-6,), True),
        ("learning_rate = 3e-5\nunet_lr = 1e-4", 1e-4, (3e-5,), True),
        ("unet_lr = 1e-4\ntext_encoder_lr = [1e-5, 0]", 1e-4, (1e-5, 0), True),
        ("learning_rate = 3e-5\nunet_lr = 1e-4\nnetwork_train_unet_only = true", 1e-4, None, False),
        ("network_dim = 4", 2e-6, None, True),
    ],
)
def test_learning_rates(lines: str, rate: float, text: tuple[float, ...] | None, trained: bool, tmp_path: Path) -> None:
    run = load(f'{BARE}train_data_dir = "/x"\n{lines}\n', tmp_path).run
    assert (run.training.learning_rate, run.training.text_encoder_learning_rates) == (rate, text)
    assert run.adapter.train_text_encoders is trained


def test_options_without_images_or_resolution(tmp_path: Path) -> None:
    found = problems("network_dim = 4\n", tmp_path)
    assert found == [
        "train.toml: no training images are named -> add train_data_dir (with folders such as 10_sks aldar inside) or "
        "dataset_config",
        "train.toml: resolution is missing, and sd-scripts has no default -> write resolution = 1024",
    ]


GUIDE = """\
model:
  pretrained_model_name_or_path: "/workspace/models/stable-diffusion-xl-base-1.0"
  v2: true
  sdxl: true
training:
  resolution: 1024
  batch_size: 1
  gradient_accumulation_steps: 1
  learning_rate: 1e-4
  max_train_steps: 1500
  save_every_n_steps: 150
network:
  network_type: "lora"
  network_dim: 64
  network_alpha: 64
dataset:
  enable_bucket: true
  min_bucket_reso: 512
  max_bucket_reso: 1024
"""
IMAGES = "  train_data_dir: /workspace/datasets/images\n"


def test_the_guide_as_it_stands_lacks_only_its_images(tmp_path: Path) -> None:
    (found,) = problems(GUIDE, tmp_path, name="guide.yaml")
    assert "no training images are named" in found
    run = load(GUIDE + IMAGES, tmp_path, name="guide.yaml").run
    assert (run.adapter.rank, run.adapter.alpha, run.training.steps, run.checkpoint.every) == (64, 64, 1500, 150)
    assert (run.data.buckets.enabled, run.data.buckets.smallest, run.data.buckets.largest) == (True, 512, 1024)


@pytest.mark.parametrize(
    ("fragment", "native", "value"),
    [
        ("dataset:\n  resolution: [512, 768, 1024, 1280]\n  enable_bucket: true\n  bucket_reso_steps: 64\n",
         "data.sources.0.resolution", (512, 768, 1024, 1280)),
        ("training:\n  resolution: 1536\n  batch_size: 1\n  gradient_checkpointing: true\n"
         "dataset:\n  min_bucket_reso: 1024\n  max_bucket_reso: 1536\n", "data.resolution", 1536),
        ("training:\n  learning_rate: 5e-5\n  max_train_steps: 2000\nnetwork:\n  network_dim: 128\n"
         "  network_alpha: 64\ndataset:\n  resolution: [512, 768, 1024]\n", "adapter.rank", 128),
        ("training:\n  learning_rate: 1e-4\n  max_train_steps: 1500\nnetwork:\n  network_dim: 32\n"
         "  network_alpha: 32\ndataset:\n  resolution: 1024\n  enable_bucket: false\n", "data.buckets.enabled", False),
        ("steps: 100\nlearning_rate: 1e-4\nnetwork_dim: 16\n", "training.steps", 100),
    ],
)  # fmt: skip
def test_fragments_of_the_guide(fragment: str, native: str, value: object, tmp_path: Path) -> None:
    data = document.parse(GUIDE + IMAGES, file="x").data
    new = document.parse(fragment, file="x").data
    flat = {key for section, inner in new.items() for key in (inner if isinstance(inner, dict) else [section])}
    flat |= {"max_train_steps"} if "steps" in flat else set()
    for inner in data.values():
        for key in flat & set(inner):
            del inner[key]
    for section, inner in new.items():
        data.setdefault(section, {}).update(inner) if isinstance(inner, dict) else data.__setitem__(section, inner)
    loaded = load(document.emit(data), tmp_path, name="guide.yaml")
    found = at(loaded.run.model_dump(mode="json"), native)
    assert found == (list(value) if isinstance(value, tuple) else value)


def test_the_example_of_options() -> None:
    loaded = files.load(Path(__file__).parents[3] / "examples" / "from_sd_scripts.toml")
    run = loaded.run
    assert [(source.role, source.repeats) for source in run.data.sources] == [("instance", 10), ("prior", 1)]
    assert (run.training.batch_size, run.training.steps, run.adapter.alpha) == (2, 1000, 8)
    assert not run.data.buckets.upscale
