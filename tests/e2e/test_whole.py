"""One user's way from a folder of pictures to files for other programs, by the command line and then in Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from e2e_helpers import Desk, draw_pictures
from PIL import Image
from safetensors import safe_open

import gesso
from gesso.evaluation.pictures import read_settings

PROMPT = "a photo of sks"


@pytest.fixture
def drawn(desk: Desk) -> Desk:
    """Eight uncaptioned pictures in `frames`, and nothing else."""
    desk.run_file.unlink()
    draw_pictures(desk.folder / "frames", [f"{i}.jpg" for i in range(8)])
    return desk


def quick(desk: Desk) -> list[str]:
    """What makes a preset fit for a test; a user would write these into the file."""
    values = {
        "data.resolution": 64,
        "data.buckets.step": 16,
        "data.cache": desk.encodings,
        "adapter.rank": 4,
        "training.device": "cpu",
        "training.precision": "fp32",
        "training.learning_rate": 5e-3,
        "training.accumulation": 2,
        "training.schedule.warmup": 0,
        "preview.every": 2,
        "preview.inference_steps": 2,
        "checkpoint.every": 2,
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def pixels(file: Path) -> np.ndarray:
    """[H, W, 3] of a picture that is neither black nor flat."""
    found = np.asarray(Image.open(file).convert("RGB"), dtype=np.int16)
    assert found.max() > 32
    assert found.std() > 4
    return found


def difference(one: Path, other: Path) -> int:
    """Largest difference of two pictures, in 1/255."""
    return int(np.abs(pixels(one) - pixels(other)).max())


def keys(file: Path) -> set[str]:
    with safe_open(file, "pt") as opened:
        return set(opened.keys())


def test_from_pictures_to_files_for_other_programs(drawn: Desk) -> None:
    options = quick(drawn)
    made = drawn.call("new", "frames", "--base", drawn.base, "--trigger", "sks", "-o", "aldar.yaml").fine()
    assert "next: gesso check aldar.yaml" in made
    checked = drawn.call("check", "aldar.yaml", *options, "--set", "training.steps=4").fine()
    assert "images      8, and 2 held out; 6 samples an epoch" in checked
    assert "ok: gesso train aldar.yaml" in checked

    train_and_resume(drawn, options)
    kohya, diffusers = export(drawn)
    sample(drawn, kohya)
    in_diffusers(drawn, diffusers)


def train_and_resume(drawn: Desk, options: list[str]) -> None:
    run = Path("runs/frames")
    drawn.call("train", "aldar.yaml", *options, "--set", "training.steps=2").fine()
    printed = drawn.call("train", "aldar.yaml", *options, "--set", "training.steps=4", "--resume", "latest").fine()
    assert "from step 2" in printed
    assert "validation loss" in printed
    assert f'try it: gesso sample {run.absolute()} --prompt "..."' in printed
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["step"] == [1, 2, 3, 4]
    assert metrics["validation_step"] == [0, 2, 4]
    assert list((run / "logs").glob("events.out.tfevents.*"))
    shown = [json.loads(line) for line in (run / "samples/index.jsonl").read_text().splitlines()]
    assert {row["step"] for row in shown} == {0, 2, 4}
    assert {row["prompt"] for row in shown} >= {PROMPT, "a photo of a dog"}
    files = {(row["step"], row["prompt"]): run / row["file"] for row in shown}
    assert pixels(files[0, PROMPT]).shape == (64, 64, 3)
    assert difference(files[0, PROMPT], files[4, PROMPT]) > 1, "it learnt nothing"


def export(drawn: Desk) -> tuple[Path, Path]:
    """Both formats; the same layers under each program's names."""
    kohya, diffusers = Path("for_comfy.safetensors"), Path("for_diffusers/pytorch_lora_weights.safetensors")
    for name, file in (("kohya", kohya), ("diffusers", diffusers)):
        answer = drawn.call("export", "runs/frames", "--format", name, "--precision", "fp32", "-o", file)
        assert answer.fine().strip() == str(file)
    ours, theirs = keys(diffusers), keys(kohya)
    down = {key for key in theirs if key.endswith(".lora_down.weight")}
    assert len(down) == sum(key.endswith(".lora_A.weight") for key in ours) > 0
    assert all(key.startswith("unet.") for key in ours)
    assert all(key.startswith("lora_unet_") for key in theirs)
    assert theirs == {
        key.replace("lora_down.weight", end) for key in down for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    with safe_open(kohya, "pt") as opened:
        header: dict[str, str] = opened.metadata()
        assert opened.get_tensor(sorted(down)[0]).dtype == torch.float32
    assert header["ss_network_dim"] == "4"
    assert header["modelspec.title"] == "frames"
    return kohya, diffusers


def sample(drawn: Desk, other: Path) -> None:
    """A grid of two prompts by two seeds; each picture tells how it was made; a LoRA at half strength shows."""
    shape = ["--steps", "2", "--width", "64", "--height", "48"]
    two = ["--prompt", PROMPT, "-p", "a photo of a dog", "--count", "2", "--seed", "5", "--negative", "blurry"]
    files = [Path(line) for line in drawn.call("sample", "runs/frames", *two, *shape, "-o", "out/o.png").fine().split()]
    assert [file.name for file in files] == ["o-00.png", "o-01.png", "o-02.png", "o-03.png", "o.png"]
    assert {pixels(file).shape for file in files[:4]} == {(48, 64, 3)}
    assert len({file.read_bytes() for file in files}) == 5
    rows, columns, _ = pixels(files[4]).shape
    assert columns > 2 * 64
    assert rows > 2 * 48
    settings = read_settings(files[3])
    assert settings["prompt"] == "a photo of a dog"
    assert (settings["negative"], settings["seed"], settings["steps"], settings["width"]) == ("blurry", 8, 2, 64)
    assert "checkpoint-4" in settings["model"]
    with Image.open(files[0]) as opened:
        assert opened.text["parameters"].startswith(f"{PROMPT}\nNegative prompt: blurry\nSteps: 2,")  # type: ignore[attr-defined]

    one = ["--prompt", PROMPT, "--seed", "5", *shape]
    for target, lora, file in [
        ("runs/frames", [], "own.png"),
        (str(drawn.base), [], "base.png"),
        (str(drawn.base), ["--lora", f"{other}:1"], "whole.png"),
        (str(drawn.base), ["--lora", f"{other}:0.5"], "half.png"),
        ("runs/frames", ["--lora", f"{other}:0.5"], "more.png"),
    ]:
        drawn.call("sample", target, *one, *lora, "-o", file).fine()
    assert difference(Path("own.png"), Path("whole.png")) <= 1, "the exported file is not what was trained"
    for one_file, other_file in [("base", "own"), ("base", "half"), ("half", "whole"), ("own", "more")]:
        assert difference(Path(f"{one_file}.png"), Path(f"{other_file}.png")) > 1
    assert read_settings(Path("half.png"))["model"].endswith(f"{other} x 0.5")


def in_diffusers(drawn: Desk, lora: Path) -> None:
    """Plain diffusers with the exported file draws what `gesso sample` drew."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(drawn.base)
    pipe.load_lora_weights(str(lora.parent))
    pipe.set_progress_bar_config(disable=True)
    sizes: dict[str, Any] = {"width": 64, "height": 48, "num_inference_steps": 2, "guidance_scale": 7.0}
    pipe(PROMPT, **sizes, generator=torch.Generator("cpu").manual_seed(5)).images[0].save("theirs.png")
    assert difference(Path("theirs.png"), Path("own.png")) <= 1


def test_the_same_in_python(desk: Desk) -> None:
    run = gesso.load_run("run.yaml", ["training.steps=2", "training.ema.enabled=false", "name=mine"])
    assert (run.training.steps, run.name, run.folder) == (2, "mine", desk.output)
    folder = gesso.train(run)
    assert folder == desk.output
    desk.train("--output", "again", "--set", "training.steps=2", "--set", "training.ema.enabled=false").fine()
    weights = "checkpoint-2/pytorch_lora_weights.safetensors"
    with safe_open(folder / weights, "pt") as one, safe_open(Path("again", weights), "pt") as two:
        assert set(one.keys()) == set(two.keys())
        for name in one.keys():  # noqa: SIM118
            assert torch.equal(one.get_tensor(name), two.get_tensor(name))
    (picture,) = gesso.sample(str(folder), prompts=["a photo"], steps=2, width=64, height=64, output=Path("p.png"))
    assert pixels(picture).shape == (64, 64, 3)
    assert len(keys(gesso.export_lora(str(folder), format="diffusers", output=desk.folder / "mine.safetensors"))) > 100
