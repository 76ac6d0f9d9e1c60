from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gesso.config import advice, files
from gesso.config.advice import Advice, Machine
from gesso.config.forecast import GIB, Counted, Forecast
from gesso.config.image_files import images_in
from gesso.config.run import RunConfig
from gesso.errors import Problems

Check = Callable[..., Advice]
GOOD = "name: x\noutput: {out}\ndata:\n  sources:\n    - path: {data}\ntraining:\n  steps: 100\n"


def fill(folder: Path, images: int = 12, captions: int | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        (folder / f"{i}.png").write_bytes(b"")
        if i < (images if captions is None else captions):
            (folder / f"{i}.txt").write_text("a thing")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return fill(tmp_path / "images")


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Callable[..., RunConfig]:
    def make(*sets: str) -> RunConfig:
        return files.load_text(GOOD.format(out=tmp_path / "out", data=data), folder=tmp_path, sets=sets).run

    return make


def found(result: Advice, level: str) -> dict[str, str]:
    return {f.key: f"{f.what} -> {f.fix}" for f in result.findings if f.level == level}


def numbers(result: Advice) -> Forecast:
    assert result.forecast is not None
    return result.forecast


def test_a_good_run_has_no_errors_and_leaves_nothing_behind(tmp_path: Path, run: Callable[..., RunConfig]) -> None:
    result = advice.check(run())
    assert not result.errors
    assert not result.warnings
    assert [hint.key for hint in result.hints] == ["checkpoint.every", "preview.prompts"][::-1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]
    result.require()


@pytest.mark.parametrize(
    ("sets", "key", "words"),
    [
        (["data.resolution=1001"], "data.resolution", "1001 is not a multiple of 8 pixels -> write 1000"),
        (["preview.width=513"], "preview.width", "513 is not a multiple of 8"),
        (["data.buckets.step=20"], "data.buckets.step", "20 is not a multiple of 8"),
        (["data.buckets.step=2048"], "data.buckets.step", "more than the resolution"),
        (["data.buckets.smallest=2048"], "data.buckets.smallest", "more than the resolution"),
        (["data.buckets.largest=512"], "data.buckets.largest", "less than the resolution"),
        (
            ["training.text_encoder_learning_rates=1e-5"],
            "training.text_encoder_learning_rates",
            "the text encoders do not train -> set adapter.train_text_encoders: true",
        ),
        (
            ["adapter.train_text_encoders=true", "training.text_encoder_learning_rates=[1e-5, 1e-5, 1e-5]"],
            "training.text_encoder_learning_rates",
            "3 rates for 2 text encoders -> give 1 or 2",
        ),
        (["training.learning_rate=0"], "training.learning_rate", "nothing would be trained"),
        (["training.device=cpu", "training.precision=fp16"], "training.precision", "fp16 training needs a GPU"),
        (["data.sources.0.missing_captions=trigger"], "data.sources.0.trigger", "there is no trigger word"),
        (["model.base=/nowhere/model"], "model.base", "there is no /nowhere/model"),
        (["training.optimizer.type=paged_adamw8bit", "training.device=cpu"], "training.optimizer.type", "needs a GPU"),
        (["training.attention=xformers"], "training.attention", "xformers is not installed -> pip install xformers"),
        (["objective.unmasked_weight=0.1"], "objective.unmasked_weight", "no source has a mask"),
        (["trackers.0.type=wandb"], "trackers.0.type", "wandb is not installed"),
    ],
)
def test_errors(
    run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, sets: list[str], key: str, words: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    errors = found(advice.check(run(*sets)), "error")
    assert list(errors) == [key]
    assert words in errors[key]


@pytest.mark.parametrize(
    ("sets", "key", "words"),
    [
        (["training.learning_rate=0.1"], "training.learning_rate", "0.1 is very high"),
        (["training.learning_rate=1e-9"], "training.learning_rate", "so low"),
        (["data.resolution=1000"], "data.resolution", "not a multiple of the bucket step 64"),
        (["training.schedule.warmup=100"], "training.schedule.warmup", "is not over when the run ends after 100"),
        (["training.accumulation=13", "data.validation.fraction=0.1"], "training.accumulation", "has only 11"),
        (["data.captions.dropout=0.9"], "data.captions.dropout", "90% of the captions are dropped"),
        (["validation.every=10"], "validation.every", "no images are held out"),
        (["data.validation.fraction=0.9"], "data.validation.fraction", "only 2 images are left"),
        (["objective.min_snr_gamma=1e6"], "objective.min_snr_gamma", "5 is usual"),
        (["training.ema.enabled=true", "training.ema.warmup=false"], "training.ema.decay", "mostly the start"),
        (
            ["data.sources.0.trigger=sks", "preview.prompts=[a photo of a cat]"],
            "preview.prompts",
            "no prompt has the trigger word sks",
        ),
    ],
)
def test_warnings(run: Callable[..., RunConfig], sets: list[str], key: str, words: str) -> None:
    result = advice.check(run(*sets))
    assert not result.errors
    warnings = found(result, "warning")
    assert list(warnings) == [key]
    assert words in warnings[key]


def test_text_encoder_rates_are_fine_where_the_encoders_train(run: Callable[..., RunConfig]) -> None:
    for rates in ("1e-5", "[1e-5, 0]"):
        sets = ["adapter.train_text_encoders=true", f"training.text_encoder_learning_rates={rates}"]
        assert not advice.check(run(*sets, "training.learning_rate=0")).errors


def test_wrong_folders_name_the_nearest_right_one(tmp_path: Path, run: Callable[..., RunConfig]) -> None:
    cases = {
        "imags": f"there is no {tmp_path}/imags -> did you mean {tmp_path}/images?",
        "zzz/deeper/still": f"folders with images there: {tmp_path}/images",
    }
    for name, words in cases.items():
        result = advice.check(run(f"data.sources.0.path={tmp_path / name}"))
        assert words in found(result, "error")["data.sources.0.path"]
        assert result.forecast is None


def test_validation_images_inside_the_training_folder(data: Path, run: Callable[..., RunConfig]) -> None:
    fill(data / "val", images=2)
    result = advice.check(run(f"data.validation.path={data / 'val'}"))
    assert "trained on too" in found(result, "error")["data.validation.path"]


def test_one_image_cannot_be_shared(run: Callable[..., RunConfig]) -> None:
    result = advice.check(run("data.validation.fraction=0.5"), counted=Counted((1,), 1, 1, 1))
    assert "cannot be shared" in found(result, "error")["data.validation.fraction"]


def test_what_only_an_estimate_says_is_no_error(run: Callable[..., RunConfig]) -> None:
    """Names of folders may give repeats, so the images have to be looked at before a run is refused."""
    sets, words = "training.accumulation=13", "= batch_size 1 x accumulation 13, and an epoch has only 12"
    estimated = advice.check(run(sets))
    assert words in found(estimated, "warning")["training.accumulation"]
    assert not estimated.errors
    looked = advice.check(run(sets), counted=Counted((12,), 0, 12, 1))
    assert words in found(looked, "error")["training.accumulation"]
    assert not advice.check(run(sets), counted=Counted((12,), 0, 120, 10)).errors


def test_output_that_cannot_be_written(
    tmp_path: Path, run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    assert "is a file" in found(advice.check(run(f"output={tmp_path}/file/run")), "error")["output"]

    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", denied)
    assert f"{tmp_path} cannot be written to: Permission denied" in found(advice.check(run()), "error")["output"]


def test_errors_carry_the_line_they_come_from(run: Callable[..., RunConfig]) -> None:
    result = advice.check(run("data.resolution=1001", "training.learning_rate=0"))
    with pytest.raises(Problems) as caught:
        result.require({"data.resolution": "run.yaml:7", "training.learning_rate": "default"})
    assert [problem.where for problem in caught.value.problems] == [
        *("run.yaml:7 (data.resolution)", "training.learning_rate"),
    ]


def test_forecast(tmp_path: Path, run: Callable[..., RunConfig]) -> None:
    more = fill(tmp_path / "more", images=8)
    sets = [
        f"data.sources.1.path={more}",
        *("data.sources.1.repeats=2", "data.sources.1.missing_captions=empty"),
        *("training.steps=1000", "training.batch_size=2", "training.accumulation=2", "data.validation.fraction=0.1"),
        *("checkpoint.every=300", "checkpoint.keep_last=2", "checkpoint.keep_every=600", "adapter.rank=8"),
    ]
    result = numbers(advice.check(run(*sets)))
    assert result.images == (12, 8)
    assert result.held_out == 2
    assert result.samples_per_epoch == round(28 * 18 / 20)
    assert result.steps_per_epoch == 7
    assert (result.steps, result.epochs) == (1000, 1000 / 7)
    assert result.checkpoints == 4, "300, 600, 900 and the last"
    assert result.checkpoints_kept == 3, "900, 1000 and 600"
    assert result.parameters == 11_612_160, "SDXL's attention at rank 8"
    assert result.checkpoint_bytes == 11_612_160 * 12
    assert result.cache_bytes == 20 * (2 * 4 * 128 * 128 * 4 + (77 * 2048 + 1280) * 2)
    assert result.disk_bytes == result.cache_bytes + 3 * result.checkpoint_bytes


@pytest.mark.parametrize(
    ("sets", "parameters"),
    [
        (["adapter.targets=attention-mlp", "adapter.rank=8"], 21_278_720),
        (["adapter.targets=[to_q, to_k, to_v, to_out.0]", "adapter.rank=8"], 11_612_160),
        (["adapter.targets=[to_k]", "adapter.rank=1"], 392_960),
        (["adapter.rank=1", "adapter.train_text_encoders=true"], 1_451_520 + 401_408),
    ],
)
def test_parameter_counts(run: Callable[..., RunConfig], sets: list[str], parameters: int) -> None:
    assert numbers(advice.check(run(*sets))).parameters == parameters


FULL = ("adapter.type=full", "training.precision=fp32", "training.learning_rate=1e-5")


def test_full_fine_tuning_counts_every_weight(run: Callable[..., RunConfig]) -> None:
    result = advice.check(run(*FULL))
    assert not result.errors
    assert not result.warnings
    denoiser = numbers(result).parameters
    assert denoiser == 2_567_000_000
    both = numbers(advice.check(run(*FULL, "adapter.train_text_encoders=true", "training.ema.enabled=true")))
    assert both.parameters is not None
    assert both.parameters > denoiser
    assert both.checkpoint_bytes == both.parameters * 24, "weights, two moments, average in float64 and float32"
    assert both.memory_bytes is not None
    assert both.memory_bytes > both.parameters * 24, "weights, gradient, two moments, average in float64"
    assert both.disk_bytes > both.cache_bytes + both.checkpoint_bytes + 6 * GIB, "and the model in the end"
    muon = numbers(advice.check(run(*FULL, "training.optimizer.type=muon")))
    assert muon.checkpoint_bytes is not None
    assert muon.checkpoint_bytes < denoiser * 12


def test_rates_of_a_full_fine_tune(tiny_base: Path, run: Callable[..., RunConfig]) -> None:
    warnings = found(advice.check(run(*FULL, "training.learning_rate=1e-3")), "warning")
    assert "very high for a full fine-tune -> 1e-5 is usual" in warnings["training.learning_rate"]
    small = ("data.resolution=64", "data.buckets.step=16", "training.learning_rate=1e-3", f"model.base={tiny_base}")
    assert not advice.check(run(*FULL, *small)).warnings, "random weights want more"


def test_the_folder_of_the_model_needs_a_name_of_its_own(run: Callable[..., RunConfig]) -> None:
    for name in ("logs", "samples", "checkpoint-5"):
        assert "choose another name" in found(advice.check(run(*FULL, f"name={name}")), "error")["name"]
        assert not advice.check(run(f"name={name}")).errors, "a LoRA is a file"


def test_muon_needs_a_torch_that_has_it(run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    sets = ("training.optimizer.type=muon",)
    assert not advice.check(run(*sets)).errors
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.8.1+cpu")
    assert "needs torch 2.9 or newer; this is 2.8.1" in found(advice.check(run(*sets)), "error")[sets[0].split("=")[0]]


@pytest.mark.parametrize("text_encoders", [False, True])
def test_weights_of_a_small_model_are_counted(
    tiny_base: Path, run: Callable[..., RunConfig], text_encoders: bool
) -> None:
    import torch

    from gesso.families.sdxl import SDXL

    sets = ("data.resolution=64", "data.buckets.step=16", f"model.base={tiny_base}")
    on = f"adapter.train_text_encoders={str(text_encoders).lower()}"
    result = numbers(advice.check(run(*FULL, *sets, on)))
    parts = SDXL(base=str(tiny_base)).load(("denoiser", "text"), dtype=torch.float32, device=torch.device("cpu"))
    networks = [parts.denoiser, *(parts.text_encoders if text_encoders else [])]
    assert result.parameters == sum(p.numel() for network in networks for p in network.parameters())
    assert result.checkpoint_bytes == result.parameters * 12
    assert result.memory_bytes is None, "what its activations take is not known"
    assert numbers(advice.check(run(*sets))).parameters is None


def test_epochs_give_steps(run: Callable[..., RunConfig]) -> None:
    result = numbers(advice.check(run("training.steps=null", "training.epochs=10", "training.accumulation=5")))
    assert (result.steps_per_epoch, result.steps, result.epochs) == (3, 30, 10)


def test_sizes_of_a_small_local_model_are_not_guessed(tmp_path: Path, run: Callable[..., RunConfig]) -> None:
    model = tmp_path / "model"
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        (model / part).mkdir(parents=True)
    (model / "vae" / "config.json").write_text('{"block_out_channels": [8, 16, 16], "scaling_factor": 0.13025}')
    (model / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"0" * 100)
    result = advice.check(run(f"model.base={model}", "data.resolution=68", "data.buckets.enabled=false"), Machine())
    assert not result.errors, "a cell of this model is 4 pixels"
    assert numbers(result).parameters is numbers(result).memory_bytes is None
    assert not [w for w in result.warnings if w.key == "training.device"]


def test_the_machine(run: Callable[..., RunConfig]) -> None:
    small = Machine(gpu="T4", gpu_memory=8 * GIB, memory=16 * GIB)
    warnings = found(advice.check(run("training.batch_size=2"), small), "warning")
    assert "T4 has 8 -> try training.gradient_checkpointing: true" in warnings["training"]
    assert "batch_size: 1" in warnings["training"]
    large = Machine(gpu="H200", gpu_memory=139 * GIB, memory=128 * GIB)
    assert not advice.check(run("training.batch_size=2"), large).warnings
    assert "no GPU was found" in found(advice.check(run(), Machine()), "warning")["training.device"]


def test_memory_falls_with_checkpointing_and_rises_with_the_batch(run: Callable[..., RunConfig]) -> None:
    def memory(*sets: str) -> Any:
        return numbers(advice.check(run(*sets))).memory_bytes

    floor = 5.4 * GIB
    assert floor < memory("training.gradient_checkpointing=true") < memory() < memory("training.batch_size=2")
    assert memory() > 10.2 * GIB
    assert memory("training.precision=fp32") > 1.8 * memory()


def test_a_full_disk_is_an_error(run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=GIB // 4))
    result = advice.check(run(), counted=Counted((12,), 0, 12, 12))
    assert "are free" in found(result, "error")["output"]
    assert "the whole cache" in found(result, "warning")["data.cache"]


def test_hidden_and_other_files_are_not_images(tmp_path: Path) -> None:
    for name in ("a.png", "B.JPG", "c.txt", ".hidden.png", "sub/d.webp", ".cache/e.png", "f.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(p.relative_to(tmp_path)) for p in images_in(tmp_path)] == ["B.JPG", "a.png", "sub/d.webp"]
