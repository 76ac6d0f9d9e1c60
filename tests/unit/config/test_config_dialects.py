"""Files of the two users' guides: each fragment becomes a run, or is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_guides import (
    AGGRESSIVE,
    CACHE,
    CONSERVATIVE,
    FLAT,
    IDENTITY,
    LORA,
    MEMORY,
    NESTED,
    OUT_OF_MEMORY,
    SLOW,
    TEXT_ENCODER,
    VALIDATION,
    WANDB,
)
from dialect_helpers import FLAT_NAME, NESTED_NAME, leaves, load, merged, notes, problems, report

from gesso.adapters import Full
from gesso.config import document

LOCAL_FLAT = FLAT.replace("your-username/your-dataset", "./my_dataset")


def test_the_nested_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load(NESTED)
    run = loaded.run
    assert report(loaded).tool == NESTED_NAME
    assert run.model.base == "stabilityai/stable-diffusion-xl-base-1.0"
    (source,) = run.data.sources
    assert (source.path, source.metadata) == (str(tmp_path / "data/train"), "metadata.jsonl")
    assert (source.image_column, source.caption_column) == ("image_path", "prompt")
    assert run.data.resolution == 1024
    assert (run.adapter.rank, run.adapter.alpha) == (64, 64)
    assert run.adapter.targets == ("to_q", "to_k", "to_v", "to_out.0")
    training = run.training
    assert (training.steps, training.epochs) == (500, None), "max_train_steps wins"
    assert (training.batch_size, training.accumulation, training.learning_rate) == (1, 4, 1e-4)
    assert (training.precision, training.attention, training.gradient_checkpointing) == ("fp16", "xformers", True)
    assert (training.schedule.type, training.schedule.warmup) == ("constant", 0)
    assert (str(run.output), run.name) == ("output/aldar_kose_lora", "aldar_kose_lora")
    assert run.checkpoint.every == run.checkpoint.keep_every == 500, "the tool keeps every checkpoint"
    assert loaded.origins["training.steps"] == "run.yaml:29"
    assert loaded.origins["data.buckets.enabled"] == f"as {NESTED_NAME} does"
    assert notes(report(loaded).ignored) == {
        "training.num_epochs": "training.max_train_steps wins over it, as in the diffusers scripts"
    }


def test_the_flat_guide_with_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load(LOCAL_FLAT)
    run = loaded.run
    assert report(loaded).tool == FLAT_NAME
    assert run.model.vae == "madebyollin/sdxl-vae-fp16-fix"
    (source,) = run.data.sources
    assert source.path == str(tmp_path / "my_dataset")
    assert (source.image_column, source.caption_column) == ("file_name", "text")
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.dropout) == (8, 16, 0.1)
    assert run.adapter.targets == ("to_k", "to_q", "to_v", "to_out.0")
    assert (run.training.steps, run.training.epochs, run.training.learning_rate) == (None, 100, 1e-4)
    assert (run.training.accumulation, run.training.precision) == (4, "fp16")
    assert (str(run.output), run.checkpoint.every, run.checkpoint.keep_last) == ("outputs", 500, 5)
    assert not report(loaded).ignored


def test_a_hub_dataset_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load(FLAT)
    (source,) = loaded.run.data.sources
    assert (source.path, source.layout) == ("hub:your-username/your-dataset", "auto")
    assert (source.image_column, source.caption_column) == ("file_name", "text")
    part = load(FLAT + "dataset_config_name: small\ndataset_split_name: test\n").run.data.sources[0]
    assert (part.path, part.split) == ("hub:your-username/your-dataset/small", "test")
    assert load(FLAT + "dataset_config_name: default\n").run.data.sources[0].path == source.path
    (tmp_path / "your-username/your-dataset").mkdir(parents=True)
    loaded = load(FLAT + "dataset_config_name: small\n")
    assert loaded.run.data.sources[0].path == str(tmp_path / "your-username/your-dataset"), "a folder goes first"
    assert notes(report(loaded).ignored)["dataset_config_name"] == "a folder has no configurations"


@pytest.mark.parametrize("path", ["s3://bucket/set", "https://x/{000..009}.tar", "hub:me/it"])
def test_urls_and_hub_names_stay_as_they_are(path: str) -> None:
    assert load(f"train_data_dir: '{path}'\nmax_train_steps: 1").run.data.sources[0].path == path
    native = f"data: {{sources: [{{path: '{path}'}}]}}\ntraining: {{steps: 1}}"
    assert load(native).run.data.sources[0].path == path


def test_a_pattern_of_shards_starts_from_the_run_file() -> None:
    native = "data: {sources: [{path: 'shards/{000..009}.tar'}]}\ntraining: {steps: 1}"
    assert load(native).run.data.sources[0].path == "/data/shards/{000..009}.tar"


def test_random_crop_and_center_crop() -> None:
    text = "train_data_dir: x\nmax_train_steps: 1\n"
    assert load(text + "random_crop: true\n").run.data.crop == "random"
    assert load(text + "center_crop: true\nrandom_crop: false\n").run.data.crop == "center"
    (found,) = problems(text + "center_crop: true\nrandom_crop: true\n")
    assert "random_crop and center_crop say the opposite" in found
    (found,) = problems(text + "max_train_samples: 10\n")
    assert "max_train_samples: 10: a run sees all images of its sources" in found


@pytest.mark.parametrize("text", [NESTED, LOCAL_FLAT, merged(LORA), merged(WANDB), merged(VALIDATION), merged(SLOW)])
def test_no_key_is_dropped_in_silence(text: str) -> None:
    loaded = load(text)
    seen = {entry.key for entry in (*report(loaded).mapped, *report(loaded).ignored, *report(loaded).refused)}
    assert leaves(text) <= seen


@pytest.mark.parametrize(("text", "steps"), [(CONSERVATIVE, "400-500"), (AGGRESSIVE, "800-1000")])
def test_a_range_in_prose_is_refused(text: str, steps: str) -> None:
    for whole in (text + "train_data_dir: x\n", merged(text, into="training")):
        (found,) = problems(whole)
        low = steps.split("-")[0]
        assert f"max_train_steps must be a whole number, not '{steps}'" in found
        assert f"{steps} is a range, not a value: choose one number, such as {low}" in found


def test_bare_fragments_of_the_guide() -> None:
    run = load(CONSERVATIVE.replace("400-500", "400") + "train_data_dir: x\n").run
    assert (run.training.steps, run.training.accumulation) == (400, 4)
    run = load(merged(AGGRESSIVE.replace("800-1000", "900"), into="training")).run
    assert (run.training.steps, run.training.learning_rate, run.training.batch_size) == (900, 5e-5, 2)
    assert run.adapter.train_text_encoders
    assert load(merged(CACHE)).run == load(merged(CACHE, into="dataset")).run == load(NESTED).run


def test_lora_fragment_leaves_out_layers_that_sdxl_lacks() -> None:
    loaded = load(merged(LORA))
    assert loaded.run.adapter.targets == ("to_q", "to_k", "to_v", "to_out.0")
    ignored = notes(report(loaded).ignored)
    for name in ("add_k_proj", "add_v_proj"):
        assert "SDXL has no such layer" in ignored[f"lora.target_modules.{name}"]


def test_wandb_fragment() -> None:
    trackers = load(merged(WANDB)).run.trackers
    assert [tracker.type for tracker in trackers] == ["tensorboard", "wandb"]
    assert trackers[1].model_dump() == {
        **{"type": "wandb", "project": "aldar-kose-training", "run_name": "dreambooth-lora-v1", "entity": None}
    }
    loaded = load(merged(WANDB.replace("use_wandb: true", "use_wandb: false")))
    assert [tracker.type for tracker in loaded.run.trackers] == ["tensorboard"]
    assert notes(report(loaded).ignored)["logging.wandb_project"] == "Weights & Biases is off"


def test_validation_fragment_becomes_previews() -> None:
    preview = load(merged(VALIDATION)).run.preview
    assert (len(preview.prompts), preview.every) == (4, 100)
    preview = load(merged(VALIDATION.replace("samples: 4", "samples: 6"))).run.preview
    assert [preview.prompts.count(prompt) for prompt in dict.fromkeys(preview.prompts)] == [2, 2, 1, 1]
    run = load(merged(VALIDATION + "dataset:\n  val_data_dir: held\n")).run
    assert run.validation.every == 100
    assert load(merged(VALIDATION)).run.validation.every is None


def test_the_identity_loss_and_its_model() -> None:
    identity = load(merged(IDENTITY)).run.objective.identity
    assert (identity.weight, identity.model) == (0.1, "buffalo_l")


def test_speed_and_text_encoder_fragments() -> None:
    assert load(merged(SLOW)).run.data.workers == 4
    run = load(merged(TEXT_ENCODER)).run
    assert run.adapter.train_text_encoders
    assert run.training.text_encoder_learning_rates is None
    run = load(merged("text_encoder:\n  train_text_encoder: true\n  learning_rate: 5e-6\n")).run
    assert run.training.text_encoder_learning_rates == (5e-6,)


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (MEMORY, "training.enable_cpu_offload", "CPU offload comes in a later version"),
        (OUT_OF_MEMORY, "training.enable_cpu_offload", "CPU offload comes in a later version"),
        ("training:\n  scale_lr: true\n", "training.scale_lr", "multiply it yourself"),
        ("training:\n  optimizer: automagic\n", "training.optimizer", "this optimizer is not there by this name"),
        ("logging:\n  report_to: comet_ml\n", "logging.report_to", "comet_ml comes in a later version"),
        ("training:\n  hub_token: hf_x\n", "training.hub_token", "a token does not belong in a file"),
    ],
)
def test_what_is_not_there_is_refused_by_name(text: str, key: str, words: str) -> None:
    (found,) = problems(merged(text))
    assert key in found
    assert words in found


def test_the_identity_loss_switched_off() -> None:
    loaded = load(merged(IDENTITY.replace("identity_loss: true", "identity_loss: false")))
    assert loaded.run.objective.identity is None
    assert {entry.key for entry in report(loaded).ignored} >= {"consistency.face_model"}


@pytest.mark.parametrize("text", [MEMORY, OUT_OF_MEMORY])
def test_the_same_switched_off_is_accepted(text: str) -> None:
    off = text.replace("enabled: true", "enabled: false").replace("identity_loss: true", "identity_loss: false")
    off = off.replace("enable_cpu_offload: true", "enable_cpu_offload: false")
    loaded = load(merged(off))
    assert not report(loaded).refused
    seen = {entry.key for entry in (*report(loaded).mapped, *report(loaded).ignored)}
    assert leaves(merged(off)) <= seen
    assert any(note.startswith("off (") for note in notes(report(loaded).ignored).values())
    if text is MEMORY:
        assert loaded.run.training.optimizer.type == "adamw8bit"
        assert loaded.run.training.accumulation == 8


def test_everything_refused_is_named_in_one_go() -> None:
    text = merged("training: {scale_lr: true}")
    for extra in ("training: {hub_token: x}", "logging: {report_to: comet_ml}", "training: {enable_cpu_offload: true}"):
        base = document.parse(text, file="x").data
        for section, values in document.parse(extra, file="x").data.items():
            base.setdefault(section, {}).update(values)
        text = document.emit(base)
    found = problems(text.replace("rank: 64", "rank: 0"))
    assert len(found) == 5
    assert any("lora.rank must be at least 1, not 0" in one for one in found), "in the words of the file"


def test_full_fine_tuning_leaves_the_settings_of_a_lora_out() -> None:
    loaded = load(merged("model:\n  finetune_method: full\ntext_encoder:\n  train_text_encoder: true\n"))
    assert loaded.run.adapter == Full(train_text_encoders=True)
    left = {key: note for key, note in notes(report(loaded).ignored).items() if key.startswith("lora.")}
    assert "lora.rank" in left
    assert all("only a LoRA has it" in note for note in left.values())
    flat = load("base_model: x\ntrain_data_dir: .\nmax_train_steps: 5\nfinetune_method: full\noptimizer: muon\n")
    assert flat.run.adapter == Full()
    assert flat.run.training.optimizer.type == "muon"
    assert "adapter.rank" not in notes(report(flat).assumed)


def test_dreambooth_without_prior_is_lora_on_the_instance_images() -> None:
    loaded = load(merged("model:\n  finetune_method: dreambooth\n"))
    assert loaded.run.adapter.type == "lora"
    assert "without prior preservation" in notes(report(loaded).assumed)["objective.type"]
