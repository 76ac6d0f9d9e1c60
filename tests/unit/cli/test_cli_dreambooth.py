"""DreamBooth by flags: the commands of the older framework's guide as they stand, apart from the program's name."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gesso import cli, stages
from gesso.cli.dreambooth import options
from gesso.config.run import RunConfig
from gesso.errors import UserError
from gesso.evaluation import class_images
from gesso.evaluation.class_images import Wanted
from gesso.objectives import Denoise, DreamBooth

GUIDE = """
  --instance_data_dir data/train/aldar_kose \
  --instance_prompt "a photo of sks aldar" \
  --class_prompt "a photo of a person" \
  --output_dir output/aldar_dreambooth \
  --resolution 1024 \
  --train_batch_size 1 \
  --gradient_accumulation_steps 4 \
  --learning_rate 1e-4 \
  --max_train_steps 500 \
  --use_lora
"""
CLASS_IMAGES = """
  --class_prompt "a photo of a person" \
  --num_images 200 \
  --output_dir data/class_images
"""
CHANGES = ("data.resolution=64", "training.steps=2", "training.accumulation=1", "trackers=[]")
SMALL = ("--model", "micro:sdxl", *(word for change in CHANGES for word in ("--set", change)))
PRIOR = ("--with-prior-preservation", "--num-class-images", "3", "--class-data-dir", "data/class")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    code = caught.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GESSO_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data/train/aldar_kose"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(folder / f"image_{i:03d}.png")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The runs that would be trained."""
    runs: list[RunConfig] = []
    monkeypatch.setattr(stages, "train", lambda run, **_: runs.append(run))
    return runs


def test_the_guides_command(trained: list[RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "dreambooth", *shlex.split(GUIDE)) == 0
    (run,) = trained
    training, (source,) = run.training, run.data.sources
    assert (training.steps, training.batch_size, training.accumulation, training.learning_rate) == (500, 1, 4, 1e-4)
    assert (source.trigger, run.data.resolution, run.adapter.type) == ("a photo of sks aldar", 1024, "lora")
    assert run.output == Path("output/aldar_dreambooth")
    assert type(run.objective) is Denoise
    told = capsys.readouterr().out
    assert "class_prompt: no effect: prior preservation is off; with_prior_preservation turns it on" in told
    assert "line 0" not in told


@pytest.mark.parametrize("spelling", ["_", "-"])
def test_flags_with_either_mark_between_words(trained: list[RunConfig], spelling: str) -> None:
    words = [w.replace("_", spelling) if w.startswith("--") else w for w in shlex.split(GUIDE)]
    assert call("train", "dreambooth", *words, *PRIOR, "--prior-loss-weight=0.5", "--train-text-encoder") == 0
    objective = trained[0].objective
    assert isinstance(objective, DreamBooth)
    assert (objective.prior_weight, objective.class_images) == (0.5, 3)
    assert trained[0].adapter.train_text_encoders


def test_class_images_by_the_guides_flags(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Wanted] = []

    def fill(wanted: Wanted, **_: Any) -> int:
        asked.append(wanted)
        return 7

    monkeypatch.setattr(class_images, "fill", fill)
    assert call("class-images", *shlex.split(CLASS_IMAGES)) == 0
    assert (
        call("class-images", "--prompt", "a dog", "--count", "5", "--output", "d", "--size", "64x48", "--batch", "2")
        == 0
    )
    one, two = asked
    assert (one.prompt, one.count, one.folder) == ("a photo of a person", 200, Path("data/class_images"))
    assert (two.prompt, two.count, two.width, two.height, two.batch) == ("a dog", 5, 64, 48, 2)
    assert "7 drawn, of 200 wanted" in capsys.readouterr().out
    assert call("class-images", "--prompt", "a dog", "--output", "d", "--size", "big") == 2


def test_a_whole_run_draws_its_class_images_trains_and_goes_on(tmp_path: Path) -> None:
    flags = [*shlex.split(GUIDE), *SMALL, *PRIOR]
    assert call("train", "dreambooth", *flags) == 0
    folder, drawn = tmp_path / "output/aldar_dreambooth", tmp_path / "data/class"
    assert (folder / "checkpoint-2/pytorch_lora_weights.safetensors").is_file()
    pictures = {path: path.read_bytes() for path in drawn.glob("*.png")}
    assert len(pictures) == 3
    assert {Image.open(path).size for path in pictures} == {(64, 64)}
    # The run file that it leaves is the same run, and the class images are not drawn again.
    assert (
        call(
            "train",
            str(folder / "run.yaml"),
            "--resume",
            "latest",
            "--set",
            "training.steps=3",
            "--accept-change",
            "training.steps",
        )
        == 0
    )
    assert (folder / "checkpoint-3").is_dir()
    assert {path: path.read_bytes() for path in drawn.glob("*.png")} == pictures


def test_a_run_file_may_be_called_dreambooth(trained: list[RunConfig], tmp_path: Path) -> None:
    source = "{path: data/train/aldar_kose, trigger: sks, missing_captions: trigger}"
    (tmp_path / "dreambooth").write_text(f"data: {{sources: [{source}]}}\ntraining: {{steps: 3}}\n")
    assert call("train", "./dreambooth") == 0
    assert trained[0].training.steps == 3
    assert call("train", "dreambooth") == 2, "that is the command, which lacks its flags"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--a-b", "1", "--c"], {"a_b": "1", "c": True}),
        (["--p=x=y", "--q", "-1"], {"p": "x=y", "q": "-1"}),
        (["--prompts", "one", "two", "three"], {"prompts": ["one", "two", "three"]}),
    ],
)
def test_how_flags_are_read(words: Sequence[str], found: dict[str, object]) -> None:
    assert options(words) == found


@pytest.mark.parametrize(
    ("words", "what"), [(["run.yaml"], "belongs to no flag"), (["--a", "1", "--a", "2"], "given twice")]
)
def test_flags_that_make_no_sense(words: Sequence[str], what: str) -> None:
    with pytest.raises(UserError, match=what):
        options(words)


def test_unknown_and_refused_flags_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(GUIDE)
    assert call("train", "dreambooth", *words, "--output_kohya_format", "--lerning-rate", "3") == 2
    told = capsys.readouterr().err
    assert "gesso export RUN --format kohya" in told
    assert "did you mean learning_rate?" in told
