"""A model in one file is the same model as its folder, bit for bit, or is refused with the reason."""

from __future__ import annotations

import shutil
from pathlib import Path

import original_layout
import pytest
import torch
from family_helpers import ALL, answers, copy, load, reconfigure, same_answers, same_networks
from safetensors.torch import load_file, save_file

from gesso.errors import UserError
from gesso.families import single_file
from gesso.families.sdxl import SDXL
from gesso.micro.models import Size, build_sdxl

UNET = "model.diffusion_model.input_blocks.4.1.proj_in.weight"


@pytest.fixture(scope="module")
def file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return original_layout.write(tiny_base, tmp_path_factory.mktemp("single") / "model.safetensors")


def altered(file: Path, to: Path, *, drop: str = "-", add: dict[str, torch.Tensor] | None = None) -> Path:
    """The file without the tensors whose names begin with `drop`, and with others."""
    state = {k: v for k, v in load_file(file).items() if not k.startswith(drop)}
    save_file(state | (add or {}), to)
    return to


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_folder_bit_for_bit(tiny_base: Path, file: Path, dtype: torch.dtype) -> None:
    folder, single = SDXL(base=str(tiny_base)), SDXL(base=str(file), config=str(tiny_base))
    one, other = load(folder, dtype=dtype), load(single, dtype=dtype)
    same_networks(one, other)
    same_answers(answers(folder, one), answers(single, other))
    assert other.denoiser.dtype == dtype
    for network in (other.denoiser, other.vae, *other.text_encoders):
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
    assert single.latent_factor == folder.latent_factor == 8
    assert torch.equal(single.noise.alphas_cumprod, folder.noise.alphas_cumprod)


def test_the_weights_are_those_of_the_file_and_not_of_the_config_folder(file: Path, tmp_path: Path) -> None:
    """The folder that `config` names may hold other weights; nothing of them may get in."""
    other = build_sdxl(tmp_path / "other", seed=9)
    ours, theirs = (load(SDXL(base=str(b), config=c)) for b, c in ((file, str(other)), (other, None)))
    for mine, strange in zip([ours.denoiser, ours.vae, *ours.text_encoders], _networks(theirs), strict=True):
        trained = {k: v for k, v in mine.named_parameters() if v.ndim > 1}
        assert trained
        assert not any(torch.equal(v, dict(strange.named_parameters())[k]) for k, v in trained.items())


def test_another_layout_of_blocks_converts_as_well(tmp_path: Path) -> None:
    """Three residual layers a block, a wider second text encoder, a deeper autoencoder."""
    size = Size(unet_channels=(8, 8, 16), unet_layers=3, unet_transformers=(1, 1, 3), vae_layers=2, text_widths=(8, 32))
    base = build_sdxl(tmp_path / "base", size=size, seed=4)
    file = original_layout.write(base, tmp_path / "model.safetensors")
    same_networks(load(SDXL(base=str(base))), load(SDXL(base=str(file), config=str(base))))


def test_a_pipeline_draws_from_it(tiny_base: Path, file: Path) -> None:
    pictures = []
    for family in (SDXL(base=str(tiny_base)), SDXL(base=str(file), config=str(tiny_base))):
        pipeline = family.pipeline(load(family))
        draw = pipeline("a red circle", num_inference_steps=2, height=32, width=32, output_type="np",
                        generator=torch.Generator().manual_seed(1))  # fmt: skip
        pictures.append(torch.from_numpy(draw.images))
    assert torch.equal(*pictures)
    assert float(pictures[0].std()) > 0


def test_the_fingerprint_follows_file_config_and_prompt_policy(tiny_base: Path, file: Path, tmp_path: Path) -> None:
    def prints(base: Path, config: Path, long_prompts: str = "truncate") -> list[str]:
        family = SDXL(base=str(base), config=str(config), long_prompts=long_prompts)  # type: ignore[arg-type]
        return [family.fingerprint(name) for name in ALL]

    first = prints(file, tiny_base)
    moved = shutil.copy(file, tmp_path / "model.safetensors")
    assert prints(moved, tiny_base) == first
    assert prints(moved, copy(tiny_base, tmp_path / "zz")) == first, "places must not matter"
    chunked = prints(file, tiny_base, "chunk")
    assert chunked[:2] == first[:2]
    assert chunked[2] != first[2], "embeddings of another length would be taken from the cache"
    changed = copy(tiny_base, tmp_path / "config")
    reconfigure(changed / "text_encoder" / "config.json", hidden_act="gelu")
    assert prints(file, changed)[2] != first[2]
    assert prints(file, changed)[:2] == first[:2]
    other = altered(file, tmp_path / "other.safetensors", drop=UNET, add={UNET: load_file(file)[UNET] + 1})
    assert prints(other, tiny_base)[0] != first[0]


