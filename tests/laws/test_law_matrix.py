"""Every law over every method and adapter; the run of this file ends with the matrix (see conftest.py)."""

from __future__ import annotations

import json
import math
import os
import shutil
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from gesso import stages
from gesso.core.runtime import Runtime
from gesso.evaluation.models import open_pipeline
from gesso.evaluation.sample import Shot, draw
from gesso.training import loop
from gesso.training.session import Session
from run_helpers import MakeRun, checkpoint_bytes, fit, in_memory

METHODS: dict[str, dict[str, Any]] = {
    "denoise": {"objective": {"type": "denoise", "min_snr_gamma": 5, "noise_offset": 0.05}},
    "dreambooth": {"objective": {"type": "dreambooth", "prior_weight": 0.7}},
    "dreambooth, prior of the model": {
        "objective": {"type": "dreambooth", "prior": "model", "class_prompt": "a photo of a thing"}
    },
    "dpo": {"objective": {"type": "dpo", "beta": 20}},
    "ipo": {"objective": {"type": "dpo", "beta": 20, "variant": "ipo", "sft_weight": 0.1}},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "rank": 4, "alpha": 6},
    "lora, text encoders": {"type": "lora", "rank": 4, "alpha": 6, "train_text_encoders": True},
    "lora, dropout": {"type": "lora", "rank": 4, "dropout": 0.3},
    "lora, convolutions, rslora, lora+": {
        "type": "lora", "rank": 4, "alpha": 6, "targets": "all", "conv_rank": 2, "rslora": True, "lora_plus_ratio": 4,
    },
    "dora": {"type": "lora", "rank": 4, "alpha": 6, "dora": True},
    "loha": {"type": "loha", "rank": 4, "alpha": 6},
    "lokr": {"type": "lokr", "rank": 4, "alpha": 6},
    "oft": {"type": "oft", "block_size": 8},
    "full": {"type": "full"},
    "full, text encoders": {"type": "full", "train_text_encoders": True},
    "new words": {"type": "embedding", "tokens": [{"token": "<new>", "initial": "thing", "vectors": 2}]},
    "lora, new words": {"type": "lora", "rank": 4, "tokens": [{"token": "<new>", "initial": "thing"}]},
}  # fmt: skip
WHOLE = [(method, adapter) for method in METHODS for adapter in ADAPTERS]
FIRST = [cell for cell in WHOLE if "denoise" in cell or "lora" in cell or cell == ("dpo", "full, text encoders")]
"""Every method with a LoRA and every adapter with the plain loss; GESSO_MATRIX=whole runs the others as well."""
CELLS = WHOLE if os.environ.get("GESSO_MATRIX") == "whole" else FIRST
INEXACT_START: frozenset[str] = frozenset({"dora"})
"""Adapters whose first prediction differs from the base model's by rounding."""


KNOWN: dict[str, tuple[str, float, dict[str, Any]]] = {
    "dpo": ("instance", math.log(2), {}),
    "ipo": ("instance", 0.25, {"objective__sft_weight": 0.0}),
    "dreambooth, prior of the model": ("prior", 0.0, {}),
}
"""The role whose loss is known before training, that loss, and what must be set for it."""
UNLIMITED = {"objective__min_snr_gamma": 1e9, "objective__noise_offset": 0.0}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """Nine preference pairs of the shared pictures."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for i, (one, other) in enumerate([(0, 1), (1, 2), (2, 3), (3, 4), (4, 0), (5, 6), (6, 5), (7, 8), (8, 7)]):
        for side, which in (("a", one), ("b", other)):
            shutil.copy(pictures / f"{which}.png", folder / f"{i}{side}.png")
        rows.append({"caption": f"a photo of pair number {i}", "chosen": f"{i}a.png", "rejected": f"{i}b.png"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def class_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pictures of a class, of two shapes."""
    folder = tmp_path_factory.mktemp("class")
    for i, size in enumerate([(64, 64), (64, 64), (96, 64)]):
        pixels = np.random.default_rng(50 + i).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a photo of a thing")
    return folder


class Cell(NamedTuple):
    """A combination, and how to make runs of it."""

    method: str
    adapter: str
    base: Path
    settings: dict[str, Any]
    make: MakeRun

    def run(self, name: str, **overrides: Any) -> Any:
        """A run of four steps that keeps every checkpoint."""
        usual = {"training__steps": 4, "checkpoint": {"every": 2, "keep_last": 9}}
        return self.make(name, **deepcopy({**self.settings, **usual, **overrides}))

    def plain(self, name: str, pictures: Path) -> Any:
        """The same adapter with the plain loss on the instances."""
        return self.run(name, objective={"type": "denoise"}, data__sources=[{"path": str(pictures)}])


