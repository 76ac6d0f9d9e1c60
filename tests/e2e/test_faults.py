"""What goes wrong at a user's desk: the exit code, one message that says what, where and what to do, nothing lost."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from e2e_helpers import Desk, draw_pictures, shell, started, tree
from safetensors.torch import load_file, save_file

from gesso import stages
from gesso.config.run import RunConfig
from gesso.core.folder import RunFolder
from run_helpers import settings

INPUT, RESOURCE, NUMERIC, LOCKED, INTERRUPTED = 2, 3, 4, 5, 75


@pytest.fixture(scope="module")
def finished(tiny_base: Path, pictures: Path, encodings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoint-2 and checkpoint-4."""
    overrides = {"training__steps": 4, "checkpoint__every": 2}
    folder = tmp_path_factory.mktemp("finished")
    return stages.train(RunConfig.model_validate(settings("run", tiny_base, pictures, encodings, folder, overrides)))


@pytest.fixture
def resumable(desk: Desk, finished: Path) -> Desk:
    """A desk where that run lies in the run folder and its run file is at hand."""
    shutil.copytree(finished, desk.output)
    desk.write(training__steps=4, checkpoint__every=2)
    return desk


@pytest.fixture
def own(desk: Desk) -> Path:
    """A copy of the pictures to spoil, named by the run file as `images`."""
    shutil.copytree(desk.pictures, desk.folder / "images")
    desk.write(data__sources=[{"path": "images"}], training__steps=1)
    return desk.folder / "images"


@pytest.fixture
def model(desk: Desk) -> Path:
    """A copy of the base model to spoil, named by the run file as `model`."""
    shutil.copytree(desk.base, desk.folder / "model")
    desk.write(model__base="model", training__steps=1)
    return desk.folder / "model"


def checkpoints(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in tree(folder).items() if name.startswith("checkpoint-")}


def status(folder: Path) -> str:
    return json.loads((folder / "status.json").read_text())["state"]


# The run file.


def test_a_misspelt_key_and_a_wrong_type_in_a_process_of_its_own(desk: Desk) -> None:
    """All mistakes at once, with their lines, before torch is even loaded."""
    text = desk.run_file.read_text().replace("learning_rate:", "learning_rat:")
    desk.run_file.write_text(text.replace("  batch_size: 2", "  batch_size: two"))
    for command in ("train", "check"):
        answer = shell("-m", "gesso", command, desk.run_file, "--set", "seed=-1", cwd=desk.folder)
        message = answer.refused(INPUT, "3 problems found", "--set seed=-1: seed must be at least 0")
        assert (
            f"{desk.line('learning_rat:')}: unknown key learning_rat in training\n  -> did you mean learning_rate?"
            in (message)
        )
        assert f"{desk.line('batch_size:')}: training.batch_size must be a whole number, not 'two'" in message
    assert not desk.output.exists()


def test_a_run_file_that_is_not_there(desk: Desk) -> None:
    desk.call("train", "runn.yaml").refused(INPUT, "runn.yaml", "there is no such run file", "run.yaml")
    desk.run_file.write_text("training: {steps: 3\n")
    desk.train().refused(INPUT, "run.yaml:")


# The pictures.


def test_a_missing_data_folder_names_the_nearest(desk: Desk) -> None:
    shutil.copytree(desk.pictures, desk.folder / "aldar_kose")
    desk.write(data__sources=[{"path": "aldar_kosse"}])
    place = desk.line("path:")
    for command in ("train", "check"):
        message = desk.call(command, desk.run_file).refused(INPUT, f"{place} (data.sources.0.path)", "there is no")
        assert f"did you mean {desk.folder / 'aldar_kose'}?" in message


def test_an_empty_data_folder(desk: Desk) -> None:
    (desk.folder / "empty").mkdir()
    desk.write(data__sources=[{"path": "empty"}])
    desk.train().refused(INPUT, str(desk.folder / "empty"), "no pictures found", "found: nothing")


def test_every_picture_without_a_caption_is_listed(desk: Desk, own: Path) -> None:
    for name in ("1.txt", "4.txt", "7.txt"):
        (own / name).unlink()
    message = desk.train().refused(INPUT, "3 of 9 pictures have no caption", "missing_captions")
    assert all(str(own / name) in message for name in ("1.txt", "4.txt", "7.txt"))
    for name in ("1.txt", "4.txt", "7.txt"):
        (own / name).write_text(" \n")
    message = desk.train().refused(INPUT, "3 of 9 pictures have no caption", "missing_captions")
    assert all(str(own / name) in message for name in ("1.txt", "4.txt", "7.txt"))
    desk.train("--set", "data.sources.0.missing_captions=empty").fine()


