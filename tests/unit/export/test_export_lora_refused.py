"""Exported LoRAs: what is not the trained model, or cannot be written, leaves nothing behind."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from export_helpers import ADAPTER, CPU, Trained, export
from safetensors.torch import load_file, save_file

from gesso.adapters import LoRA
from gesso.errors import ResourceError, UserError
from gesso.export import lora
from gesso.export.lora import Verified
from gesso.families import lora_file


def broken(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    up = next(name for name in tensors if name.endswith("lora_up.weight"))
    module = up.removesuffix(".lora_up.weight")
    match kind:
        case "alpha of one layer":
            tensors[f"{module}.alpha"] = torch.tensor(4.0)
        case "a layer is missing":
            for end in ("lora_up.weight", "lora_down.weight", "alpha"):
                del tensors[f"{module}.{end}"]
        case "one number":
            tensors[up][0, 0] += 0.01
        case "a layer that is not in the model":
            for end in ("lora_up.weight", "lora_down.weight", "alpha"):
                tensors[f"lora_unet_input_blocks_99_1_proj_in.{end}"] = tensors.pop(f"{module}.{end}")


@pytest.mark.parametrize(
    "kind", ["alpha of one layer", "a layer is missing", "one number", "a layer that is not in the model"]
)
def test_a_file_that_differs_is_refused_and_deleted(
    train: Callable[[LoRA], Trained], tmp_path: Path, kind: str
) -> None:
    trained = train(ADAPTER)
    path = tmp_path / "a.safetensors"
    export(trained, path, "kohya")
    tensors = load_file(path)
    broken(kind, tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match="does not reload as the trained model"):
        verify(trained, path)
    assert not path.exists()


def verify(trained: Trained, path: Path) -> Verified:
    family = trained.family
    return lora.verify(
        path,
        trained=lora_file.parse(trained.attached.state(), trained.attached.metadata(), path=path),
        family=family,
        fresh=family.load(("denoiser", "text"), dtype=torch.float32, device=CPU.device),
        expected=lora.probe(family, trained.parts),
    )


def test_other_weights_than_the_live_models_are_refused(train: Callable[[LoRA], Trained], tmp_path: Path) -> None:
    """The weights arrive whole, but they are not those of the model that was asked."""
    trained = train(ADAPTER)
    expected = lora.probe(trained.family, trained.parts)
    off = replace(expected, prediction=expected.prediction * (1 + 1e-3))
    trained.save(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="predictions differ"):
        lora.verify(
            tmp_path / "a.safetensors",
            trained=lora.read(tmp_path / "a.safetensors"),
            family=trained.family,
            fresh=trained.family.load(("denoiser", "text"), dtype=torch.float32, device=CPU.device),
            expected=off,
        )


def test_a_failed_export_leaves_the_old_file(
    train: Callable[[LoRA], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train(LoRA(rank=2))
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"the file of last week")
    monkeypatch.setattr(lora, "_alpha", lambda _, dtype: torch.tensor(99.0, dtype=dtype))
    with pytest.raises(UserError, match="strength"):
        export(trained, path, "kohya")
    assert path.read_bytes() == b"the file of last week"
    assert list(tmp_path.iterdir()) == [path]


def test_weights_beyond_fp16_are_refused(train: Callable[[LoRA], Trained], tmp_path: Path) -> None:
    trained = train(LoRA(rank=2))
    with torch.no_grad():
        next(iter(trained.attached.state().values()))[0, 0] = 1e6
    with pytest.raises(UserError, match="do not fit into float16") as caught:
        export(trained, tmp_path / "a.safetensors", "diffusers", "fp16")
    assert "bf16" in caught.value.fix
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(train: Callable[[LoRA], Trained], tmp_path: Path) -> None:
    trained = train(LoRA(rank=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot be written"):
        export(trained, tmp_path / "file" / "a.safetensors", "kohya")
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export(trained, tmp_path / "a.bin", "kohya")


def test_probing_leaves_modes_as_they_were(train: Callable[[LoRA], Trained]) -> None:
    trained = train(LoRA(rank=2, dropout=0.5))
    unet = trained.parts.denoiser
    unet.train()
    unet.mid_block.eval()
    modes = [m.training for m in unet.modules()]
    first, second = (lora.probe(trained.family, trained.parts) for _ in range(2))
    assert [m.training for m in unet.modules()] == modes
    assert torch.equal(first.prediction, second.prediction), "dropout was on"
