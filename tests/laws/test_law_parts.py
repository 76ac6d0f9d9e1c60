"""Each part that is frozen or has a learning rate of 0 moves by exactly 0; every other part moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gesso import stages
from run_helpers import MakeRun, fit, in_memory


def trained(folder: Any) -> dict[str, float]:
    """The largest entry of the trained B matrices (which start at 0) by part."""
    state = load_file(folder / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    moved: dict[str, float] = {}
    for name, tensor in state.items():
        if name.endswith("lora_B.weight"):
            part = name.split(".")[0]
            moved[part] = max(moved.get(part, 0.0), float(tensor.abs().max()))
            assert tensor.dtype == torch.float32
    return moved


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("on", "rates", "parts"),
    [
        (False, None, {"unet"}),
        (True, None, {"unet", "text_encoder", "text_encoder_2"}),
        (True, [1e-3], {"unet", "text_encoder", "text_encoder_2"}),
        (True, [1e-3, 0], {"unet", "text_encoder"}),
        (True, [0, 1e-3], {"unet", "text_encoder_2"}),
        (True, [0], {"unet"}),
    ],
)
def test_trained_parts(make_run: MakeRun, on: bool, rates: Any, parts: set[str], accumulation: int) -> None:
    run = make_run(
        "run",
        adapter__train_text_encoders=on,
        training__text_encoder_learning_rates=rates,
        training__accumulation=accumulation,
        training__batch_size=1,
        training__steps=2,
    )
    moved = trained(stages.train(run))
    assert set(moved) == parts
    assert all(value > 0 for value in moved.values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("rate", "on", "rates", "parts"),
    [
        (1e-3, False, None, {"unet"}),
        (1e-3, True, None, {"unet", "text_encoder", "text_encoder_2"}),
        (1e-3, True, [1e-3, 0], {"unet", "text_encoder"}),
        (0.0, True, [0, 1e-3], {"text_encoder_2"}),
    ],
)
def test_parts_of_a_full_fine_tune(
    make_run: MakeRun, tiny_base: Path, optimizer: str, rate: float, on: bool, rates: Any, parts: set[str]
) -> None:
    run = make_run(
        "run",
        adapter={"type": "full", "train_text_encoders": on},
        training__learning_rate=rate,
        training__text_encoder_learning_rates=rates,
        training__optimizer={"type": optimizer},
        training__batch_size=1,
        training__steps=2,
    )
    folder = stages.train(run)
    saved = {path.parent.name: load_file(path) for path in (folder / "checkpoint-2").glob("*/*model.safetensors")}
    assert saved.keys() == parts
    for part, tensors in saved.items():
        (file,) = (tiny_base / part).glob("*.safetensors")
        before = load_file(file)
        plain = {name if name in before else name.removeprefix("text_model."): t for name, t in tensors.items()}
        assert plain.keys() == before.keys()
        still = [name for name, tensor in plain.items() if torch.equal(tensor, before[name])]
        if part == "unet":
            assert not still
        else:
            # What no gradient reaches (the last layer of the first encoder) moves only by weight decay.
            assert not any("token_embedding" in name or "layers.0" in name for name in still if "bias" not in name)


def test_the_base_model_never_moves(make_run: MakeRun) -> None:
    run = make_run("run", adapter__train_text_encoders=True, training__steps=2)
    session, data = in_memory(run)
    networks = session.policy.networks
    before = [{k: v.clone() for k, v in n.state_dict().items() if "lora" not in k} for n in networks]
    fit(run, session, data)
    assert session.learner.step == 2
    for network, state in zip(networks, before, strict=True):
        after = network.state_dict()
        assert state
        assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    listed = {id(p) for group in session.adapter.parameters().values() for p in group.values()}
    assert {id(p) for n in networks for p in n.parameters() if p.requires_grad} == listed
