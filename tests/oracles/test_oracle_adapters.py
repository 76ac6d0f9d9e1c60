"""DoRA, rsLoRA, LoHa, LoKr, OFT and adapted convolutions: one layer's answer against the formula of its weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import formulas
import formulas_adapters as adapters
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from rig import normal
from torch import Tensor, nn

from gesso.adapters import AnyAdapter
from gesso.core.seams import Attached, Parts
from gesso.families.sdxl import SDXL

CPU = torch.device("cpu")
LINEAR, CONV = "attn2.to_q", "resnets.0.conv1"


@pytest.fixture(scope="module")
def family(model: Path) -> SDXL:
    return SDXL(base=str(model))


def load(family: SDXL, dtype: torch.dtype = torch.float32) -> Parts:
    return family.load({"denoiser", "text"}, dtype=dtype, device=CPU)


def attach(family: SDXL, parts: Parts, settings: dict[str, Any], *, filled: float | None = 0.3) -> Attached:
    """The adapter in place, its numbers random if `filled` says how large."""
    spec: Any = TypeAdapter(AnyAdapter).validate_python(settings)
    attached: Attached = spec.attach(parts, family, seed=0)
    if filled is not None:
        for group in attached.parameters().values():
            for i, (name, p) in enumerate(group.items()):
                noise = torch.from_numpy(filled * normal(100 + i, *p.shape))
                p.data.copy_(p.data * (1 + noise) if "magnitude" in name else noise)
    return attached


def layer(parts: Parts, end: str) -> tuple[str, Any]:
    """A module of the UNet by the end of its name; of an adapted one, peft's own module."""
    return next((n, m) for n, m in parts.denoiser.named_modules() if n.endswith(end))


def tensors(attached: Attached, name: str) -> dict[str, np.ndarray]:
    """The trained tensors of a layer by what comes after its name."""
    found = {}
    for key, value in attached.state().items():
        head, inside, tail = key.rpartition(f"{name}.")
        if inside and not head.endswith("base_layer."):
            found[tail.removesuffix(".weight").removesuffix(".default")] = value.double().numpy()
    return found


def compare(module: Any, weight: np.ndarray, bias: Tensor | None, plain: np.ndarray) -> None:
    """A layer's answer is that of a layer with this weight, and not that of the one without adapter."""
    conv = weight.ndim == 4
    x = torch.from_numpy(normal(7, 2, weight.shape[1], 6, 5) if conv else normal(7, 3, 5, weight.shape[1])).double()

    def apply(by: np.ndarray) -> np.ndarray:
        told = torch.from_numpy(by), None if bias is None else bias.double()
        return (nn.functional.conv2d(x, *told, padding=1) if conv else nn.functional.linear(x, *told)).numpy()

    with torch.no_grad():
        found = module(x.float()).double().numpy()
    assert formulas.relative_l2(found, apply(weight)) < 2e-6
    assert formulas.relative_l2(found, apply(plain)) > 1e-3


CASES: list[tuple[dict[str, Any], float]] = [
    ({"type": "lora", "rank": 4, "alpha": 6, "rslora": True}, 6 / 2),
    ({"type": "lora", "rank": 4, "alpha": 6, "dora": True}, 6 / 4),
    ({"type": "lora", "rank": 9, "alpha": 3, "dora": True, "rslora": True}, 3 / 3),
    ({"type": "loha", "rank": 3, "alpha": 5}, 5 / 3),
    ({"type": "lokr", "rank": 2, "alpha": 3, "factor": 4}, 3 / 2),
    ({"type": "lokr", "rank": 1, "alpha": 1, "factor": 8, "decompose_both": True}, 1.0),
]


def change(settings: dict[str, Any], found: dict[str, np.ndarray], scale: float, shape: tuple[int, ...]) -> np.ndarray:
    """dW by the formula of the adapter."""
    if settings["type"] == "loha":
        return adapters.loha(found, scale).reshape(shape)
    if settings["type"] == "lokr":
        return adapters.lokr(found, scale).reshape(shape)
    return scale * (adapters.wide(found["lora_B"]) @ adapters.wide(found["lora_A"])).reshape(shape)


@pytest.mark.parametrize(("settings", "scale"), CASES, ids=[str(s) for s, _ in CASES])
def test_a_linear_layer(family: SDXL, settings: dict[str, Any], scale: float) -> None:
    parts = load(family)
    name, plain = layer(parts, LINEAR)
    weight = plain.weight.double().numpy()
    attached = attach(family, parts, settings)
    found = tensors(attached, name)
    grown = weight + change(settings, found, scale, weight.shape)
    if settings.get("dora"):
        (magnitude,) = (v for k, v in found.items() if "magnitude" in k)
        grown = adapters.dora(weight, grown - weight, magnitude)
    compare(layer(parts, LINEAR)[1], grown, plain.bias, weight)


@pytest.mark.parametrize("settings", [{"type": "lora", "rank": 4}, {"type": "loha", "rank": 2}], ids=str)
def test_a_convolution(family: SDXL, settings: dict[str, Any]) -> None:
    """conv_alpha / conv_rank, as published adapters with convolutions have it: A with the kernel, B of 1 x 1."""
    parts = load(family)
    name, plain = layer(parts, CONV)
    weight = plain.weight.double().numpy()
    attached = attach(family, parts, settings | {"conv_rank": 5, "conv_alpha": 2})
    grown = weight + change(settings, tensors(attached, name), 2 / 5, weight.shape)
    compare(layer(parts, CONV)[1], grown, plain.bias, weight)


