"""Every optimiser: the library's numbers over flat groups, exact resume, parts that stand still, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from gesso.config.optimizer import KINDS, Optimizer
from gesso.errors import ResourceError, UserError
from gesso.training import optim
from gesso.training.members import Members
from gesso.training.optim import FlatGroup

SHAPES = {"matrix": (24, 18), "bias": (24,), "conv": (16, 3, 3, 3), "wide": (4, 40), "long": (2, 40, 40)}
"""Together more than 4,096 numbers: of fewer the 8-bit ones keep 32 bits."""
NAMED = [name for name, kind in KINDS.items() if kind.runs_on("cpu")]
CLASSES: dict[str, dict[str, Any]] = {
    "torch.optim.NAdam": {"momentum_decay": 0.01},
    "torch.optim.SGD": {"momentum": 0.9, "nesterov": True},
    "pytorch_optimizer.ScheduleFreeRAdam": {},
    "pytorch_optimizer.AdEMAMix": {},
    "pytorch_optimizer.Shampoo": {},
}


def spec(name: str) -> Optimizer:
    return Optimizer(type=name, options=CLASSES.get(name, {}))


def rate(name: str) -> float:
    kind = KINDS.get(name)
    return 1.0 if kind is not None and kind.finds_rate else 1e-2


def tensors(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


class Module:
    """Two parts, and the loss of a step that the step's number alone decides."""

    def __init__(self, name: str, *, rates: tuple[float, float] | None = None, stop: int | None = None) -> None:
        self.parts = [tensors(1), tensors(2)]
        both = rates or (rate(name), rate(name) / 2)
        self.groups = [
            optim.flat_group(
                spec(name),
                f"part{i}",
                {f"part{i}.{k}": p for k, p in part.items()},
                learning_rate=both[i],
                stop=stop if i else None,
            )
            for i, part in enumerate(self.parts)
        ]
        self.optimizer: Members = optim.build(spec(name), self.groups)

    def step(self, number: int, *, total: int = 100) -> None:
        still = optim.rest(self.groups, number, total)
        for group in self.groups:
            group.gradient.zero_()
        loss(self.parts, number).backward()
        optim.set_rates(self.optimizer, self.groups, 1 / (1 + number / 10), still=still)
        self.optimizer.step()

    def weights(self) -> list[Tensor]:
        return [group.flat.detach().clone() for group in self.groups]

    def save(self) -> tuple[dict[str, Tensor], list[Tensor]]:
        """As a checkpoint does: the state, and the weights in use, all through a file's plain layout."""
        state = {name: value.clone().contiguous() for name, value in optim.state(self.optimizer).items()}
        with self.optimizer.evaluated():
            return state, self.weights()

    def load(self, saved: tuple[dict[str, Tensor], list[Tensor]]) -> None:
        state, weights = saved
        with torch.no_grad():
            for group, weight in zip(self.groups, weights, strict=True):
                group.flat.copy_(weight)
        optim.restore(self.optimizer, state)


def loss(parts: list[dict[str, nn.Parameter]], number: int) -> Tensor:
    pieces = [
        ((p * (1 + i + number % 3)).sin() + p).square().mean() for i, part in enumerate(parts) for p in part.values()
    ]
    return torch.stack(pieces).sum()


every = pytest.mark.parametrize("name", [*NAMED, *CLASSES])


