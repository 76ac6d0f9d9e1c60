"""Writes a diffusers folder as the single file that SDXL was published in: the names of Stability's own code."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gesso.families import lora_names

State = dict[str, Tensor]

_NORMS = {"norm1": "in_layers.0", "norm2": "out_layers.0"}
_CLIP = [
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("final_layer_norm", "ln_final"),
    ("embeddings.token_embedding", "token_embedding"),
]
_VAE_ATTENTION = [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out")]


def original(folder: Path) -> State:
    """Every tensor of the model under its original name."""
    state = {f"model.diffusion_model.{k}": v for k, v in unet(_read(folder / "unet")).items()}
    state |= {f"first_stage_model.{k}": v for k, v in vae(_read(folder / "vae")).items()}
    state |= {f"conditioner.embedders.0.transformer.text_model.{k}": v for k, v in _text(folder, "").items()}
    # An integer buffer that the published files carry.
    positions = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
    state[positions] = torch.arange(77)[None]
    state |= {f"conditioner.embedders.1.model.{k}": v for k, v in open_clip(_text(folder, "_2")).items()}
    state["conditioner.embedders.1.model.logit_scale"] = torch.tensor(4.6)
    return state


def write(folder: Path, file: Path, *, metadata: dict[str, str] | None = None, extra: State | None = None) -> Path:
    """The folder's model as one file."""
    save_file({k: v.contiguous() for k, v in (original(folder) | (extra or {})).items()}, file, metadata)
    return file


def unet(state: State) -> State:
    """SGM's names for the UNet; the table is for layers with weights to adapt, the norms follow them."""
    layers = {key.rpartition(".")[0] for key in state}
    table = lora_names.sgm([path for path in layers if not path.startswith("conv_norm_out")])
    table["conv_norm_out"] = "out.0"
    found = {}
    for key, tensor in state.items():
        path, _, leaf = key.rpartition(".")
        name = table[path]
        if ".resnets." in path and (last := path.rpartition(".")[2]) in _NORMS:
            name = name.removesuffix(last) + _NORMS[last]
        found[f"{name}.{leaf}"] = tensor
    return found


def vae(state: State) -> State:
    """The autoencoder of latent diffusion: its attention is made of 1x1 convolutions, its decoder counts backwards."""
    ups = 1 + max(int(m[1]) for k in state if (m := re.match(r"decoder\.up_blocks\.(\d+)", k)))
    found = {}
    for key, tensor in state.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{ups - 1 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{ups - 1 - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1")
            for ours, theirs in _VAE_ATTENTION:
                name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        found[name] = tensor
    return found


def open_clip(state: State) -> State:
    """OpenCLIP: query, key and value in one matrix, and a projection that multiplies from the right."""
    found = {}
    for key, tensor in state.items():
        if re.search(r"self_attn\.[kv]_proj", key):
            continue
        name = key
        for ours, theirs in _CLIP:
            name = name.replace(ours, theirs)
        if match := re.search(r"self_attn\.q_proj\.(weight|bias)", key):
            fused = [state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[name.replace(match[0], f"attn.in_proj_{match[1]}")] = torch.cat(fused)
        elif key == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif key == "embeddings.position_embedding.weight":
            found["positional_embedding"] = tensor
        else:
            found[name] = tensor
    return found


def _read(folder: Path) -> State:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _text(folder: Path, suffix: str) -> State:
    return {k.removeprefix("text_model."): v for k, v in _read(folder / f"text_encoder{suffix}").items()}
