"""Full fine-tuning in every way it can be set: what trains moves, what does not stays exactly, and resume is exact."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gesso import stages
from gesso.core.folder import RunFolder
from gesso.core.runtime import Precision, Runtime
from gesso.training import loop
from gesso.training.session import Session
from run_helpers import MakeRun, Stop, checkpoint_bytes, stop_after

BOTH = {"type": "full", "train_text_encoders": True}
BF16 = {"training__precision": "bf16"}
VARIANTS: dict[str, dict[str, Any]] = {
    "float32 weights in bf16": {"adapter": BOTH, **BF16},
    "bf16 weights": {"adapter": BOTH | {"weights": "bf16"}, **BF16},
    "bf16 weights, 8-bit moments": {
        "adapter": BOTH | {"weights": "bf16"}, "training__optimizer": {"type": "adamw8bit"}, **BF16
    },
    "bf16 weights of some layers": {"adapter": {"type": "full", "weights": "bf16", "targets": ["attn2"]}, **BF16},
    "text encoders alone": {"adapter": BOTH | {"train_denoiser": False}, **BF16},
    "checkpointing": {"adapter": BOTH, "training__gradient_checkpointing": True, **BF16},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_uninterrupted(make_run: MakeRun, variant: str) -> None:
    overrides = VARIANTS[variant]
    whole = stages.train(make_run("whole", **overrides))
    broken = make_run("broken", **overrides)
    for step in (4, 5):
        with pytest.raises(Stop):
            stages.train(broken, resume="latest", emit=stop_after(step))
    files = checkpoint_bytes(stages.train(broken, resume="latest"), 8)
    assert files == checkpoint_bytes(whole, 8) != checkpoint_bytes(whole, 6)


@pytest.mark.parametrize("variant", ["float32 weights in bf16", "bf16 weights", "text encoders alone"])
def test_previews_and_saves_leave_the_weights_alone(make_run: MakeRun, variant: str) -> None:
    common: dict[str, Any] = {**VARIANTS[variant], "training__steps": 3}
    plain = stages.train(make_run("plain", **common))
    shown = {"preview": {"prompts": ["a photo", "thing"], "every": 1, "inference_steps": 2}}
    other = stages.train(make_run("other", **common, **shown, checkpoint={"every": 1}))
    assert len(list((other / "samples").rglob("*.png"))) >= 8
    assert checkpoint_bytes(plain, 3) == checkpoint_bytes(other, 3)


def before_and_after(base: Path, folder: Path, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A network's tensors before and after training, under the names that they have now."""
    (old,), (new,) = ((f / part).glob("*.safetensors") for f in (base, folder))
    before, after = load_file(old), load_file(new)
    return before, {name if name in before else name.removeprefix("text_model."): t for name, t in after.items()}


