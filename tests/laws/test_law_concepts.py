"""Two concepts with a class each in one run: what a step's loss is, and that no split and no pause changes it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gesso import stages
from gesso.core.batch import Batch
from gesso.core.runtime import Runtime
from gesso.objectives import Denoise
from gesso.training import loop
from run_helpers import MakeRun, Stop, checkpoint_bytes, in_memory, stop_after

WEIGHTS = {"man": 2.0, "dog": 0.5, "men": 1.5, "dogs": 0.25}
PRIOR_WEIGHT = 0.7


@pytest.fixture(scope="module")
def albums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two concepts and of their classes, of two shapes and of different numbers."""
    root, rng = tmp_path_factory.mktemp("albums"), np.random.default_rng(2)
    for name, count in (("man", 5), ("dog", 4), ("men", 3), ("dogs", 2)):
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 255, (64, 96 if i == 1 else 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
            (root / name / f"{i}.txt").write_text(f"a photo of {name}")
    return root


def concepts(albums: Path, **objective: Any) -> dict[str, Any]:
    """The overrides of a run on both, with a weight for each folder."""
    sources = [{"path": str(albums / name), "weight": weight} for name, weight in WEIGHTS.items()]
    for source, prompt in zip(sources, ("", "", "a photo of a man", "a photo of a dog"), strict=True):
        source |= {"role": "prior", "class_prompt": prompt, "class_images": 2} if prompt else {"trigger": "sks"}
    kind = {"type": "dreambooth", "prior_weight": PRIOR_WEIGHT, **objective}
    return {"data__sources": sources, "objective": kind}


class Step:
    """One step of a run after B has left zero: its loss as the loop has it, and that of each sample by hand."""

    def __init__(self, run: Any, step: int) -> None:
        session, data = in_memory(run)
        with torch.no_grad():
            for group in session.learner.groups:
                group.flat.add_(0.05 * torch.randn(group.flat.shape, generator=torch.Generator().manual_seed(1)))
        session.policy.train()
        runtime = Runtime.detect(run.training.precision, "cpu")
        loss = partial(run.objective.loss, session.policy)
        self.loss = loop._accumulate(run.seed, step, loss, session.learner, data.stream, runtime).loss
        self.gradient = torch.cat([group.gradient.double().flatten() for group in session.learner.groups])
        self.plain: dict[str, list[float]] = {}
        with torch.no_grad(), session.policy.evaluating():
            for batch in data.stream.window(step):
                for file, error in zip(batch.files, self._errors(session.policy, batch), strict=True):
                    self.plain.setdefault(Path(file).parent.name, []).append(error)

    def _errors(self, policy: Any, batch: Batch) -> list[float]:
        """What each sample costs without any weight."""
        plain = replace(batch, weights=torch.ones(len(batch)))
        found: list[float] = Denoise().loss(policy, plain).double().tolist()
        return found


@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_loss_of_a_step_is_the_sum_of_two_weighted_means(make_run: MakeRun, albums: Path, step: int) -> None:
    found = Step(make_run(**concepts(albums)), step)
    taught = [WEIGHTS[name] * e for name in ("man", "dog") for e in found.plain.get(name, [])]
    kept = [WEIGHTS[name] * e for name in ("men", "dogs") for e in found.plain.get(name, [])]
    count = 1 if step == 2 else 4  # nine samples an epoch, four a step
    assert len(taught) == len(kept) == count
    assert found.loss == pytest.approx(sum(taught) / count + PRIOR_WEIGHT * sum(kept) / count, rel=1e-5)


def test_no_split_of_a_step_changes_it(make_run: MakeRun, albums: Path) -> None:
    found = [
        Step(make_run(f"split-{n}", training__batch_size=n, training__accumulation=4 // n, **concepts(albums)), 1)
        for n in (1, 2, 4)
    ]
    for other in found[1:]:
        assert {k: len(v) for k, v in other.plain.items()} == {k: len(v) for k, v in found[0].plain.items()}
        assert other.loss == pytest.approx(found[0].loss, rel=1e-5)
        assert float((other.gradient - found[0].gradient).norm() / found[0].gradient.norm()) <= 1e-5


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_weight_of_each_source_counts(make_run: MakeRun, albums: Path, name: str) -> None:
    """Over an epoch, for each of the four: with weight 0 exactly its own samples are gone from the loss."""
    overrides = concepts(albums)
    for source in overrides["data__sources"]:
        if Path(source["path"]).name == name:
            source["weight"] = 0.0
    changed = 0
    for step in (0, 1):
        before, after = (Step(make_run(f"{i}", **o), step) for i, o in enumerate((concepts(albums), overrides)))
        factor = WEIGHTS[name] * (PRIOR_WEIGHT if name in ("men", "dogs") else 1) / 4
        gone = factor * sum(before.plain.get(name, []))
        assert before.loss - after.loss == pytest.approx(gone, rel=1e-4, abs=1e-6)
        changed += gone > 0
    assert changed


def test_the_prior_of_the_model_has_a_prompt_for_each_source(make_run: MakeRun, albums: Path) -> None:
    sources = [{"path": str(albums / name), "class_prompt": f"a photo of a {name}"} for name in ("man", "dog")]
    run = make_run(data__sources=sources, objective={"type": "dreambooth", "prior": "model"})
    _, data = in_memory(run)
    seen = set()
    for step in range(3):
        for batch in data.stream.window(step):
            prior = {Path(f).parent.name for f in batch.files} if set(batch.roles) == {"prior"} else set()
            seen |= prior
            for file, caption, role in zip(batch.files, batch.captions, batch.roles, strict=True):
                assert role != "prior" or caption == f"a photo of a {Path(file).parent.name}"
    assert seen == {"man", "dog"}


def test_a_run_with_two_classes_resumes_to_the_same_bytes(make_run: MakeRun, albums: Path) -> None:
    """Its class images are drawn by the run itself; broken off and resumed, none is drawn anew."""

    def drawn(name: str) -> dict[str, Any]:
        folder = albums.parent / f"{albums.name}-{name}"
        overrides = concepts(albums)
        for source in overrides["data__sources"][2:]:
            source["path"] = str(folder / Path(source["path"]).name)
        return overrides

    whole = stages.train(make_run("whole", **drawn("classes")))
    pictures = sorted((albums.parent / f"{albums.name}-classes").rglob("*"))
    made = {path: path.read_bytes() for path in pictures if path.is_file()}
    assert sorted(path.suffix for path in made) == [".png"] * 4 + [".txt"] * 4
    told = {
        (path.parent.name, json.loads(Image.open(path).info["gesso"])["prompt"])
        for path in made
        if path.suffix == ".png"
    }
    assert told == {("men", "a photo of a man"), ("dogs", "a photo of a dog")}
    part = make_run("part", **drawn("classes"))
    with pytest.raises(Stop):
        stages.train(part, emit=stop_after(5))
    again = stages.train(part, resume="latest")
    assert checkpoint_bytes(again, 8) == checkpoint_bytes(whole, 8)
    assert {path: path.read_bytes() for path in made} == made
