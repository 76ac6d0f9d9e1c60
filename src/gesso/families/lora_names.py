"""The names that LoRA files give to a model's layers: diffusers' dotted names and kohya's flat ones.

A canonical name is what diffusers reads everywhere: the part's name and the module path, such as
`unet.mid_block.attentions.0.proj_in`, and for CLIP always with `text_model`. kohya writes a prefix and the path with
`_` for `.`; for an SDXL UNet the path is that of the original (SGM) code. `_` is also part of names, so flat names
are only ever looked up in a table built from the modules of a loaded network.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from gesso.core.changes import Change
from gesso.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

Modules = Mapping[str, tuple[int, ...]]
"""Canonical name of each layer that an adapter can sit on -> the shape of its weight."""

KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
KOHYA_BASE_VERSION = {"stable-diffusion-xl-v1-base": "sdxl_base_v1-0"}
"""kohya's name of the base model for each ModelSpec architecture."""

_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
_RESNET |= {"conv_shortcut": "skip_connection"}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


def modules(networks: Mapping[str, nn.Module]) -> dict[str, tuple[int, ...]]:
    """The linear and convolution layers of networks keyed by part name ("unet", "text_encoder", ...).

    Networks with peft adapters in place give the same answer as without.
    """
    return {name: tuple(weight.shape) for name, weight in weights(networks).items()}


def weights(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weights of those layers, by canonical name."""
    from torch import nn

    found: dict[str, Tensor] = {}
    for part, network in networks.items():
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and not re.search(r"\.lora_[AB]\.", path):
                found[canonical(part, path.removesuffix(".base_layer"))] = module.weight
    return found


def merge(networks: Mapping[str, nn.Module], changes: Mapping[str, Change], *, strength: float = 1.0) -> None:
    """Put changes (by canonical name) into the weights of networks keyed by part name; adapters may be in place."""
    import torch

    with torch.no_grad():
        for name, weight in weights(networks).items():
            if name in changes:
                weight.copy_(changes[name].to(weight.device).applied(weight, strength=strength))


def canonical(part: str, path: str) -> str:
    """The name of a module of one part, whether or not this transformers release has `text_model` in its paths."""
    outside = part == "unet" or path.startswith(("text_model.", "text_projection"))
    return f"{part}.{path}" if outside else f"{part}.text_model.{path}"


def kohya(names: Iterable[str]) -> dict[str, str]:
    """Canonical name -> kohya's name: SGM paths for the UNet, transformers paths for the text encoders."""
    split = [name.partition(".") for name in names]
    blocks = sgm([path for part, _, path in split if part == "unet"])
    return {
        f"{part}.{path}": KOHYA_PREFIX[part] + (blocks[path] if part == "unet" else path).replace(".", "_")
        for part, _, path in split
    }


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Every name under which a file may mention a layer -> its canonical name."""
    names = list(names)
    table = {flat: name for name, flat in kohya(names).items()}
    for name in names:
        part, _, path = name.partition(".")
        table[name] = name
        table[KOHYA_PREFIX[part] + path.replace(".", "_")] = name
        if part != "unet":
            table[f"{part}.{path.removeprefix('text_model.')}"] = name
        else:
            table["lycoris_" + path.replace(".", "_")] = name
    return table


def sgm(paths: Collection[str]) -> dict[str, str]:
    """Module paths of a diffusers UNet -> their paths in the original (SGM) code, for any block layout.

    The layout is read from the paths of all its layers: how many residual layers each block has, whether attention
    follows them, and whether the block ends in a down- or upsampler. SGM numbers these one after another.
    Raises `UserError` for a layer that has no counterpart.
    """
    places = dict(_places(paths))
    table = {}
    for path in paths:
        if path in _OUTSIDE_BLOCKS:
            table[path] = _OUTSIDE_BLOCKS[path]
            continue
        match = re.fullmatch(r"(.+?\.(resnets|attentions|downsamplers|upsamplers)\.\d+)\.(.+)", path)
        if match is None or match[1] not in places:
            raise UserError(
                f"the UNet's layer {path} has no name in kohya's format", fix="export in the diffusers format"
            )
        block, kind, leaf = match.groups()
        rest = {"resnets": _RESNET.get(leaf, leaf), "downsamplers": "op"}.get(kind, leaf)
        table[path] = f"{places[block]}.{rest}"
    return table


def _places(paths: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each residual layer, attention and sampler of a UNet with its place in SGM's numbering."""
    groups = {
        m[1] for p in paths if (m := re.match(r"(.+?\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+)\.", p))
    }

    def count(prefix: str) -> int:
        indices = (g.removeprefix(prefix).split(".")[0] for g in groups if g.startswith(prefix))
        return max((int(i) for i in indices), default=-1) + 1

    index = 1
    for block in range(count("down_blocks.")):
        for layer in range(count(f"down_blocks.{block}.resnets.")):
            yield f"down_blocks.{block}.resnets.{layer}", f"input_blocks.{index}.0"
            yield f"down_blocks.{block}.attentions.{layer}", f"input_blocks.{index}.1"
            index += 1
        if f"down_blocks.{block}.downsamplers.0" in groups:
            yield f"down_blocks.{block}.downsamplers.0", f"input_blocks.{index}.0"
            index += 1
    attentions = count("mid_block.attentions.")
    for layer in range(count("mid_block.resnets.")):
        # One attention sits between each two residual layers, where the middle block has any.
        yield f"mid_block.resnets.{layer}", f"middle_block.{2 * layer if attentions else layer}"
        yield f"mid_block.attentions.{layer}", f"middle_block.{2 * layer + 1}"
    index = 0
    for block in range(count("up_blocks.")):
        after = 2 if count(f"up_blocks.{block}.attentions.") else 1
        for layer in range(count(f"up_blocks.{block}.resnets.")):
            yield f"up_blocks.{block}.resnets.{layer}", f"output_blocks.{index}.0"
            yield f"up_blocks.{block}.attentions.{layer}", f"output_blocks.{index}.1"
            index += 1
        yield f"up_blocks.{block}.upsamplers.0", f"output_blocks.{index - 1}.{after}"
