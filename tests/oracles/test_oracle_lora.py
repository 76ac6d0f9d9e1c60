"""LoRA against W + (alpha / r) B A: in one layer, in the whole UNet, in diffusers, and in its gradients."""

from __future__ import annotations

from pathlib import Path

import formulas
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from rig import normal
from safetensors.torch import save_file
from torch import Tensor, nn

from gesso.adapters import AttachedLoRA, LoRA
from gesso.core.batch import Geometry
from gesso.core.fused import LoRALinear
from gesso.core.seams import Parts
from gesso.families.sdxl import SDXL

CPU = torch.device("cpu")
GEOMETRY = [Geometry(1023, 765, 1, 255, 1024, 768), Geometry(64, 64, 0, 0, 64, 64)]
CAPTIONS = ["a photo of sks aldar", "red circle"]
SPEC = LoRA(rank=4, alpha=6)


@pytest.fixture(scope="module")
def family(model: Path) -> SDXL:
    return SDXL(base=str(model))


def loaded(family: SDXL, dtype: torch.dtype = torch.float32) -> Parts:
    return family.load({"denoiser", "text"}, dtype=dtype, device=CPU)


def answer(family: SDXL, parts: Parts) -> Tensor:
    """The network's prediction for two fixed samples, text encoders included."""
    assert parts.denoiser is not None
    dtype = next(parts.denoiser.parameters()).dtype
    noisy = torch.from_numpy(normal(1, 2, 4, 8, 8)).to(dtype)
    cond = family.condition(family.encode_text(parts, CAPTIONS), GEOMETRY)
    return family.predict(parts.denoiser, noisy, torch.tensor([700, 3]), cond)


def fill(attached: AttachedLoRA, scale: float = 0.1) -> None:
    """Random matrices, B too: a trained adapter."""
    for group in attached.parameters().values():
        for i, parameter in enumerate(group.values()):
            parameter.data.copy_(torch.from_numpy(scale * normal(100 + i, *parameter.shape)))


def merge(parts: Parts, state: dict[str, Tensor], *, alpha: float) -> int:
    """Add (alpha / r) B A to the weights of networks without adapters, by numpy; returns how many layers grew."""
    assert parts.denoiser is not None
    networks = {
        "unet": parts.denoiser,
        "text_encoder": parts.text_encoders[0],
        "text_encoder_2": parts.text_encoders[1],
    }
    merged = 0
    for name, down in state.items():
        if not name.endswith(".lora_A.weight"):
            continue
        path = name.removesuffix(".lora_A.weight")
        part, _, layer = path.partition(".")
        modules = dict(networks[part].named_modules())
        weight = modules[layer if layer in modules else layer.removeprefix("text_model.")].weight
        up = state[f"{path}.lora_B.weight"]
        grown = formulas.lora_merge(weight.double().numpy(), down.numpy(), up.numpy(), alpha=alpha)
        weight.data.copy_(torch.from_numpy(grown))
        merged += 1
    return merged


# --------------------------------------------------------------------------- start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["attention", "attention-mlp", "all-linear"])
def test_at_the_start_the_model_is_the_base_bit_for_bit(family: SDXL, targets: str, dtype: torch.dtype) -> None:
    parts = loaded(family, dtype)
    with torch.no_grad():
        before = answer(family, parts)
        attached = LoRA(rank=4, alpha=6, targets=targets).attach(parts, family, seed=0, text_encoders=(0, 1))
        assert torch.equal(answer(family, parts), before)
    names = {name for group in attached.parameters().values() for name in group}
    assert len(names) > 8
    starts = [p for group in attached.parameters().values() for n, p in group.items() if n.endswith("lora_A.weight")]
    assert len({tuple(p.flatten()[:4].tolist()) for p in starts}) == len(starts)  # no two layers start alike
    for p in starts:
        bound = 1 / np.sqrt(p.shape[1])
        assert float(p.detach().abs().max()) <= bound
        assert float(p.detach().std()) == pytest.approx(bound / np.sqrt(3), rel=0.35)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trained_matrices_are_float32_and_the_base_is_frozen(family: SDXL, dtype: torch.dtype) -> None:
    parts = loaded(family, dtype)
    attached = SPEC.attach(parts, family, seed=0, text_encoders=(1,))
    trained = {id(p) for group in attached.parameters().values() for p in group.values()}
    assert set(attached.parameters()) == {"unet", "text_encoder_2"}
    for network in [parts.denoiser, *parts.text_encoders]:
        assert network is not None
        for p in network.parameters():
            assert p.requires_grad == (id(p) in trained)
            assert p.dtype == (torch.float32 if id(p) in trained else dtype)
    assert {v.dtype for v in attached.state().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        ("attention", {"to_q", "to_k", "to_v", "to_out.0"}),
        ("attention-mlp", {"to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"}),
    ],
)
def test_every_layer_that_a_preset_means_is_adapted_and_no_other(family: SDXL, targets: str, leaves: set[str]) -> None:
    parts = loaded(family)
    assert parts.denoiser is not None
    wanted = {
        f"unet.{name}"
        for name, module in parts.denoiser.named_modules()
        if isinstance(module, nn.Linear) and any(name.endswith(f".{leaf}") for leaf in leaves)
    }
    attached = LoRA(rank=2, targets=targets).attach(parts, family, seed=0)
    found = {n.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for n in attached.state()}
    assert found == wanted
    assert len(wanted) > 20


