"""Whole runs with each kind of adapter, and what their settings do to a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_helpers import answer, fill, loaded
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from gesso import stages
from gesso.adapters import LoHa, LoKr, LoRA
from gesso.core import checkpoints
from gesso.core.runtime import Runtime
from gesso.errors import UserError
from gesso.evaluation.models import open_pipeline
from gesso.training.session import Session
from run_helpers import MakeRun, checkpoint_bytes

SETTINGS: dict[str, dict[str, Any]] = {
    "dora": {"type": "lora", "rank": 2, "dora": True, "conv_rank": 1},
    "dropped": {"type": "lora", "rank": 4, "rank_dropout": 0.5, "module_dropout": 0.3, "conv_rank": 2, "dropout": 0.1},
    "bounded": {"type": "lora", "rank": 2, "max_norm": 0.01, "lora_plus_ratio": 16, "learning_rates": {"mid_block": 3}},
    "lokr": {"type": "lokr", "rank": 2, "factor": 4, "rank_dropout": 0.2, "module_dropout": 0.2},
    "loha": {"type": "loha", "rank": 2, "targets": "all"},
    "oft": {"type": "oft", "block_size": 8},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_run_resumes_bit_for_bit_and_draws(make_run: MakeRun, tmp_path: Path, kind: str) -> None:
    common = {"adapter": SETTINGS[kind], "training__steps": 2, "checkpoint__every": 1}
    whole = stages.train(make_run("whole", **common))
    stages.train(make_run("parts", **{**common, "training__steps": 1}))
    parts = stages.train(make_run("parts", **common), resume="latest")
    one, other = (checkpoint_bytes(folder, 2) for folder in (whole, parts))
    assert one == other
    drawn = stages.sample(
        str(whole), prompts=["a photo of thing"], steps=1, device="cpu", precision="fp32", output=tmp_path / "a.png"
    )
    assert drawn[0].is_file()


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha", "oft"])
def test_what_is_drawn_is_the_trained_model(make_run: MakeRun, tmp_path: Path, kind: str) -> None:
    run = make_run("run", adapter=SETTINGS[kind], training__steps=1, training__learning_rate=0.05)
    folder = stages.train(run)
    runtime = Runtime.for_inference("fp32", "cpu")
    pipe, _ = open_pipeline(str(folder), runtime=runtime)
    plain, _ = open_pipeline(run.model.base, runtime=runtime)
    drawn = answer(run.model, _parts(pipe))
    assert (drawn - answer(run.model, _parts(plain))).abs().max() > 1e-3 * drawn.abs().max()
    if kind == "oft":
        assert not list(folder.glob("*.safetensors"))
        return
    exported, _ = open_pipeline(run.model.base, loras=[(str(folder / "run.safetensors"), 1.0)], runtime=runtime)
    assert (answer(run.model, _parts(exported)) - drawn).abs().max() < 5e-3 * drawn.abs().max()


def test_no_adapted_layer_grows_beyond_max_norm(tiny_base: Path) -> None:
    family, parts = loaded(tiny_base)
    attached = LoRA(rank=2, alpha=6, max_norm=4, conv_rank=2).attach(parts, family, seed=0)
    fill(attached)
    before = {name: change.delta().double().numpy() for name, change in attached.changes().items()}  # type: ignore[attr-defined]
    attached.after_step()
    norms = {name: np.linalg.norm(delta) for name, delta in before.items()}
    assert min(norms.values()) < 4 < max(norms.values())
    for name, change in attached.changes().items():
        wanted = before[name] * min(1.0, 4 / norms[name])
        np.testing.assert_allclose(change.delta().numpy(), wanted, rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]


def test_learning_rates_follow_patterns_and_lora_plus(make_run: MakeRun) -> None:
    adapter = {"rank": 2, "lora_plus_ratio": 16, "learning_rates": {"mid_block": 0.5, r"up_blocks\.0": 2}}
    run = make_run("run", adapter=adapter, training__learning_rate=1e-3, training__steps=1)
    runtime = Runtime.detect("fp32", "cpu")
    parts = run.model.load({"text"}, dtype=runtime.dtype, device=runtime.device)
    groups = Session.build(run, parts, runtime).learner.groups
    assert len({group.part for group in groups}) == len(groups) == 6
    for group in groups:
        for name in group.names:
            own = 0.5 if "mid_block" in name else 2 if ".up_blocks.0." in name else 1
            assert group.learning_rate == pytest.approx(1e-3 * own * (16 if "lora_B" in name else 1))


@pytest.mark.parametrize("dora", [False, True])
def test_starting_from_a_lora_starts_at_its_answer(tiny_base: Path, tmp_path: Path, dora: bool) -> None:
    family, parts = loaded(tiny_base)
    old = LoRA(rank=2, alpha=3).attach(parts, family, seed=0)
    fill(old)
    wanted = answer(family, parts)
    file = tmp_path / "old.safetensors"
    save_file(
        {k: t.clone() for k, t in old.state().items()}, file, old.layout().headers["pytorch_lora_weights.safetensors"]
    )
    _, fresh = loaded(tiny_base)
    base = answer(family, fresh)
    new = LoRA(rank=5, alpha=2, targets="attention-mlp", dora=dora, init_from=str(file))
    attached = new.attach(fresh, family, seed=1)
    assert torch.equal(answer(family, fresh), base)
    attached.begin()
    assert (answer(family, fresh) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    with attached.reference():
        assert torch.equal(answer(family, fresh), base)
    for misfit, why in (
        (LoRA(rank=1, init_from=str(file)), "has rank 2 there"),
        (LoRA(rank=2, targets=("proj_in",), init_from=str(file)), "are not adapted here"),
    ):
        with pytest.raises(UserError, match=why):
            misfit.attach(loaded(tiny_base)[1], family, seed=0).begin()


@pytest.mark.parametrize(
    "spec",
    [
        LoRA(rank=4, rank_dropout=0.5, conv_rank=2),
        LoRA(rank=4, module_dropout=0.5),
        LoKr(rank=2, module_dropout=0.5),
        LoHa(rank=2, rank_dropout=0.5),
    ],
)
def test_dropout_follows_torchs_generator_and_is_off_in_eval(tiny_base: Path, spec: LoRA | LoKr | LoHa) -> None:
    family, parts = loaded(tiny_base)
    attached = spec.attach(parts, family, seed=0)
    fill(attached)
    still = answer(family, parts)
    assert torch.equal(answer(family, parts), still)
    parts.denoiser.train()
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        seen.append(answer(family, parts))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], still)


def test_rank_dropout_keeps_the_mean(tiny_base: Path) -> None:
    family, parts = loaded(tiny_base)
    attached = LoRA(rank=64, rank_dropout=0.5).attach(parts, family, seed=0)
    fill(attached)
    layer: Any = next(m for n, m in parts.denoiser.named_modules() if n.endswith("attn1.to_q"))
    x = torch.ones(512, 1, layer.in_features)
    with torch.no_grad():
        whole = layer(x)
        layer.train()
        torch.manual_seed(0)
        dropped = layer(x)
    assert not torch.equal(dropped[0], dropped[1])  # each sample has its own
    change = (whole - layer.base_layer(x))[0]
    assert (dropped.mean(0) - whole[0]).norm() < 0.25 * change.norm()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"dora": True, "rank_dropout": 0.1}, "rank_dropout does not go with dora"),
        ({"dora": True, "max_norm": 1.0}, "max_norm does not go with dora"),
        ({"conv_alpha": 1.0}, "without conv_rank"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"learning_rates": {"mid_block": 0.0}}, "greater than 0"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        LoRA.model_validate(settings)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (LoRA(dora=True, dropout=0.1, conv_rank=2), "dropout does not go with dora on convolutions"),
        (LoRA(rank_pattern={"middle": 2}), "'middle' is found in the name of no adapted layer"),
        (LoRA(targets=("to_x",)), "no layer of the denoiser is called to_x"),
        (LoRA(rank_pattern={"unet": 0}), "no layer is adapted"),
    ],
)
def test_what_means_no_layer_is_refused(tiny_base: Path, spec: LoRA, why: str) -> None:
    family, parts = loaded(tiny_base)
    with pytest.raises(UserError, match=why):
        spec.attach(parts, family, seed=0)


def test_saved_tensors_have_the_names_of_the_layout(make_run: MakeRun) -> None:
    run = make_run("run", adapter=SETTINGS["lokr"], training__steps=1)
    checkpoint = stages.train(run) / "checkpoint-1"
    tensors = checkpoints.tensors(checkpoint)
    assert all(name.startswith("unet.base_model.model.") for name in tensors)
    assert len(tensors) == len(load_file(checkpoint / "unet" / "adapter_model.safetensors"))


def _parts(pipe: Any) -> Any:
    from gesso.core.seams import Parts

    encoders, tokenizers = [pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2]
    return Parts(denoiser=pipe.unet, vae=pipe.vae, text_encoders=encoders, tokenizers=tokenizers)
