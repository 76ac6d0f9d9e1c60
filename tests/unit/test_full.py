"""The adapter that trains every weight: what it unfreezes, saves, restores, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from gesso.adapters import AnyAdapter, AttachedFull, Full, LoRA
from gesso.core.seams import Parts
from gesso.errors import UserError
from gesso.families.sdxl import SDXL

CPU = torch.device("cpu")


def load(base: Path, dtype: torch.dtype = torch.float32) -> tuple[SDXL, Parts]:
    family = SDXL(base=str(base))
    return family, family.load(("denoiser", "text"), dtype=dtype, device=CPU)


def attach(base: Path, encoders: tuple[int, ...] = (0, 1), *, reference: bool = False) -> tuple[Parts, AttachedFull]:
    family, parts = load(base)
    return parts, Full().attach(parts, family, seed=0, text_encoders=encoders, reference=reference)


def test_every_weight_of_the_chosen_networks_trains_and_no_other(tiny_base: Path) -> None:
    parts, attached = attach(tiny_base, (1,))
    assert list(attached.parameters()) == ["unet", "text_encoder_2"]
    listed = {id(p) for group in attached.parameters().values() for p in group.values()}
    for network, trains in ((parts.denoiser, True), (parts.text_encoders[0], False), (parts.text_encoders[1], True)):
        assert all(p.requires_grad == trains for p in network.parameters())
        assert all((id(p) in listed) == trains for p in network.parameters())
    assert "text_encoder_2.text_model.embeddings.token_embedding.weight" in attached.state()


def test_the_state_comes_back_and_files_hold_all_of_it(tiny_base: Path) -> None:
    parts, attached = attach(tiny_base)
    saved = {k: v.clone() for k, v in attached.state().items()}
    with torch.no_grad():
        for parameter in parts.denoiser.parameters():
            parameter.add_(1)
    assert not torch.equal(attached.state()["unet.conv_in.bias"], saved["unet.conv_in.bias"])
    attached.restore(saved)
    assert all(torch.equal(saved[k], v) for k, v in attached.state().items())
    files = attached.layout().split(saved)
    assert sorted(files) == [
        *("text_encoder/model.safetensors", "text_encoder_2/model.safetensors"),
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert sum(len(tensors) for tensors in files.values()) == len(saved)


@pytest.mark.parametrize("change", ["missing", "surplus", "shape"])
def test_what_does_not_fit_is_refused(tiny_base: Path, change: str) -> None:
    _, attached = attach(tiny_base)
    state = dict(attached.state())
    name = "text_encoder_2.text_projection.weight"
    match change:
        case "missing":
            del state[name]
        case "surplus":
            state["unet.other"] = torch.zeros(1)
        case "shape":
            state[name] = state[name][:1]
    with pytest.raises(UserError, match="does not fit this run") as caught:
        attached.restore(state)
    assert ("unet.other" if change == "surplus" else name) in str(caught.value)


def test_a_tensor_with_two_names_is_one(tiny_base: Path) -> None:
    parts, attached = attach(tiny_base)
    encoder = parts.text_encoders[1]
    count = len(attached.state())
    layers = encoder.text_model.encoder.layers
    layers[1].mlp.fc1.weight = layers[0].mlp.fc1.weight
    assert len(attached.state()) == count - 1
    assert "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.weight" in attached.parameters()["text_encoder_2"]


def test_buffers_are_saved_but_do_not_train(tiny_base: Path) -> None:
    parts, _ = load(tiny_base)[1], None
    parts.denoiser.register_buffer("count", torch.tensor([3]))
    attached = AttachedFull({"unet": parts.denoiser})
    assert "unet.count" in attached.state()
    assert "unet.count" not in attached.parameters()["unet"]


def test_the_reference_is_the_model_before_training_also_after_an_error(tiny_base: Path) -> None:
    parts, attached = attach(tiny_base, reference=True)
    before = {k: v.clone() for k, v in attached.state().items()}
    with torch.no_grad():
        for group in attached.parameters().values():
            for parameter in group.values():
                parameter.mul_(1.5).add_(0.01)
    trained = {k: v.clone() for k, v in attached.state().items()}
    places = [p.data_ptr() for p in parts.denoiser.parameters()]
    with attached.reference():
        assert all(torch.equal(before[k], v) for k, v in attached.state().items())
    with pytest.raises(ZeroDivisionError), attached.reference():
        raise ZeroDivisionError
    assert all(torch.equal(trained[k], v) for k, v in attached.state().items())
    assert [p.data_ptr() for p in parts.denoiser.parameters()] == places, "views of the flat vector stay views"


def test_no_reference_is_kept_unless_asked_for(tiny_base: Path) -> None:
    _, attached = attach(tiny_base)
    with pytest.raises(RuntimeError, match="reference=True"), attached.reference():
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_refused_with_the_way_out(tiny_base: Path, dtype: torch.dtype) -> None:
    family, parts = load(tiny_base, dtype)
    with pytest.raises(UserError, match="float32") as caught:
        Full().attach(parts, family, seed=0)
    assert caught.value.where == "training.precision"
    assert not any(p.requires_grad for p in parts.denoiser.parameters())


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"rank": 8}, LoRA(rank=8)),
        ({"type": "lora"}, LoRA()),
        ({"type": "full", "train_text_encoders": True}, Full(train_text_encoders=True)),
        (Full(), Full()),
        (LoRA(rank=2), LoRA(rank=2)),
    ],
)
def test_the_type_chooses_and_lora_is_the_default(value: Any, wanted: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyAdapter)
    found = adapter.validate_python(value)
    assert found == wanted
    assert type(found) is type(wanted)
    assert adapter.validate_python(adapter.dump_python(found)) == wanted
