"""DreamBooth on a real network: weight 0 is Denoise, no split matters, the model's own prior begins at exactly 0."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gesso import stages
from gesso.core.folder import RunFolder
from gesso.core.runtime import Runtime
from gesso.training import loop
from gesso.training.session import Session
from run_helpers import MakeRun, checkpoint_bytes

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora on the text encoders, with dropout": {"type": "lora", "rank": 4, "dropout": 0.3, "train_text_encoders": True},
    "full": {"type": "full", "train_text_encoders": True},
}
MODEL = {"type": "dreambooth", "prior": "model", "class_prompt": "a photo of a thing"}


@pytest.fixture(scope="module")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of two shapes, fewer than an epoch asks for."""
    folder = tmp_path_factory.mktemp("class")
    rng = np.random.default_rng(1)
    for i, size in enumerate([(64, 64, 3)] * 3 + [(64, 96, 3)] * 2):
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a photo of a thing")
    return folder


def with_class(pictures: Path, class_images: Path, **objective: Any) -> dict[str, Any]:
    sources = [{"path": str(pictures)}, {"path": str(class_images), "role": "prior"}]
    return {"data__sources": sources, "objective": {"type": "dreambooth", **objective}}


class Step:
    """One optimiser step of a run, up to its gradient; with `moved` after B has left zero."""

    def __init__(self, run: Any, step: int = 0, *, moved: bool = True) -> None:
        folder = RunFolder(run.folder)
        folder.prepare()
        runtime = Runtime.detect(run.training.precision, "cpu")
        data = stages.prepare(run, folder, runtime, lambda event: None)
        session = Session.build(run, data.parts, runtime)
        with torch.no_grad():
            for group in session.learner.groups if moved else []:
                start = torch.randn(group.flat.shape, generator=torch.Generator().manual_seed(1))
                group.flat.add_(start * 0.05)
        session.policy.train()
        loss = partial(run.objective.loss, session.policy)
        self.loss = loop._accumulate(run.seed, step, loss, session.learner, data.stream, runtime).loss
        self.gradient = torch.cat([group.gradient.double().flatten() for group in session.learner.groups])
        self.samples = data.stream.window_size(step)
        self.batches = list(data.stream.window(step))
        with torch.no_grad(), session.policy.evaluating():
            self.each = {
                key: float(value)
                for batch in self.batches
                for key, value in zip(batch.draws.samples, loss(batch), strict=True)
            }

    def roles(self) -> dict[Any, str]:
        return {key: role for b in self.batches for key, role in zip(b.draws.samples, b.roles, strict=True)}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_weight_0_is_denoise_on_the_instances(
    make_run: MakeRun, pictures: Path, class_images: Path, adapter: str
) -> None:
    common = {"adapter": ADAPTERS[adapter]}
    plain = Step(make_run("plain", **common))
    nothing = Step(make_run("nothing", **common, **with_class(pictures, class_images, prior_weight=0.0)))
    assert nothing.samples == 2 * plain.samples
    assert nothing.loss == pytest.approx(plain.loss, rel=1e-6)
    assert difference(plain.gradient, nothing.gradient) <= 1e-5
    taught = {key for key, role in nothing.roles().items() if role == "instance"}
    assert taught == set(plain.roles())
    weighted = Step(make_run("weighted", **common, **with_class(pictures, class_images)))
    assert difference(plain.gradient, weighted.gradient) > 0.05, "the class images do count otherwise"


@pytest.mark.parametrize(("kind", "step"), [("images", 0), ("model", 2)])
def test_splits_of_a_step_give_one_gradient(
    make_run: MakeRun, pictures: Path, class_images: Path, kind: str, step: int
) -> None:
    """1 x 4, 2 x 2 and 4 x 1; step 2 is the epoch's last and short: 1 instance of 9, and 1 prior sample."""
    objective = {"objective": MODEL} if kind == "model" else with_class(pictures, class_images, prior_weight=0.7)
    found = {
        size: Step(
            make_run(f"split-{size}", training__batch_size=size, training__accumulation=4 // size, **objective), step
        )
        for size in (1, 2, 4)
    }
    assert found[1].samples == (2 if step == 2 else 8)
    for size in (2, 4):
        assert found[size].roles() == found[1].roles()
        assert difference(found[1].gradient, found[size].gradient) <= 1e-5
        assert found[size].loss == pytest.approx(found[1].loss, rel=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_models_own_prior_begins_at_exactly_0(make_run: MakeRun, adapter: str) -> None:
    fresh = Step(make_run("fresh", adapter=ADAPTERS[adapter], objective=MODEL), moved=False)
    prior = [fresh.each[key] for key, role in fresh.roles().items() if role == "prior"]
    assert len(prior) == 4
    assert prior == [0.0] * 4
    moved = Step(make_run("moved", adapter=ADAPTERS[adapter], objective=MODEL))
    assert all(moved.each[key] > 0 for key in moved.each)


def test_a_run_resumes_to_the_same_bytes(make_run: MakeRun, pictures: Path, class_images: Path) -> None:
    objective = with_class(pictures, class_images)
    whole = stages.train(make_run("whole", **objective))
    again = stages.train(make_run("again", **objective), resume=str(whole / "checkpoint-3"))
    assert checkpoint_bytes(again, 8) == checkpoint_bytes(whole, 8)