@pytest.fixture(params=CELLS, ids=lambda cell: f"{cell[0]} x {cell[1]}")
def cell(
    request: pytest.FixtureRequest, make_run: MakeRun, tiny_base: Path, pairs: Path, pictures: Path, class_images: Path
) -> Cell:
    method, adapter = request.param
    settings: dict[str, Any] = {**METHODS[method], "adapter": ADAPTERS[adapter]}
    if METHODS[method]["objective"]["type"] == "dpo":
        settings["data__sources"] = [{"path": str(pairs)}]
    if method == "dreambooth":
        settings["data__sources"] = [{"path": str(pictures)}, {"path": str(class_images), "role": "prior"}]
    if "tokens" in ADAPTERS[adapter]:
        settings["data__captions"] = {"prefix": "<new> "}
    return Cell(method, adapter, tiny_base, settings, make_run)


class Live(NamedTuple):
    """A run in memory, about to train."""

    run: Any
    session: Session
    data: Any

    def fit(self) -> None:
        """All its steps."""
        fit(self.run, self.session, self.data)

    def predictions(self) -> list[Tensor]:
        """What the model says of the first step's pictures, dropout off."""
        policy, found = self.session.policy, []
        with torch.no_grad(), policy.evaluating():
            for batch in self.data.stream.window(0):
                t = policy.noise.sample_t(batch.u, low=0.0, high=1.0)
                noisy = policy.noise.corrupt(batch.latents, batch.noise, t)
                found.append(policy.predict(noisy, t, policy.condition(batch)))
        return found

    def moved(self) -> Live:
        """The same with every trained number moved at random, as after some training."""
        with torch.no_grad():
            for i, group in enumerate(self.session.learner.groups):
                noise = torch.randn(group.flat.shape, generator=torch.Generator().manual_seed(i))
                group.flat.add_(0.02 * noise)
        return self


def live(run: Any) -> Live:
    return Live(run, *in_memory(run))


class Step(NamedTuple):
    """The first optimiser step of a run, up to its gradient."""

    gradient: Tensor
    losses: dict[str, list[float]]
    """Of each sample, by its role."""

    def differs(self, other: Step) -> float:
        """Relative L2 distance of the gradients."""
        return float((self.gradient - other.gradient).norm() / self.gradient.norm())


def first_step(one: Live) -> Step:
    """Dropout is off: it is drawn by batch, so that splits may differ."""
    policy, groups = one.session.policy, one.session.learner.groups
    loss = partial(one.run.objective.loss, policy)
    losses: dict[str, list[float]] = {}
    with policy.evaluating():
        loop._accumulate(one.run.seed, 0, loss, one.session.learner, one.data.stream, Runtime.detect("fp32", "cpu"))
        with torch.no_grad():
            for batch in one.data.stream.window(0):
                for role, value in zip(batch.roles, loss(batch), strict=True):
                    losses.setdefault(role, []).append(float(value))
    views = {name: g for group in groups for name, g in group.views(group.gradient.clone()).items()}
    return Step(torch.cat([views[name].double().flatten() for name in sorted(views)]), losses)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_resumed_is_uninterrupted(cell: Cell) -> None:
    run = cell.run("run")
    straight = checkpoint_bytes(stages.train(run), 4)
    shutil.rmtree(run.folder / "checkpoint-4")
    stages.train(run, resume="latest")
    assert checkpoint_bytes(run.folder, 4) == straight