def test_text_encoder_names_are_those_of_files_in_circulation(family: SDXL) -> None:
    """q, k, v and out of every CLIP layer, with `text_model` in the path whatever transformers calls it."""
    attached = SPEC.attach(loaded(family), family, seed=0, text_encoders=(0, 1))
    wanted = {
        f"{part}.text_model.encoder.layers.{i}.self_attn.{leaf}_proj.lora_{side}.weight"
        for part in ("text_encoder", "text_encoder_2")
        for i in range(2)
        for leaf in ("q", "k", "v", "out")
        for side in "AB"
    }
    assert {name for name in attached.state() if not name.startswith("unet.")} == wanted


def test_the_start_depends_on_the_seed_alone(family: SDXL) -> None:
    torch.manual_seed(1)
    one = SPEC.attach(loaded(family), family, seed=5).state()
    torch.manual_seed(2)
    two = SPEC.attach(loaded(family), family, seed=5).state()
    three = SPEC.attach(loaded(family), family, seed=6).state()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not any(torch.equal(one[k], three[k]) for k in one if "lora_A" in k)


# --------------------------------------------------------------------------- strength


@pytest.mark.parametrize(("rank", "alpha"), [(4, 6.0), (4, None), (3, 1.0), (8, 0.5)])
def test_one_layer_equals_the_merged_weight(family: SDXL, rank: int, alpha: float | None) -> None:
    parts = loaded(family)
    assert parts.denoiser is not None
    name, plain = next((n, m) for n, m in parts.denoiser.named_modules() if n.endswith("attn2.to_out.0"))
    weight, bias = plain.weight.double().numpy(), plain.bias.double().numpy()
    attached = LoRA(rank=rank, alpha=alpha).attach(parts, family, seed=0)
    fill(attached, 0.5)
    layer = dict(parts.denoiser.named_modules())[name]
    state = attached.state()
    down, up = (state[f"unet.{name}.lora_{side}.weight"].numpy() for side in "AB")
    grown = formulas.lora_merge(weight, down, up, alpha=rank if alpha is None else alpha)
    x = normal(2, 5, 7, weight.shape[1])
    with torch.no_grad():
        found = layer(torch.from_numpy(x)).double().numpy()
    wanted = x.astype(np.float64) @ grown.T + bias
    assert formulas.relative_l2(found, wanted) < 1e-6
    assert formulas.relative_l2(x @ weight.T + bias, wanted) > 1e-2  # the adapter does something


def test_the_whole_model_equals_the_merged_one(family: SDXL) -> None:
    live, plain = loaded(family), loaded(family)
    attached = LoRA(rank=4, alpha=6, targets="all-linear").attach(live, family, seed=0, text_encoders=(0, 1))
    fill(attached)
    with torch.no_grad():
        before = answer(family, plain)
        assert merge(plain, attached.state(), alpha=6) == len(attached.state()) // 2
        found, wanted = answer(family, live), answer(family, plain)
    assert formulas.relative_l2(found.double().numpy(), wanted.double().numpy()) < 1e-5
    assert formulas.relative_l2(before.double().numpy(), wanted.double().numpy()) > 1e-2


@pytest.mark.parametrize("alpha", [6.0, 2.5, None])
def test_diffusers_loads_the_same_model(model: Path, family: SDXL, tmp_path: Path, alpha: float | None) -> None:
    """state() and metadata() as a file -> `load_lora_weights` on a fresh base: same text, same prediction."""
    live = loaded(family)
    attached = LoRA(rank=4, alpha=alpha, targets="attention-mlp").attach(live, family, seed=0, text_encoders=(0, 1))
    fill(attached)
    tensors = {k: v.contiguous() for k, v in attached.state().items()}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata=attached.metadata())
    theirs = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    with torch.no_grad():
        base = theirs.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        theirs.load_lora_weights(tmp_path)
        hidden, _, pooled, _ = theirs.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        mine = {v.ndim: v for v in family.encode_text(live, CAPTIONS).values()}
        for found, wanted, unchanged in ((hidden, mine[3], base[0]), (pooled, mine[2], base[2])):
            assert formulas.relative_l2(found.double().numpy(), wanted.double().numpy()) < 1e-5
            assert formulas.relative_l2(unchanged.double().numpy(), wanted.double().numpy()) > 1e-3
        loaded_parts = Parts(
            denoiser=theirs.unet,
            text_encoders=[theirs.text_encoder, theirs.text_encoder_2],
            tokenizers=[theirs.tokenizer, theirs.tokenizer_2],
        )
        found, wanted = answer(family, loaded_parts), answer(family, live)
        plain = answer(family, loaded(family))
    assert formulas.relative_l2(found.double().numpy(), wanted.double().numpy()) < 1e-5
    assert formulas.relative_l2(plain.double().numpy(), wanted.double().numpy()) > 1e-2