@pytest.mark.parametrize("exact", [True, False])
def test_a_rotated_layer(family: SDXL, exact: bool) -> None:
    """x R W' with a rotation for each block of inputs: lengths and angles between the weights are kept."""
    parts, size = load(family), 8
    name, plain = layer(parts, LINEAR)
    weight = plain.weight.double().numpy()
    attached = attach(family, parts, {"type": "oft", "block_size": size, "exact": exact}, filled=0.03)
    (angles,) = tensors(attached, name).values()
    rotation = np.zeros((weight.shape[1], weight.shape[1]))
    for i, row in enumerate(angles.reshape(-1, size * (size - 1) // 2)):
        block = slice(i * size, (i + 1) * size)
        rotation[block, block] = adapters.cayley(row, size)
    assert np.abs(rotation @ rotation.T - np.eye(len(rotation))).max() < 1e-12
    x = torch.from_numpy(normal(7, 3, 5, weight.shape[1]))
    with torch.no_grad():
        found = layer(parts, LINEAR)[1](x).double().numpy()
    ways = [
        x.double().numpy() @ r @ weight.T + (0 if plain.bias is None else plain.bias.double().numpy())
        for r in (rotation, rotation.T)
    ]
    assert min(formulas.relative_l2(found, way) for way in ways) < (2e-6 if exact else 5e-4)
    assert formulas.relative_l2(found, x.double().numpy() @ weight.T) > 1e-2


@pytest.mark.parametrize("settings", [s for s, _ in CASES] + [{"type": "oft", "block_size": 8}], ids=str)
def test_at_the_start_nothing_is_changed_and_all_of_it_is_float32(family: SDXL, settings: dict[str, Any]) -> None:
    """In a bf16 model: a peer's adapters are bf16 there, and nine in ten of their weights never move."""
    parts = load(family, torch.bfloat16)
    x = torch.from_numpy(normal(8, 2, 3, layer(parts, LINEAR)[1].in_features)).bfloat16()
    with torch.no_grad():
        before = layer(parts, LINEAR)[1](x)
        attached = attach(family, parts, settings, filled=None)
        after = layer(parts, LINEAR)[1](x)
    assert formulas.relative_l2(after.double().numpy(), before.double().numpy()) < (
        5e-3 if settings.get("dora") else 1e-9
    )
    trained = [p for group in attached.parameters().values() for p in group.values()]
    assert trained
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.requires_grad for p in trained)


def test_the_rate_of_b_over_that_of_a(family: SDXL) -> None:
    attached = attach(family, load(family), {"type": "lora", "rank": 2, "lora_plus_ratio": 16.0}, filled=None)
    rates = {name: attached.rate_factor(name) for group in attached.parameters().values() for name in group}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1.0}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {16.0}


def test_a_change_that_is_too_long_is_scaled_down_to_the_limit_and_no_other(family: SDXL) -> None:
    """The Frobenius norm of (alpha / rank) B A of each layer after a step: min(1, limit / norm) of what it was."""
    parts, limit = load(family), 1.5
    attached = attach(family, parts, {"type": "lora", "rank": 4, "alpha": 6, "max_norm": limit}, filled=0.2)

    def changes() -> dict[str, np.ndarray]:
        state = attached.state()
        return {
            name: 1.5 * state[name.replace("lora_A", "lora_B")].double().numpy() @ state[name].double().numpy()
            for name in state
            if "lora_A" in name
        }

    for i, p in enumerate(p for group in attached.parameters().values() for p in group.values()):
        p.data.mul_(0.3 + 0.4 * (i % 7))
    before = changes()
    attached.after_step()
    norms = {name: float(np.linalg.norm(change)) for name, change in before.items()}
    assert min(norms.values()) < limit < max(norms.values())
    for name, after in changes().items():
        wanted = before[name] * min(1.0, limit / norms[name])
        assert formulas.relative_l2(after, wanted) < 1e-5


def test_dropped_ranks_leave_the_answer_right_on_average(family: SDXL) -> None:
    """Each rank is left out in its share of the passes, for each sample by itself, and the others make up for it."""
    parts, share = load(family), 0.25
    attach(family, parts, {"type": "lora", "rank": 4, "rank_dropout": share})
    module = layer(parts, LINEAR)[1]
    x = torch.from_numpy(normal(9, 1, 1, module.in_features)).expand(4000, 1, -1)
    with torch.no_grad():
        base, whole = (net(x[:1])[0, 0].double().numpy() for net in (module.base_layer, module.eval()))
        torch.manual_seed(3)
        drawn = module.train()(x)[:, 0].double().numpy()
    module.eval()
    changes = {tuple(np.round(row, 4)) for row in drawn}
    assert len(changes) == 2**4  # every choice of four ranks
    gap, spread = drawn.mean(axis=0) - whole, drawn.std(axis=0) / np.sqrt(len(drawn))
    assert (np.abs(gap) < 5 * spread + 1e-6).all()
    assert formulas.relative_l2(base, whole) > 1e-2
    assert (np.abs(drawn - base).max(axis=1) < 1e-6).mean() == pytest.approx(share**4, abs=5 * share**2 / np.sqrt(4000))
