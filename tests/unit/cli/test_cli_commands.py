from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gesso import cli, stages
from gesso.cli import health
from gesso.core.events import Finished, RunStarted
from gesso.core.seams import Emit
from gesso.errors import Interrupted, LockedError, NumericError

Result = subprocess.CompletedProcess[str]


def shell(*arguments: str, cwd: Path | None = None, **environment: str) -> Result:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "gesso", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}, timeout=120
    )


def call(*arguments: str) -> int:
    """The command line in this process; its exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    code = caught.value.code
    return code if isinstance(code, int) else 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8), (20 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a thing")
    return folder


@pytest.fixture
def run_file(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"output: {tmp_path}/out\ndata:\n  sources:\n    - path: {data.name}\ntraining:\n  steps: 10\n")
    return path


class Stages:
    """Stands in for the stages; remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.error: BaseException | None = None
        for name in ("train", "sample", "export"):
            monkeypatch.setattr(stages, name, self._record(name), raising=False)

    def _record(self, name: str) -> Any:
        def called(first: Any, **rest: Any) -> Any:
            self.calls.append((name, first, rest))
            if self.error is not None:
                raise self.error
            if name == "train":
                emit: Emit = rest["emit"]
                emit(RunStarted(0, total_steps=10, samples=12, folder=str(first.folder)))
                emit(Finished(10, seconds=1.0, peak_memory=2**30, outputs={"checkpoint": "x"}))
                return first.folder
            return [rest["output"]] if name == "sample" else Path("file.safetensors")

        return called


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(monkeypatch)


def test_help_and_version() -> None:
    result = shell("--help")
    assert result.returncode == 0
    for command in ("new", "check", "train", "sample", "export", "demo", "doctor", "config"):
        assert f"  {command} " in result.stdout
    assert shell("--version").stdout.startswith("gesso 0.")


