"""Weights updated inside the backward pass end where those updated after it do, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from gesso import stages
from gesso.core.batch import Batch
from gesso.core.events import Event, StepDone
from gesso.core.seams import Policy
from gesso.errors import NumericError
from gesso.objectives import Denoise
from gesso.training import optim
from run_helpers import MakeRun, Stop, checkpoint_bytes, fit, in_memory, stop_after

BOTH = {"type": "full", "train_text_encoders": True}
BF16 = {"training__precision": "bf16"}
RATES = {"training__text_encoder_learning_rates": [3e-4, 5e-5]}
VARIANTS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bf16 weights": {"adapter": BOTH | {"weights": "bf16"}, **BF16},
    "float32 weights in bf16": {"adapter": BOTH, **BF16},
    "adafactor": {"training__optimizer": {"type": "adafactor"}},
    "came": {"training__optimizer": {"type": "came"}},
    "soap": {"training__optimizer": {"type": "soap"}},
    "lion": {"training__optimizer": {"type": "lion"}},
    "8-bit moments": {"training__optimizer": {"type": "adamw8bit"}},
    "8-bit moments of bf16 weights": {
        "adapter": {"type": "full", "weights": "bf16"},
        "training__optimizer": {"type": "adamw8bit"},
        **BF16,
    },
    "text encoders": {"adapter": BOTH, **RATES},
    "text encoders by adafactor": {"adapter": BOTH, "training__optimizer": {"type": "adafactor"}, **RATES},
    "one encoder still": {"adapter": BOTH, "training__text_encoder_learning_rates": [0, 3e-4]},
    "encoders that stop": {"adapter": BOTH, "training__text_encoder_stop": 3},
    "encoders alone": {"adapter": BOTH | {"train_denoiser": False}},
    "three shapes in a step": {"training__batch_size": 4},
    "some layers": {"adapter": {"type": "full", "targets": ["attn2", "conv_in"]}},
    "checkpointing": {"adapter": BOTH, "training__gradient_checkpointing": True},
    "checkpointing in bf16": {
        "adapter": BOTH | {"weights": "bf16"},
        "training__gradient_checkpointing": True,
        **BF16,
    },
}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tiny model has many, and parameters lie across their borders."""
    monkeypatch.setattr(optim, "PIECE", 4096)


def full(make_run: MakeRun, name: str, *, fused: bool, **overrides: Any) -> Any:
    common: dict[str, Any] = {"adapter": {"type": "full"}, "training__accumulation": 1, "training__clip": None}
    return make_run(name, **{**common, "training__fused_backward": fused, **overrides})


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_equals_unfused(make_run: MakeRun, variant: str) -> None:
    overrides = {"training__steps": 5, **VARIANTS[variant]}
    plain = checkpoint_bytes(stages.train(full(make_run, "plain", fused=False, **overrides)), 5)
    fused = checkpoint_bytes(stages.train(full(make_run, "fused", fused=True, **overrides)), 5)
    assert fused.keys() == plain.keys()
    assert [name for name in plain if fused[name] != plain[name]] == []


def test_fused_equals_unfused_beside_the_model_before_training(
    make_run: MakeRun, pictures: Path, tmp_path: Path
) -> None:
    """A preference swaps the weights for those of before and back, in each step."""
    names = sorted(path.name for path in pictures.glob("*.png"))[:5]
    rows = [{"caption": "a thing", "chosen": n, "rejected": f"other-{n}"} for n in names]
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name in names:
        picture = Image.open(pictures / name)
        picture.save(folder / name)
        picture.rotate(180).save(folder / f"other-{name}")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides: dict[str, Any] = {"data__sources": [{"path": str(folder)}], "objective": {"type": "dpo"}}
    overrides |= {"training__steps": 4, "checkpoint__every": 4}
    plain, fused = (
        checkpoint_bytes(stages.train(full(make_run, f"run-{fused}", fused=fused, **overrides)), 4)
        for fused in (False, True)
    )
    assert fused == plain


