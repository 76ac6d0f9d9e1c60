"""The layers of SDXL that an adapter can sit on: what presets call them, and their sizes in the published model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
_FEED_FORWARD = ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
_EMBEDDINGS = ["time_emb_proj", "linear_1", "linear_2"]
_CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"]
TARGETS = {
    "attention": _ATTENTION,
    "attention-mlp": [*_ATTENTION, *_FEED_FORWARD],
    "all-linear": [*_ATTENTION, *_FEED_FORWARD, *_EMBEDDINGS],
    "convolutions": _CONVOLUTIONS,
    "all": [*_ATTENTION, *_FEED_FORWARD, *_EMBEDDINGS, *_CONVOLUTIONS],
}
"""Ends of the names of the UNet's layers by preset."""

_WIDTHS, _DEPTHS, _TEXT, _TIME = (320, 640, 1280), (0, 2, 10), 2048, 1280
Layer = tuple[str, tuple[int, ...]]


@cache
def published() -> dict[str, tuple[int, ...]]:
    """Names in adapter files and weight shapes of the linear layers and convolutions of the UNet and text encoders."""
    unet = {f"unet.{name}": shape for name, shape in _unet()}
    text = {f"text_encoder.text_model.{name}": shape for name, shape in _clip(12, 768)}
    return unet | text | {f"text_encoder_2.text_model.{name}": shape for name, shape in _clip(32, 1280)}


def _unet() -> Iterator[Layer]:
    yield "conv_in", (_WIDTHS[0], 4, 3, 3)
    yield "time_embedding.linear_1", (_TIME, _WIDTHS[0])
    yield "time_embedding.linear_2", (_TIME, _TIME)
    yield "add_embedding.linear_1", (_TIME, 2816)
    yield "add_embedding.linear_2", (_TIME, _TIME)
    skips = [_WIDTHS[0]]
    width = _WIDTHS[0]
    for block, (out, depth) in enumerate(zip(_WIDTHS, _DEPTHS, strict=True)):
        start = f"down_blocks.{block}"
        for i in range(2):
            yield from _unit(start, i, width, out, depth)
            width = out
            skips.append(width)
        if block < 2:
            yield f"{start}.downsamplers.0.conv", (width, width, 3, 3)
            skips.append(width)
    yield from _unit("mid_block", 0, width, width, _DEPTHS[-1])
    yield from _residual("mid_block.resnets.1", width, width)
    for block, (out, depth) in enumerate(zip(_WIDTHS[::-1], _DEPTHS[::-1], strict=True)):
        start = f"up_blocks.{block}"
        for i in range(3):
            yield from _unit(start, i, width + skips.pop(), out, depth)
            width = out
        if block < 2:
            yield f"{start}.upsamplers.0.conv", (width, width, 3, 3)
    yield "conv_out", (4, width, 3, 3)


def _unit(start: str, i: int, width: int, out: int, depth: int) -> Iterator[Layer]:
    yield from _residual(f"{start}.resnets.{i}", width, out)
    if depth:
        yield from _transformer(f"{start}.attentions.{i}", out, depth)


def _residual(start: str, width: int, out: int) -> Iterator[Layer]:
    yield f"{start}.conv1", (out, width, 3, 3)
    yield f"{start}.time_emb_proj", (out, _TIME)
    yield f"{start}.conv2", (out, out, 3, 3)
    if width != out:
        yield f"{start}.conv_shortcut", (out, width, 1, 1)


def _transformer(start: str, width: int, depth: int) -> Iterator[Layer]:
    yield f"{start}.proj_in", (width, width)
    for i in range(depth):
        for attention, source in (("attn1", width), ("attn2", _TEXT)):
            inside = f"{start}.transformer_blocks.{i}.{attention}"
            yield f"{inside}.to_q", (width, width)
            yield f"{inside}.to_k", (width, source)
            yield f"{inside}.to_v", (width, source)
            yield f"{inside}.to_out.0", (width, width)
        yield f"{start}.transformer_blocks.{i}.ff.net.0.proj", (8 * width, width)
        yield f"{start}.transformer_blocks.{i}.ff.net.2", (width, 4 * width)
    yield f"{start}.proj_out", (width, width)


def _clip(layers: int, width: int) -> Iterator[Layer]:
    for i in range(layers):
        for leaf in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield f"encoder.layers.{i}.self_attn.{leaf}", (width, width)
        yield f"encoder.layers.{i}.mlp.fc1", (4 * width, width)
        yield f"encoder.layers.{i}.mlp.fc2", (width, 4 * width)