@every
@pytest.mark.parametrize("cut", [1, 12])
def test_resumed_equals_uninterrupted_bit_for_bit(name: str, cut: int) -> None:
    """What is brought back is all there is: the moments, d, z, preconditioners and their steps. 12 is after SOAP's
    basis was turned, and 1 before most of them have a history."""
    whole, first, second = Module(name), Module(name), Module(name)
    for number in range(25):
        whole.step(number)
    for number in range(cut):
        first.step(number)
    second.load(first.save())
    assert all(torch.equal(a, b) for a, b in zip(first.weights(), second.weights(), strict=True))
    for number in range(cut, 25):
        second.step(number)
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), second.weights(), strict=True))
    ours, theirs = optim.state(whole.optimizer), optim.state(second.optimizer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@every
def test_without_its_state_a_resumed_run_differs(name: str) -> None:
    """The law above can fail: nearly every optimiser here remembers something that matters."""
    whole, second = Module(name), Module(name)
    for number in range(12):
        whole.step(number)
    with torch.no_grad():
        for ours, theirs in zip(second.groups, whole.groups, strict=True):
            ours.flat.copy_(theirs.flat)
    whole.step(12)
    second.step(12)
    assert not all(torch.equal(a, b) for a, b in zip(whole.weights(), second.weights(), strict=True))


@every
def test_the_loss_falls(name: str) -> None:
    module = Module(name)
    before = float(loss(module.parts, 0).detach())
    for number in range(60):
        module.step(number)
    with module.optimizer.evaluated():
        assert float(loss(module.parts, 0).detach()) < before


FLAT = [name for name in NAMED if not KINDS[name].by_tensor and not name.endswith("8bit")]
"""The 8-bit ones round in blocks of 256 numbers, which are others in a flat vector."""


@pytest.mark.parametrize("name", FLAT)
def test_a_flat_vector_gives_the_numbers_of_separate_tensors(name: str) -> None:
    """One vector of all tensors, or the library's class over the tensors: the same but for the order of sums."""
    module = Module(name)
    made, arguments = optim.require(spec(name), device="cpu"), spec(name).arguments()
    theirs = [tensors(1), tensors(2)]
    plain = [made(list(part.values()), lr=1.0, **arguments) for part in theirs]  # type: ignore[call-arg]
    for number in range(20):
        module.step(number)
        for part in theirs:
            for parameter in part.values():
                parameter.grad = None
        loss(theirs, number).backward()
        for optimizer, group in zip(plain, module.groups, strict=True):
            optimizer.param_groups[0]["lr"] = group.learning_rate / (1 + number / 10)
            optimizer.step()
    for group, part in zip(module.groups, theirs, strict=True):
        for name_, parameter in zip(group.names, part.values(), strict=True):
            torch.testing.assert_close(
                group.views(group.flat.detach())[name_], parameter.detach(), rtol=2e-4, atol=2e-5
            )


@pytest.mark.parametrize("name", ["adafactor", "came", "soap"])
def test_what_works_by_matrix_gets_the_matrices(name: str) -> None:
    """The same numbers as the library's class over the tensors, a convolution seen as a matrix."""
    atol = 1e-3 if name == "soap" else 1e-5  # rounding turns the basis of what has no direction of its own
    module, theirs = Module(name), tensors(1)
    made, arguments = optim.require(spec(name), device="cpu"), spec(name).arguments()
    if name == "adafactor":
        arguments["momentum_dtype"] = torch.float32
    matrices = [nn.Parameter(p.detach().flatten(1) if p.ndim > 2 else p.detach()) for p in theirs.values()]
    plain = made(matrices, lr=1.0, **arguments)  # type: ignore[call-arg]
    for number in range(20):
        module.step(number)
        shaped = {k: m.detach().view(SHAPES[k]).requires_grad_() for k, m in zip(SHAPES, matrices, strict=True)}
        loss([shaped], number).backward()  # type: ignore[list-item]
        for matrix, tensor in zip(matrices, shaped.values(), strict=True):
            assert tensor.grad is not None
            matrix.grad = tensor.grad.view_as(matrix)
        plain.param_groups[0]["lr"] = module.groups[0].learning_rate / (1 + number / 10)
        plain.step()
    ours = module.groups[0].views(module.groups[0].flat.detach())
    for name_, matrix in zip(module.groups[0].names, matrices, strict=True):
        torch.testing.assert_close(ours[name_].reshape(matrix.shape), matrix.detach(), rtol=1e-4, atol=atol)


@every
def test_a_part_at_rate_zero_stands_still_and_the_other_moves_as_alone(name: str) -> None:
    """Not by weight decay, and not by a rate that is found for both; the first part's rate is not the second's."""
    for rates in ((0.0, rate(name)), (rate(name), 0.0)):
        module = Module(name, rates=rates)
        before = module.weights()
        for number in range(12):
            module.step(number)
        moved = [not torch.equal(a, b) for a, b in zip(before, module.weights(), strict=True)]
        assert moved == [value > 0 for value in rates]


@every
def test_a_part_that_stops_stands_exactly_still_from_then_on(name: str) -> None:
    module = Module(name, stop=6)
    for number in range(6):
        module.step(number)
    then = module.weights()
    for number in range(6, 15):
        module.step(number)
        assert not any(p.requires_grad for p in module.groups[1].parameters)
    assert torch.equal(module.weights()[1], then[1])
    assert not torch.equal(module.weights()[0], then[0])


def test_a_part_may_stop_after_a_fraction_of_the_run() -> None:
    group = FlatGroup.of("part", tensors(0), learning_rate=1.0, stop=0.3)
    assert [group.trains(step, 10) for step in range(5)] == [True, True, True, False, False]


@pytest.mark.parametrize("name", ["prodigy", "dadapt_adam", "dadapt_lion"])
def test_the_rate_that_was_found_is_the_one_that_is_told(name: str) -> None:
    module = Module(name)
    for number in range(12):
        module.step(number)
    found = module.optimizer.param_groups[0]["d"]
    assert found > 2e-6, "it starts at 1e-6 and grows"
    assert optim.rate(module.optimizer) == pytest.approx(found * module.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("name", ["schedule_free", "pytorch_optimizer.ScheduleFreeRAdam"])
def test_the_weights_in_use_are_the_average_and_leave_training_untouched(name: str) -> None:
    """x = (y - (1 - beta) z) / beta, the running mean of the z of every step; y is back bit for bit."""
    module = Module(name)
    for number in range(8):
        module.step(number)
    training, z = module.weights(), optim.state(module.optimizer)
    assert module.optimizer.averages
    with module.optimizer.evaluated():
        used = module.weights()
    assert all(torch.equal(a, b) for a, b in zip(training, module.weights(), strict=True))
    beta = module.optimizer.param_groups[0]["betas"][0]
    for group, y, x in zip(module.groups, training, used, strict=True):
        mean = (
            torch.cat([z[f"{n}.z"].flatten() for n in group.names])
            if f"{group.part}.z" not in z
            else z[f"{group.part}.z"]
        )
        torch.testing.assert_close(beta * x + (1 - beta) * mean, y, rtol=1e-5, atol=1e-6)
        assert not torch.equal(x, y)


def test_others_are_used_as_they_train() -> None:
    module = Module("adamw")
    module.step(0)
    assert not module.optimizer.averages
    before = module.weights()
    with module.optimizer.evaluated():
        assert all(torch.equal(a, b) for a, b in zip(before, module.weights(), strict=True))


def test_numbers_come_back_as_they_were() -> None:
    """A Python float is no float32: the sum of schedule-free's weights would lose its last digits."""
    module = Module("schedule_free")
    for number in range(12):
        module.step(number)
    again = Module("schedule_free")
    again.load(module.save())
    for ours, theirs in zip(module.optimizer.param_groups, again.optimizer.param_groups, strict=True):
        assert type(theirs["weight_sum"]) is float
        assert theirs["weight_sum"] == ours["weight_sum"] != float(torch.tensor(ours["weight_sum"]))
        assert type(theirs["step"]) is int
    soap = Module("soap")
    soap.step(0)
    names = optim.state(soap.optimizer)
    assert {"part0.matrix.Q#list", "part0.matrix.Q/0", "part0.bias.GG/0#list", "@0.step#int"} <= names.keys()


def test_settings_are_not_state() -> None:
    """A run that goes on with another weight decay has the new one."""
    first, second = Module("lion"), Module("lion")
    first.step(0)
    second.optimizer.param_groups[0]["weight_decay"] = 0.5
    second.load(first.save())
    assert second.optimizer.param_groups[0]["weight_decay"] == 0.5


def test_state_of_other_weights_is_refused() -> None:
    module = Module("adamw")
    module.step(0)
    state = optim.state(module.optimizer)
    for wrong in ({**state, "other.exp_avg": state["part0.exp_avg"]}, {**state, "part0.exp_avg": torch.zeros(3)}):
        with pytest.raises(UserError, match="does not fit"):
            optim.restore(Module("adamw").optimizer, wrong)
    shaped = Module("came")
    shaped.step(0)
    lacking = {k: v for k, v in optim.state(shaped.optimizer).items() if not k.startswith("part0.bias")}
    with pytest.raises(UserError, match=r"part0\.bias"):
        optim.restore(Module("came").optimizer, lacking)


@pytest.mark.parametrize(
    ("name", "device"), [("paged_adamw8bit", "cpu"), ("paged_adamw8bit", "mps"), ("lion8bit", "mps")]
)
def test_what_a_device_cannot_do_is_refused(name: str, device: str) -> None:
    with pytest.raises(UserError, match=f"{name} does not run on {device}"):
        optim.require(Optimizer(type=name), device=device)


@pytest.mark.parametrize("name", ["adamw8bit", "lion8bit"])
def test_8_bit_moments_are_8_bit_in_memory_and_in_the_checkpoint_and_move_like_32_bits(name: str) -> None:
    small, large = Module(name), Module(name.removesuffix("8bit"))
    for number in range(20):
        small.step(number)
        large.step(number)
    state = optim.state(small.optimizer)
    moments = [value for key, value in state.items() if key.rpartition(".")[2] in ("state1", "state2")]
    assert len(moments) == 2 * KINDS[name].moments
    assert {value.dtype for value in moments} == {torch.uint8}
    start = [group.flat.detach() for group in Module(name).groups]
    for one, other, before in zip(small.weights(), large.weights(), start, strict=True):
        assert (one - other).norm() < 0.1 * (other - before).norm()


def test_a_resumed_paged_optimiser_has_its_moments_in_paged_memory_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the pages that only a GPU has: memory that its own allocator handed out."""
    first, second = Module("adamw8bit"), Module("adamw8bit")
    first.step(0)
    asked = []
    for member in second.optimizer._members:
        plain = member.get_state_buffer  # type: ignore[attr-defined]
        monkeypatch.setattr(
            member, "get_state_buffer", lambda p, dtype, plain=plain: asked.append(plain(p, dtype)) or asked[-1]
        )
    second.load(first.save())
    kept = [s[name] for member in second.optimizer._members for s in member.state.values() for name in s]
    assert len(asked) == 4
    assert all(any(buffer is value for value in kept) for buffer in asked)
    for one in (first, second):
        one.step(1)
    assert all(torch.equal(a, b) for a, b in zip(first.weights(), second.weights(), strict=True))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"type": "torch.optim.Nothing"}, "there is no optimiser torch.optim.Nothing"),
        ({"type": "math.sqrt"}, "there is no optimiser math.sqrt"),
        ({"type": "torch.optim.LBFGS"}, "asks for the loss several times"),
        ({"type": "lion", "options": {"use_gc": True}}, "Lion takes no use_gc"),
        ({"type": "torch.optim.SGD", "options": {"momentom": 0.9}}, "SGD takes no momentom"),
    ],
)
def test_classes_and_options_that_do_not_exist_are_refused(values: Mapping[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        optim.require(Optimizer.model_validate(values), device="cpu")


def test_options_with_wrong_values_are_refused() -> None:
    with pytest.raises(UserError, match="SGD: Nesterov"):
        optim.build(
            Optimizer(type="torch.optim.SGD", options={"nesterov": True}),
            [FlatGroup.of("part", tensors(0), learning_rate=1.0)],
        )


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ResourceError, match="needs nowhere_to_be_found"):
        optim.require(Optimizer(type="nowhere_to_be_found.Adam"), device="cpu")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"type": "AdamW-8bit"}, "must be one of adamw, .*not 'AdamW-8bit'; did you mean adamw8bit"),
        ({"type": "lion", "eps": 1e-8}, "lion has no eps"),
        ({"type": "adamw", "beta3": 0.9}, "adamw has no beta3"),
        ({"type": "torch.optim.NAdam", "beta1": 0.9}, "put what torch.optim.NAdam takes under options"),
        ({"type": "torch.optim.NAdam", "options": {"lr": 1.0}}, "the learning rate is training.learning_rate"),
        ({"type": "prodigy", "options": {"betas": (0.9, 0.9)}}, "betas has a key of its own"),
    ],
)
def test_settings_without_effect_are_refused(values: Mapping[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        Optimizer.model_validate(values)


def test_constants_reach_the_class() -> None:
    came = Optimizer(type="came", beta1=0.8, beta3=0.95).arguments()
    assert came == {"betas": (0.8, 0.999, 0.95), "weight_decay": 0.01}
    assert Optimizer(type="adafactor").arguments()["betas"] == (None, 0.999)
    assert Optimizer(type="prodigy", options={"d_coef": 2.0, "bias_correction": False}).arguments() == {
        **{"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "d_coef": 2.0, "bias_correction": False},
    }
    assert Optimizer(type="torch.optim.SGD", options={"momentum": 0.9}).arguments() == {"momentum": 0.9}