def test_what_is_logged_is_what_an_unfused_run_logs(make_run: MakeRun) -> None:
    seen: dict[bool, list[StepDone]] = {False: [], True: []}
    for fused, events in seen.items():

        def keep(event: Event, events: list[StepDone] = events) -> None:
            if isinstance(event, StepDone):
                events.append(event)

        stages.train(full(make_run, f"run-{fused}", fused=fused, training__batch_size=4), emit=keep)
    assert len(seen[True]) == len(seen[False]) == 8
    for one, other in zip(seen[True], seen[False], strict=True):
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-6)
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert (one.learning_rate, one.samples) == (other.learning_rate, other.samples)


RESUMED = ["adamw", "8-bit moments", "bf16 weights", "text encoders by adafactor", "encoders that stop"]


@pytest.mark.parametrize("variant", RESUMED)
@pytest.mark.parametrize("ways", [(True, True, True), (False, True, False)], ids=["fused", "to and fro"])
def test_resumed_equals_uninterrupted_either_way(
    make_run: MakeRun, variant: str, ways: tuple[bool, bool, bool]
) -> None:
    """Killed after steps 4 and 7, so going on from 3 and 6; a run may change its way on each occasion."""
    overrides = VARIANTS[variant]
    whole = checkpoint_bytes(stages.train(full(make_run, "whole", fused=True, **overrides)), 8)
    for fused, step in zip(ways, (4, 7), strict=False):
        with pytest.raises(Stop):
            stages.train(full(make_run, "broken", fused=fused, **overrides), resume="latest", emit=stop_after(step))
    last = stages.train(full(make_run, "broken", fused=ways[-1], **overrides), resume="latest")
    assert checkpoint_bytes(last, 8) == whole


def spoil(monkeypatch: pytest.MonkeyPatch, *, call: int) -> None:
    """Make the gradient of the last layer that is reached no number, in one call of the loss; all else is as it was."""
    count, real = [0], Denoise.loss

    def loss(self: Denoise, policy: Policy, batch: Batch) -> Tensor:
        count[0] += 1
        if count[0] == call:
            (first,) = (p for n, p in policy.parts.denoiser.named_parameters() if n == "conv_in.weight")  # type: ignore[attr-defined]
            handle = first.register_hook(lambda gradient: (handle.remove(), gradient * torch.nan)[1])
        return real(self, policy, batch)

    monkeypatch.setattr(Denoise, "loss", loss)


def test_a_gradient_that_is_no_number_ends_the_run_and_saves_nothing(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is known when all the other layers have been updated; what comes next is the last checkpoint."""
    whole = checkpoint_bytes(stages.train(full(make_run, "whole", fused=True, checkpoint__every=2)), 8)
    said: dict[bool, str] = {}
    for fused in (False, True):
        run = full(make_run, f"run-{fused}", fused=fused, checkpoint__every=2)
        with monkeypatch.context() as patch:
            spoil(patch, call=6)
            with pytest.raises(NumericError) as raised:
                stages.train(run)
        assert raised.value.exit_code == 4
        said[fused] = str(raised.value).replace(run.name, "run")
        folder = run.folder.absolute()
        assert sorted(p.name for p in folder.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
        assert not list(folder.glob(".partial-*"))
        assert checkpoint_bytes(stages.train(run, resume="latest"), 8) == whole
    assert said[True] == said[False]
    assert "the gradient of step 6 is not finite" in said[True]
    assert said[True].count(".png") == 2


def test_a_torn_step_cannot_be_saved(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = full(make_run, "run", fused=True)
    session, data = in_memory(run)
    session.snapshot({})
    before = [group.flat.detach().clone() for group in session.learner.groups]
    spoil(monkeypatch, call=1)
    with pytest.raises(NumericError):
        fit(run, session, data)
    assert not all(torch.equal(a, g.flat) for a, g in zip(before, session.learner.groups, strict=True))
    with pytest.raises(RuntimeError, match="half done"):
        session.snapshot({})


def test_there_is_no_gradient_between_two_steps(make_run: MakeRun) -> None:
    run = full(make_run, "run", fused=True, adapter=BOTH, training__steps=2)
    session, data = in_memory(run)
    fit(run, session, data)
    for group in session.learner.groups:
        assert all(p.grad is None for p in (group.flat, *group.parameters))
