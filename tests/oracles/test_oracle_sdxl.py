"""The SDXL family against diffusers' own pipeline and networks, on a tiny model with random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import formulas
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from rig import normal
from torch import Tensor, nn

from gesso.core.batch import Geometry
from gesso.core.seams import Parts
from gesso.families.sdxl import SDXL

CPU = torch.device("cpu")
LONG = " ".join(["red circle blue star"] * 40)
PROMPTS = [
    "",
    "a photo of sks aldar in a yellow robe",
    LONG,
    "Алдар Көсе 🧔 — naïve café, 東京!",
    "  A  RED\tcircle,\n(on:1.3) [blue] 'sky'  ",
]
GEOMETRY = [Geometry(1023, 765, 1, 255, 1024, 768), Geometry(3001, 2047, 17, 0, 640, 1536)]


@pytest.fixture(scope="module")
def family(model: Path) -> SDXL:
    return SDXL(base=str(model))


@pytest.fixture(scope="module")
def parts(family: SDXL) -> Parts:
    return family.load({"text", "vae", "denoiser"}, dtype=torch.float32, device=CPU)


def pipeline(model: Path, dtype: torch.dtype = torch.float32) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False).to(dtype)


def same_text(found: dict[str, Tensor], hidden: Tensor, pooled: Tensor) -> None:
    """Bit for bit; the pooled embedding is the 2-dimensional one, the hidden states the 3-dimensional one."""
    by_rank = {value.ndim: value for value in found.values()}
    assert sorted(by_rank) == [2, 3]
    assert len(found) == 2
    for mine, other in ((by_rank[3], hidden), (by_rank[2], pooled)):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


# --------------------------------------------------------------------------- text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_equals_the_pipeline_bit_for_bit(model: Path, family: SDXL, dtype: torch.dtype) -> None:
    theirs = pipeline(model, dtype)
    mine = family.load({"text"}, dtype=dtype, device=CPU)
    with torch.no_grad():
        for prompt in PROMPTS:
            hidden, _, pooled, _ = theirs.encode_prompt(prompt, do_classifier_free_guidance=False)
            same_text(family.encode_text(mine, [prompt]), hidden, pooled)
        hidden, _, pooled, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        same_text(family.encode_text(mine, PROMPTS), hidden, pooled)
    assert len({tuple(row[:8].tolist()) for row in pooled.float()}) == len(PROMPTS)


def test_text_is_penultimate_without_norm_and_pooled_at_the_end_mark(family: SDXL, parts: Parts) -> None:
    """From the layers themselves: the input of each encoder's last layer, and the projection of the normed output."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for encoder in parts.text_encoders:
        layers = next(module for name, module in encoder.named_modules() if name.endswith("layers"))
        handles.append(layers[-1].register_forward_pre_hook(lambda _m, args: inputs.append(args[0].detach())))
        norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
        handles.append(norm.register_forward_hook(lambda _m, _a, out: outputs.append(out.detach())))
    prompt = PROMPTS[1]
    found = family.encode_text(parts, [prompt])
    for handle in handles:
        handle.remove()
    by_rank = {value.ndim: value for value in found.values()}
    assert torch.equal(by_rank[3], torch.cat(inputs, dim=-1))
    ids = parts.tokenizers[1](prompt).input_ids
    projection = parts.text_encoders[1].text_projection.weight
    wanted = outputs[1][0, len(ids) - 1].double().numpy() @ projection.double().numpy().T
    assert np.abs(by_rank[2][0].double().numpy() - wanted).max() < 1e-6


def test_chunks_are_each_encoded_as_a_prompt_of_their_own(model: Path, parts: Parts) -> None:
    words = ["a", "red", "circle", "blue", "star", "on", "the", "green", "sea"]
    text = [words[i % len(words)] for i in range(100)]  # one token each: chunks of 75 and 25
    chunked = SDXL(base=str(model), long_prompts="chunk", max_chunks=3)
    theirs = pipeline(model)
    with torch.no_grad():
        found = {v.ndim: v for v in chunked.encode_text(parts, [" ".join(text)]).values()}
        pieces = [
            theirs.encode_prompt(" ".join(p), do_classifier_free_guidance=False) for p in (text[:75], text[75:], [])
        ]
    assert found[3].shape[1] == 3 * 77
    assert (found[3] - torch.cat([piece[0] for piece in pieces], dim=1)).abs().max() < 1e-6
    assert (found[2] - pieces[0][2]).abs().max() < 1e-6


