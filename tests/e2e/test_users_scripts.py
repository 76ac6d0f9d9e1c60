"""Guides that users have: their folders, files, commands and scripts as they stand, on a model of a few kilobytes.

Changed are only the base model, the sizes and lengths that a CPU can do, and the names of the old packages.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e_helpers import Desk, draw_pictures, shell
from PIL import Image
from safetensors.torch import load_file

from gesso.api import DiffusionTrainer, SDXLEngine, StoryboardDataset

# A guide to training a character, with a folder of frames and a nested file.

CHARACTER = """\
# Minimal DreamBooth LoRA config
model:
  base_model_id: "{base}"
  finetune_method: "lora"  # or "full" or "dreambooth"
  resolution: 64
  gradient_checkpointing: true
  enable_xformers: false

lora:
  rank: 64
  alpha: 64
  target_modules:
    - "to_q"
    - "to_k"
    - "to_v"
    - "to_out.0"

dataset:
  train_data_dir: "data/train"
  metadata_file: "metadata.jsonl"
  image_column: "image_path"
  caption_column: "prompt"

training:
  output_dir: "output/aldar_kose_lora"
  train_batch_size: 1
  gradient_accumulation_steps: 4
  num_epochs: 10
  max_train_steps: 2  # DreamBooth: start with 500 steps
  learning_rate: 5.0e-3
  mixed_precision: no
  lr_scheduler: "constant"
  lr_warmup_steps: 0
"""

SCRIPT = """\
from gesso import DiffusionTrainer, StoryboardDataset, collate_fn
from torch.utils.data import DataLoader
import yaml

# Load config
with open("configs/training.yaml") as f:
    config = yaml.safe_load(f)

# Initialize trainer
trainer = DiffusionTrainer(config)

# Create dataset
train_dataset = StoryboardDataset(
    data_dir="data/train",
    tokenizer=trainer.tokenizer,
    resolution=96
)

train_loader = DataLoader(
    train_dataset,
    batch_size=1,
    shuffle=True,
    collate_fn=collate_fn
)

# Train
trainer.train(train_loader)
"""

DRAW = """\
from gesso import SDXLEngine

engine = SDXLEngine(
    model_id="output/aldar_kose_lora/checkpoint-2",
    device="cpu"
)

