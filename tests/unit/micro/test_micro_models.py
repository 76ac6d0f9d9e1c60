"""The tiny SDXL: an ordinary diffusers folder, the same bytes every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from gesso.micro.models import Size, build_sdxl, networks, vae_factor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sdxl(tmp_path_factory.mktemp("micro") / "sdxl")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)  # the caller's random state must not matter
    assert contents(build_sdxl(tmp_path / "again")) == contents(base)


def test_another_seed_gives_other_weights(base: Path, tmp_path: Path) -> None:
    ours, others = contents(base), contents(build_sdxl(tmp_path / "other", seed=1))
    differing = {name for name in ours if ours[name] != others[name]}
    assert differing == {name for name in ours if name.endswith(".safetensors")}
    assert len(differing) == 4


def test_torchs_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_sdxl(tmp_path / "sdxl")
    assert torch.equal(torch.rand(3), expected)


def test_the_files_are_small_float32_safetensors(base: Path) -> None:
    files = contents(base)
    assert sum(len(content) for content in files.values()) < 2_000_000
    assert not [name for name in files if name.endswith((".bin", ".pt", ".ckpt"))]
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_the_structure_is_that_of_sdxl(base: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    unet = pipeline.unet.config
    assert unet.down_block_types == ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    assert unet.layers_per_block == 2
    assert unet.use_linear_projection is True
    assert unet.addition_embed_type == "text_time"
    widths = pipeline.text_encoder.config.hidden_size, pipeline.text_encoder_2.config.hidden_size
    assert unet.cross_attention_dim == sum(widths)
    assert unet.projection_class_embeddings_input_dim == pipeline.text_encoder_2.config.projection_dim + 6 * 8
    assert pipeline.vae_scale_factor == vae_factor(Size()) == 8
    assert pipeline.vae.config.scaling_factor == 0.13025
    scheduler = json.loads((base / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["beta_schedule"], scheduler["prediction_type"]) == ("scaled_linear", "epsilon")
    assert (scheduler["beta_start"], scheduler["beta_end"]) == (0.00085, 0.012)
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)


def test_the_pipeline_draws_the_same_picture_twice_and_reads_the_prompt(base: Path) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        result = pipeline(prompt, num_inference_steps=2, generator=generator, output_type="np")
        return result.images[0]

    first = draw("a photo of sks aldar")
    assert first.shape == (64, 64, 3)
    assert np.isfinite(first).all()
    assert first.std() > 0
    assert np.array_equal(draw("a photo of sks aldar"), first)
    assert not np.array_equal(draw("a blue star"), first)


def test_every_size_field_reaches_the_networks() -> None:
    size = Size(unet_channels=(8, 16), unet_layers=1, unet_transformers=(1, 3), unet_heads=(1, 4), resolution=32)
    parts = networks(size, seed=0)
    assert len(parts.unet.down_blocks) == 2
    assert len(parts.unet.down_blocks[1].attentions[0].transformer_blocks) == 3
    assert parts.unet.config.sample_size == 4
    small = networks(Size(vae_channels=(8, 8), text_widths=(8, 32), text_layers=(2, 3)), seed=0)
    assert len(small.vae.decoder.up_blocks) == 2
    assert small.text_encoder_2.config.num_hidden_layers == 3
    assert small.unet.config.cross_attention_dim == 40
