"""Drawing: the picture is that of plain diffusers, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from gesso.adapters import LoRA
from gesso.errors import NumericError, UserError
from gesso.evaluation.sample import Shot, draw, encode, settings
from gesso.families.sdxl import SDXL

SHOT = Shot("a photo of sks aldar", seed=7, steps=3, guidance=5.0, width=64, height=48)
ADAPTER = LoRA(rank=4, alpha=6, train_text_encoders=True)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def plain(pipeline: Any, shot: Shot, negative: str | None = None) -> np.ndarray:
    """What someone gets who only knows diffusers."""
    return pixels(
        pipeline(
            shot.prompt,
            negative_prompt=negative,
            num_inference_steps=shot.steps,
            guidance_scale=shot.guidance,
            width=shot.width,
            height=shot.height,
            generator=torch.Generator().manual_seed(shot.seed),
        ).images[0]
    )


@pytest.fixture
def pipeline(base: Path) -> Any:
    family = SDXL(base=str(base))
    parts = family.load(("denoiser", "vae", "text"), dtype=torch.float32, device=torch.device("cpu"))
    return family.pipeline(parts)


def test_the_live_models_picture_is_the_one_diffusers_draws_from_its_checkpoint(
    train: Callable[..., Any], base: Path, tmp_path: Path
) -> None:
    family, parts, _ = train(ADAPTER, path=tmp_path / "checkpoint-5" / "pytorch_lora_weights.safetensors")
    ours = pixels(draw(family.pipeline(parts), [SHOT])[0])
    users = StableDiffusionXLPipeline.from_pretrained(base)
    before = plain(users, SHOT)
    users.load_lora_weights(tmp_path / "checkpoint-5")
    theirs = plain(users, SHOT)
    assert ours.shape == (48, 64, 3)
    assert np.abs(ours - theirs).max() <= 2
    assert np.abs(before - theirs).max() > 8, "the LoRA does not show, so the comparison proves nothing"


@pytest.mark.parametrize("negative", ["", "blurry, dark"])
def test_pictures_equal_those_of_the_plain_pipeline(pipeline: Any, base: Path, negative: str) -> None:
    users = StableDiffusionXLPipeline.from_pretrained(base)
    shots = [Shot("a red circle", negative, 1, 2, 4.0, 64, 64), Shot("Köse 帽子", negative, 2, 2, 1.0, 64, 64)]
    drawn = draw(pipeline, shots)
    for shot, image in zip(shots, drawn, strict=True):
        assert np.array_equal(pixels(image), plain(pipeline, shot, negative or None))
        # Networks that were loaded in another way round their sums differently.
        assert np.abs(pixels(image) - plain(users, shot, negative or None)).max() <= 1


def test_a_picture_depends_on_its_shot_alone(pipeline: Any) -> None:
    other = Shot("a blue square", seed=8, steps=2, width=64, height=64)
    first, second = draw(pipeline, [SHOT, other])
    assert np.array_equal(pixels(draw(pipeline, [other])[0]), pixels(second))
    assert np.array_equal(pixels(draw(pipeline, [SHOT])[0]), pixels(first))
    reseeded = Shot(**{**vars(SHOT), "seed": 8})
    assert not np.array_equal(pixels(draw(pipeline, [reseeded])[0]), pixels(first))


def test_encoded_prompts_draw_the_same_without_text_encoders(base: Path) -> None:
    family = SDXL(base=str(base))
    cpu = torch.device("cpu")
    everything = family.load(("denoiser", "vae", "text"), dtype=torch.float32, device=cpu)
    shots = [SHOT, Shot("a hat", "ugly", 3, 2, 4.0, 64, 64), Shot("a hat", "", 3, 2, 1.0, 64, 64)]
    wanted = draw(family.pipeline(everything), shots)
    # As in training: the prompts are encoded before the denoiser is there, and drawn after the encoders are gone.
    embeddings = encode(family.pipeline(family.load(("text",), dtype=torch.float32, device=cpu)), shots)
    found = draw(
        family.pipeline(family.load(("denoiser", "vae"), dtype=torch.float32, device=cpu)), shots, embeddings=embeddings
    )
    for one, other in zip(wanted, found, strict=True):
        assert np.array_equal(pixels(one), pixels(other))


def test_networks_and_random_state_are_left_as_found(train: Callable[..., Any]) -> None:
    family, parts, attached = train(LoRA(rank=2, dropout=0.5, train_text_encoders=True))
    unet, text = parts.denoiser, parts.text_encoders[0]
    unet.train()
    unet.mid_block.eval()
    text.train()
    parts.vae.to(torch.float16)
    parts.vae.register_to_config(force_upcast=True)
    networks = [unet, parts.vae, *parts.text_encoders]

    def state() -> list[Any]:
        found: list[Any] = [m.training for n in networks for m in n.modules()]
        for network in networks:
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
                found.append((name, tensor.requires_grad, tensor.dtype, tensor.device, tensor.double().sum().item()))
        return [*found, torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), torch.is_grad_enabled()]

    before = state()
    assert any(p.requires_grad for group in attached.parameters().values() for p in group.values())
    pipeline = family.pipeline(parts)
    first, second = draw(pipeline, [SHOT]), draw(pipeline, [SHOT])
    encode(pipeline, [SHOT])
    assert state() == before
    assert np.array_equal(pixels(first[0]), pixels(second[0])), "dropout was on"

    with pytest.raises(KeyboardInterrupt):
        draw(pipeline, [SHOT], progress=Mock(side_effect=KeyboardInterrupt))
    assert state() == before


def test_a_half_precision_denoiser_draws_with_a_float32_vae(base: Path) -> None:
    family = SDXL(base=str(base))
    parts = family.load(("denoiser", "vae", "text"), dtype=torch.bfloat16, device=torch.device("cpu"))
    assert parts.vae.dtype == torch.float32
    image = draw(family.pipeline(parts), [SHOT])[0]
    assert image.size == (64, 48)


def test_progress_is_told(pipeline: Any) -> None:
    heard: list[tuple[int, int]] = []
    draw(pipeline, [SHOT, SHOT], progress=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 2), (2, 2)]


def test_nothing_is_printed(pipeline: Any, capfd: pytest.CaptureFixture[str]) -> None:
    draw(pipeline, [SHOT])
    assert capfd.readouterr() == ("", "")


def test_a_broken_denoiser_is_reported(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericError, match=r"denoiser's answer is not finite \(seed 7"):
        draw(pipeline, [SHOT])


def test_a_broken_vae_is_reported(pipeline: Any) -> None:
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.fill_(float("inf"))
    with pytest.raises(NumericError, match="VAE's answer is not finite"):
        draw(pipeline, [SHOT])


@pytest.mark.parametrize("level", [-9.0, 0.2])
def test_a_flat_picture_is_not_a_success(pipeline: Any, level: float) -> None:
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.weight.zero_()
        pipeline.vae.decoder.conv_out.bias.fill_(level)
    with pytest.raises(NumericError, match="one flat colour"):
        draw(pipeline, [SHOT])


@pytest.mark.parametrize("size", [(60, 64), (64, 0), (-8, 64)])
def test_impossible_sizes_are_refused(pipeline: Any, size: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        draw(pipeline, [Shot("x", width=size[0], height=size[1])])


def test_settings_say_everything(pipeline: Any) -> None:
    said = settings(SHOT, pipeline=pipeline, model="runs/a")
    assert said["sampler"] == "EulerDiscreteScheduler"
    assert said["model"] == "runs/a"
    assert Shot(**{k: v for k, v in said.items() if k not in ("sampler", "model")}) == SHOT