@pytest.mark.parametrize("weights", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", [["attn2"], ["up_blocks.1", "conv_in.bias"], "attention", "all"])
def test_layers_that_are_no_target_move_by_exactly_zero(
    make_run: MakeRun, tiny_base: Path, targets: Any, weights: str
) -> None:
    adapter = {"type": "full", "targets": targets, "weights": weights}
    # Weight decay moves what has no gradient, if it is let.
    run = make_run("run", adapter=adapter, training__steps=3, training__optimizer={"weight_decay": 0.3}, **BF16)
    before, after = before_and_after(tiny_base, stages.train(run) / "checkpoint-3", "unet")
    assert before.keys() == after.keys()
    start = {name: tensor.to(after[name].dtype) for name, tensor in before.items()}
    moved = {name for name in before if not torch.equal(start[name], after[name])}
    words = {"attention": ("to_q", "to_k", "to_v", "to_out.0"), "all": ("",)}.get(str(targets), tuple(targets))
    wanted = {name for name in before if any(word in name for word in words)}
    # A rounded update of a few numbers may leave all of them.
    assert moved == wanted or (weights == "bf16" and moved < wanted and len(moved) > 0.9 * len(wanted))
    assert {t.dtype for t in after.values()} == {torch.bfloat16 if weights == "bf16" else torch.float32}


@pytest.mark.parametrize(
    ("adapter", "rate", "rates", "parts"),
    [
        (BOTH, 1e-3, [1e-3, 0], {"unet", "text_encoder"}),
        (BOTH, 1e-3, [0], {"unet"}),
        (BOTH | {"train_denoiser": False}, 1e-3, None, {"text_encoder", "text_encoder_2"}),
        (BOTH, 0.0, [0, 1e-3], {"text_encoder_2"}),
    ],
)
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_parts_without_a_rate_move_by_exactly_zero(
    make_run: MakeRun, tiny_base: Path, adapter: Any, rate: float, rates: Any, parts: set[str], weights: str
) -> None:
    run = make_run(
        "run",
        adapter=adapter | {"weights": weights},
        training__learning_rate=rate,
        training__text_encoder_learning_rates=rates,
        training__steps=2,
        training__ema={"enabled": False},
        **BF16,
    )
    folder = stages.train(run)
    assert {path.name for path in (folder / "checkpoint-2").iterdir() if path.is_dir()} == parts | {"state"}
    model = stages.export(str(folder), precision="fp32")
    for part in ("unet", "text_encoder", "text_encoder_2", "vae"):
        before, after = before_and_after(tiny_base, model, part)
        assert before.keys() == {name if name in before else name.removeprefix("text_model.") for name in after}
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert len(moved) > 0.5 * len(before) if part in parts else not moved, part


def session(run: Any, precision: Precision, steps: int = 0) -> tuple[Session, dict[str, torch.Tensor]]:
    """A session after some steps on the CPU, and the gradient of the next step by name."""
    folder = RunFolder(run.folder)
    folder.prepare()
    runtime = Runtime(torch.device("cpu"), precision)
    data = stages.prepare(run, folder, runtime, lambda event: None)
    made = Session.build(run, data.parts, runtime)
    made.policy.train()
    loss = partial(run.objective.loss, made.policy)
    if steps:
        training = run.training.model_copy(update={"steps": steps})
        loop.fit(training, name="run", seed=0, loss=loss, learner=made.learner, stream=data.stream, runtime=runtime,
                 actions=[], emit=lambda event: None, stopping=lambda: False)  # fmt: skip
    loop._accumulate(run.seed, made.learner.step, loss, made.learner, data.stream, runtime)
    found = {n: g.clone() for group in made.learner.groups for n, g in group.views(group.gradient).items()}
    return made, found


@pytest.mark.parametrize(
    ("precision", "weights", "bound"), [("bf16", "fp32", 0.05), ("fp16", "fp32", 0.01), ("bf16", "bf16", 0.08)]
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_in_16_bits_is_that_of_float32_but_for_rounding(
    make_run: MakeRun, precision: Precision, weights: str, bound: float, checkpointing: bool
) -> None:
    """fp16, which is for GPUs, is run here as the arithmetic that it is."""
    _, exact = session(make_run("exact", adapter=BOTH), "fp32")
    values = {"adapter": BOTH | {"weights": weights}, "training__gradient_checkpointing": checkpointing}
    made, found = session(make_run("coarse", training__precision=precision, **values), precision)
    assert found.keys() == exact.keys()
    kept = torch.bfloat16 if weights == "bf16" else torch.float32
    assert {g.dtype for g in found.values()} == {group.flat.dtype for group in made.learner.groups} == {kept}
    one, other = (torch.cat([t[k].double().flatten() for k in sorted(exact)]) for t in (exact, found))
    difference = float((one - other).norm() / one.norm())
    assert 1e-5 < difference < bound, "below that nothing was computed in 16 bits"


def test_fp16_steps_end_where_float32_steps_do(make_run: MakeRun) -> None:
    run = make_run("run", adapter=BOTH, training__precision="fp16", training__learning_rate=1e-4)
    made, _ = session(run, "fp16", steps=2)
    assert made.learner.step == 2
    assert made.learner.scaler.get_scale() > 1
    exact, _ = session(make_run("exact", adapter=BOTH, training__learning_rate=1e-4), "fp32", steps=2)
    for coarse, fine in zip(made.learner.groups, exact.learner.groups, strict=True):
        assert torch.allclose(coarse.flat, fine.flat, atol=5e-4)


def test_updates_that_16_bits_would_lose_are_kept(make_run: MakeRun) -> None:
    """1e-6 on weights near 1 (norms start there) is a hundredth of a bf16 step: in float32 it shows, every time."""
    run = make_run("run", adapter={"type": "full"}, training__learning_rate=1e-6, training__steps=3,
                   training__optimizer={"weight_decay": 0.0}, training__schedule={"type": "constant"},
                   **BF16)  # fmt: skip
    after = load_file(stages.train(run) / "checkpoint-3" / "unet" / "diffusion_pytorch_model.safetensors")
    norms = [t for name, t in after.items() if name.endswith("norm1.weight")]
    assert norms
    moved = torch.cat(norms) - 1
    assert float(moved.abs().max()) < 4e-6
    assert float((moved != 0).float().mean()) > 0.9


def test_a_frozen_text_encoder_is_read_in_the_precision_of_the_run(make_run: MakeRun) -> None:
    """What trains is wide and computes narrow; what does not train is loaded narrow."""
    made, _ = session(make_run("a", adapter={"type": "full"}, **BF16), "bf16")
    assert made.parts.denoiser.dtype == torch.float32
    assert not made.parts.text_encoders, "their answers are cached"
    made, _ = session(make_run("b", adapter=BOTH | {"train_denoiser": False}, **BF16), "bf16")
    assert made.parts.denoiser.dtype == torch.bfloat16
    assert {encoder.dtype for encoder in made.parts.text_encoders} == {torch.float32}
    encoder, ids = made.parts.text_encoders[0], torch.tensor([[0, 1]])
    with torch.no_grad():
        found = encoder(ids).last_hidden_state
        wide = type(encoder).forward(encoder, ids).last_hidden_state
        with torch.autocast("cpu", torch.bfloat16):
            narrow = type(encoder).forward(encoder, ids).last_hidden_state
    assert torch.equal(found, narrow)
    assert not torch.equal(found, wide)