# --------------------------------------------------------------------------- reference, restore


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_base_bit_for_bit(family: SDXL, dtype: torch.dtype) -> None:
    parts = loaded(family, dtype)
    with torch.no_grad():
        base = answer(family, parts)
        attached = LoRA(rank=4, alpha=6).attach(parts, family, seed=0, text_encoders=(0, 1))
        fill(attached)
        live = answer(family, parts)
        with attached.reference():
            assert torch.equal(answer(family, parts), base)
        assert torch.equal(answer(family, parts), live)
        assert not torch.equal(live, base)


def test_dropout_is_on_only_where_the_network_trains(family: SDXL) -> None:
    """Adapters join a network in its mode: none in eval mode, some in training, and none in the reference."""
    parts = loaded(family)
    assert parts.denoiser is not None
    with torch.no_grad():
        base = answer(family, parts)
        attached = LoRA(rank=4, alpha=6, dropout=0.5).attach(parts, family, seed=0)
        fill(attached)
        quiet = answer(family, parts)
        assert torch.equal(answer(family, parts), quiet)
        parts.denoiser.train()
        assert not torch.equal(answer(family, parts), answer(family, parts))
        with attached.reference():
            assert torch.equal(answer(family, parts), base)
        parts.denoiser.eval()
        assert torch.equal(answer(family, parts), quiet)


def test_reference_ends_after_an_error_and_leaves_the_matrices_trainable(family: SDXL) -> None:
    parts = loaded(family)
    attached = SPEC.attach(parts, family, seed=0)
    fill(attached)
    with torch.no_grad():
        live = answer(family, parts)
    with pytest.raises(RuntimeError, match="injected"), attached.reference():
        raise RuntimeError("injected")
    found = answer(family, parts)
    assert torch.equal(found, live)
    found.square().sum().backward()
    for parameter in attached.parameters()["unet"].values():
        assert parameter.requires_grad
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0


def test_restore_gives_the_same_bits_on_a_fresh_model(family: SDXL) -> None:
    parts, fresh = loaded(family), loaded(family)
    attached = SPEC.attach(parts, family, seed=0, text_encoders=(0, 1))
    fill(attached)
    kept = {k: v.clone() for k, v in attached.state().items()}
    other = SPEC.attach(fresh, family, seed=1, text_encoders=(0, 1))
    other.restore(kept)
    with torch.no_grad():
        assert torch.equal(answer(family, fresh), answer(family, parts))
    assert all(torch.equal(v, kept[k]) for k, v in other.state().items())


# --------------------------------------------------------------------------- gradients


