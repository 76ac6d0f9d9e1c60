"""What the model predicts and how noise is added: read from the model, set in the run file, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_helpers import ALL, copy, load, reconfigure

from gesso.errors import UserError
from gesso.families.sdxl import SDXL

SCHEDULER = Path("scheduler") / "scheduler_config.json"


def changed(base: Path, folder: Path, **values: Any) -> str:
    model = copy(base, folder / "model")
    reconfigure(model / SCHEDULER, **values)
    return str(model)


@pytest.mark.parametrize("stated", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("asked", [None, "epsilon", "v_prediction"])
def test_training_and_sampling_take_the_same_prediction(
    tiny_base: Path, tmp_path: Path, stated: str, asked: Any
) -> None:
    family = SDXL(base=changed(tiny_base, tmp_path, prediction_type=stated), prediction=asked)
    wanted = asked or stated
    assert family.noise.prediction == wanted
    assert family.pipeline(load(family, ())).scheduler.config.prediction_type == wanted
    latents, noise, t = torch.ones(1, 4, 2, 2), torch.full((1, 4, 2, 2), 3.0), torch.tensor([500])
    alpha = family.noise.alphas_cumprod[500]
    target = 3.0 if wanted == "epsilon" else float(alpha.sqrt() * 3 - (1 - alpha).sqrt())
    assert torch.allclose(family.noise.target(latents, noise, t), torch.full_like(noise, target))


def test_sampler_and_training_share_the_noise_levels(tiny_base: Path, tmp_path: Path) -> None:
    base = changed(tiny_base, tmp_path, beta_start=0.002, beta_end=0.03, beta_schedule="linear")
    family = SDXL(base=base)
    theirs = family.pipeline(load(family, ())).scheduler.alphas_cumprod
    assert torch.allclose(family.noise.alphas_cumprod.float(), theirs, rtol=1e-5)
    assert not torch.allclose(theirs, SDXL(base=str(tiny_base)).noise.alphas_cumprod.float(), rtol=1e-2)


def test_zero_terminal_snr_goes_with_v_prediction_only(tiny_base: Path, tmp_path: Path) -> None:
    base = changed(tiny_base, tmp_path, rescale_betas_zero_snr=True)
    for refused in (SDXL(base=base), SDXL(base=base, prediction="epsilon")):
        with pytest.raises(UserError, match="zero-terminal-SNR schedule cannot be trained with epsilon") as caught:
            _ = refused.noise
        assert "model.prediction to v_prediction" in caught.value.fix
    family = SDXL(base=base, prediction="v_prediction")
    assert float(family.noise.alphas_cumprod[-1]) == 0
    assert family.pipeline(load(family, ())).scheduler.config.rescale_betas_zero_snr


def test_zero_terminal_snr_of_the_run_file(tiny_base: Path, tmp_path: Path) -> None:
    """Training and sampling both have the rescaled schedule, and false takes it from a model that has it."""
    on = SDXL(base=str(tiny_base), prediction="v_prediction", zero_terminal_snr=True)
    plain = SDXL(base=str(tiny_base), prediction="v_prediction")
    assert float(on.noise.alphas_cumprod[-1]) == 0 < float(plain.noise.alphas_cumprod[-1])
    assert float(on.noise.alphas_cumprod[0]) == pytest.approx(float(plain.noise.alphas_cumprod[0]), rel=1e-12)
    sampler = on.pipeline(load(on, ())).scheduler
    assert (sampler.config.rescale_betas_zero_snr, sampler.config.timestep_spacing) == (True, "trailing")
    sampler.set_timesteps(4)
    assert int(sampler.timesteps[0]) == 999, "sampling begins where there is no picture"
    assert torch.allclose(sampler.alphas_cumprod[:-1], on.noise.alphas_cumprod[:-1].float(), rtol=1e-3)
    base = changed(tiny_base, tmp_path, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    off = SDXL(base=base, zero_terminal_snr=False)
    assert torch.equal(off.noise.alphas_cumprod, plain.noise.alphas_cumprod)
    assert not off.pipeline(load(off, ())).scheduler.config.rescale_betas_zero_snr
    assert float(SDXL(base=base).noise.alphas_cumprod[-1]) == 0
    with pytest.raises(UserError, match="cannot be trained with epsilon"):
        _ = SDXL(base=str(tiny_base), zero_terminal_snr=True).noise


def test_a_sampler_that_cannot_begin_at_a_zero_terminal_schedule(tiny_base: Path, tmp_path: Path) -> None:
    base = changed(tiny_base, tmp_path, _class_name="PNDMScheduler")
    family = SDXL(base=base, prediction="v_prediction", zero_terminal_snr=True)
    with pytest.raises(UserError, match="PNDMScheduler cannot sample with a zero-terminal"):
        family.pipeline(load(family, ()))


@pytest.mark.parametrize("name", ["PaintScheduler", "UNet2DConditionModel", "__version__"])
def test_a_sampler_that_diffusers_does_not_know(tiny_base: Path, tmp_path: Path, name: str) -> None:
    family = SDXL(base=changed(tiny_base, tmp_path, _class_name=name))
    with pytest.raises(UserError, match=f"diffusers has no sampler '{name}'") as caught:
        family.pipeline(load(family, ()))
    assert caught.value.where == "scheduler_config.json"


def test_the_models_own_sampler_is_kept(tiny_base: Path, tmp_path: Path) -> None:
    family = SDXL(base=changed(tiny_base, tmp_path, _class_name="DDIMScheduler", steps_offset=7))
    scheduler = family.pipeline(load(family, ())).scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.steps_offset == 7


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "noise schedule 'squaredcos_cap_v2'"),
        ({"prediction_type": "sample"}, "prediction type 'sample'"),
    ],
)
def test_a_schedule_that_cannot_be_trained(tiny_base: Path, tmp_path: Path, values: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        _ = SDXL(base=changed(tiny_base, tmp_path, **values)).noise


@pytest.mark.parametrize("content", [None, "{", "[1, 2]"])
def test_a_damaged_scheduler_config_is_named(tiny_base: Path, tmp_path: Path, content: str | None) -> None:
    model = copy(tiny_base, tmp_path / "model")
    (model / SCHEDULER).unlink()
    if content is not None:
        (model / SCHEDULER).write_text(content)
    with pytest.raises(UserError, match=r"scheduler_config\.json cannot be read") as caught:
        _ = SDXL(base=str(model)).noise
    assert caught.value.where == str(model / SCHEDULER)


@pytest.mark.parametrize("lost", ["unet", "text_encoder_2", "tokenizer", "scheduler", "vae"])
def test_a_folder_of_another_kind_is_refused_by_what_it_lacks(tiny_base: Path, tmp_path: Path, lost: str) -> None:
    model = copy(tiny_base, tmp_path / "model")
    (model / lost).rename(tmp_path / "gone")
    for name in ALL:
        with pytest.raises(UserError, match=f"is not an SDXL diffusers folder: it holds no {lost} folder") as caught:
            SDXL(base=str(model)).fingerprint(name)
        assert caught.value.where == "model.base"
    if lost == "vae":
        load(SDXL(base=str(model), vae=str(tiny_base)), ("vae",))
