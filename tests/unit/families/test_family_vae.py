"""Another autoencoder in the place of the model's own, and what its config does to the latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import original_layout
import pytest
import torch
from family_helpers import copy, load, reconfigure, rewrite
from safetensors.torch import load_file, save_file

from gesso.core import resolve
from gesso.errors import UserError
from gesso.families import sdxl
from gesso.families.sdxl import SDXL
from gesso.micro.models import Size, build_sdxl

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with another autoencoder: other weights and another scale."""
    return build_sdxl(tmp_path_factory.mktemp("other") / "sdxl", seed=7, size=Size(vae_scale=0.5))


def vae_of(family: SDXL) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load(family, ("vae",)).vae.state_dict()
    return state


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", ["vae folder", "whole model", "diffusers file", "original file", "whole checkpoint"])
def test_every_way_to_name_another_vae(tiny_base: Path, other: Path, tmp_path: Path, kind: str) -> None:
    weights = other / "vae" / WEIGHTS
    bare = tmp_path / "sdxl_vae.safetensors"
    match kind:
        case "vae folder":
            name = other / "vae"
        case "whole model":
            name = other
        case "diffusers file":
            name = weights
        case "original file":
            name = bare
            save_file({k: v.contiguous() for k, v in original_layout.vae(load_file(weights)).items()}, bare)
        case _:
            name = original_layout.write(other, tmp_path / "checkpoint.safetensors")
    family, own = SDXL(base=str(tiny_base), vae=str(name)), SDXL(base=str(tiny_base))
    wanted = vae_of(SDXL(base=str(other)))
    assert equal(vae_of(family), wanted)
    assert not equal(vae_of(own), wanted)
    assert family.fingerprint("vae") != own.fingerprint("vae")
    for part in ("denoiser", "text"):
        assert family.fingerprint(part) == own.fingerprint(part)
    # A folder brings its own scale; a file has no config, so the model's own counts.
    moments = torch.cat([torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)], dim=1)
    scale = 0.5 if name.is_dir() else 0.13025
    assert torch.allclose(family.latents(moments, torch.zeros(1, 4, 2, 2)), torch.full((1, 4, 2, 2), scale))


def test_the_fingerprint_is_that_of_the_contents(tiny_base: Path, other: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(other / "vae", tmp_path / "elsewhere")
    first = SDXL(base=str(tiny_base), vae=str(other)).fingerprint("vae")
    assert SDXL(base=str(tiny_base), vae=str(moved)).fingerprint("vae") == first
    rewrite(moved / WEIGHTS, lambda state: state | {"quant_conv.bias": state["quant_conv.bias"] + 1e-6})
    assert SDXL(base=str(tiny_base), vae=str(moved)).fingerprint("vae") != first


def test_the_public_base_gets_the_fp16_safe_vae(tiny_base: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, list[str]] = {}
    places = {sdxl.PUBLIC_BASE: tiny_base, "madebyollin/sdxl-vae-fp16-fix": other / "vae"}

    def hub(name: str, revision: str | None, patterns: list[str], key: str) -> Path:
        asked[name] = [str(revision), key, *patterns]
        return places[name]

    monkeypatch.setattr(resolve, "_download", hub)
    family = SDXL(variant="fp16", revision="v1")
    assert equal(vae_of(family), vae_of(SDXL(base=str(other))))
    assert family.fingerprint("vae") == SDXL(base=str(tiny_base), vae=str(other / "vae")).fingerprint("vae")
    assert asked["madebyollin/sdxl-vae-fp16-fix"][:2] == ["None", "model.vae"], "the revision is the base model's"
    fetched = [pattern for pattern in asked[sdxl.PUBLIC_BASE] if pattern.startswith("vae")]
    assert fetched == ["vae/config.json"], "the base's own VAE was fetched for nothing"
    own = SDXL(vae=sdxl.PUBLIC_BASE)
    assert equal(vae_of(own), vae_of(SDXL(base=str(tiny_base))))


def test_plain_files_do_where_only_the_base_has_the_variant(tiny_base: Path, other: Path, tmp_path: Path) -> None:
    """As with the public base in fp16, whose fp16-safe VAE has plain files only."""
    base = with_variant(copy(tiny_base, tmp_path / "base"), "fp16")
    parts = load(SDXL(base=str(base), variant="fp16", vae=str(other)))
    assert equal(parts.vae.state_dict(), vae_of(SDXL(base=str(other))))
    marked = with_variant(copy(other, tmp_path / "other"), "fp16")
    same = load(SDXL(base=str(base), variant="fp16", vae=str(marked)))
    assert equal(same.vae.state_dict(), parts.vae.state_dict())


def test_files_of_a_variant_are_read_only_when_it_is_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    folder = with_variant(copy(tiny_base, tmp_path / "base"), "fp16")
    assert equal(vae_of(SDXL(base=str(folder), variant="fp16")), vae_of(SDXL(base=str(tiny_base))))
    with pytest.raises(UserError, match=r"no \.safetensors weights of vae .*fp16") as caught:
        vae_of(SDXL(base=str(folder)))
    assert "model.variant" in caught.value.fix
    with pytest.raises(UserError, match=r"no fp16 \.safetensors weights of unet"):
        SDXL(base=str(tiny_base), variant="fp16").fingerprint("denoiser")
    both = copy(tiny_base, tmp_path / "both")
    plain = load_file(both / "vae" / WEIGHTS)
    save_file({k: v + 1 for k, v in plain.items()}, both / "vae" / WEIGHTS.replace(".", ".fp16.", 1), {"format": "pt"})
    for variant, shift in ((None, 0), ("fp16", 1)):
        found = vae_of(SDXL(base=str(both), variant=variant))
        assert torch.equal(found["quant_conv.bias"], plain["quant_conv.bias"] + shift)
    prints = {SDXL(base=str(both), variant=v).fingerprint("vae") for v in (None, "fp16")}
    assert len(prints) == 2


def test_what_is_no_vae_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder or file \./nothing") as caught:
        vae_of(SDXL(base=str(tiny_base), vae="./nothing"))
    assert caught.value.where == "model.vae"
    with pytest.raises(UserError, match=r"no \.safetensors weights of vae"):
        vae_of(SDXL(base=str(tiny_base), vae=str(tiny_base / "text_encoder")))
    broken = copy(tiny_base / "vae", tmp_path / "broken")
    content = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).unlink()
    (broken / WEIGHTS).write_bytes(content[:-100])
    with pytest.raises(UserError, match="the weights of vae cannot be read") as caught:
        vae_of(SDXL(base=str(tiny_base), vae=str(broken)))
    assert caught.value.where == str(broken)


