"""Options of the diffusers scripts and nested files: their values, their mistakes, and which tool a file is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_guides import CACHE, CONSERVATIVE, FLAT, LORA, NESTED, PRIOR
from dialect_helpers import FLAT_NAME, NESTED_NAME, leaves, load, merged, notes, problems, report

from gesso.config import dialects, document, files


@pytest.mark.parametrize(
    ("name", "warmup", "expected", "expected_warmup"),
    [
        ("constant", 100, "constant", 0),
        ("constant_with_warmup", 100, "constant", 100),
        ("cosine", 10, "cosine", 10),
        ("cosine_with_restarts", 0, "cosine_restarts", 0),
        ("polynomial", 0, "polynomial", 0),
    ],
)
def test_schedules(name: str, warmup: int, expected: str, expected_warmup: int) -> None:
    loaded = load(merged(f"training:\n  lr_scheduler: {name}\n  lr_warmup_steps: {warmup}\n  lr_num_cycles: 3\n"))
    schedule = loaded.run.training.schedule
    assert (schedule.type, schedule.warmup) == (expected, expected_warmup)
    assert schedule.cycles == (3 if name == "cosine_with_restarts" else 1)
    ignored = notes(report(loaded).ignored)
    assert ("training.lr_warmup_steps" in ignored) == (name == "constant"), "diffusers ignores it for constant"


def test_an_unknown_schedule_is_named() -> None:
    (found,) = problems(merged("training:\n  lr_scheduler: piecewise_constant\n"))
    assert "training.lr_scheduler must be one of constant" in found


@pytest.mark.parametrize(
    ("line", "precision"), [("no", "fp32"), ("'no'", "fp32"), ("false", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_mixed_precision_words(line: str, precision: str) -> None:
    assert load(f"train_data_dir: x\nmax_train_steps: 1\nmixed_precision: {line}").run.training.precision == precision


def test_common_script_options() -> None:
    text = """\
pretrained_model_name_or_path: a/b
train_data_dir: x
max_train_steps: 10
seed: 7
resolution: 512
center_crop: false
random_flip: yes
rank: 4
snr_gamma: 5.0
noise_offset: 0.05
max_grad_norm: 0.5
adam_beta1: 0.8
adam_beta2: 0.99
adam_weight_decay: 0.1
adam_epsilon: "1e-6"
use_8bit_adam: false
checkpointing_steps: 250
checkpoints_total_limit: 2
validation_prompt: a cat
num_validation_images: 3
report_to: all
gradient_checkpointing: off
enable_xformers_memory_efficient_attention: false
use_ema: true
dataloader_num_workers: 0
allow_tf32: true
resume_from_checkpoint: latest
push_to_hub: true
hub_model_id: me/it
"""
    loaded = load(text)
    run = loaded.run
    assert (run.seed, run.data.resolution, run.data.crop, run.data.flip) == (7, 512, "random", True)
    assert (run.objective.min_snr_gamma, run.objective.noise_offset) == (5, 0.05)
    optimizer = run.training.optimizer
    assert (optimizer.type, optimizer.beta1, optimizer.beta2) == ("adamw", 0.8, 0.99)
    assert (optimizer.weight_decay, optimizer.eps, run.training.clip) == (0.1, 1e-6, 0.5)
    assert (run.checkpoint.every, run.checkpoint.keep_last, run.checkpoint.keep_every) == (250, 2, None)
    assert run.preview.prompts == ("a cat",) * 3
    assert [tracker.type for tracker in run.trackers] == ["tensorboard", "wandb"]
    assert (run.training.gradient_checkpointing, run.training.attention) == (False, "sdpa")
    assert (run.training.ema.enabled, run.data.workers) == (True, 0)
    assert (report(loaded).hub_repo, report(loaded).resume) == ("me/it", "latest")
    assert leaves(text) <= {entry.key for entry in (*report(loaded).mapped, *report(loaded).ignored)}


def test_the_same_setting_twice() -> None:
    both = merged("dataset:\n  resolution: 512\n")
    (found,) = problems(both)
    assert "dataset.resolution is 512 but model.resolution" in found
    loaded = load(merged("dataset:\n  resolution: 1024\n"))
    assert "says the same" in notes(report(loaded).ignored)["dataset.resolution"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training:\n  learning_rat: 1\n", "unknown key training.learning_rat (read as a file of nested"),
        ("training:\n  learning_rat: 1\n", "did you mean learning_rate?"),
        ("lora:\n  rnak: 1\n", "did you mean rank?"),
        ("datset:\n  x: 1\n", "unknown key datset (read as nested SDXL training YAML) -> did you mean dataset?"),
        ("lora:\n  learning_rate: 1\n", "unknown key lora.learning_rate"),
    ],
)
def test_unknown_keys_are_errors_with_the_nearest_spelling(text: str, words: str) -> None:
    (found,) = problems(merged(text))
    assert words in found


def test_a_file_without_images_or_length_says_so_once() -> None:
    found = problems("lora:\n  rank: 4\n  alpha: 4\n")
    assert [one.split(": ", 1)[1].split(" ->")[0] for one in found] == [
        *("no training images are named", "the run has no length"),
    ]


def test_paths_start_from_the_working_directory_else_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "both").mkdir(parents=True)
    (there / "both").mkdir(parents=True)
    (there / "only").mkdir()
    monkeypatch.chdir(here)
    for name, expected in (("both", here), ("only", there), ("neither", here)):
        text = f"train_data_dir: {name}\nmax_train_steps: 1"
        assert load(text, folder=there).run.data.sources[0].path == str(expected / name)
    assert load("dataset_name: only\nlora_rank: 4\nnum_epochs: 1", folder=there).run.data.sources[0].path == str(
        there / "only"
    )


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        (NESTED, NESTED_NAME),
        (LORA, NESTED_NAME),
        (PRIOR, NESTED_NAME),
        (FLAT, FLAT_NAME),
        (CONSERVATIVE, FLAT_NAME),
        (CACHE, FLAT_NAME),
        ("name: x\nseed: 1\ndata: {sources: []}\ntraining: {steps: 1}", None),
        ("preset: style", None),
        ("data: {sources: []}\ntraining: {steps: 3, learning_rate: 1, train_batch_size: 2}", None),
        ("data: {sources: []}\ntraining: {steps: 3}\nlora_rank: 2", None),
        ("nonsense: 1", None),
    ],
)
def test_detection(text: str, tool: str | None) -> None:
    assert dialects.detect(document.parse(text, file="x").data) == tool


def test_foreign_names_point_at_keys_that_exist() -> None:
    from gesso.config import schema

    names = dialects.foreign_names()
    assert names["train_batch_size"] == "training.batch_size"
    for native in names.values():
        assert schema.locate(tuple(native.split(".")))[1] is not None, native


def test_sets_are_in_our_names() -> None:
    run = files.load_text(NESTED, folder=Path("/"), sets=["training.steps=3", "training.attention=sdpa"]).run
    assert (run.training.steps, run.training.attention) == (3, "sdpa")
