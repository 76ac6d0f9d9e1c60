"""The tensors that files keep of one layer's change, and what kohya's header says of the whole network."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor

from gesso.core.changes import Change, Hadamard, Kronecker, Pair


def diffusers(pair: Pair) -> dict[str, Tensor]:
    """A LoRA's or DoRA's matrices by the names that diffusers and peft give them."""
    found = {"lora_A.weight": pair.down, "lora_B.weight": pair.up}
    if pair.magnitude is not None:
        # peft keeps the norms of a convolution as [1, out, 1, 1].
        kernel = pair.down.ndim > 2
        found["lora_magnitude_vector"] = pair.magnitude.view(1, -1, 1, 1) if kernel else pair.magnitude.flatten()
    return found


def kohya(change: Change) -> tuple[dict[str, Tensor], float]:
    """A layer's matrices by the names that kohya's tools and LyCORIS give them, and its alpha."""
    match change:
        case Pair():
            found = {"lora_down.weight": change.down, "lora_up.weight": change.up}
            if change.magnitude is not None:
                found["dora_scale"] = change.magnitude.reshape(-1, *[1] * (change.down.ndim - 1))
            return found, change.alpha
        case Hadamard():
            return dict(change.tensors), change.scale * change.rank
        case Kronecker(tensors=tensors, scale=scale, rank=None):
            # Readers take no alpha where both factors are whole, so the strength goes into one of them.
            return {**tensors, "lokr_w1": tensors["lokr_w1"].float() * scale}, 1.0
        case Kronecker(rank=rank):
            assert rank is not None
            return dict(change.tensors), change.scale * rank
    raise TypeError(f"{change.kind} has no names in such files")


def of_one_alpha(changes: Mapping[str, Change]) -> dict[str, Change]:
    """The same with the commonest alpha everywhere: diffusers mixes up layers of a LoRA whose alphas differ."""
    alphas = Counter(change.alpha for change in changes.values() if isinstance(change, Pair))
    if len(alphas) < 2:
        return dict(changes)
    alpha = alphas.most_common(1)[0][0]
    return {
        name: replace(c, up=c.up.float() * (c.alpha / alpha), scale=alpha / c.rank)
        if isinstance(c, Pair) and c.alpha != alpha
        else c
        for name, c in changes.items()
    }


def network(changes: Collection[Change]) -> dict[str, str]:
    """kohya's `ss_network_` header values: the module that trains such layers, its arguments, rank and alpha."""
    kinds = sorted({change.kind for change in changes})
    arguments: dict[str, str] = {}
    if kinds != ["LoRA"]:
        arguments = {"algo": "lora", "dora_wd": "True"} if kinds == ["DoRA"] else {"algo": kinds[0].lower()}
    ranks, alphas = set(), set()
    for change in changes:
        if isinstance(change, Pair | Hadamard | Kronecker):
            ranks.add(change.rank)
            alphas.add(None if change.rank is None else change.scale * change.rank)
    return {
        "ss_network_module": "lycoris.kohya" if arguments else "networks.lora",
        "ss_network_dim": _common(ranks),
        "ss_network_alpha": _common(alphas),
        "ss_network_args": json.dumps(arguments),
    }


def _common(found: Collection[float | None]) -> str:
    """The one value of all layers, or kohya's word for several."""
    (only, *others) = found
    return f"{float(only):g}" if only is not None and not others else "Dynamic"
