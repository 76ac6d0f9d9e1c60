"""What enters the denoiser: latents that hide nothing, padding of each tokenizer's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from rig import normal

from gesso.families.sdxl import SDXL

CPU = torch.device("cpu")


def test_what_is_not_finite_is_not_hidden(model: Path) -> None:
    """An overflow in the VAE must reach whoever stops the run: a peer puts zeros in its place and trains on."""
    family = SDXL(base=str(model))
    parts = family.load({"vae"}, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        next(p for n, p in parts.vae.named_parameters() if n.endswith("conv_in.bias")).fill_(float("inf"))
    moments = family.encode_images(parts, torch.from_numpy(normal(1, 1, 3, 16, 16)).clamp(-1, 1))
    assert not moments[:, :4].isfinite().any()
    assert not family.latents(moments, torch.zeros(1, 4, *moments.shape[2:])).isfinite().any()


def test_each_channel_has_a_centre_and_a_spread_of_its_own_where_the_vae_says_so(model: Path, tmp_path: Path) -> None:
    """(raw - mean) * scale / std per channel, as diffusers decodes such a VAE: raw = latent * std / scale + mean."""
    folder = shutil.copytree(model, tmp_path / "model")
    file = folder / "vae" / "config.json"
    centre, spread = [0.1, -0.4, 0.25, 1.5], [1.5, 0.5, 2.0, 0.75]
    changes = {"latents_mean": centre, "latents_std": spread, "scaling_factor": 0.5}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    moments, noise = normal(3, 2, 8, 4, 4), normal(4, 2, 4, 4, 4)
    found = SDXL(base=str(folder)).latents(torch.from_numpy(moments), torch.from_numpy(noise)).double().numpy()
    raw = moments[:, :4].astype(np.float64) + moments[:, 4:].astype(np.float64) * noise
    back = found * np.array(spread)[:, None, None] / 0.5 + np.array(centre)[:, None, None]
    assert np.abs(back - raw).max() < 2e-6


def test_each_encoder_has_the_padding_of_its_own_tokenizer(model: Path) -> None:
    """SDXL's first tokenizer pads with the end mark and the second with `!`; so do the ids that they get."""
    family = SDXL(base=str(model))
    parts = family.load({"text"}, dtype=torch.float32, device=CPU)
    exclamation = parts.tokenizers[1].convert_tokens_to_ids("!")
    parts.tokenizers[1].pad_token = "!"
    seen: list[torch.Tensor] = []
    for encoder in parts.text_encoders:
        encoder.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
    with torch.no_grad():
        family.encode_text(parts, ["red circle"])
    for ids, tokenizer, filler in zip(
        seen, parts.tokenizers, [parts.tokenizers[0].eos_token_id, exclamation], strict=True
    ):
        words = tokenizer("red circle", padding=False).input_ids
        assert ids[0].tolist() == words + [filler] * (tokenizer.model_max_length - len(words))
