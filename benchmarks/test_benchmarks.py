"""Tests of the harness itself: `pytest benchmarks`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import peers
import pytest

HERE = Path(__file__).resolve().parent
SCRIPT = """
import argparse, torch
from torchvision import transforms
parser = argparse.ArgumentParser()
parser.add_argument("--max_train_steps", type=int)
arguments, _ = parser.parse_known_args()
layer = torch.nn.Linear(8, 5)
optimizer = torch.optim.AdamW(layer.parameters())
for _ in range(arguments.max_train_steps):
    layer(transforms.ToTensor()(transforms.Image.new("RGB", (8, 8)))).sum().backward()
    optimizer.step()
"""


def report(*, wall: list[float], cpu: list[float]) -> dict[str, object]:
    return {"wall": wall, "cpu": cpu, "trained": {"float32": 7}, "training_peak_rss": 100, "peak_rss": 200, "gpu": {}}


def run_meter(tmp_path: Path, source: str, *, steps: int) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(source)
    command = [sys.executable, str(HERE / "meter.py"), "--report", str(tmp_path / "r.json")]
    command += ["--steps", str(steps), "--warmup", "1", str(script), "--", "--max_train_steps", "3"]
    environment = {**os.environ, "BENCHMARK_START": "0.0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_window_begins_after_the_warm_up() -> None:
    stamps = report(wall=[10.0, 11.0, 12.0, 12.5, 14.0], cpu=[5.0, 6.0, 6.25, 6.5, 7.5])
    found = peers.figures(stamps, warmup=2, process_seconds=20.0, process_cpu=9.0)
    assert found["cpu_seconds_of_each_step"] == [0.25, 0.25, 1.0]
    assert found["step_cpu_seconds"] == 0.25
    assert found["step_seconds"] == 1.0
    assert found["steps_per_second"] == pytest.approx(3 / 3.0)
    assert (found["first_step_seconds"], found["first_step_cpu_seconds"]) == (10.0, 5.0)
    assert "peak_vram" not in found


def test_a_ratio_above_one_means_that_gesso_is_better() -> None:
    fast = {"step_cpu_seconds": 1.0, "steps_per_second": 1.0, "peak_rss": 50}
    slow = {"step_cpu_seconds": 3.0, "steps_per_second": 0.25, "peak_rss": 25}
    found = peers.summary({"gesso": [fast, fast, slow], "diffusers": [slow, slow, fast]})
    assert found["medians"]["gesso"] == fast
    assert found["ratios"] == {
        "gesso against diffusers": {"step_cpu_seconds": 3.0, "steps_per_second": 4.0, "peak_rss": 0.5}
    }


def test_a_result_file_is_json_with_short_lists() -> None:
    value = {"a": [0.5, 1e-05, -2], "b": {"c": ["x", "y"], "d": []}, "e": "[ 1,\n 2 ]"}
    text = peers.as_text(value)
    assert json.loads(text) == value
    assert '"a": [0.5, 1e-05, -2]' in text


def test_the_meter_counts_steps_and_refuses_another_number(tmp_path: Path) -> None:
    right = run_meter(tmp_path, SCRIPT, steps=3)
    assert right.returncode == 0, right.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert len(found["wall"]) == len(found["cpu"]) == 3
    assert found["wall"] == sorted(found["wall"])
    assert found["cpu"] == sorted(found["cpu"])
    assert found["trained"] == {"float32": 45}
    assert 0 < found["training_peak_rss"] <= found["peak_rss"]
    (tmp_path / "r.json").unlink()
    wrong = run_meter(tmp_path, SCRIPT, steps=4)
    assert wrong.returncode != 0
    assert "3 optimiser steps were seen where 4 were asked for" in wrong.stderr
    assert not (tmp_path / "r.json").exists()


def test_a_script_that_fails_fails_the_meter(tmp_path: Path) -> None:
    assert run_meter(tmp_path, SCRIPT + "\nraise SystemExit(3)", steps=3).returncode == 3
    assert run_meter(tmp_path, SCRIPT + "\nraise SystemExit(0)", steps=3).returncode == 0


def test_the_stand_in_does_what_the_script_asks_of_torchvision() -> None:
    source = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import crop
coordinates = np.stack((*np.meshgrid(np.arange(12), np.arange(8)), np.zeros((8, 12), int)), -1).astype(np.uint8)
picture = Image.fromarray(coordinates)  # red is x, green is y
middle = np.asarray(transforms.CenterCrop(4)(picture))
assert (middle[0, 0] == [4, 2, 0]).all() and middle.shape == (4, 4, 3)
assert (np.asarray(crop(picture, 1, 3, 2, 5))[0, 0] == [3, 1, 0]).all()
assert (np.asarray(transforms.RandomHorizontalFlip(p=1.0)(picture))[0, 0] == [11, 0, 0]).all()
assert transforms.Resize(4, interpolation=transforms.InterpolationMode.LANCZOS)(picture).size == (6, 4)
top, left, height, width = transforms.RandomCrop(4).get_params(picture, (4, 4))
assert 0 <= top <= 4 and 0 <= left <= 8 and (height, width) == (4, 4)
pixels = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5], [0.5])])(picture)
assert pixels.shape == (3, 8, 12) and pixels.dtype == torch.float32
assert torch.allclose(pixels[0, 0], torch.arange(12) / 127.5 - 1)
"""
    done = subprocess.run([sys.executable, "-c", source, str(HERE / "shims")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("flags", [["--steps", "5", "--warmup", "5"], ["--warmup", "0"], ["--repeats", "0"]])
def test_impossible_windows_are_refused(flags: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with pytest.raises(SystemExit) as refused:
        peers.main(["--diffusers-script", str(script), *flags])
    assert refused.value.code == 2


def test_the_whole_harness_on_networks_of_no_size(tmp_path: Path) -> None:
    """Gesso trains for real; a script of a few lines stands for the peer; the GPU's defaults are overridden."""
    script = tmp_path / "peer.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(HERE / "gpu" / "run.py"), "--diffusers-script", str(script), "--device", "cpu"]
    command += ["--size", "smoke", "--resolution", "64", "--images", "4", "--batch-sizes", "2", "--precisions", "fp32"]
    command += ["--steps", "3", "--warmup", "1", "--repeats", "2", "--threads", "1"]
    command += ["--results", str(tmp_path / "results"), "--work", str(tmp_path), "--name", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "results" / "smoke.json").read_text())
    (cell,) = result["cells"]
    assert cell["trained_parameters"] == {"gesso": {"float32": 13440}, "diffusers": {"float32": 45}}
    assert [len(rows) for rows in cell["repeats"].values()] == [2, 2]
    for row in cell["repeats"]["gesso"]:
        assert len(row["cpu_seconds_of_each_step"]) == 2
        assert min(row["cpu_seconds_of_each_step"]) > 0
        assert row["first_step_cpu_seconds"] < row["process_cpu_seconds"]
        assert row["threads"] == 1
    assert result["settings"]["device"] == "cpu"
    assert str(tmp_path) not in json.dumps(result)
    assert "gesso trained 13440 float32 parameters" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peer.py", "results"]


def test_every_seeded_fault_still_has_its_place_in_the_source() -> None:
    command = [sys.executable, str(HERE / "quality" / "mutations.py"), "--places"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
