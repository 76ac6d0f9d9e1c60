"""Early stopping, the best checkpoint and the closing table, on whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gesso import stages
from gesso.core import checkpoints
from gesso.core.events import Event, Finished, Saved, StepDone, Validated
from gesso.errors import UserError
from gesso.training.session import Session
from run_helpers import MakeRun, checkpoint_bytes

HELD = {"data__validation": {"fraction": 0.2}, "validation__every": 1, "validation__timesteps": 1}


class Stop(Exception):
    """Ends a run from inside its event sink."""


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Validation says these losses, by step, whatever the weights are."""

    def measure(session: Session, batches: Any, runtime: Any) -> dict[str, float]:
        return {"loss": losses[session.learner.step], "accuracy": -losses[session.learner.step]}

    monkeypatch.setattr(Session, "measure", measure)


def test_a_run_ends_when_validation_gets_no_better_and_resumes_to_the_same_end(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.9, 0.5, 0.6, 0.4, 0.7, 0.41, 0.1, 0.1, 0.1])
    settings = {"training__early_stopping": {"patience": 2}, "checkpoint__every": 2, **HELD}
    told: list[Event] = []
    whole = stages.train(make_run("whole", **settings), emit=told.append)
    (end,) = [event for event in told if isinstance(event, Finished)]
    assert end.step == 5
    assert end.reason == "the validation loss has not got better than 0.4 of step 3 in 2 measurements"
    assert json.loads((whole / "status.json").read_text())["state"] == "finished"

    def crash(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            raise Stop

    with pytest.raises(Stop):
        stages.train(make_run("cut", **settings), emit=crash)
    again: list[Event] = []
    cut = stages.train(make_run("cut", **settings), resume="latest", emit=again.append)
    assert checkpoint_bytes(cut, 5) == checkpoint_bytes(whole, 5)
    assert [e.step for e in again if isinstance(e, Validated)] == [5], "the history came from the checkpoint"
    over: list[Event] = []
    stages.train(make_run("cut", **settings), resume="latest", emit=over.append)
    assert not [event for event in over if isinstance(event, StepDone)], "a stopped run has nothing more to do"


def test_the_best_step_is_saved_whatever_the_interval_and_outlives_the_newer_ones(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.1, 0.5, 0.4, 0.2, 0.7, 0.3, 0.4, 0.4, 0.4])
    run = make_run("run", checkpoint={"every": 2, "keep_last": 1, "keep_best": "loss"}, **HELD)
    told: list[Event] = []
    folder = stages.train(run, emit=told.append)
    assert [event.step for event in told if isinstance(event, Saved)] == [1, 2, 3, 4, 6, 8], "each once"
    assert list(checkpoints.listed(folder)) == [3, 8], "step 0 is the base model, and is no checkpoint"
    assert checkpoints.chosen(folder, "best") == folder / "checkpoint-3"
    assert checkpoints.chosen(folder, "latest") == folder / "checkpoint-8"
    (end,) = [event for event in told if isinstance(event, Finished)]
    assert end.outputs["best checkpoint"] == str(folder / "checkpoint-3")
    file = stages.export(
        str(folder), checkpoint="best", precision="fp32", output=folder / "best.safetensors", device="cpu"
    )
    exported = load_file(file)
    kept = load_file(folder / "checkpoint-3" / "ema" / "pytorch_lora_weights.safetensors")
    assert any(torch.equal(exported[name], kept[name]) for name in exported.keys() & kept.keys() if "lora_B" in name)
    for wrong in ("5", "worst"):
        with pytest.raises(UserError):
            checkpoints.chosen(folder, wrong)


def test_without_keep_best_the_best_of_what_is_there_is_taken(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [0.1, 0.1, 0.1, 0.3, 0.1, 0.1, 0.2, 0.1, 0.4])
    folder = stages.train(make_run("run", **HELD))
    assert list(checkpoints.listed(folder)) == [3, 6, 8]
    assert checkpoints.chosen(folder, "best") == folder / "checkpoint-6"