@pytest.mark.parametrize("cut", [0, 5, 5000, -1])
def test_a_file_cut_short_is_refused_by_name(tiny_base: Path, file: Path, tmp_path: Path, cut: int) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="not a readable safetensors file") as caught:
        load(SDXL(base=str(broken), config=str(tiny_base)), ("denoiser",))
    assert caught.value.where == str(broken)
    assert "fetch it again" in caught.value.fix


def test_a_lora_is_no_model(tiny_base: Path, tmp_path: Path) -> None:
    lora = tmp_path / "style.safetensors"
    key = "lora_unet_input_blocks_4_1_proj_in"
    save_file({f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2)}, lora)
    with pytest.raises(UserError, match="this is a LoRA, not a model") as caught:
        load(SDXL(base=str(lora), config=str(tiny_base)))
    assert caught.value.where == str(lora)


@pytest.mark.parametrize(
    ("drop", "words"),
    [
        ("conditioner.embedders.1.", "it holds no text_encoder_2"),
        ("conditioner.", "it holds no text_encoder and no text_encoder_2"),
        ("model.diffusion_model.", "it holds no unet"),
        ("first_stage_model.", "this checkpoint holds no VAE"),
    ],
)
def test_a_part_that_is_absent_is_named_and_not_borrowed(
    tiny_base: Path, file: Path, tmp_path: Path, drop: str, words: str
) -> None:
    """The folder of configs has weights of its own, which diffusers would take."""
    part = altered(file, tmp_path / "part.safetensors", drop=drop)
    with pytest.raises(UserError, match=words) as caught:
        load(SDXL(base=str(part), config=str(tiny_base)))
    assert caught.value.where == str(part)


def test_a_checkpoint_without_a_vae_takes_the_one_that_is_named(tiny_base: Path, file: Path, tmp_path: Path) -> None:
    bare = altered(file, tmp_path / "bare.safetensors", drop="first_stage_model.")
    parts = load(SDXL(base=str(bare), config=str(tiny_base), vae=str(tiny_base)))
    same_networks(parts, load(SDXL(base=str(tiny_base))))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (UNET, "unet"),
        ("first_stage_model.decoder.conv_in.weight", "vae"),
        ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight", "text_encoder"),
        ("conditioner.embedders.1.model.transformer.resblocks.1.mlp.c_fc.bias", "text_encoder_2"),
        ("conditioner.embedders.1.model.text_projection", "text_encoder_2"),
    ],
)
def test_a_missing_tensor_is_refused(tiny_base: Path, file: Path, tmp_path: Path, name: str, part: str) -> None:
    broken = altered(file, tmp_path / "broken.safetensors", drop=name)
    with pytest.raises(UserError, match=rf"(1|some) of the tensors of {part} are missing") as caught:
        load(SDXL(base=str(broken), config=str(tiny_base)))
    assert caught.value.where == str(broken)


def test_a_config_of_another_model_is_refused(file: Path, tmp_path: Path) -> None:
    wide = build_sdxl(tmp_path / "wide", size=Size(unet_channels=(8, 16, 32)))
    with pytest.raises(UserError, match="the weights of unet cannot be read"):
        load(SDXL(base=str(file), config=str(wide)), ("denoiser",))


def test_training_marks_in_the_file_decide_the_schedule(tiny_base: Path, file: Path, tmp_path: Path) -> None:
    def family(name: str, marks: list[str], **settings: str) -> SDXL:
        marked = altered(file, tmp_path / f"{name}.safetensors", add={m: torch.zeros(0) for m in marks})
        return SDXL(base=str(marked), config=str(tiny_base), **settings)  # type: ignore[arg-type]

    assert family("plain", []).noise.prediction == "epsilon"
    v = family("v", ["v_pred"])
    assert v.noise.prediction == "v_prediction"
    assert float(v.noise.alphas_cumprod[-1]) > 0
    assert v.pipeline(load(v)).scheduler.config.prediction_type == "v_prediction"
    zero = family("zero", ["v_pred", "ztsnr"])
    assert float(zero.noise.alphas_cumprod[-1]) == 0
    scheduler = zero.pipeline(load(zero)).scheduler.config
    assert scheduler.rescale_betas_zero_snr
    assert scheduler.timestep_spacing == "trailing"
    with pytest.raises(UserError, match="zero-terminal-SNR"):
        _ = family("conflict", ["v_pred", "ztsnr"], prediction="epsilon").noise
    with pytest.raises(UserError, match="EDM's noise"):
        _ = family("edm", ["edm_mean", "edm_std"]).noise
    header = original_layout.write(tiny_base, tmp_path / "h.safetensors", metadata={"modelspec.prediction_type": "v"})
    assert single_file.schedule(header) == {"prediction_type": "v_prediction"}


def _networks(parts: object) -> list[torch.nn.Module]:
    return [parts.denoiser, parts.vae, *parts.text_encoders]  # type: ignore[attr-defined]
