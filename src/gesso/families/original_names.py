"""The names that SDXL's tensors had when it was published, in Stability's own code, from those of diffusers' folders.

The UNet's blocks are numbered one after another, the autoencoder's decoder backwards, and OpenCLIP keeps query, key
and value in one matrix and multiplies its projection from the right.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gesso.families import lora_names

if TYPE_CHECKING:
    from torch import Tensor

State = Mapping[str, "Tensor"]

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
"""What the names of each part's tensors begin with."""

_RESNET_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
_VAE = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_OPEN_CLIP = (
    (r"encoder\.layers\.", "transformer.resblocks."),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"final_layer_norm", "ln_final"),
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
)


def original(parts: Mapping[str, State]) -> dict[str, Tensor]:
    """Every tensor of a model under its original name, from the state of each network by the part's name.

    It is what the published file holds, apart from OpenCLIP's `logit_scale`, which no picture depends on.
    """
    makers = {"unet": _unet, "vae": _vae, "text_encoder": _clip, "text_encoder_2": _open_clip}
    return {PREFIXES[part] + k: t.contiguous() for part, state in parts.items() for k, t in makers[part](state).items()}


def _unet(state: State) -> dict[str, Tensor]:
    paths = {key: key.rpartition(".")[0] for key in state}
    table = lora_names.sgm([path for path in set(paths.values()) if path != "conv_norm_out"])
    table["conv_norm_out"] = "out.0"
    found = {}
    for key, tensor in state.items():
        place, _, last = table[paths[key]].rpartition(".")
        norm = _RESNET_NORMS.get(last) if ".resnets." in key else None
        found[f"{place}.{norm or last}.{key.rpartition('.')[2]}"] = tensor
    return found


def _vae(state: State) -> dict[str, Tensor]:
    blocks = 1 + max(int(m[1]) for key in state if (m := re.match(r"decoder\.up_blocks\.(\d+)", key)))

    def backwards(match: re.Match[str]) -> str:
        return f"up.{blocks - 1 - int(match[1])}."

    found = {}
    for key, tensor in state.items():
        name = re.sub(r"up_blocks\.(\d+)\.", backwards, _renamed(key, _VAE))
        if name.startswith("decoder.up."):
            name = re.sub(r"resnets\.(\d+)", r"block.\1", name).replace("upsamplers.0", "upsample")
        # Its attention was written as convolutions of one pixel.
        found[name] = tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
    return found


def _clip(state: State) -> dict[str, Tensor]:
    import torch

    found = {f"text_model.{_short(key)}": tensor for key, tensor in state.items()}
    length = found["text_model.embeddings.position_embedding.weight"].shape[0]
    found["text_model.embeddings.position_ids"] = torch.arange(length)[None]
    return found


def _open_clip(state: State) -> dict[str, Tensor]:
    import torch

    short = {_short(key): tensor for key, tensor in state.items()}
    found = {}
    for key, tensor in short.items():
        if match := re.fullmatch(r"(.*)self_attn\.([qkv])_proj\.(weight|bias)", key):
            if match[2] == "q":
                joined = torch.cat([short[f"{match[1]}self_attn.{which}_proj.{match[3]}"] for which in "qkv"])
                found[f"{_renamed(match[1], _OPEN_CLIP)}attn.in_proj_{match[3]}"] = joined
        elif key == "text_projection.weight":
            found["text_projection"] = tensor.T
        else:
            found[_renamed(key, _OPEN_CLIP)] = tensor
    return found


def _short(key: str) -> str:
    """Without the `text_model.` that some releases of transformers put before a text encoder's names."""
    return key.removeprefix("text_model.")


def _renamed(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, name in rules:
        key = re.sub(pattern, name, key)
    return key
