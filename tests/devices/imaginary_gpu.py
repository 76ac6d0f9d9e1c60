"""A GPU that only looks like one: its tensors have shapes, types and a device, but no numbers.

What would stop on a real one for tensors on two devices stops here too, and every number that the CPU asks it for,
which it would have to wait for, is counted. Run as a program it trains one step of each run in a file of settings and
prints what happened, as JSON: torch knows one such device a process, and for good, which other tests must not see.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from gesso.config.run import RunConfig
from gesso.core.batch import Batch, Geometry
from gesso.core.random import Draws, SampleKey
from gesso.core.runtime import Runtime
from gesso.core.seams import Parts
from gesso.families.sdxl import SDXL
from gesso.training import loop
from gesso.training.session import Session, network_types

NAME = "imaginary"
SIDE = 8


class Module(_DummyBackendModule):
    """What torch asks of a device's module, beside what the dummy has."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        del seed


class Generator(torch.Generator):
    """torch's own, on the CPU where it should be on the device, which has none."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)


class Mode(FakeTensorMode):
    """Tensors without numbers; what asks the device for a number gets 1, and is counted."""

    asked = 0
    yes = False

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._count(args[0])
            self.yes = not self.yes  # so that dropout leaves out some layers, whichever way it asks
            return self.yes if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is torch.ops.aten.nonzero.default:
            self._count(args[0])
            with self:
                return torch.zeros((1, args[0].ndim), dtype=torch.int64, device=args[0].device)
        if func is torch.ops.aten._to_copy.default and str((kwargs or {}).get("device")) == "cpu":
            self._count(args[0])
        return super().dispatch(func, types, args, kwargs or {})

    def _count(self, tensor: Tensor) -> None:
        self.asked += tensor.device.type == NAME


def train(run: RunConfig, mode: Mode) -> int:
    """One step, and what follows it; returns how many numbers the step asked the device for."""
    runtime = Runtime(torch.device(NAME, 0), run.training.precision)
    live = run.adapter.train_text_encoders or bool(run.tokens)
    _ = run.model.noise  # a table that has numbers, which decide what the model predicts
    with mode:
        parts = run.model.load({"vae", "text"}, dtype=network_types(run, runtime)[1], device=runtime.device)
        session = Session.build(run, parts, runtime)
        sizes = session.parts.denoiser.config
        pooled = sizes.projection_class_embeddings_input_dim - 6 * sizes.addition_time_embed_dim
        stream = Stream(run, live, runtime.dtype, (sizes.cross_attention_dim, pooled))
        session.policy.train()
        before = mode.asked
        loop.fit(
            run.training,
            name=run.name,
            seed=run.seed,
            loss=partial(run.objective.loss, session.policy),
            learner=session.learner,
            stream=stream,
            runtime=runtime,
            actions=[],
            emit=lambda _: None,
            stopping=lambda: False,
        )
        asked = mode.asked - before
        with session.as_sampled():
            session.adapter.state()
        session.restore(session.snapshot({}))
        session.measure([stream.batch(held_out=True)], runtime)
    return asked


@dataclass(frozen=True)
class Stream:
    """Made-up batches of any kind of sample."""

    run: RunConfig
    live: bool
    dtype: torch.dtype
    text: tuple[int, int]
    """Widths of the text embeddings and of the pooled one."""
    steps_per_epoch: int = 1

    def window(self, step: int) -> Iterator[Batch]:
        del step
        return iter([self.batch()])

    def window_size(self, step: int) -> int:
        del step
        return 2

    def batch(self, *, held_out: bool = False) -> Batch:
        objective = self.run.objective
        draws = Draws(0, 0, (SampleKey("a"), SampleKey("b")))
        pictures = [torch.from_numpy(draws.normal(name, (4, SIDE, SIDE))) for name in ("latent", "noise", "rejected")]
        prior = objective.type == "dreambooth" and not held_out
        masked = "pair" not in objective.needs
        shapes = {"prompt_embeds": (2, 77, self.text[0]), "pooled": (2, self.text[1])}
        return Batch(
            latents=pictures[0],
            noise=pictures[1],
            u=torch.from_numpy(draws.uniform("timestep")).float(),
            weights=torch.ones(2),
            geometry=(Geometry(64, 64, 0, 0, 64, 64),) * 2,
            captions=("a photo of a thing",) * 2,
            text=None if self.live else {k: torch.zeros(s, dtype=self.dtype) for k, s in shapes.items()},
            files=("a", "b"),
            draws=draws,
            mask=torch.ones(2, 1, SIDE, SIDE) if masked else None,
            rejected=None if masked else pictures[2],
            roles=("instance", "prior" if prior else "instance"),
            counts={"instance": 1, "prior": 1} if prior else {"instance": 2},
            held_out=held_out,
        )


def fake_loading(mode: Mode) -> None:
    """Let SDXL load its networks with real numbers and give them away without."""
    real = SDXL.load

    def load(self: SDXL, names: Sequence[str], *, dtype: torch.dtype, device: torch.device) -> Parts:
        with unset_fake_temporarily():
            parts = real(self, names, dtype=dtype, device=torch.device("cpu"))
        for network in (parts.denoiser, parts.vae, *parts.text_encoders):
            if network is not None:
                _move(network, mode, device)
        return parts

    SDXL.load = load  # type: ignore[method-assign, assignment]


def _move(network: nn.Module, mode: Mode, device: torch.device) -> None:
    _apply(network, lambda tensor: mode.from_tensor(tensor.detach()).to(device))


def _apply(network: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As torch's own, which cannot swap tensors of this kind: new parameters take the place of the old ones."""
    for module in network.modules() if recurse else [network]:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moves = parameter.requires_grad
                module._parameters[name] = nn.Parameter(change(parameter.data), requires_grad=moves)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return network


def main(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What became of each run: how many numbers its step asked the device for, or the error."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor looks for a real device
    # Neither exists for it; on the CPU both are tested with numbers.
    Runtime.autocast = lambda self, network: None  # type: ignore[method-assign]
    torch.Generator = Generator  # type: ignore[misc]
    nn.Module._apply = _apply  # type: ignore[method-assign, assignment]
    found: dict[str, Any] = {}
    for name, values in settings.items():
        mode = Mode(allow_non_fake_inputs=True)
        original = SDXL.load
        fake_loading(mode)
        try:
            found[name] = train(RunConfig.model_validate(values), mode)
        except Exception:
            found[name] = traceback.format_exc()
        finally:
            SDXL.load = original  # type: ignore[method-assign]
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)
    os._exit(0)  # autograd's thread for the device does not end by itself