def test_a_step_may_be_split_in_any_way(cell: Cell) -> None:
    """1 x 4, 2 x 2 and 4 x 1: gradients equal to rounding.

    Of preferences the gradient is the small difference of two large ones, which leaves a digit less.
    """
    least = 1e-4 if cell.run("any").objective.needs == {"pair"} else 1e-5
    one, *others = [
        first_step(live(cell.run(f"split-{size}", training__batch_size=size, training__accumulation=4 // size)).moved())
        for size in (1, 2, 4)
    ]
    assert all(one.differs(other) <= least for other in others)


def test_where_a_methods_loss_is_known_it_is_that(cell: Cell, pictures: Path) -> None:
    """Before training DPO's is ln 2, IPO's 1/4, and that of the model as its own prior 0. DreamBooth at weight 0, and
    min-SNR without a limit, are the plain loss of the instances."""
    if known := KNOWN.get(cell.method):
        role, loss, own = known
        found = first_step(live(cell.run("run", **own))).losses[role]
        assert found == pytest.approx([loss] * 4, rel=0, abs=1e-3 if cell.adapter in INEXACT_START else 1e-7)
        return
    special = {"objective__prior_weight": 0.0} if cell.method == "dreambooth" else UNLIMITED
    plain = first_step(live(cell.plain("plain", pictures)).moved())
    assert plain.differs(first_step(live(cell.run("special", **special)).moved())) <= 1e-5
    assert plain.differs(first_step(live(cell.run("usual")).moved())) > 1e-3


def test_plain_diffusers_draws_the_runs_picture(cell: Cell, tmp_path: Path) -> None:
    """What the run exports, loaded by diffusers alone, against the trained model as it is."""
    rates = {"training__learning_rate": 2e-3 if "full" in cell.adapter else 0.05, "training__token_learning_rate": 0.1}
    folder = stages.train(cell.run("run", training__steps=2, **rates))
    shot = Shot("a photo of <new> thing", seed=3, steps=2, width=64, height=64)
    ours = open_pipeline(str(folder), runtime=Runtime.for_inference("fp32", "cpu"))[0]
    theirs, base = exported(cell, folder, tmp_path), StableDiffusionXLPipeline.from_pretrained(cell.base)
    one, other, before = (np.asarray(draw(pipe, [shot])[0], np.int16) for pipe in (ours, theirs, base))
    assert np.abs(one - other).max() <= 1
    assert np.abs(one - before).max() > 2, "so little was trained that the comparison proves nothing"


def exported(cell: Cell, folder: Path, to: Path) -> StableDiffusionXLPipeline:
    """A pipeline of diffusers with what was trained: as a whole model, or for new words as the guide says."""
    adapter = ADAPTERS[cell.adapter]
    if "tokens" not in adapter:
        whole = "diffusers" if adapter["type"] == "full" else "merged"
        path = stages.export(str(folder), format=whole, precision="fp32", device="cpu", output=to / "whole")
        return StableDiffusionXLPipeline.from_pretrained(path)
    pipe = StableDiffusionXLPipeline.from_pretrained(cell.base)
    words = to / "out-embeddings"
    if adapter["type"] == "lora":
        pipe.load_lora_weights(stages.export(str(folder), precision="fp32", output=to / "out.safetensors"))
    else:
        stages.export(str(folder), precision="fp32", output=words)
    state = load_file(words / "new.safetensors")
    for key, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(state[key], token="<new>", text_encoder=encoder, tokenizer=tokenizer)
    return pipe


def test_the_first_step_begins_at_the_base_model_and_the_reference_stays_there(cell: Cell) -> None:
    one = live(cell.run("run", training__steps=2))
    policy = one.session.policy
    start = base = one.predictions()
    # Full training keeps a copy of the weights for objectives that ask for it only.
    referable = one.run.adapter.type != "full" or one.run.objective.reference
    if referable:
        with policy.reference():
            base = one.predictions()
    if cell.adapter in INEXACT_START:
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(start, base, strict=True))
    else:
        assert same(start, base)
    one.fit()
    trained = one.predictions()
    assert not same(trained, base)
    if not referable:
        return
    with policy.reference():
        assert same(one.predictions(), base)
    assert same(one.predictions(), trained)
    with pytest.raises(ZeroDivisionError), policy.reference():
        1 / 0  # noqa: B018
    assert same(one.predictions(), trained)


def test_what_is_frozen_moves_by_nothing_and_the_rest_moves(cell: Cell) -> None:
    one = live(cell.run("run", training__steps=2))
    trained = {name: p for group in one.session.adapter.parameters().values() for name, p in group.items()}
    ids = {id(p) for p in trained.values()}
    networks = one.session.policy.networks
    frozen = [(p, p.detach().clone()) for network in networks for p in network.parameters() if id(p) not in ids]
    before = {name: p.detach().clone() for name, p in trained.items()}
    one.fit()
    assert all(torch.equal(p, old) for p, old in frozen)
    parts = {part: any(not torch.equal(p, before[n]) for n, p in group.items())
             for part, group in one.session.adapter.parameters().items()}  # fmt: skip
    assert all(parts.values()), parts


def test_cached_is_encoded_at_every_visit(cell: Cell) -> None:
    cached = stages.train(cell.run("cached", training__steps=2))
    fresh = stages.train(cell.run("fresh", training__steps=2, data__encoding="live"))
    assert checkpoint_bytes(cached, 2) == checkpoint_bytes(fresh, 2)


def test_previews_workers_and_cadence_change_nothing(cell: Cell) -> None:
    plain = stages.train(cell.run("plain", training__steps=2))
    busy = stages.train(
        cell.run(
            "busy",
            training__steps=2,
            data__workers=3,
            checkpoint={"every": 1, "keep_last": 9},
            preview={"prompts": ["a photo"], "every": 1, "inference_steps": 1},
        )
    )
    assert checkpoint_bytes(plain, 2) == checkpoint_bytes(busy, 2)
