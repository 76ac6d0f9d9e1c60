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
    family, parts = load(tiny_base)
    parts.denoiser.register_buffer("count", torch.tensor([3]))
    attached = Full().attach(parts, family, seed=0)
    assert "unet.count" in attached.state()
    assert attached.parameters()["unet"].keys() == attached.state().keys() - {"unet.count"}


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


def test_a_forward_pass_keeps_its_gradient_while_the_reference_answers(tiny_base: Path) -> None:
    """Whichever comes first: only pointers change, so what backward needs is still there."""
    parts, attached = attach(tiny_base, (), reference=True)
    inputs = {"timestep": torch.tensor([5]), "encoder_hidden_states": torch.ones(1, 4, 40)}
    added = {"text_embeds": torch.ones(1, 24), "time_ids": torch.ones(1, 6)}

    def answer() -> torch.Tensor:
        return parts.denoiser(torch.ones(1, 4, 8, 8), **inputs, added_cond_kwargs=added, return_dict=False)[0]

    with torch.no_grad():
        first = answer()
        for parameter in parts.denoiser.parameters():
            parameter.add_(0.01)
    gradients = []
    for between in (False, True):
        parts.denoiser.zero_grad()
        loss = answer().square().mean()
        if between:
            with torch.no_grad(), attached.reference():
                assert torch.equal(answer(), first)
        loss.backward()
        gradients.append([p.grad.clone() for p in parts.denoiser.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(g.any() for g in gradients[0])


def test_nothing_is_copied_to_look_at_the_reference(tiny_base: Path) -> None:
    """What is held inside is the copy made when training began, and after it the trained tensors themselves."""
    parts, attached = attach(tiny_base, (1,), reference=True)
    networks = [parts.denoiser, parts.text_encoders[1]]

    def places() -> list[int]:
        return [p.data_ptr() for network in networks for p in network.parameters()]

    outside, inside = places(), []
    for _ in range(2):
        with attached.reference():
            inside.append(places())
        assert places() == outside
    assert inside[0] == inside[1]
    assert not set(inside[0]) & set(outside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_another_type_than_is_said_are_refused(tiny_base: Path, dtype: torch.dtype) -> None:
    family, parts = load(tiny_base, dtype)
    with pytest.raises(UserError, match="should be kept in fp32") as caught:
        Full().attach(parts, family, seed=0)
    assert caught.value.where == "adapter.weights"
    assert not any(p.requires_grad for p in parts.denoiser.parameters())


@pytest.mark.parametrize(
    ("targets", "trained", "still"),
    [
        ("attention", ["attn1.to_q.weight", "attn2.to_out.0.bias"], ["ff.net.2.weight", "norm1.weight", "conv_in"]),
        ("attention-mlp", ["attn1.to_q.weight", "ff.net.2.bias", "proj_in.weight"], ["norm1.weight", "conv_in"]),
        (["attn2"], ["attn2.to_k.weight", "attn2.to_out.0.bias"], ["attn1.to_k.weight", "attn2.norm.weight"]),
        (["up_blocks.1"], ["up_blocks.1.resnets.0.conv1.weight"], ["up_blocks.0.resnets.0.conv1.weight"]),
        (["down_blocks.*.attn2.to_v"], ["down_blocks.1", "attn2.to_v.weight"], ["up_blocks.0", "attn2.to_k"]),
        (["bias"], ["conv_in.bias", "norm1.bias"], ["conv_in.weight"]),
        (["conv_in.weight", "mid_block"], ["conv_in.weight", "mid_block.resnets"], ["conv_in.bias", "up_blocks.0"]),
    ],
)
def test_targets_choose_layers_of_the_denoiser(tiny_base: Path, targets: Any, trained: Any, still: Any) -> None:
    family, parts = load(tiny_base)
    spec = Full.model_validate({"targets": targets, "train_text_encoders": True})
    attached = spec.attach(parts, family, seed=0, text_encoders=(0,))
    chosen = set(attached.parameters()["unet"])
    everything = {f"unet.{name}" for name, _ in parts.denoiser.named_parameters()}
    assert 0 < len(chosen) < len(everything)
    assert {n for n, p in parts.denoiser.named_parameters() if p.requires_grad} == {c[5:] for c in chosen}
    assert all(any(piece in name for name in chosen) for piece in trained)
    assert not any(piece in name for name in chosen for piece in still)
    assert all(any(piece in name for name in everything) for piece in still if piece != "attn2.norm.weight")
    assert attached.state().keys() > everything, "files hold the whole network"
    assert all(p.requires_grad for p in parts.text_encoders[0].parameters()), "targets are the denoiser's"


def test_a_target_that_names_nothing_is_refused_with_the_names_there_are(tiny_base: Path) -> None:
    family, parts = load(tiny_base)
    with pytest.raises(UserError, match=r"nothing in the denoiser is called attn3, up_blocks\.9") as caught:
        Full(targets=("attn2", "attn3", "up_blocks.9")).attach(parts, family, seed=0)
    assert caught.value.where == "adapter.targets"
    assert "attn2, " in caught.value.fix


def test_text_encoders_train_alone(tiny_base: Path) -> None:
    family, parts = load(tiny_base)
    spec = Full(train_denoiser=False, train_text_encoders=True)
    attached = spec.attach(parts, family, seed=0, text_encoders=(0,))
    assert list(attached.parameters()) == ["text_encoder"]
    assert not any(p.requires_grad for p in parts.denoiser.parameters())
    assert list(attached.layout().headers) == ["text_encoder/model.safetensors"]
    with pytest.raises(UserError, match="nothing trains"):
        spec.attach(parts, family, seed=0, text_encoders=())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train_denoiser": False}, "nothing trains"),
        ({"train_denoiser": False, "train_text_encoders": True, "targets": ["attn1"]}, "which does not train"),
        ({"targets": []}, "the list of targets is empty"),
        ({"weights": "fp16"}, "'fp32' or 'bf16'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Full.model_validate(values)


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
