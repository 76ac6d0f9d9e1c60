"""New words in training: they start as the base model's words, nothing else moves, and no stop or split matters."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gesso import stages
from gesso.core.events import Event, StepDone, Warned
from gesso.core.runtime import Runtime
from gesso.errors import UserError
from gesso.training import loop
from run_helpers import MakeRun, checkpoint_bytes, fit, in_memory

TOKENS = [{"token": "<it>", "initial": "red man", "vectors": 3}, {"token": "<number>", "initial": "star"}]
ALONE: dict[str, Any] = {"adapter": {"type": "embedding", "tokens": TOKENS}, "training__learning_rate": 1e-2}
PIVOTAL: dict[str, Any] = {
    "adapter": {"rank": 4, "alpha": 6, "train_text_encoders": True, "tokens": TOKENS},
    "training__token_learning_rate": 1e-2,
}
KINDS = {"alone": ALONE, "pivotal": PIVOTAL, "muon": {**PIVOTAL, "training__optimizer": {"type": "muon"}}}


@pytest.fixture
def worded(pictures: Path, tmp_path: Path) -> dict[str, Any]:
    """The pictures with captions that have the new words, one of them in capitals and one without."""
    folder = tmp_path / "worded"
    folder.mkdir()
    for i, file in enumerate(sorted(pictures.glob("*.png"))):
        (folder / file.name).hardlink_to(file)
        text = "a photo of a thing" if i == 4 else f"a photo of {'<IT>' if i == 3 else '<it>'}, <number> {i}"
        (folder / f"{file.stem}.txt").write_text(text)
    return {"data__sources": [{"path": str(folder)}]}


@pytest.mark.parametrize("kind", ["alone", "pivotal"])
def test_at_step_0_a_word_is_its_initial_words(make_run: MakeRun, worded: dict[str, Any], kind: str) -> None:
    made, _ = in_memory(make_run("run", **KINDS[kind], **worded))
    family, parts = made.run.model, made.parts
    base = family.load({"text"}, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        found = family.encode_text(parts, ["a photo of <it>, <number> 4", "a <NUMBER>", "a sea"])
        expected = family.encode_text(base, ["a photo of red man red, star 4", "a star", "a sea"])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("kind", ["alone", "pivotal"])
def test_nothing_else_moves(make_run: MakeRun, worded: dict[str, Any], kind: str) -> None:
    """Exactly 0, under a weight decay that would show in every row and weight that it reached."""
    decay = {"training__optimizer": {"type": "adamw", "weight_decay": 0.5}}
    made, data = in_memory(make_run("run", **KINDS[kind], **worded, **decay, training__steps=3))
    trained = {name for part in made.adapter.parameters().values() for name in part}
    networks = made.policy.networks
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    start = {name: tensor.clone() for name, tensor in made.adapter.state().items()}
    fit(made.run, made, data)
    own = {id(p) for part in made.adapter.parameters().values() for p in part.values()}
    for network, state in zip(networks, before, strict=True):
        frozen = [name for name, p in network.named_parameters() if id(p) not in own]
        assert frozen
        assert all(torch.equal(network.state_dict()[name], state[name]) for name in frozen)
        assert not any(p.requires_grad for p in network.parameters() if id(p) not in own)
    assert any("token_embedding.known.weight" in name for name in before[1])
    assert trained == start.keys()
    still = {name for name, tensor in made.adapter.state().items() if torch.equal(tensor, start[name])}
    assert not {name for name in still if not name.startswith("text_encoder.")}  # its last layer is not read


@pytest.mark.parametrize(("rate", "moves"), [(0.0, False), (1e-2, True)])
def test_words_have_a_rate_of_their_own(make_run: MakeRun, worded: dict[str, Any], rate: float, moves: bool) -> None:
    changes = {**PIVOTAL, "training__token_learning_rate": rate, "training__learning_rate": 0.0 if moves else 1e-3}
    made, data = in_memory(make_run("run", **changes, **worded, training__steps=2))
    start = {name: tensor.clone() for name, tensor in made.adapter.state().items()}
    fit(made.run, made, data)
    moved = {name for name, tensor in made.adapter.state().items() if not torch.equal(tensor, start[name])}
    words = {name for name in start if name.startswith("embeddings/")}
    assert len(words) == 4
    assert words <= moved if moves else not words & moved
    assert bool(moved - words) is not moves


def test_lengths_are_kept_where_asked(make_run: MakeRun, worded: dict[str, Any]) -> None:
    tokens = [TOKENS[0] | {"keep_norm": True}, TOKENS[1]]
    kept = ALONE | {"adapter": {"type": "embedding", "tokens": tokens}}
    made, data = in_memory(make_run("run", **kept, **worded, training__steps=4))
    start = {name: tensor.clone() for name, tensor in made.adapter.state().items()}
    fit(made.run, made, data)
    for name, tensor in made.adapter.state().items():
        drift = (tensor.double().norm(dim=1) / start[name].double().norm(dim=1) - 1).abs().max()
        turn = 1 - torch.cosine_similarity(tensor.double(), start[name].double(), dim=1).max()
        assert float(drift) < 1e-6 if "/it." in name else float(drift) > 1e-3
        assert float(turn) > 1e-3


class Stop(Exception):
    """The process dies."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_equals_an_uninterrupted_one(make_run: MakeRun, worded: dict[str, Any], kind: str) -> None:
    shown = {"preview": {"prompts": ["a photo of <it>"], "every": 3, "inference_steps": 1}}
    whole = stages.train(make_run("whole", **KINDS[kind], **worded))

    def die(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 5:
            raise Stop

    broken = make_run("broken", **KINDS[kind], **worded, **shown)
    with pytest.raises(Stop):
        stages.train(broken, emit=die)
    found = checkpoint_bytes(stages.train(broken, resume="latest"), 8)
    assert found == checkpoint_bytes(whole, 8)
    assert {
        "embeddings/it/learned_embeds.safetensors",
        "ema/embeddings/number/learned_embeds.safetensors",
    } < found.keys()


@pytest.mark.parametrize("kind", ["alone", "pivotal"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_splits_of_a_step_give_one_gradient(
    make_run: MakeRun, worded: dict[str, Any], kind: str, checkpointing: bool
) -> None:
    gradients = []
    for batch_size, accumulation in [(1, 4), (2, 2), (4, 1)]:
        split = {"training__batch_size": batch_size, "training__accumulation": accumulation}
        memory = {"training__gradient_checkpointing": checkpointing}
        made, data = in_memory(make_run(f"split-{batch_size}", **KINDS[kind], **worded, **split, **memory))
        made.policy.train()
        loss = partial(made.run.objective.loss, made.policy)
        loop._accumulate(made.run.seed, 0, loss, made.learner, data.stream, Runtime.detect("fp32", "cpu"))
        gradients.append(torch.cat([group.gradient.double().clone() for group in made.learner.groups]))
    assert gradients[0].norm() > 0
    for other in gradients[1:]:
        assert float((other - gradients[0]).norm() / gradients[0].norm()) <= 1e-5


def test_the_reference_reads_the_first_values(make_run: MakeRun, worded: dict[str, Any]) -> None:
    made, data = in_memory(make_run("run", **PIVOTAL, **worded, training__steps=3))
    batch = next(iter(data.stream.window(0)))

    def answer() -> torch.Tensor:
        with torch.no_grad():
            t = torch.full((len(batch),), 300)
            return made.policy.predict(batch.latents, t, made.policy.condition(batch))

    with made.policy.evaluating():
        before = answer()
        fit(made.run, made, data)
        with made.policy.evaluating():
            after = answer()
            with made.policy.reference():
                assert torch.equal(answer(), before)
            assert torch.equal(answer(), after)
            with pytest.raises(Stop), made.policy.reference():
                raise Stop
            assert torch.equal(answer(), after)
    assert not torch.equal(before, after)


def test_a_word_in_no_caption_is_refused(make_run: MakeRun, worded: dict[str, Any], tmp_path: Path) -> None:
    tokens = [*TOKENS, {"token": "<other>"}]
    with pytest.raises(UserError) as refused:
        stages.train(make_run("run", adapter={"type": "embedding", "tokens": tokens}, **worded))
    told = str(refused.value)
    assert "no caption has the new word <other>" in told
    assert "adapter.tokens.2.token" in told
    assert "<it>" not in told


def test_the_trigger_of_a_source_puts_a_word_into_captions(make_run: MakeRun, pictures: Path) -> None:
    tokens = [{"token": "<it>", "initial": "zebra", "vectors": 1}]
    sources = [{"path": str(pictures), "trigger": "<it>"}]
    told: list[Event] = []
    run = make_run("run", adapter={"type": "embedding", "tokens": tokens}, data__sources=sources, training__steps=1)
    stages.train(run, emit=told.append)
    (notice,) = [event.message for event in told if isinstance(event, Warned)]
    assert "'zebra', which <it> starts from, is no single token" in notice


def test_captions_without_words_are_told_where_nothing_else_trains(make_run: MakeRun, worded: dict[str, Any]) -> None:
    told: list[Event] = []
    stages.train(make_run("run", **ALONE, **worded, training__steps=1), emit=told.append)
    assert any("1 of 9 captions have no new word" in e.message for e in told if isinstance(e, Warned))
    told.clear()
    stages.train(make_run("other", **PIVOTAL, **worded, training__steps=1), emit=told.append)
    assert not [event for event in told if isinstance(event, Warned)]


def test_a_checkpoint_of_other_words_is_refused(make_run: MakeRun, worded: dict[str, Any]) -> None:
    folder = stages.train(make_run("run", **ALONE, **worded, training__steps=1))
    changed = {"type": "embedding", "tokens": [TOKENS[0] | {"vectors": 2}, TOKENS[1]]}
    other = make_run("run", **ALONE | {"adapter": changed}, **worded, training__steps=2)
    with pytest.raises(UserError, match=r"adapter\.tokens\.0\.vectors: 3 -> 2"):
        stages.train(other, resume="latest")
    with pytest.raises(UserError, match="the saved embedding does not fit this run"):
        stages.train(other, resume="latest", accept=["adapter"])
    assert load_file(folder / "checkpoint-1" / "embeddings" / "it" / "learned_embeds.safetensors")["clip_l"].shape == (
        3,
        16,
    )