image = engine.txt2img(
    prompt="a photo of sks aldar wearing traditional chapan",
    height=64,
    width=64,
    num_steps=3
)
"""

CHAPAN = "a photo of sks aldar wearing traditional chapan"


@pytest.fixture
def character(desk: Desk) -> Desk:
    """The guide's folder: six frames in a sub-folder, metadata beside it, the minimal file."""
    names = [f"image_{i:03}.jpg" for i in range(1, 7)]
    draw_pictures(desk.folder / "data/train/aldar_kose", names, side=96)
    rows = [{"image_path": f"aldar_kose/{name}", "prompt": f"{CHAPAN} {i}"} for i, name in enumerate(names)]
    (desk.folder / "data/train/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (desk.folder / "configs").mkdir()
    (desk.folder / "configs/training.yaml").write_text(CHARACTER.format(base=desk.base))
    return desk


def in_diffusers(base: Path, lora: Path, prompt: str) -> Image.Image:
    """The guide's own inference: plain diffusers, no code of ours."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    pipe.load_lora_weights(str(lora))
    placed = {name for name, _ in pipe.unet.named_parameters() if ".lora_B." in name}
    saved = load_file(lora / "pytorch_lora_weights.safetensors")
    assert len(placed) == sum(".lora_B." in name for name in saved) > 0
    pipe.set_progress_bar_config(disable=True)
    sizes: dict[str, Any] = {"width": 64, "height": 64, "num_inference_steps": 3, "guidance_scale": 7.5}
    return pipe(prompt, **sizes, generator=torch.Generator("cpu").manual_seed(0)).images[0]


def different(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of two pictures, in 1/255."""
    assert one.size == other.size
    return int(np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max())


def test_a_character_from_its_guide(character: Desk) -> None:
    """Train, load in diffusers, draw with the engine, go on from the checkpoint."""
    command = ["train", "--config", "configs/training.yaml"]
    printed = character.call(*command, "--output_dir", "output/aldar_kose_lora").fine()
    assert "read as nested SDXL training YAML" in printed
    assert "lora.rank -> adapter.rank" in printed
    assert "training 2 steps on 6 samples" in printed
    checkpoint = Path("output/aldar_kose_lora/checkpoint-2")
    saved = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    assert {tensor.shape[0] for name, tensor in saved.items() if ".lora_A." in name} == {64}
    assert any(tensor.any() for name, tensor in saved.items() if ".lora_B." in name)

    names: dict[str, Any] = {}
    exec(DRAW, names)
    drawn = in_diffusers(character.base, checkpoint, CHAPAN)
    assert different(names["image"], drawn) <= 1
    plain = SDXLEngine(character.base, device="cpu").txt2img(CHAPAN, height=64, width=64, num_steps=3)
    assert different(plain, drawn) > 1, "the LoRA changes nothing"

    longer = Path("configs/training.yaml")
    longer.write_text(longer.read_text().replace("max_train_steps: 2", "max_train_steps: 3"))
    printed = character.call(*command, "--resume_from_checkpoint", str(checkpoint)).fine()
    assert "training 3 steps on 6 samples an epoch, from step 2" in printed
    assert Path("output/aldar_kose_lora/checkpoint-3/pytorch_lora_weights.safetensors").is_file()
    assert (checkpoint / "manifest.json").is_file()
    assert json.loads(Path("output/aldar_kose_lora/metrics.json").read_text())["step"] == [1, 2, 3]


def test_the_guides_own_training_script(character: Desk) -> None:
    """`SCRIPT` word for word; the loader's resolution and batch size win over the file's."""
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    run = Path("output/aldar_kose_lora")
    settings = (run / "run.yaml").read_text()
    assert "resolution: 96" in settings
    assert "batch_size: 1" in settings
    assert "accumulation: 4" in settings
    assert (run / "checkpoint-2/pytorch_lora_weights.safetensors").is_file()
    batch = next(iter(names["train_loader"]))
    assert batch["pixel_values"].shape == (1, 3, 96, 96)
    assert batch["pixel_values"].dtype == torch.float32
    assert float(batch["pixel_values"].abs().max()) <= 1
    assert batch["input_ids"].shape == (1, 77)
    assert batch["prompts"][0].startswith(CHAPAN)

    steps = run / "events.jsonl"
    scripted = [json.loads(line)["loss"] for line in steps.read_text().splitlines() if '"StepDone"' in line]
    text = Path("configs/training.yaml").read_text().replace("resolution: 64", "resolution: 96")
    Path("configs/same.yaml").write_text(text)
    character.call("train", "--config", "configs/same.yaml", "--output", "same").fine()
    lines = Path("same/events.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines if '"StepDone"' in line] == scripted


def test_a_script_with_a_dataset_of_its_own_is_told_what_to_do(character: Desk) -> None:
    import yaml
    from torch.utils.data import DataLoader

    from gesso.errors import UserError

    trainer = DiffusionTrainer(yaml.safe_load(Path("configs/training.yaml").read_text()))
    with pytest.raises(UserError, match=r"the loader is over a list.*\n.*gesso.StoryboardDataset"):
        trainer.train(DataLoader([1, 2, 3]))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="there is no such folder"):
        StoryboardDataset(data_dir=character.folder / "data/trian")
    assert not Path("output").exists()


# A guide to a LoRA on a dataset of one's own, with a flat file and accelerate.

FLAT = """\
# Model settings
model_name: "{base}"
vae_name: "{base}/vae"

# Dataset
dataset_name: "{data}"
caption_column: "text"
image_column: "file_name"

# LoRA settings
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.1
lora_target_modules:
  - "to_k"
  - "to_q"
  - "to_v"
  - "to_out.0"

# Training hyperparameters
learning_rate: 1e-4
num_train_epochs: 3
train_batch_size: 1
gradient_accumulation_steps: 4
mixed_precision: "{precision}"

# Output
output_dir: "./outputs"
save_steps: 2
save_total_limit: 5
resolution: 64
"""

LATEST_LOSS = """\
import json
with open('outputs/metrics.json') as f:
    metrics = json.load(f)
print('Latest loss:', metrics['loss'][-1])
"""


@pytest.fixture
def dataset(desk: Desk) -> Desk:
    """The guide's folder: four pictures in `images/`, captions in `metadata.jsonl` beside it."""
    names = [f"image_{i:03}.jpg" for i in range(1, 5)]
    draw_pictures(desk.folder / "my_dataset/images", names)
    rows = [{"file_name": name, "text": f"A detailed caption describing the image {i}"} for i, name in enumerate(names)]
    (desk.folder / "my_dataset/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return desk


def write_flat(desk: Desk, *, data: str = "my_dataset", precision: str = "no") -> None:
    text = FLAT.format(base=desk.base, data=data, precision=precision)
    (desk.folder / "training_config.yaml").write_text(text)


def test_a_dataset_from_its_guide(dataset: Desk) -> None:
    """Three epochs of one step, and the curve that another guide looks at."""
    write_flat(dataset)
    printed = dataset.call("train", "--config", "training_config.yaml").fine()
    assert "read as diffusers options" in printed
    assert "training 3 steps on 4 samples" in printed
    assert sorted(p.name for p in Path("outputs").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    shown = io.StringIO()
    with redirect_stdout(shown):
        exec(LATEST_LOSS, {})
    said, loss = shown.getvalue().rsplit(" ", 1)
    assert said == "Latest loss:"
    steps = [json.loads(line) for line in Path("outputs/events.jsonl").read_text().splitlines()]
    assert float(loss) == [step["loss"] for step in steps if step["event"] == "StepDone"][-1]


def test_accelerate_launch(dataset: Desk) -> None:
    """In a process of accelerate's making, `python -m gesso` inside; the result is the one without accelerate."""
    write_flat(dataset)
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "gesso", "train"]
    answer = shell(*launch, "--config", "training_config.yaml", cwd=dataset.folder)
    assert "done: 3 steps" in answer.fine()
    dataset.call("train", "training_config.yaml", "--output", "alone").fine()
    weights = [load_file(Path(run, "checkpoint-3/pytorch_lora_weights.safetensors")) for run in ("outputs", "alone")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_the_guide_asks_for_and_this_machine_or_version_cannot_do(
    dataset: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    write_flat(dataset, precision="fp16")
    command = ["train", "--config", "training_config.yaml"]
    dataset.call(*command).refused(2, "training_config.yaml:25", "fp16 training needs a GPU", "use bf16 or fp32")
    write_flat(dataset, data="your-username/your-dataset")
    message = dataset.call(*command).refused(2, "hub:your-username/your-dataset", "cannot be read")
    assert "HF_HUB_OFFLINE" in message


def test_a_push_to_the_hub_that_fails_loses_nothing(dataset: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_flat(dataset)
    answer = dataset.call(
        "train", "--config", "training_config.yaml", "--hub_model_id", "your-username/your-lora-model"
    )
    message = answer.refused(3, "your-username/your-lora-model: the hub cannot be reached", "nothing is lost")
    assert "done: 3 steps" in answer.out
    assert Path("outputs/outputs.safetensors").is_file()
    folder = Path(message.split("hf upload your-username/your-lora-model ")[1].strip())
    assert list(folder.glob("*.safetensors")), "what it says to upload is there"
    assert (folder / "README.md").is_file()


def test_every_name_stays_what_it_is() -> None:
    """Loaded late; no name is that of a subpackage, which would take its place once imported."""
    code = (
        "import sys, gesso; assert 'torch' not in sys.modules\n"
        "for _ in range(2): print(*(callable(getattr(gesso, name)) for name in gesso.__all__))\n"
        "import gesso.export.lora; print(callable(gesso.export_lora), gesso.export.lora.__name__)"
    )
    names = " ".join(["True"] * 12)
    assert shell("-c", code, cwd=Path(sys.prefix)).fine().splitlines() == [names, names, "True gesso.export.lora"]