def matrices(dtype: torch.dtype, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """x [2, 5, 6], W [7, 6], bias [7], A [3, 6], B [7, 3]."""
    x, w, c, a, b = (
        torch.from_numpy(normal(s, *shape)).to(dtype)
        for s, shape in enumerate([(2, 5, 6), (7, 6), (7,), (3, 6), (7, 3)])
    )
    return x.requires_grad_(), w, c if bias else None, a.requires_grad_(), b.requires_grad_()


@pytest.mark.parametrize("bias", [True, False])
def test_fused_layer_against_finite_differences(bias: bool) -> None:
    x, w, c, a, b = matrices(torch.float64, bias=bias)
    assert torch.autograd.gradcheck(
        lambda x, a, b: LoRALinear.apply(x, w, c, a, b, 0.7), (x, a, b), eps=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("bias", [True, False])
def test_fused_layer_against_the_formula_and_plain_autograd(bias: bool) -> None:
    x, w, c, a, b = matrices(torch.float64, bias=bias)
    seed = torch.from_numpy(normal(9, 2, 5, 7)).double()
    found = LoRALinear.apply(x, w, c, a, b, 0.7)
    grown = formulas.lora_merge(w.numpy(), a.detach().numpy(), b.detach().numpy(), alpha=0.7 * 3)
    wanted = x.detach().numpy() @ grown.T + (0.0 if c is None else c.numpy())
    assert formulas.relative_l2(found.detach().numpy(), wanted) < 1e-14
    mine = torch.autograd.grad(found, (x, a, b), seed)
    plain = nn.functional.linear(x, w, c) + 0.7 * (x @ a.T) @ b.T
    for ours, theirs in zip(mine, torch.autograd.grad(plain, (x, a, b), seed), strict=True):
        assert formulas.relative_l2(ours.numpy(), theirs.numpy()) < 1e-13


def test_fused_layer_takes_strided_inputs_and_gradients() -> None:
    """Transposed views reach it from attention; expanded gradients from sums."""
    x, w, c, a, b = matrices(torch.float64, bias=True)
    turned = x.transpose(0, 1)
    mine = torch.autograd.grad(LoRALinear.apply(turned, w, c, a, b, 0.7).sum(), (x, a, b))
    plain = torch.autograd.grad((nn.functional.linear(turned, w, c) + 0.7 * (turned @ a.T) @ b.T).sum(), (x, a, b))
    for ours, theirs in zip(mine, plain, strict=True):
        assert formulas.relative_l2(ours.numpy(), theirs.numpy()) < 1e-13


def test_fused_layer_does_not_write_to_what_it_is_given() -> None:
    x, w, c, a, b = matrices(torch.float64, bias=True)
    before = [v.detach().clone() for v in (x, w, c, a, b)]
    out = LoRALinear.apply(x, w, c, a, b, 0.7)
    seed = torch.ones_like(out)
    out.backward(seed)
    for now, then in zip((x, w, c, a, b), before, strict=True):
        assert torch.equal(now.detach(), then)
    assert torch.equal(seed, torch.ones_like(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_layer_in_the_compute_dtype(dtype: torch.dtype) -> None:
    """Frozen weights and activations in bf16, matrices in float32: float32 gradients, right to bf16 rounding."""
    generator = np.random.default_rng(4)
    x, w, a, b, seed = (
        torch.from_numpy(generator.standard_normal(shape)) for shape in [(64, 96), (80, 96), (8, 96), (80, 8), (64, 80)]
    )
    low = x.to(dtype).requires_grad_(), w.to(dtype), a.float().requires_grad_(), b.float().requires_grad_()
    out = LoRALinear.apply(low[0], low[1], None, low[2], low[3], 0.5)
    assert out.dtype == dtype
    mine = torch.autograd.grad(out, (low[0], low[2], low[3]), seed.to(dtype))
    assert [g.dtype for g in mine] == [dtype, torch.float32, torch.float32]
    exact = tuple(v.detach().double().requires_grad_() for v in (low[0], low[2], low[3]))
    plain = exact[0] @ low[1].double().T + 0.5 * (exact[0] @ exact[1].T) @ exact[2].T
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert formulas.relative_l2(out.detach().double().numpy(), plain.detach().numpy()) < tolerance
    for ours, theirs in zip(mine, torch.autograd.grad(plain, exact, seed.to(dtype).double()), strict=True):
        assert formulas.relative_l2(ours.double().numpy(), theirs.numpy()) < tolerance


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_the_whole_unet(family: SDXL, checkpointing: bool) -> None:
    """In float64: the adapter's gradient equals plain autograd through merged weights, layer by layer."""
    live, plain = loaded(family, torch.float64), loaded(family, torch.float64)
    assert live.denoiser is not None
    assert plain.denoiser is not None
    attached = LoRA(rank=3, alpha=5, targets="all-linear").attach(live, family, seed=0)
    fill(attached)
    if checkpointing:
        live.denoiser.enable_gradient_checkpointing()
        live.denoiser.train()
    weight = torch.from_numpy(normal(50, 2, 4, 8, 8)).double()
    noisy, t = torch.from_numpy(normal(1, 2, 4, 8, 8)).double(), torch.tensor([700, 3])
    with torch.no_grad():
        text = family.encode_text(plain, CAPTIONS)
    cond = family.condition(text, GEOMETRY)
    (family.predict(live.denoiser, noisy, t, cond) * weight).sum().backward()

    leaves = {k: v.double().requires_grad_() for k, v in attached.state().items()}
    frozen = dict(plain.denoiser.named_parameters())
    grown = {}
    for name, down in leaves.items():
        if name.endswith("lora_A.weight"):
            path = name.removesuffix(".lora_A.weight")
            key = path.removeprefix("unet.") + ".weight"
            grown[key] = frozen[key] + (5 / 3) * leaves[f"{path}.lora_B.weight"] @ down
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]}
    out = torch.func.functional_call(
        plain.denoiser, grown, (noisy, t, cond["prompt_embeds"]), {"added_cond_kwargs": added, "return_dict": False}
    )[0]
    (out * weight).sum().backward()
    for name, parameter in attached.parameters()["unet"].items():
        assert parameter.grad is not None
        wanted = leaves[name].grad
        assert wanted is not None
        assert float(wanted.norm()) > 0
        assert formulas.relative_l2(parameter.grad.double().numpy(), wanted.numpy()) < 1e-6
