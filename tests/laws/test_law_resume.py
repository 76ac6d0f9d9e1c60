"""A resumed run equals one that was never interrupted, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gesso import stages
from gesso.core.events import Event, StepDone
from gesso.errors import Interrupted, UserError
from run_helpers import MakeRun, Stop, checkpoint_bytes, settings, stop_after

FULL = {"type": "full", "train_text_encoders": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"adapter__dropout": 0.3},
    "text encoders": {"adapter__train_text_encoders": True, "training__text_encoder_learning_rates": [5e-4, 1e-4]},
    "bf16": {"training__precision": "bf16"},
    "checkpointing": {"training__gradient_checkpointing": True, "objective__min_snr_gamma": 5},
    "full": {"adapter": FULL, "training__text_encoder_learning_rates": [5e-4, 1e-4]},
    "full, muon": {"adapter": FULL, "training__optimizer": {"type": "muon"}},
    "schedule-free": {"training__optimizer": {"type": "schedule_free"}, "training__ema": {"enabled": False}},
    "prodigy": {"training__optimizer": {"type": "prodigy"}, "training__learning_rate": 1.0},
    "text encoders stop": {
        "adapter__train_text_encoders": True,
        "training__text_encoder_stop": 0.5,
        "training__optimizer": {"type": "came"},
    },
    "losses": {
        "objective__noise_offset": 0.1,
        "objective__input_perturbation": 0.1,
        "objective__loss_type": "huber",
        "data__crop": "random",
    },
    "noise and timesteps": {
        "objective": {
            "pyramid_noise_iterations": 4,
            "timesteps": {"type": "beta", "alpha": 2, "beta": 1},
            "timestep_bias": {"begin": 0.5, "multiplier": 2},
            "weighting": {"type": "soft_min_snr"},
            "loss_type": "smooth_l1",
            "huber_schedule": "snr",
        },
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_uninterrupted(make_run: MakeRun, variant: str) -> None:
    overrides = VARIANTS[variant]
    whole = stages.train(make_run("whole", **overrides))
    broken = make_run("broken", **overrides)
    for step in (4, 5, 7):
        with pytest.raises(Stop):
            stages.train(broken, resume="latest", emit=stop_after(step))
    resumed = stages.train(broken, resume="latest")
    assert checkpoint_bytes(resumed, 8).keys() == checkpoint_bytes(whole, 8).keys()
    assert checkpoint_bytes(resumed, 8) == checkpoint_bytes(whole, 8)
    assert checkpoint_bytes(resumed, 8) != checkpoint_bytes(whole, 6)


def test_steps_after_a_resume_show_the_same_losses_and_rates(make_run: MakeRun) -> None:
    seen: dict[str, dict[int, tuple[float, float]]] = {"whole": {}, "resumed": {}}

    def sink(name: str) -> Any:
        def keep(event: Event) -> None:
            if isinstance(event, StepDone):
                seen[name][event.step] = (event.loss, event.learning_rate)

        return keep

    stages.train(make_run("whole"), emit=sink("whole"))
    broken = make_run("broken")
    with pytest.raises(Stop):
        stages.train(broken, emit=stop_after(5))
    folder = stages.train(broken, resume="latest", emit=sink("resumed"))
    assert sorted(seen["resumed"]) == [4, 5, 6, 7, 8]
    assert all(seen["whole"][step] == seen["resumed"][step] for step in seen["resumed"])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["step"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert metrics["loss"] == [seen["whole"][step][0] for step in metrics["step"]]


@pytest.mark.parametrize(
    ("adapter", "file"),
    [({"rank": 4}, "pytorch_lora_weights.safetensors"), (FULL, "text_encoder_2/model.safetensors")],
)
def test_a_damaged_newest_checkpoint_is_passed_over(make_run: MakeRun, adapter: Any, file: str) -> None:
    run = make_run("run", adapter=adapter)
    whole = checkpoint_bytes(stages.train(run), 8)
    weights = run.folder / "checkpoint-8" / file
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    told: list[str] = []
    stages.train(run, resume="latest", emit=lambda event: told.append(str(event)))
    assert any("checkpoint-8 is damaged" in text and file in text for text in told)
    assert checkpoint_bytes(run.folder, 8) == whole


def test_a_changed_setting_is_refused_unless_accepted_by_name(make_run: MakeRun) -> None:
    run = make_run("run")
    with pytest.raises(Stop):
        stages.train(run, emit=stop_after(4))
    other = make_run("run", seed=4, training__learning_rate=2e-3)
    with pytest.raises(UserError, match="seed: 3 -> 4") as refused:
        stages.train(other, resume="latest")
    assert "--accept-change seed" in str(refused.value)
    assert "learning_rate" not in str(refused.value)
    told: list[str] = []
    stages.train(other, resume="latest", accept=["seed"], emit=lambda event: told.append(str(event)))
    assert any("training.learning_rate: 0.001 -> 0.002" in text for text in told)


def test_changed_pictures_are_refused(make_run: MakeRun, pictures: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(pictures, copy)
    run = make_run("run", data__sources=[{"path": str(copy)}])
    with pytest.raises(Stop):
        stages.train(run, emit=stop_after(4))
    (copy / "0.txt").write_text("another caption")
    with pytest.raises(UserError, match=r"hash\.data"):
        stages.train(run, resume="latest")


def test_a_finished_run_is_not_started_over(make_run: MakeRun) -> None:
    run = make_run("run")
    stages.train(run)
    with pytest.raises(UserError, match="already holds a run"):
        stages.train(run)


def test_a_longer_run_goes_on_from_a_finished_one(make_run: MakeRun) -> None:
    """With a constant rate, 4 steps and then 4 more are the same as 8."""
    constant = {"training__schedule": {"type": "constant"}}
    whole = stages.train(make_run("whole", **constant))
    short = make_run("short", training__steps=4, **constant)
    stages.train(short)
    longer = short.model_copy(update={"training": make_run("x", **constant).training})
    assert checkpoint_bytes(stages.train(longer, resume="latest"), 8) == checkpoint_bytes(whole, 8)


SCRIPT = """
import json, sys
from gesso import stages
from gesso.config.run import RunConfig
from gesso.errors import Interrupted
import torch
torch.set_num_threads(1)
try:
    stages.train(RunConfig.model_validate(json.loads(sys.argv[1])), resume="latest")
