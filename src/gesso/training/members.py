"""Several optimisers as one: each part of a model has its own, so that a part can stand still while others move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gesso.errors import UserError
from gesso.training import optim_state

_OURS = frozenset({"params", "lr", "part", "names", "still", "bundle"})
_SHAPED = ("exp_avg", "exp_avg_sq", "momentum_buffer", "z", "s", "p0", "trained", "state1", "state2")


@runtime_checkable
class Averaging(Protocol):
    """An optimiser whose weights in training are not those to use: schedule-free ones."""

    def eval(self) -> None:
        """Put the average into the parameters."""

    def train(self) -> None:
        """Put back what trains."""


@runtime_checkable
class Paging(Protocol):
    """An optimiser that says where its large tensors are to lie: those of bitsandbytes."""

    def get_state_buffer(self, p: nn.Parameter, dtype: torch.dtype) -> Tensor:
        """A tensor of the parameter's shape, in memory that can be paged out where it is a paged one."""


class Members(torch.optim.Optimizer):
    """Optimisers that are stepped together, seen from outside as one with all their groups.

    Every group holds the `part` that it belongs to, the `names` of its parameters, and whether it is `still`: then it
    is not stepped at all, so that neither weight decay nor momentum nor averaging can move it. Groups of one `bundle`
    are stepped equally often and remember the same, beside what they remember of each parameter.
    """

    def __init__(self, members: Sequence[torch.optim.Optimizer]) -> None:
        groups = [group for member in members for group in member.param_groups]
        super().__init__(groups, {})
        self._members = list(members)
        # The groups themselves and not copies, so that a learning rate set here is theirs.
        self.param_groups = groups
        self._averaging = [member for member in members if isinstance(member, Averaging)]
        for member in self._averaging:
            member.train()
        self._constants = [dict(group) for group in groups]
        self._stepped = False
        bundles = list(dict.fromkeys(group.get("bundle", i) for i, group in enumerate(groups)))
        self._keys = [f"@{bundles.index(group.get('bundle', i))}" for i, group in enumerate(groups)]

    @property
    def averages(self) -> bool:
        """Whether the weights to use are others than the ones that train."""
        return bool(self._averaging)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of everything that is not still."""
        loss = None if closure is None else closure()
        self.update_rest()
        if not self._stepped:
            self.saved()  # what cannot be saved is told now and not at the first checkpoint
            self._stepped = True
        return loss

    @property
    def torn(self) -> bool:
        """Whether some weights are a step ahead of others, so that there is nothing to save."""
        return False

    def update_rest(self) -> None:
        """Update every member that this step has not updated yet."""
        for member in self._members:
            if not self.is_still(member):
                self.update(member)

    def is_still(self, member: torch.optim.Optimizer) -> bool:
        """Whether a member is left as it is in this step."""
        return all(group["still"] for group in member.param_groups)

    def update(self, member: torch.optim.Optimizer) -> None:
        """One update of one member."""
        member.step()
        for state in member.state.values():
            state.update({name: optim_state.row_by_row(value) for name, value in state.items()})

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Inside, the parameters are the ones to use; after it, bit for bit the ones that train."""
        parameters = [p for member in self._averaging for group in member.param_groups for p in group["params"]]
        trained = [p.detach().clone() for p in parameters]
        for member in self._averaging:
            member.eval()
        try:
            yield
        finally:
            for member in self._averaging:
                member.train()
            with torch.no_grad():
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.copy_(value)

    def saved(self) -> dict[str, Tensor]:
        """Every value that the members keep, and the weights in training where those in use are others."""
        kept: dict[str, Tensor] = {}
        for key, group, constants in zip(self._keys, self.param_groups, self._constants, strict=True):
            for name, value in group.items():
                if name not in _OURS and not _same(value, constants.get(name, _NOTHING)):
                    kept |= optim_state.packed(f"{key}.{name}", value)
        for member, owner, parameter in self._named():
            for name, value in member.state.get(parameter, {}).items():
                kept |= optim_state.packed(f"{owner}.{name}", value)
            if isinstance(member, Averaging):
                kept[f"{owner}.trained"] = parameter.detach()
        return kept

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `saved` gave; raises `UserError` if it is not of these parameters."""
        by_owner: dict[str, dict[str, Tensor]] = {}
        for name in optim_state.names(saved):
            owner, _, quantity = name.rpartition(".")
            by_owner.setdefault(owner, {})[quantity] = saved.get(name, torch.zeros(0))
        own = {owner: (member, parameter) for member, owner, parameter in self._named()}
        together: dict[str, list[str]] = {key: [] for key in self._keys}
        for key, group in zip(self._keys, self.param_groups, strict=True):
            together[key] += group["names"]
        wrong = by_owner.keys() - own.keys() - together.keys()
        wrong |= {o for o in by_owner.keys() & own.keys() if not _fits(by_owner[o], own[o][1])}
        wrong |= {o for names in together.values() for o in _torn(names, by_owner)}
        if wrong:
            raise UserError(f"the saved optimiser state does not fit the trained weights of {min(wrong)}")
        for key, group in zip(self._keys, self.param_groups, strict=True):
            device = group["params"][0].device
            for name in by_owner.get(key, ()):
                group[name] = optim_state.unpacked(f"{key}.{name}", saved, device)
        for owner, (member, parameter) in own.items():
            homes = {q: _home(member, owner, q, parameter) for q in by_owner.get(owner, ())}
            state = {q: optim_state.unpacked(f"{owner}.{q}", saved, home) for q, home in homes.items()}
            trained = state.pop("trained", None)
            if trained is not None:
                with torch.no_grad():
                    parameter.copy_(trained)
            if isinstance(member, Paging):
                for name in state.keys() & {"state1", "state2"}:
                    state[name] = member.get_state_buffer(parameter, state[name].dtype).copy_(state[name])
            if state:
                member.state[parameter] = state

    def _named(self) -> Iterator[tuple[torch.optim.Optimizer, str, nn.Parameter]]:
        for member in self._members:
            for group in member.param_groups:
                for name, parameter in zip(group["names"], group["params"], strict=True):
                    yield member, name, parameter


_NOTHING = object()


def _home(member: torch.optim.Optimizer, owner: str, quantity: str, parameter: nn.Parameter) -> torch.device:
    """Where a quantity belongs: torch's optimisers count steps on the CPU, unless they are fused or capturable, and
    would wait for the device at every parameter if the count lay there."""
    if quantity != "step":
        return parameter.device
    settings = next(group for group in member.param_groups if owner in group["names"])
    counted_there = settings.get("fused") or settings.get("capturable")
    return parameter.device if counted_there else torch.device("cpu")


def _same(value: Any, before: Any) -> bool:
    if isinstance(value, Tensor) or isinstance(before, Tensor):
        return value is before
    return type(value) is type(before) and bool(value == before)


def _torn(owners: Sequence[str], saved: Mapping[str, Any]) -> list[str]:
    """Parameters of a group that nothing was saved of, though of others it was; one that stood still has nothing."""
    missing = [owner for owner in owners if owner not in saved]
    return missing if len(missing) < len(owners) else []


def _fits(saved: Mapping[str, Tensor], parameter: nn.Parameter) -> bool:
    return all(v.shape == parameter.shape for k, v in saved.items() if k in _SHAPED)
