"""The names of the older preference framework, as its guide uses them."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gesso
from gesso import DPODataset, DPOTrainer, TrainingConfig, create_dataloader
from gesso.errors import UserError


@pytest.fixture
def config(tiny_base: Path, pictures: Path, encodings: Path, tmp_path: Path) -> TrainingConfig:
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = []
    for i in range(5):
        shutil.copy(pictures / f"{i}.png", folder / f"chosen-{i}.png")
        pixels = np.random.default_rng(i).integers(0, 128, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"rejected-{i}.png")
        rows.append({"caption": f"thing {i}", "chosen": f"chosen-{i}.png", "rejected": f"rejected-{i}.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return TrainingConfig(
        pretrained_model_name_or_path=str(tiny_base),
        train_data_dir=str(folder),
        output_dir=str(tmp_path / "run"),
        resolution=64,
        train_batch_size=2,
        gradient_accumulation_steps=1,
        max_train_steps=3,
        learning_rate=1e-2,
        rank=4,
        mixed_precision="fp32",
        gradient_checkpointing=False,
        validation_fraction=0.2,
        vae_batch_size=1,
        device="cpu",
        cache_dir=str(encodings),
        validation_prompts=("thing 1",),
    )


@pytest.mark.parametrize(
    ("name", "value"), [("mixed_precision", "half"), ("lr_scheduler", "cosin"), ("max_train_steps", 0), ("rank", "x")]
)
def test_a_wrong_value_is_named_as_the_script_names_it(config: TrainingConfig, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"TrainingConfig: {name} must be"):
        DPOTrainer(dataclasses.replace(config, **{name: value}))


def test_accelerates_word_for_float32(config: TrainingConfig) -> None:
    assert dataclasses.replace(config, mixed_precision="no").run.training.precision == "fp32"


def test_the_guides_script(config: TrainingConfig) -> None:
    trainer = DPOTrainer(config)
    trainer.setup_accelerator()
    trainer.setup_models()
    trainer.setup_data()
    trainer.setup_optimization()
    folder = trainer.train()
    assert (folder / "checkpoint-3" / "pytorch_lora_weights.safetensors").is_file()
    (drawn,) = trainer.generate_samples(seed=42, steps=25)
    (preview,) = (folder / "samples" / "step-00000003").glob("*.png")
    assert np.array_equal(np.asarray(drawn), np.asarray(Image.open(preview))), "the trained model's, not the base's"
    with pytest.raises(UserError, match="train has saved what it trained"):
        trainer.save_checkpoint(folder / "more")
    assert [entry["step"] for entry in trainer.metrics] == [1, 2, 3]
    assert trainer.metrics[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)


def test_steps_one_by_one(config: TrainingConfig, tmp_path: Path) -> None:
    config.learning_rate = 1e-4
    trainer = DPOTrainer(config)
    batches = list(trainer.train_dataloader)
    assert [len(batch["prompt"]) for batch in batches] == [2, 2, 1]
    loss, measured = trainer.compute_loss(batches[0])
    assert loss.requires_grad
    assert measured["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (measured["accuracy"], measured["margin"]) == (0.5, 0)
    steps = [trainer.train_step(batches[0]) for _ in range(3)]
    assert [entry["step"] for entry in steps] == [1, 2, 3]
    learner = trainer.session.learner
    learner.step = 0  # the noise and the timesteps of the first step again
    after, measured = trainer.compute_loss(batches[0])
    assert float(after.detach()) < math.log(2)
    assert measured["margin"] > 0
    learner.step = 3
    with pytest.raises(UserError, match="all 3 steps are done"):
        trainer.train_step(batches[0])
    saved = load_file(trainer.save_checkpoint(tmp_path / "saved") / "pytorch_lora_weights.safetensors")
    assert any(float(tensor.abs().max()) > 0 for name, tensor in saved.items() if "lora_B" in name)
    pictures = trainer.generate_samples(["thing 1", "thing 2"], steps=1)
    assert [picture.size for picture in pictures] == [(64, 64)] * 2


def test_both_sides_are_encoded_alike_and_in_small_batches(config: TrainingConfig) -> None:
    """The same pixels on both sides give the same latents; how many go through the VAE at once does not matter."""
    trainer = DPOTrainer(config)
    batch: dict[str, Any] = dict(next(iter(trainer.train_dataloader)))
    batch["rejected"] = batch["preferred"]
    ready = trainer._batch(batch)
    assert ready.rejected is not None
    assert torch.equal(ready.latents, ready.rejected)
    pixels = torch.cat([batch["preferred"], batch["rejected"]])
    one_by_one = trainer.process_vae_batch(pixels)
    trainer.config.vae_batch_size = 4
    assert torch.allclose(trainer.process_vae_batch(pixels), one_by_one, atol=1e-5)


def test_a_data_set_without_pairs_and_one_of_two_sizes(config: TrainingConfig, pictures: Path) -> None:
    with pytest.raises(UserError, match="no pairs"):
        DPODataset(pictures, 64)
    dataset = DPODataset(config.train_data_dir, 64)
    item = dataset[0]
    assert item["preferred"].shape == item["rejected"].shape == (3, 64, 64)
    assert item["geometry"] == (64, 64, 0, 0, 64, 64)
    assert len(list(create_dataloader(dataset, 2))) == 3
    shutil.copy(pictures / "5.png", Path(config.train_data_dir) / "rejected-0.png")
    with pytest.raises(UserError, match=r"\(64, 64\) and \(96, 64\)"):
        DPODataset(config.train_data_dir, 64)[0]


def test_the_names_are_gessos() -> None:
    assert {"TrainingConfig", "DPOTrainer", "DPODataset", "create_dataloader"} <= set(gesso.__all__)
