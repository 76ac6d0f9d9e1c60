"""What must not matter does not: how a step is split, previews, validation, workers, logging, caches."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gesso import stages
from gesso.core.batch import Batch
from gesso.core.folder import RunFolder
from gesso.core.runtime import Runtime
from gesso.training import loop
from gesso.training.session import Session
from run_helpers import MakeRun, checkpoint_bytes

WITHOUT_EFFECT: dict[str, dict[str, Any]] = {
    "previews every step": {"preview": {"prompts": ["a photo", "thing"], "every": 1, "inference_steps": 2}},
    "workers": {"data__workers": 3},
    "tensorboard": {"trackers": [{"type": "tensorboard"}]},
    "saves every step": {"checkpoint__every": 1},
    "validation every step": {"validation__every": 1},
    "encoded at every visit, not cached": {"data__encoding": "live"},
}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> dict[str, Any]:
    """Validation pictures from a folder of their own, so that training sees the same set with and without."""
    return {"validation": {"path": str(pictures)}}


FULL = {"type": "full", "train_text_encoders": True}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"rank": 4, "alpha": 6}},
    "lora with dropout": {"adapter": {"rank": 4, "alpha": 6, "dropout": 0.3}},
    "full": {"adapter": FULL, "training__optimizer": {"type": "muon"}},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("setting", WITHOUT_EFFECT)
def test_settings_without_effect_leave_the_weights_alone(make_run: MakeRun, setting: str, adapter: str) -> None:
    common: dict[str, Any] = {**ADAPTERS[adapter], "data__validation": {"fraction": 0.2}}
    plain = stages.train(make_run("plain", **common))
    other = stages.train(make_run("other", **common, **WITHOUT_EFFECT[setting]))
    assert checkpoint_bytes(plain, 8) == checkpoint_bytes(other, 8)


def test_a_second_run_reads_the_cache_and_ends_the_same(make_run: MakeRun, tmp_path: Path) -> None:
    told: list[str] = []
    fresh = stages.train(make_run("fresh", data__cache=str(tmp_path / "cold")))
    warm = stages.train(make_run("warm", data__cache=str(tmp_path / "cold")), emit=lambda e: told.append(str(e)))
    assert checkpoint_bytes(fresh, 8) == checkpoint_bytes(warm, 8)


def first_gradient(run: Any, step: int = 0) -> tuple[dict[str, torch.Tensor], list[Batch]]:
    """The accumulated gradient of one optimiser step by parameter name, and the batches it came from."""
    folder = RunFolder(run.folder)
    folder.prepare()
    runtime = Runtime.detect(run.training.precision, "cpu")
    data = stages.prepare(run, folder, runtime, lambda event: None)
    session = Session.build(run, data.parts, runtime)
    with torch.no_grad():  # B = 0 would leave A without a gradient
        for group in session.learner.groups if run.adapter.type == "lora" else []:
            group.flat.copy_(torch.randn(group.flat.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    session.policy.train()
    loss = partial(run.objective.loss, session.policy)
    loop._accumulate(run.seed, step, loss, session.learner, data.stream, runtime)
    gradients = {n: g.clone() for group in session.learner.groups for n, g in group.views(group.gradient).items()}
    return gradients, list(data.stream.window(step))


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    flat_a, flat_b = (torch.cat([t[k].double().flatten() for k in sorted(t)]) for t in (a, b))
    return float((flat_a - flat_b).norm() / flat_a.norm())


@pytest.mark.parametrize("text_encoders", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("step", [0, 2])
def test_splits_of_a_step_give_one_gradient(make_run: MakeRun, text_encoders: bool, kind: str, step: int) -> None:
    """1 x 4, 2 x 2 and 4 x 1: the same samples and draws. Step 2 is the epoch's last and short: 1 sample of 9."""
    gradients, ids = {}, {}
    for batch_size, accumulation in [(1, 4), (2, 2), (4, 1)]:
        run = make_run(
            f"split-{batch_size}",
            training__batch_size=batch_size,
            training__accumulation=accumulation,
            adapter={"type": kind, "train_text_encoders": text_encoders},
        )
        gradients[batch_size], batches = first_gradient(run, step)
        ids[batch_size] = sorted((key.id, key.repeat) for batch in batches for key in batch.draws.samples)
    assert ids[1] == ids[2] == ids[4]
    assert len(ids[1]) == (1 if step == 2 else 4)
    for batch_size in (2, 4):
        difference = relative_difference(gradients[1], gradients[batch_size])
        assert difference <= 1e-5, f"{batch_size} at once differs by {difference:.1e}"


def test_splits_of_a_step_give_one_gradient_with_noise_of_every_kind(make_run: MakeRun) -> None:
    objective = {
        "pyramid_noise_iterations": 4,
        "noise_offset": 0.1,
        "input_perturbation": 0.1,
        "timesteps": {"type": "logit_normal", "mean": 0.5},
        "timestep_bias": {"begin": 0.5, "multiplier": 2},
        "weighting": {"type": "debiased"},
        "loss_type": "log_cosh",
    }
    gradients = {
        size: first_gradient(
            make_run(
                f"split-{size}",
                training__batch_size=size,
                training__accumulation=4 // size,
                objective=objective,
            )
        )[0]
        for size in (1, 2, 4)
    }
    assert relative_difference(gradients[1], gradients[2]) <= 1e-5
    assert relative_difference(gradients[1], gradients[4]) <= 1e-5


def test_a_short_step_weighs_its_samples_fully(make_run: MakeRun) -> None:
    """The last window of an epoch holds 1 sample of 4: its gradient is that sample's own, not a quarter of it."""
    short, batches = first_gradient(make_run("short"), step=2)
    assert sum(len(batch) for batch in batches) == 1
    alone, same = first_gradient(make_run("alone", training__batch_size=1, training__accumulation=4), step=2)
    assert batches[0].files == same[0].files
    assert relative_difference(short, alone) <= 1e-6
    assert float(torch.cat([g.flatten() for g in short.values()]).norm()) > 0