@pytest.mark.parametrize("key", ["scaling_factor", "block_out_channels"])
def test_a_config_without_what_latents_need_is_refused_at_the_start(tiny_base: Path, tmp_path: Path, key: str) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    file = folder / "vae" / "config.json"
    content = json.loads(file.read_text())
    del content[key]
    file.unlink()
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"holds no {key}") as caught:
        _ = SDXL(base=str(folder)).latent_factor
    assert caught.value.where == str(file)


@pytest.mark.parametrize(("part", "name"), [("denoiser", "unet"), ("vae", "vae"), ("text", "text_encoder_2")])
def test_a_tensor_missing_from_a_folder_is_not_made_up(tiny_base: Path, tmp_path: Path, part: str, name: str) -> None:
    """diffusers and transformers fill it with random numbers and a warning."""
    folder = copy(tiny_base, tmp_path / "base")
    (file,) = (folder / name).glob("*.safetensors")
    gone = sorted(load_file(file))[3]
    rewrite(file, lambda state: {k: v for k, v in state.items() if k != gone})
    with pytest.raises(UserError, match=rf"1 of the tensors of {name} are missing \(first: .*{gone}\)") as caught:
        load(SDXL(base=str(folder)), (part,))
    assert caught.value.where == str(folder / name)


def test_latents_with_means_and_deviations_undo_what_diffusers_does(tiny_base: Path, tmp_path: Path) -> None:
    folder = copy(tiny_base, tmp_path / "base")
    means, deviations = [-1.6, 2.25, 0.5, 0.0], [8.4, 5.5, 6.0, 0.25]
    reconfigure(folder / "vae" / "config.json", latents_mean=means, latents_std=deviations, scaling_factor=0.5)
    family = SDXL(base=str(folder))
    generator = torch.Generator().manual_seed(3)
    raw, noise = torch.randn(2, 4, 3, 5, generator=generator), torch.randn(2, 4, 3, 5, generator=generator)
    spread = torch.rand(2, 4, 3, 5, generator=generator)
    found = family.latents(torch.cat([raw, spread], dim=1), noise)
    for channel in range(4):
        wanted = (raw + spread * noise)[:, channel].double() - means[channel]
        wanted = wanted * 0.5 / deviations[channel]
        assert torch.allclose(found[:, channel].double(), wanted, rtol=1e-5, atol=1e-6)
    # The pipeline's way back, from the last latents to what its decoder gets.
    pipeline = family.pipeline(load(family))
    decoded: list[torch.Tensor] = []
    pipeline.vae.post_quant_conv.register_forward_pre_hook(lambda _m, args: decoded.append(args[0]))
    last: list[torch.Tensor] = []

    def keep(_pipeline: object, _step: int, _t: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last.append(state["latents"].clone())
        return state

    pipeline("a red circle", num_inference_steps=2, height=32, width=32, callback_on_step_end=keep)
    moments = torch.cat([decoded[0], torch.zeros_like(decoded[0])], dim=1)
    assert torch.allclose(family.latents(moments, torch.zeros_like(decoded[0])), last[-1], rtol=1e-4, atol=1e-5)


def with_variant(folder: Path, variant: str) -> Path:
    """Rename all weights as those of a variant."""
    for file in [*folder.rglob("*.safetensors")]:
        file.rename(file.with_name(f"{file.stem}.{variant}.safetensors"))
    return folder
