"""Networks in diffusers' folders: whole or in shards, plain or of a variant, and nothing that is not theirs."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest
import torch
from family_helpers import ALL, copy, load, same_networks

from gesso.errors import UserError
from gesso.families import model_folder
from gesso.families.sdxl import SDXL


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_the_same_model(tiny_base: Path, tmp_path: Path, variant: str | None) -> None:
    whole = load(SDXL(base=str(tiny_base)))
    folder = copy(tiny_base, tmp_path / "base")
    networks = {"unet": whole.denoiser, "vae": whole.vae}
    networks |= dict(zip(("text_encoder", "text_encoder_2"), whole.text_encoders, strict=True))
    for part, network in networks.items():
        for file in (folder / part).glob("*"):
            file.unlink()
        network.save_pretrained(folder / part, max_shard_size="40KB", variant=variant)
        assert len(list((folder / part).glob("*-of-*.safetensors"))) > 1
    family = SDXL(base=str(folder), variant=variant)
    same_networks(load(family), whole)
    for part in networks:
        written = {path.name for path in (folder / part).iterdir()}
        assert {path.name for path in model_folder.files(folder / part, part, variant)} == written
        fetched = {n for n in written for p in model_folder.patterns(part, variant) if fnmatch.fnmatch(n, p)}
        assert fetched == written, "what the hub's client would bring is not what diffusers wrote"
    before = [family.fingerprint(name) for name in ALL]
    last = max((folder / "unet").glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-4] + bytes(4))
    assert SDXL(base=str(folder), variant=variant).fingerprint("denoiser") != before[0]
    last.unlink()
    with pytest.raises(UserError, match="the weights of unet cannot be read"):
        load(SDXL(base=str(folder), variant=variant), ("denoiser",))


@pytest.mark.parametrize(
    "name",
    [
        *("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin", "model.onnx_data"),
        *("diffusion_pytorch_model.non_ema.safetensors", "diffusion_flax_model.msgpack", "openvino_model.bin"),
        *("diffusion_pytorch_model.fp16-00001-of-00002.safetensors", "diffusion_pytorch_model_ema.safetensors"),
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ],
)
def test_files_of_other_kinds_are_none_of_a_networks(name: str) -> None:
    assert not any(fnmatch.fnmatch(name, pattern) for pattern in model_folder.patterns("unet", None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_denoiser_has_the_asked_type_and_the_vae_float32(tiny_base: Path, dtype: torch.dtype) -> None:
    parts = load(SDXL(base=str(tiny_base)), dtype=dtype)
    for network in (parts.denoiser, *parts.text_encoders):
        assert {p.dtype for p in network.parameters()} == {dtype}
    assert {p.dtype for p in parts.vae.parameters()} == {torch.float32}


@pytest.mark.parametrize(("names", "loaded"), [(("denoiser",), 1), (("vae",), 1), (("text",), 2), ((), 0)])
def test_only_what_is_asked_for_is_loaded(tiny_base: Path, names: tuple[str, ...], loaded: int) -> None:
    parts = load(SDXL(base=str(tiny_base)), names)
    assert sum(x is not None for x in (parts.denoiser, parts.vae, *parts.text_encoders)) == loaded
    assert len(parts.tokenizers) == (2 if "text" in names else 0)


def test_loading_draws_no_random_numbers(tiny_base: Path) -> None:
    """The libraries initialise networks before they fill them."""
    state = torch.random.get_rng_state()
    load(SDXL(base=str(tiny_base)))
    assert torch.equal(torch.random.get_rng_state(), state)
