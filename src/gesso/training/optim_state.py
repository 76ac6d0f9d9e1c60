"""What optimisers remember, as named tensors and back, bit for bit: numbers, lists and empty places included.

A value's name is `<parameter>.<quantity>`; of a whole group it is `@<number of the group>.<quantity>`. What is no
tensor carries its kind after a #, as in `@0.d#float`; the items of a list are `<name>/<position>`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from gesso.errors import UserError

State = Mapping[str, Tensor]


def packed(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """A value as tensors; raises `UserError` for one that could not be brought back as it was."""
    match value:
        case Tensor():
            yield name, value.detach()
        case bool():
            yield f"{name}#bool", torch.tensor(value)
        case int():
            yield f"{name}#int", torch.tensor(value, dtype=torch.int64)
        case float():
            yield f"{name}#float", torch.tensor(value, dtype=torch.float64)
        case None:
            yield f"{name}#none", torch.zeros(0)
        case str():
            yield f"{name}#text", torch.tensor(list(value.encode()), dtype=torch.uint8)
        case list() | tuple():
            yield f"{name}#{'list' if isinstance(value, list) else 'tuple'}", torch.tensor(len(value))
            for i, item in enumerate(value):
                yield from packed(f"{name}/{i}", item)
        case dict():
            keys = list(value)
            yield from packed(f"{name}#dict", keys)
            for i, item in enumerate(value.values()):
                yield from packed(f"{name}/{i}", item)
        case _:
            raise UserError(
                f"the optimiser keeps a {type(value).__name__} ({name}), which cannot be saved and brought back",
                where="training.optimizer.type",
                fix="choose another optimiser",
            )


def unpacked(name: str, saved: State, device: torch.device) -> Any:
    """The value that was packed under this name, its tensors on `device`."""
    if name in saved:
        return saved[name].to(device, copy=True)
    kind = next(key for key in saved if key.startswith(f"{name}#") and "/" not in key[len(name) :])
    tensor = saved[kind]
    match kind.removeprefix(f"{name}#").partition("#")[0]:
        case "bool" | "int" | "float":
            return tensor.item()
        case "none":
            return None
        case "text":
            return bytes(tensor.tolist()).decode()
        case "list":
            return [unpacked(f"{name}/{i}", saved, device) for i in range(int(tensor))]
        case "tuple":
            return tuple(unpacked(f"{name}/{i}", saved, device) for i in range(int(tensor)))
        case _:
            keys = unpacked(f"{name}#dict", saved, device)
            return {key: unpacked(f"{name}/{i}", saved, device) for i, key in enumerate(keys)}


def names(saved: State) -> list[str]:
    """The names that values were packed under, each once."""
    return list(dict.fromkeys(key.partition("#")[0].partition("/")[0] for key in saved))


def row_by_row(value: Any) -> Any:
    """The value with its tensors laid out as they come back from a file: some kernels round by layout."""
    match value:
        case Tensor():
            return value if value.is_contiguous() else value.contiguous()
        case list() | tuple():
            return type(value)(row_by_row(item) for item in value)
        case dict():
            return {key: row_by_row(item) for key, item in value.items()}
        case _:
            return value
