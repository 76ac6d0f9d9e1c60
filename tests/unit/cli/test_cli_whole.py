"""The commands one after another on a tiny model, as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from gesso import cli

NESTED = """\
model: {{base_model_id: {base}, resolution: 64, finetune_method: lora}}
lora: {{rank: 4, alpha: 8}}
dataset: {{train_data_dir: {data}}}
training: {{output_dir: out, max_train_steps: 4, mixed_precision: "no", save_steps: 2, train_batch_size: 2}}
"""


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code if isinstance(caught.value.code, int) else 0


def test_train_resume_sample_export(
    tmp_path: Path,
    tiny_base: Path,
    pictures: Path,
    encodings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("training.yaml").write_text(NESTED.format(base=tiny_base, data=pictures))
    quick = ["--set", f"data.cache={encodings}", "--set", "training.device=cpu"]
    assert call("train", "--config", "training.yaml", *quick) == 0
    assert "try it: gesso sample" in capsys.readouterr().out
    assert Path("out/checkpoint-2/pytorch_lora_weights.safetensors").is_file()
    assert Path("out/checkpoint-4/pytorch_lora_weights.safetensors").is_file()

    assert call("train", "--config", "training.yaml", *quick) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert call("train", "--resume_from_checkpoint", "out/checkpoint-2") == 2
    assert "goes on after checkpoint-2, to checkpoint-4" in capsys.readouterr().err
    assert call("train", "--resume_from_checkpoint", "out/checkpoint-2", "--output", "branch") == 0
    assert "from step 2" in capsys.readouterr().out

    assert call("sample", "out", "--prompt", "a photo", "--steps", "1", "--count", "2", "-o", "o.png") == 0
    files = capsys.readouterr().out.split()
    assert len(files) == 3, "two pictures and the sheet"
    assert all(Image.open(file).width >= 64 for file in files)

    assert call("export", "out", "--format", "kohya", "--precision", "fp32", "-o", "k.safetensors") == 0
    with safe_open("k.safetensors", "pt") as exported:
        assert any(name.endswith(".lora_down.weight") for name in exported.keys())  # noqa: SIM118