except Interrupted as error:
    sys.exit(error.exit_code)
"""


def start(values: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SCRIPT, json.dumps(values)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def long_settings(tiny_base: Path, pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """Saves after every second step with many writes, so that kills fall into saves too; its own cache folder."""
    overrides = {"training__steps": 40, "checkpoint__every": 2, "checkpoint__keep_last": 2}
    return settings("killed", tiny_base, pictures, tmp_path / "cache", tmp_path, overrides)


def test_kills_change_nothing_in_full_training(long_settings: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 in training and saving of all weights under Muon, each time after some progress."""
    long_settings["adapter"] = FULL
    long_settings["training"] |= {"steps": 12, "optimizer": {"type": "muon"}}
    assert start(dict(long_settings, name="whole", output=str(tmp_path / "whole"))).wait() == 0
    killed = Path(long_settings["output"])
    for step, delay in [(2, 0.0), (4, 0.02), (6, 0.05)]:
        process = start(long_settings)
        while not any(killed.glob(f".partial-checkpoint-{step}-*")) and not (killed / f"checkpoint-{step}").exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(long_settings).wait() == 0
    assert checkpoint_bytes(killed, 12) == checkpoint_bytes(tmp_path / "whole", 12)


def test_twenty_kills_change_nothing(long_settings: dict[str, Any], tmp_path: Path) -> None:
    """kill -9 at random moments of caching, training and saving; each try goes on from the last."""
    whole = dict(long_settings, name="whole", output=str(tmp_path / "whole"))
    assert start(whole).wait() == 0
    rng = random.Random(7)
    kills = 0
    status = Path(long_settings["output"]) / "events.jsonl"
    while kills < 20:
        size = status.stat().st_size if status.exists() else 0
        process = start(long_settings)
        if kills >= 4:
            # The first kills fall into start-up and caching; the later ones wait until this try does something.
            while process.poll() is None and (not status.exists() or status.stat().st_size == size):
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.35))
        else:
            time.sleep(rng.uniform(0.5, 6.0))
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 20, f"the run ended after {kills} kills: make it longer"
    assert start(long_settings).wait() == 0
    killed = Path(long_settings["output"])
    assert checkpoint_bytes(killed, 40) == checkpoint_bytes(tmp_path / "whole", 40)
    assert not list(killed.glob(".partial-*"))
    assert not list(killed.glob(".trash-*"))


def test_sigterm_saves_and_says_resumable(long_settings: dict[str, Any]) -> None:
    folder = Path(long_settings["output"])
    values = dict(long_settings, checkpoint={"every": 1000})
    process = start(values)
    while not (folder / "metrics.json").exists() or not (folder / "events.jsonl").read_text().count("StepDone"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=90) == Interrupted.exit_code == 75
    (saved,) = folder.glob("checkpoint-*")
    assert 0 < int(saved.name.split("-")[1]) < 40
    assert json.loads((folder / "status.json").read_text())["state"] == "interrupted"


def test_a_second_run_in_the_folder_is_refused(long_settings: dict[str, Any]) -> None:
    from gesso.config.run import RunConfig
    from gesso.errors import LockedError

    process = start(long_settings)
    try:
        lock = Path(long_settings["output"]) / ".lock"
        while not lock.exists() or not lock.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        with pytest.raises(LockedError, match=f"pid {process.pid}"):
            stages.train(RunConfig.model_validate(long_settings), resume="latest")
    finally:
        process.kill()
        process.wait()


def test_a_branch_must_not_mix_with_what_came_after(make_run: MakeRun, tmp_path: Path) -> None:
    """Going on from an earlier checkpoint with another rate would leave the old later ones among the new."""
    run = make_run("run")
    folder = stages.train(run)
    other = make_run("run", training__learning_rate=5e-3)
    with pytest.raises(UserError, match="goes on after checkpoint-3, to checkpoint-8"):
        stages.train(other, resume=str(folder / "checkpoint-3"))
    branch = stages.train(other.model_copy(update={"output": tmp_path / "branch"}), resume=str(folder / "checkpoint-3"))
    assert checkpoint_bytes(branch, 8) != checkpoint_bytes(folder, 8)


def test_a_run_resumes_in_another_precision_with_a_notice(make_run: MakeRun) -> None:
    with pytest.raises(Stop):
        stages.train(make_run("run"), emit=stop_after(4))
    told: list[str] = []
    stages.train(make_run("run", training__precision="bf16"), resume="latest", emit=lambda e: told.append(str(e)))
    assert any("training.precision: 'fp32' -> 'bf16'" in text for text in told)


def test_nothing_left_to_train_is_said(make_run: MakeRun) -> None:
    run = make_run("run")
    stages.train(run)
    told: list[str] = []
    stages.train(run, resume="latest", emit=lambda e: told.append(str(e)))
    assert any("nothing is left to train" in text for text in told)