@pytest.mark.parametrize(
    "settings",
    [
        {"training__early_stopping": {"metric": "margin"}, **HELD},
        {"checkpoint__keep_best": "margin", **HELD},
        {"training__early_stopping": {}},
    ],
)
def test_a_measure_that_is_not_there_is_refused_before_the_first_step(make_run: MakeRun, settings: Any) -> None:
    told: list[Event] = []
    with pytest.raises(UserError, match=r"does not measure margin|no images are held out"):
        stages.train(make_run("run", **settings), emit=told.append)
    assert not [event for event in told if isinstance(event, StepDone)]


def weight_change(folder: Path, part: str) -> float:
    first, last = (load_file(folder / f"checkpoint-{i}" / "pytorch_lora_weights.safetensors") for i in (1, 2))
    names = [name for name in last if name.startswith(f"{part}.")]
    return float(torch.cat([(last[n].double() - first[n].double()).flatten() for n in names]).norm())


@pytest.mark.parametrize("rates", [[1e-3, 0], [0, 1e-3]])
def test_the_closing_table_has_exact_zeros_for_what_is_frozen(make_run: MakeRun, rates: list[float]) -> None:
    run = make_run(
        "run",
        adapter__train_text_encoders=True,
        training__text_encoder_learning_rates=rates,
        training__optimizer={"weight_decay": 0.5},
        training__ema={"enabled": False},
        training__steps=2,
        training__schedule={"type": "constant"},
        checkpoint__every=1,
    )
    told: list[Event] = []
    folder = stages.train(run, emit=told.append)
    (end,) = [event for event in told if isinstance(event, Finished)]
    table = {one.part: one for one in end.components}
    assert list(table) == ["unet", "text_encoder", "text_encoder_2", "vae"]
    frozen = "text_encoder" if rates[0] == 0 else "text_encoder_2"
    trained = load_file(folder / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    for part, one in table.items():
        numbers = sum(t.numel() for name, t in trained.items() if name.startswith(f"{part}."))
        assert one.parameters == numbers
        if part in (frozen, "vae"):
            assert (one.parameters, one.learning_rates, one.change) == (0, (), 0.0)
        else:
            assert one.learning_rates == (1e-3,)
            assert one.change is not None
            assert one.change > 0
            assert weight_change(folder, part) > 0
    assert json.loads((folder / "metrics.json").read_text())["components"][0]["change"] == table["unet"].change


def test_a_denoiser_at_rate_zero_changes_by_exactly_nothing(make_run: MakeRun) -> None:
    run = make_run(
        "run",
        adapter__train_text_encoders=True,
        training__learning_rate=0.0,
        training__text_encoder_learning_rates=[1e-3],
        training__optimizer={"type": "schedule_free", "weight_decay": 0.5},
        training__ema={"enabled": False},
        training__steps=2,
        checkpoint__every=1,
    )
    told: list[Event] = []
    folder = stages.train(run, emit=told.append)
    (end,) = [event for event in told if isinstance(event, Finished)]
    table = {one.part: one for one in end.components}
    assert (table["unet"].parameters, table["unet"].change) == (0, 0.0)
    assert table["text_encoder"].change
    assert weight_change(folder, "unet") == 0.0


def test_the_change_is_the_relative_2_norm_also_of_a_resumed_run(make_run: MakeRun) -> None:
    settings = {"adapter": {"type": "full"}, "training__ema": {"enabled": False}, "training__steps": 4}
    told: list[Event] = []
    stages.train(make_run("whole", **settings), emit=told.append)

    def crash(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 4:
            raise Stop

    run = make_run("cut", **settings)
    with pytest.raises(Stop):
        stages.train(run, emit=crash)
    stages.train(run, resume="latest", emit=told.append)
    whole, cut = ({c.part: c for c in event.components} for event in told if isinstance(event, Finished))
    assert whole == cut
    base = load_file(next(Path(run.model.base, "unet").glob("*.safetensors")))
    trained = load_file(run.folder / "checkpoint-4" / "unet" / "diffusion_pytorch_model.safetensors")
    moved = sum(float((trained[n].double() - base[n].double()).square().sum()) for n in base)
    before = sum(float(base[n].double().square().sum()) for n in base)
    assert whole["unet"].change == pytest.approx((moved / before) ** 0.5, rel=1e-9)
