"""Gradient checkpointing changes memory and nothing else, also where only adapters on text encoders train."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from gesso.core.runtime import Runtime
from gesso.training import loop
from run_helpers import MakeRun, in_memory


def gradients(make_run: MakeRun, name: str, *, checkpointing: bool) -> tuple[dict[str, Tensor], list[object]]:
    """The first step's gradients by name, and how the text encoders' layers recompute."""
    run = make_run(
        name,
        adapter={"type": "lora", "rank": 2, "train_text_encoders": True},
        data__captions={},
        training__accumulation=1,
        training__gradient_checkpointing=checkpointing,
    )
    session, data = in_memory(run)
    for group in session.learner.groups:  # B starts at 0, and then A has no gradient to compare
        group.flat.data.add_(0.02)
    session.policy.train()
    loss = partial(run.objective.loss, session.policy)
    loop._accumulate(0, 0, loss, session.learner, data.stream, Runtime.detect("fp32", "cpu"))
    found = {n: g.clone() for group in session.learner.groups for n, g in group.views(group.gradient).items()}
    layers = [layer for encoder in session.parts.text_encoders for layer in encoder.modules()]
    ways = [
        vars(layer)["_gradient_checkpointing_func"] for layer in layers if vars(layer).get("gradient_checkpointing")
    ]
    return found, [way.keywords["use_reentrant"] for way in ways]


def test_recomputing_gives_the_same_gradients_and_reaches_text_encoders(make_run: MakeRun) -> None:
    plain, none = gradients(make_run, "plain", checkpointing=False)
    found, ways = gradients(make_run, "recomputed", checkpointing=True)
    assert none == []
    # By default transformers 4 recomputes in a way that leaves weights behind frozen inputs without a gradient.
    assert ways
    assert not any(ways)
    assert all(torch.allclose(found[name], plain[name], rtol=1e-4, atol=1e-9) for name in plain)
    assert {"text_encoder", "text_encoder_2"} <= {name.partition(".")[0] for name in found if found[name].any()}