@pytest.mark.parametrize("command", ["new", "check", "train", "sample", "export", "demo", "doctor", "config"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert "Usage: gesso" in capsys.readouterr().out


def test_the_front_loads_nothing_heavy(run_file: Path) -> None:
    """Not only on import: help, a whole check and config show run without torch and its like."""
    heavy = ("torch", "diffusers", "transformers", "peft", "accelerate", "tensorboard", "matplotlib")
    for arguments in (["--help"], ["check", str(run_file)], ["config", "show", str(run_file)]):
        code = (
            "import sys, gesso.cli, gesso.config.files, gesso.config.advice\n"
            f"try: gesso.cli.main({arguments!r})\n"
            "except SystemExit as done: assert not done.code, done.code\n"
            f"print('loaded:', [m for m in {heavy!r} if m in sys.modules])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == "loaded: []"


@pytest.mark.usefixtures("data")
def test_from_images_to_a_checked_run_file(tmp_path: Path) -> None:
    made = shell("new", "images", "--trigger", "sks aldar", "-o", "my.yaml", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "next: gesso check my.yaml" in made.stdout
    checked = shell("check", "my.yaml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "length      500 steps" in checked.stdout
    assert "ok: gesso train my.yaml" in checked.stdout
    again = shell("new", "images", "-o", "my.yaml", cwd=tmp_path)
    assert again.returncode == 2
    assert "already there" in again.stderr
    assert shell("new", "images", "-o", "my.yaml", "--force", "--preset", "style", cwd=tmp_path).returncode == 0
    assert "1500" in (tmp_path / "my.yaml").read_text()


def test_mistakes_are_printed_without_a_traceback(run_file: Path) -> None:
    run_file.write_text(run_file.read_text() + "  learning_rat: 1\n")
    result = shell("check", str(run_file), "--set", "training.steps=x")
    assert result.returncode == 2
    assert "2 problems found" in result.stderr
    assert f"{run_file}:7: unknown key learning_rat in training" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in shell("check", str(run_file), GESSO_DEBUG="1").stderr


def test_check_as_json(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check", str(run_file), "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert answer["forecast"]["images"] == [12]
    assert {hint["key"] for hint in answer["hints"]} >= {"preview.prompts"}
    assert call("check", str(run_file), "--json", "--set", "data.resolution=1001") == 2
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["errors"][0]["key"]) == (False, "data.resolution")
    assert answer["errors"][0]["where"] == "--set (data.resolution)"
    assert call("check", str(run_file), "--json", "--set", "training.steps=0", "--set", "seed=x") == 2
    answer = json.loads(capsys.readouterr().out)
    assert [error["what"].split()[0] for error in answer["errors"]] == ["seed", "training.steps"]


@pytest.mark.usefixtures("data")
def test_check_shows_what_became_of_another_tools_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "training.yaml"
    path.write_text("lora_rank: 8\nnum_train_epochs: 3\ndataset_name: ./images\ncache_latents: true\n")
    assert call("check", str(path)) == 0
    printed = capsys.readouterr().out
    assert "read as diffusers options:" in printed
    assert "line 1: lora_rank -> adapter.rank" in printed
    assert "line 4: cache_latents: no effect: latents are always cached" in printed
    assert "length      36 steps = 3.0 epochs" in printed


def test_config_show(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config", "show", str(run_file), "--set", "preview.prompts=[a, 'b: c']") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"training.steps: 10 # {run_file}:6" in lines
    assert 'preview.prompts: [a, "b: c"] # --set' in lines
    assert "training.batch_size: 1 # default" in lines
    assert call("config", "presets") == 0
    assert "low_vram" in capsys.readouterr().out


def test_train_hands_everything_over(
    run_file: Path, recorded: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--set", "training.batch_size=2", "--resume", "latest", "--output_dir", str(tmp_path / "else: where")]
    assert call("train", "--config", str(run_file), *options, "--accept-change", "training.batch_size") == 0
    ((name, run, rest),) = recorded.calls
    assert name == "train"
    assert run.training.batch_size == 2
    assert run.output == tmp_path / "else: where"
    assert (rest["resume"], list(rest["accept"])) == ("latest", ["training.batch_size"])
    assert "done: 10 steps" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--resume", "--resume_from_checkpoint", "--resume-from-checkpoint"])
def test_resume_spellings(run_file: Path, recorded: Stages, option: str) -> None:
    assert call("train", str(run_file), option, "out/checkpoint-5") == 0
    assert recorded.calls[0][2]["resume"] == "out/checkpoint-5"


def test_a_checkpoint_alone_finds_its_run_file(tmp_path: Path, run_file: Path, recorded: Stages) -> None:
    assert call("train", "--resume", str(tmp_path / "checkpoint-5")) == 0
    assert recorded.calls[0][1].training.steps == 10
    assert call("train") == 2
    assert call("train", str(run_file), "--config", "other.yaml") == 2
    assert len(recorded.calls) == 1


@pytest.mark.parametrize("option", ["--hub-model-id", "--hub_model_id"])
def test_pushing_to_the_hub(run_file: Path, recorded: Stages, tmp_path: Path, option: str) -> None:
    assert call("train", str(run_file), option, "me/it") == 0
    name, target, rest = recorded.calls[1]
    assert (name, target, rest["hub_repo"]) == ("export", str(tmp_path / "out"), "me/it")
    assert call("train", str(run_file), "--push-to-hub") == 2
    assert len(recorded.calls) == 2


def test_advice_is_heeded_before_anything_starts(
    run_file: Path, recorded: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", str(run_file), "--set", "training.learning_rate=0") == 2
    assert "nothing would be trained" in capsys.readouterr().err
    assert not recorded.calls


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumericError("the loss is not finite", where="step 3", fix="lower the rate"), 4),
        (LockedError("another process holds the folder"), 5),
        (Interrupted("stopped after step 3"), 75),
        (KeyboardInterrupt(), 75),
    ],
)
def test_exit_codes(
    run_file: Path, recorded: Stages, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    recorded.error = error
    assert call("train", str(run_file)) == code
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert str(error) in shown


def test_an_unexpected_error_is_short_and_its_traceback_is_in_the_run_folder(
    run_file: Path, recorded: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.error = RuntimeError("a tensor is sad\nand more")
    assert call("train", str(run_file)) == 1
    shown = capsys.readouterr().err
    assert "unexpected error: RuntimeError: a tensor is sad" in shown
    assert "Traceback" not in shown
    (log,) = (tmp_path / "out" / "logs").iterdir()
    assert str(log) in shown
    assert "in called" in log.read_text()


def test_sample(recorded: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lora", "a.safetensors:0.5", "--lora", "me/it", "--seed", "3", "--count", "2", "--width", "64"]
    assert call("sample", "runs/x", "--prompt", "a", "-p", "b", *options, "-o", str(tmp_path / "o.png")) == 0
    ((name, target, rest),) = recorded.calls
    assert (name, target) == ("sample", "runs/x")
    assert rest == {
        **{"prompts": ["a", "b"], "loras": [("a.safetensors", 0.5), ("me/it", 1.0)], "negative": "", "seed": 3},
        **{"steps": 25, "guidance": 7.0, "width": 64, "height": None, "count": 2, "output": tmp_path / "o.png"},
        **{"device": None, "precision": None, "checkpoint": None},
    }
    assert "o.png" in capsys.readouterr().out
    assert call("sample", "runs/x") == 2, "a prompt is needed"
    assert call("sample", "runs/x", "-p", "a", "--precision", "fp8") == 2


def test_export(recorded: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", "runs/x", "--format", "kohya", "--no-ema", "--push-to-hub", "me/it") == 0
    ((name, target, rest),) = recorded.calls
    assert (name, target) == ("export", "runs/x")
    assert rest == {
        **{"format": "kohya", "output": None, "use_ema": False, "precision": None, "hub_repo": "me/it"},
        **{"device": None, "checkpoint": None},
    }
    assert "file.safetensors" in capsys.readouterr().out
    assert call("export", "runs/x") == 0
    assert recorded.calls[1][2]["use_ema"] is None
    assert call("export", "runs/x", "--precision", "bf16") == 0
    assert recorded.calls[2][2]["precision"] == "bf16"
    assert call("export", "runs/x", "--format", "zip") == 2


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gesso.micro
    from gesso.micro import report

    base = dict.fromkeys([row.key for row in (*report.LEARNT, *report.KEPT)], 0.25)

    def run(folder: Path, *, emit: Emit) -> Path:
        emit(Finished(1, seconds=1.0, peak_memory=0, outputs={}))
        folder.mkdir(parents=True, exist_ok=True)
        figures = {"base": base, "trained": base | {"identity_rate": 0.875}, "steps": 300, "seconds": {"all": 150}}
        (folder / "figures.json").write_text(json.dumps(figures | {"counts": {"unseen": 64, "ordinary": 32}}))
        return folder / "report.html"

    story, opened = types.ModuleType("gesso.micro.demo"), list[str]()
    story.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gesso.micro.demo", story)
    monkeypatch.setattr(gesso.micro, "demo", story, raising=False)
    monkeypatch.setattr("typer.launch", opened.append)
    assert call("demo", "--folder", str(tmp_path / "d")) == 0
    said = capsys.readouterr().out
    assert re.search(r"It is Aldar +25% -> 88%", said)
    assert "64 pictures of Aldar" in said
    assert f"report: {tmp_path}/d/report.html" in said
    assert opened == []
    assert call("demo", "--folder", str(tmp_path / "d"), "--open") == 0
    assert opened == [f"{tmp_path}/d/report.html"]


def test_doctor_finds_this_machine_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("doctor", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    names = [check["name"] for check in answer["checks"]]
    assert answer["ok"] is True
    for name in ("python", "torch", "diffusers", "peft", "devices", "memory", "disk", "model cache", "wandb"):
        assert name in names


def test_doctor_names_what_is_missing_and_the_cure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = health.importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise health.importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "diffusers" else real(name)

    monkeypatch.setattr(health.importlib.metadata, "version", version)
    monkeypatch.setattr(health, "nvidia_gpus", lambda: [("RTX 3060", 12 * 2**30)])
    monkeypatch.setattr(health, "_TORCH", 'print(\'{"cuda": null, "gpus": [], "mps": false, "threads": 2}\')')
    assert call("doctor") == 3
    printed = capsys.readouterr().out
    assert 'pip install "peft>=' in printed
    assert "0.1, too old" in printed
    assert "RTX 3060 is there, but torch (built for the CPU only) cannot use it" in printed
    assert "--index-url https://download.pytorch.org/whl/" in printed


def test_doctor_survives_a_broken_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(health, "_TORCH", "raise ImportError('libcudart.so.12 not found')")
    assert call("doctor") == 3
    assert "torch cannot be imported: ImportError: libcudart.so.12 not found" in capsys.readouterr().out