def test_broken_pictures_are_all_named_and_can_be_skipped(desk: Desk, own: Path) -> None:
    (own / "1.png").write_bytes(b"<html>not found</html>")
    whole = (own / "2.png").read_bytes()
    (own / "2.png").write_bytes(whole[: len(whole) // 2])
    message = desk.train().refused(INPUT, "2 problems found", f"{own / '2.png'}: the picture is damaged")
    assert f"{own / '1.png'}: not a picture" in message
    assert "data.skip_bad" in message
    printed = desk.train("--set", "data.skip_bad=true").fine()
    assert "warning: 2 unreadable pictures left out:" in printed
    assert all(str(own / name) in printed for name in ("1.png", "2.png"))
    assert "training 1 steps on 7 samples" in printed


def test_a_caption_that_is_not_utf8(desk: Desk, own: Path) -> None:
    (own / "3.txt").write_bytes("a photo\nof Köse".encode("latin-1"))
    desk.train().refused(INPUT, f"{own / '3.txt'}:2: the text is not UTF-8: byte 0xf6", "save it as UTF-8")


def test_broken_metadata_lines_are_all_named(desk: Desk, own: Path) -> None:
    rows = [f'{{"file_name": "{i}.png", "text": "thing {i}"}}' for i in range(9)]
    rows[2] = rows[2].replace('"text":', '"text"')
    rows[5] = rows[5].replace("5.png", "55.png")
    (own / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    message = desk.train().refused(INPUT, "2 problems found", f"{own / 'metadata.jsonl'}:3: not JSON")
    assert f"{own / 'metadata.jsonl'}:6: there is no picture '55.png'" in message
    assert "did you mean 5.png?" in message


def test_fewer_samples_than_one_step_takes(desk: Desk) -> None:
    for command in ("train", "check"):
        message = desk.call(command, desk.run_file, "--set", "training.batch_size=5").refused(
            INPUT,
            "an epoch has 9 samples (9 pictures x repeats), but one step takes 10 = batch_size 5 x accumulation 2",
        )
        assert "repeats" in message
    desk.train("--set", "training.batch_size=5", "--set", "data.validation.fraction=0.4").refused(
        INPUT, "an epoch has", "batch_size 5 x accumulation 2 x 1 process", "data.sources"
    )


# The base model.


@pytest.mark.parametrize(
    ("base", "code", "parts"),
    [
        ("./nowhere", INPUT, ["there is no", "nowhere", "diffusers folder"]),
        (
            "nobody/no-such-model",
            RESOURCE,
            ["on this machine", "HF_HUB_OFFLINE", "a local folder"],
        ),
        ("images", INPUT, ["images is not an SDXL diffusers folder", "0.png", "model_index.json"]),
        ("weights.ckpt", INPUT, ["is a pickle file", "convert it to .safetensors"]),
    ],
)
def test_a_base_model_that_is_none(
    desk: Desk, own: Path, monkeypatch: pytest.MonkeyPatch, base: str, code: int, parts: list[str]
) -> None:
    """A hub id without a network is a resource that is missing; all others are mistakes in the run file."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (own.parent / "weights.ckpt").write_bytes(b"x")
    desk.write(model__base=base)
    desk.train().refused(code, f"{desk.line('base:')} (model.base)", *parts)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_damaged_weights_of_the_base_model(desk: Desk, model: Path, part: str) -> None:
    (weights,) = (model / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    desk.train().refused(INPUT, f"{model / part}: the weights of {part} cannot be read", "fetch")
    assert status(desk.output) == "failed"
    weights.unlink()
    desk.train().refused(INPUT, f"{model / part}: ", "no .safetensors weights")


@pytest.mark.parametrize("file", ["model_index.json", "scheduler/scheduler_config.json", "vae/config.json"])
def test_damaged_settings_of_the_base_model(desk: Desk, model: Path, file: str) -> None:
    """Known before the training, not when its result is exported."""
    (model / file).write_text("{")
    answer = desk.train()
    answer.refused(INPUT, f"{model / file}", "cannot be read", "fetch the model again")
    assert "step 1: saved" not in answer.out


# Going on from checkpoints.


def test_starting_anew_where_a_run_lies(resumable: Desk) -> None:
    before = tree(resumable.output)
    message = resumable.train().refused(INPUT, "already holds a run (checkpoint-4)", str(resumable.output))
    assert "--resume latest" in message
    assert "--output" in message
    assert tree(resumable.output) == before


def test_a_damaged_checkpoint_named_by_its_path(resumable: Desk) -> None:
    state = resumable.output / "checkpoint-4/state/optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    before = checkpoints(resumable.output)
    message = resumable.train("--resume", "run/checkpoint-4").refused(
        INPUT, "run/checkpoint-4", "this checkpoint is damaged"
    )
    assert "state/optimizer.safetensors has" in message
    assert "--resume latest" in message
    resumable.train("--resume", "run/checkpoint-9").refused(INPUT, "run/checkpoint-9", "there is no such folder")
    assert checkpoints(resumable.output) == before


def test_a_damaged_newest_checkpoint_is_passed_over(resumable: Desk) -> None:
    before = checkpoints(resumable.output)
    weights = resumable.output / "checkpoint-4/pytorch_lora_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x40
    weights.write_bytes(content)
    printed = resumable.train("--resume", "latest").fine()
    assert (
        "warning: checkpoint-4 is damaged and is passed over: pytorch_lora_weights.safetensors was altered" in printed
    )
    assert "from step 2" in printed
    after = checkpoints(resumable.output)
    assert {name for name in before if before[name] != after[name]} <= {
        "checkpoint-4/manifest.json",
        "checkpoint-4/pytorch_lora_weights.safetensors",  # the header's keys come in any order
        "checkpoint-4/ema/pytorch_lora_weights.safetensors",
    }
    again = load_file(weights)
    weights.write_bytes(before["checkpoint-4/pytorch_lora_weights.safetensors"])
    assert all(torch.equal(again[name], tensor) for name, tensor in load_file(weights).items())


def test_no_checkpoint_is_whole(resumable: Desk) -> None:
    for step in (2, 4):
        (resumable.output / f"checkpoint-{step}" / "manifest.json").write_text("{")
    before = checkpoints(resumable.output)
    resumable.train("--resume", "latest").refused(INPUT, "no checkpoint of this run is whole", "--output")
    for command in (["sample", "run", "-p", "x"], ["export", "run"]):
        resumable.call(*command).refused(INPUT, "every checkpoint of this run is damaged")
    assert checkpoints(resumable.output) == before


def test_a_changed_seed_is_shown_and_must_be_accepted(resumable: Desk) -> None:
    before = checkpoints(resumable.output)
    changed = ["--resume", "latest", "--set", "seed=9", "--set", "training.steps=5"]
    resumable.train(*changed).refused(INPUT, "seed: 3 -> 9", "--accept-change seed", "exact continuation")
    resumable.train(*changed, "--accept-change", "sead").refused(INPUT, "seed: 3 -> 9")
    assert checkpoints(resumable.output) == before
    printed = resumable.train(*changed, "--accept-change", "seed").fine()
    assert "warning: changed since the checkpoint: seed: 3 -> 9" in printed
    assert checkpoints(resumable.output).items() >= before.items()
    assert "checkpoint-5/manifest.json" in checkpoints(resumable.output)


def test_a_changed_caption_must_be_accepted(resumable: Desk) -> None:
    shutil.copytree(resumable.pictures, resumable.folder / "images")
    resumable.write(data__sources=[{"path": "images"}], training__steps=5, checkpoint__every=2)
    (resumable.folder / "images/4.txt").write_text("another caption")
    message = resumable.train("--resume", "latest").refused(INPUT, "hash.data:", "--accept-change hash.data")
    assert "seed" not in message
    printed = resumable.train("--resume", "latest", "--accept-change", "hash.data").fine()
    assert "from step 4" in printed


# While it runs.


def test_a_loss_that_is_no_number(resumable: Desk) -> None:
    """Ends before the update; the message names the step and its pictures, the checkpoints stay as they were."""
    shutil.copytree(resumable.base, resumable.folder / "model")
    (weights,) = (resumable.folder / "model/unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_in.weight"].view(-1)[0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    resumable.write(model__base="model", training__steps=6, checkpoint__every=2)
    before = checkpoints(resumable.output)
    going_on = ["--resume", "latest", "--accept-change", "hash.denoiser"]
    message = resumable.train(*going_on, "--accept-change", "model.base").refused(
        NUMERIC, "the loss of step 5 is not finite (loss nan", "--resume latest", "bf16 or fp32"
    )
    named = [path for path in resumable.pictures.glob("*.png") if str(path) in message]
    assert len(named) == 4, "batch_size 2 x accumulation 2"
    assert checkpoints(resumable.output) == before
    assert status(resumable.output) == "failed"
    assert json.loads((resumable.output / "metrics.json").read_text())["step"] == [1, 2, 3, 4]
    events = [json.loads(line) for line in (resumable.output / "events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["exit_code"], events[-1]["resumable"]) == ("Failed", NUMERIC, True)
    # The same run goes on once the model is mended.
    shutil.copyfile(next((resumable.base / "unet").glob("*.safetensors")), weights)
    resumable.train("--resume", "latest", "--accept-change", "model.base").fine()
    assert "checkpoint-6/manifest.json" in checkpoints(resumable.output)


def test_the_output_is_a_file(desk: Desk) -> None:
    desk.output.write_text("precious")
    desk.train().refused(INPUT, f"{desk.line('output:')} (output)", "is a file", "choose another output")
    desk.train("--output", "run/deeper").refused(INPUT, "is a file", "choose another output")
    assert desk.output.read_text() == "precious"


def test_a_second_run_in_the_same_folder(resumable: Desk) -> None:
    before = tree(resumable.output)
    with RunFolder(resumable.output).held():
        resumable.train("--resume", "latest").refused(LOCKED, str(resumable.output), "another run is writing here (pid")
    del before[".lock"]
    after = tree(resumable.output)
    del after[".lock"]
    assert after == before


@pytest.mark.parametrize("sets", [["training.device=cpu"], ["training.device=null"]])
def test_fp16_on_a_cpu(desk: Desk, monkeypatch: pytest.MonkeyPatch, sets: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    desk.write(training__precision="fp16")
    options = [part for one in sets for part in ("--set", one)]
    place = f"{desk.line('precision:')} (training.precision)"
    desk.train(*options).refused(INPUT, place, "fp16 training needs a GPU", "bf16 or fp32")


def test_a_device_that_is_not_there(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    desk.train("--set", "training.device=cuda").refused(RESOURCE, "no CUDA device is visible", "gesso doctor")
    desk.train("--set", "training.device=gpu").refused(INPUT, "--set", "there is no device 'gpu'", "cuda, cuda:1")
    desk.call("sample", desk.base, "-p", "x", "--device", "gpu").refused(INPUT, "there is no device 'gpu'")


# Pictures of a model that cannot be drawn.


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["runz", "-p", "x"], ["there is no folder or file runz"]),
        (["BASE", "-p", "x", "--lora", "gone.safetensors:0.5"], ["--lora", "gone.safetensors"]),
        (["BASE", "-p", "x", "--lora", "run.yaml"], ["run.yaml", "not a readable safetensors file"]),
        (["BASE", "-p", "x", "--width", "61"], ["61 x 64", "multiples of 8"]),
    ],
)
def test_what_cannot_be_drawn(desk: Desk, options: list[str], parts: list[str]) -> None:
    chosen = [str(desk.base) if option == "BASE" else option for option in options]
    desk.call("sample", *chosen, "--steps", "1").refused(INPUT, *parts)
    assert not Path("out.png").exists()


# Ctrl-C.


def wait_for(found: Callable[[], bool], process_ended: Callable[[], int | None]) -> None:
    while not found():
        assert process_ended() is None, "the process ended too early"
        time.sleep(0.005)


def test_ctrl_c_while_caching(desk: Desk) -> None:
    """Answered between two pictures with 75; meanwhile nobody else gets in; afterwards what was cached is kept."""
    names = [f"{i}.png" for i in range(400)]
    draw_pictures(desk.folder / "many", names)
    many = [{"path": "many", "missing_captions": "empty"}]
    desk.write(data__sources=many, data__cache="cache", data__flip=False, training__epochs=1, training__accumulation=40)
    events = desk.output / "events.jsonl"

    def caching() -> bool:
        return events.exists() and '"task": "caching images"' in events.read_text()

    with started("-m", "gesso", "train", desk.run_file, cwd=desk.folder) as process:
        wait_for(caching, process.poll)
        desk.train("--resume", "latest").refused(LOCKED, f"another run is writing here (pid {process.pid}")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == INTERRUPTED, out + err
    assert "Traceback" not in out + err
    assert "stopped as asked, before training began" in err
    assert "what is cached is kept" in err
    assert "StepDone" not in events.read_text()
    assert not checkpoints(desk.output)
    cached = {p: p.stat().st_mtime_ns for p in (desk.folder / "cache/encodings").rglob("*") if p.is_file()}
    assert 0 < len(cached) < 400, "it was not stopped in the middle"
    desk.train("--resume", "latest", "--set", "training.steps=1", "--set", "training.accumulation=1").fine()
    assert {p: p.stat().st_mtime_ns for p in cached} == cached
    assert checkpoints(desk.output)
