"""Every kind of adapter: base at the start and inside `reference`, its published formula after, exact restoring."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapter_helpers import KINDS, answer, fill, grown, loaded, merged
from peft import PeftModel
from safetensors.torch import save_file

from gesso.errors import UserError
from gesso.families import lora_names

every = pytest.mark.parametrize("kind", KINDS)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_the_model_is_the_base_bit_for_bit(tiny_base: Path, kind: str, dtype: torch.dtype) -> None:
    family, parts = loaded(tiny_base, dtype)
    before = answer(family, parts)
    attached = KINDS[kind].attach(parts, family, seed=0, text_encoders=(0, 1))
    if kind == "oft":
        # proj_in reads a transposed tensor, and its rotated copy lies straight: the sums have another order.
        assert not any(change.moves for change in attached.changes().values())
        assert (answer(family, parts) - before).abs().max() < 10 * torch.finfo(dtype).eps * before.abs().max()
    else:
        assert torch.equal(answer(family, parts), before)
    trained = {id(p): p for group in attached.parameters().values() for p in group.values()}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    for network in [parts.denoiser, *parts.text_encoders]:
        assert all(p.requires_grad == (id(p) in trained) for p in network.parameters())


@every
def test_it_does_what_its_paper_says_and_the_reference_is_the_base(tiny_base: Path, kind: str) -> None:
    family, parts = loaded(tiny_base)
    base = answer(family, parts)
    attached = KINDS[kind].attach(parts, family, seed=0, text_encoders=(0,))
    fill(attached)
    live = answer(family, parts)
    assert (live - base).abs().max() > 0.01 * base.abs().max()
    plain = answer(family, merged(parts, tiny_base))
    assert (live - plain).abs().max() < 1e-4 * plain.abs().max()
    with pytest.raises(ZeroDivisionError), attached.reference():
        assert torch.equal(answer(family, parts), base)
        raise ZeroDivisionError
    assert torch.equal(answer(family, parts), live)


@every
def test_its_changes_are_those_weights(tiny_base: Path, kind: str) -> None:
    family, parts = loaded(tiny_base)
    attached = KINDS[kind].attach(parts, family, seed=0, text_encoders=(1,))
    fill(attached)
    changes = attached.changes()
    networks = {"unet": parts.denoiser, "text_encoder_2": parts.text_encoders[1]}
    weights, layers = lora_names.weights(networks), {}
    for part, network in networks.items():
        layers |= {lora_names.canonical(part, path): module for path, module in network.named_modules()}
    assert len(changes) > 20
    for name, change in changes.items():
        assert change.fits(tuple(weights[name].shape))
        wanted = torch.from_numpy(grown(layers[name])).float()
        torch.testing.assert_close(change.applied(weights[name].detach()), wanted, rtol=1e-4, atol=1e-5)
        half = weights[name].detach() + 0.5 * (wanted - weights[name].detach())
        torch.testing.assert_close(change.applied(weights[name].detach(), strength=0.5), half, rtol=1e-4, atol=1e-5)


@every
def test_state_comes_back_exactly_and_another_adapters_does_not(tiny_base: Path, kind: str) -> None:
    family, parts = loaded(tiny_base)
    attached = KINDS[kind].attach(parts, family, seed=0)
    start = {name: tensor.clone() for name, tensor in attached.state().items()}
    fill(attached)
    live = answer(family, parts)
    state = {name: tensor.clone() for name, tensor in attached.state().items()}
    assert not any(torch.equal(start[name], state[name]) for name in state)
    _, other = loaded(tiny_base)
    again = KINDS[kind].attach(other, family, seed=0)
    assert all(torch.equal(tensor, start[name]) for name, tensor in again.state().items())
    again.restore(state)
    assert torch.equal(answer(family, other), live)
    with pytest.raises(UserError, match="does not fit"):
        again.restore(dict(list(state.items())[1:]))


@every
def test_the_start_depends_on_the_seed_and_the_layer(tiny_base: Path, kind: str) -> None:
    family, parts = loaded(tiny_base)
    torch.manual_seed(3)
    one = KINDS[kind].attach(parts, family, seed=0).state()
    two = KINDS[kind].attach(loaded(tiny_base)[1], family, seed=1).state()
    drawn = {name for name, tensor in one.items() if tensor.any() and "magnitude" not in name}
    assert not any(torch.equal(one[name], two[name]) for name in drawn)
    if kind.startswith("oft"):
        assert not drawn
    else:
        firsts = [tuple(one[name].flatten()[:3].tolist()) for name in drawn]
        assert len(set(firsts)) == len(firsts) > 20


@pytest.mark.parametrize("kind", ["loha", "loha-tucker", "lokr", "lokr-both", "oft", "oft-exact"])
def test_peft_loads_the_files(tiny_base: Path, tmp_path: Path, kind: str) -> None:
    family, parts = loaded(tiny_base)
    attached = KINDS[kind].attach(parts, family, seed=0, text_encoders=(1,))
    fill(attached)
    layout = attached.layout()
    for file, tensors in layout.split(attached.state()).items():
        (tmp_path / file).parent.mkdir()
        save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / file, dict(layout.headers[file]))
    for file, text in layout.texts.items():
        (tmp_path / file).write_text(text)
        assert json.loads(text)["peft_type"]
    _, fresh = loaded(tiny_base)
    PeftModel.from_pretrained(fresh.denoiser, str(tmp_path / "unet"))
    PeftModel.from_pretrained(fresh.text_encoders[1], str(tmp_path / "text_encoder_2"))
    live = answer(family, parts)
    assert (answer(family, fresh) - live).abs().max() < 1e-5 * live.abs().max()