def test_overlong_counts_what_is_cut(family: SDXL, parts: Parts) -> None:
    exact, over = " ".join(["red"] * 75), " ".join(["red"] * 76)
    assert family.overlong(parts.tokenizers, ["", exact, over, LONG]) == [over, LONG]
    same = family.encode_text(parts, [exact, over])
    assert all(torch.equal(value[0], value[1]) for value in same.values())


# --------------------------------------------------------------------------- images


def test_moments_are_those_of_the_vae(family: SDXL, parts: Parts) -> None:
    assert isinstance(parts.vae, nn.Module)
    pixels = torch.from_numpy(normal(1, 2, 3, 32, 48)).clamp(-1, 1)
    moments = family.encode_images(parts, pixels)
    with torch.no_grad():
        posterior = parts.vae.encode(pixels).latent_dist
    assert moments.dtype == torch.float32
    assert moments.shape == (2, 8, 32 // family.latent_factor, 48 // family.latent_factor)
    assert torch.equal(moments[:, :4], posterior.mean)
    assert torch.equal(moments[:, 4:], posterior.std)


def test_the_vae_is_float32_whatever_the_rest_is(family: SDXL) -> None:
    half = family.load({"vae", "denoiser"}, dtype=torch.bfloat16, device=CPU)
    assert half.vae is not None
    assert half.denoiser is not None
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    assert {p.dtype for p in half.denoiser.parameters()} == {torch.bfloat16}
    pixels = torch.from_numpy(normal(1, 1, 3, 16, 16)).clamp(-1, 1)
    full = family.load({"vae"}, dtype=torch.float32, device=CPU)
    assert torch.equal(family.encode_images(half, pixels), family.encode_images(full, pixels))


def test_posterior_sample_is_that_of_diffusers(family: SDXL, parts: Parts) -> None:
    assert isinstance(parts.vae, nn.Module)
    pixels = torch.from_numpy(normal(2, 2, 3, 16, 16)).clamp(-1, 1)
    moments = family.encode_images(parts, pixels)
    with torch.no_grad():
        posterior = parts.vae.encode(pixels).latent_dist
    sample = posterior.sample(torch.Generator().manual_seed(9))
    noise = torch.randn(sample.shape, generator=torch.Generator().manual_seed(9))
    found = family.latents(moments, noise)
    assert (found - sample * 0.13025).abs().max() < 1e-6
    assert (family.latents(moments, torch.zeros_like(noise)) - posterior.mode() * 0.13025).abs().max() < 1e-6
    wanted = formulas.scale_latents(sample.double().numpy(), factor=0.13025)
    assert formulas.relative_l2(found.double().numpy(), wanted) < 1e-6


@pytest.mark.parametrize(("shift", "scale"), [(None, 0.18215), (0.0609, 1.5305), (-0.2, 0.3611)])
def test_shift_and_scale_are_read_from_the_model(
    model: Path, tmp_path: Path, shift: float | None, scale: float
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_factor": shift, "scaling_factor": scale}))
    moments, noise = normal(3, 2, 8, 4, 4), normal(4, 2, 4, 4, 4)
    found = SDXL(base=str(folder)).latents(torch.from_numpy(moments), torch.from_numpy(noise))
    raw = moments[:, :4].astype(np.float64) + moments[:, 4:].astype(np.float64) * noise
    wanted = formulas.scale_latents(raw, factor=scale, shift=shift or 0.0)
    assert np.abs(found.double().numpy() - wanted).max() < 2e-6
    assert found.dtype == torch.float32


# --------------------------------------------------------------------------- the UNet


@contextmanager
def spy(unet: nn.Module) -> Iterator[list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What reaches the UNet's forward."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = unet.register_forward_pre_hook(lambda _m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    yield calls
    handle.remove()


def test_time_ids_are_in_diffusers_order(model: Path, family: SDXL) -> None:
    """Against what the pipeline itself builds from (original size, crop, target size)."""
    text = {"prompt_embeds": torch.zeros(2, 77, 40), "pooled": torch.zeros(2, 24)}
    time_ids = family.condition(text, GEOMETRY)["time_ids"]
    assert time_ids.dtype == torch.float32
    theirs = pipeline(model)
    for row, g in zip(time_ids, GEOMETRY, strict=True):
        wanted = theirs._get_add_time_ids(
            (g.original_height, g.original_width),
            (g.crop_top, g.crop_left),
            (g.target_height, g.target_width),
            dtype=torch.float32,
            text_encoder_projection_dim=24,
        )
        assert torch.equal(row[None], wanted)
        assert row.tolist() == [*g]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predict_is_the_unet_and_nothing_is_rounded_on_the_way(family: SDXL, dtype: torch.dtype) -> None:
    loaded = family.load({"denoiser", "text"}, dtype=dtype, device=CPU)
    unet = loaded.denoiser
    assert isinstance(unet, UNet2DConditionModel)
    noisy, t = torch.from_numpy(normal(5, 2, 4, 8, 8)), torch.tensor([999, 257])
    with torch.no_grad():
        cond = family.condition(family.encode_text(loaded, PROMPTS[:2]), GEOMETRY)
        with spy(unet) as calls:
            found = family.predict(unet, noisy, t, cond)
        hidden, pooled = cond["prompt_embeds"], cond["pooled"]
        wanted = unet(
            noisy.to(dtype),
            t,
            encoder_hidden_states=hidden.to(dtype),
            added_cond_kwargs={
                "text_embeds": pooled.to(dtype),
                "time_ids": torch.tensor([[1023.0, 765, 1, 255, 1024, 768], [3001, 2047, 17, 0, 640, 1536]]),
            },
        ).sample
    assert torch.equal(found, wanted)
    (args, kwargs), *more = calls
    assert not more
    ids = kwargs["added_cond_kwargs"]["time_ids"]
    assert ids.dtype == torch.float32  # bf16 would turn 1023 into 1024 and 765 into 764
    assert ids.tolist() == [[float(x) for x in g] for g in GEOMETRY]
    seen = kwargs["timestep"] if "timestep" in kwargs else args[1]
    assert seen.tolist() == [999, 257]
    assert seen.dtype in (torch.int64, torch.float32)


def test_each_size_number_reaches_the_answer(family: SDXL, parts: Parts) -> None:
    """Changing any one of the six numbers by one changes the prediction, and only in its own row."""
    assert parts.denoiser is not None
    noisy, t = torch.from_numpy(normal(6, 2, 4, 8, 8)), torch.tensor([10, 600])
    with torch.no_grad():
        text = family.encode_text(parts, PROMPTS[:2])
        base = family.predict(parts.denoiser, noisy, t, family.condition(text, GEOMETRY))
        for place in range(6):
            other = Geometry(*(x + (i == place) for i, x in enumerate(GEOMETRY[1])))
            moved = family.predict(parts.denoiser, noisy, t, family.condition(text, [GEOMETRY[0], other]))
            assert torch.equal(moved[0], base[0])
            assert not torch.equal(moved[1], base[1])


def test_a_prediction_does_not_depend_on_its_batch_mates(family: SDXL, parts: Parts) -> None:
    assert parts.denoiser is not None
    noisy, t = torch.from_numpy(normal(7, 3, 4, 8, 8)), torch.tensor([10, 600, 999])
    geometry = [*GEOMETRY, Geometry(64, 64, 0, 0, 64, 64)]
    with torch.no_grad():
        text = family.encode_text(parts, PROMPTS[:3])
        whole = family.predict(parts.denoiser, noisy, t, family.condition(text, geometry))
        for i in range(3):
            row = {k: v[i : i + 1] for k, v in text.items()}
            one = family.predict(parts.denoiser, noisy[i : i + 1], t[i : i + 1], family.condition(row, [geometry[i]]))
            assert formulas.relative_l2(one[0].double().numpy(), whole[i].double().numpy()) < 1e-5


def test_loaded_networks_are_frozen_and_quiet(parts: Parts) -> None:
    for network in [parts.denoiser, parts.vae, *parts.text_encoders]:
        assert network is not None
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())


def test_the_forward_process_is_that_of_the_model(model: Path, tmp_path: Path, family: SDXL) -> None:
    assert family.noise.prediction == "epsilon"
    assert formulas.relative(family.noise.alphas_cumprod.numpy(), formulas.SDXL_ALPHA_BAR) < 1e-12
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    changed = SDXL(base=str(folder)).noise
    assert changed.prediction == "v_prediction"
    assert float(changed.alphas_cumprod[-1]) == 0.0
