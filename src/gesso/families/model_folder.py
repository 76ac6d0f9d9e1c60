"""diffusers' folder layout: which files make up a network, and reading one whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gesso.errors import UserError

if TYPE_CHECKING:
    import torch

    from gesso.core.seams import Family, Parts

_STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def patterns(part: str, variant: str | None) -> list[str]:
    """The names that the files of one network can have in its folder: weights whole or in shards, and the config."""
    stem, mark = _STEMS.get(part, "model"), f".{variant}" if variant else ""
    shards = "-?????-of-?????"
    names = [
        "config.json",
        f"{stem}{mark}.safetensors",
        f"{stem}{mark}{shards}.safetensors",
        # Before diffusers 0.31 the variant came after the number of the shard.
        f"{stem}{shards}{mark}.safetensors",
        f"{stem}.safetensors.index{mark}.json",
    ]
    return list(dict.fromkeys(names))


def files(folder: Path, part: str, variant: str | None) -> list[Path]:
    """The config and the weights of one network; raises `UserError` where there are no weights of this variant."""
    found = {path for pattern in patterns(part, variant) for path in folder.glob(pattern)}
    if any(path.suffix == ".safetensors" for path in found):
        return sorted(found)
    marked = f"{variant} " if variant else ""
    names = ", ".join(sorted(p.name for p in folder.glob("*") if p.is_file() and p.name != "config.json")[:6])
    fix = "set model.variant if its files carry one, such as fp16; pickle files (.bin) have to be converted first"
    raise UserError(
        f"there are no {marked}.safetensors weights of {part} in this folder (found: {names or 'nothing'})",
        where=str(folder),
        fix="leave out model.variant, or fetch the files of this variant" if variant else fix,
    )


def has(folder: Path, part: str, variant: str | None) -> bool:
    """Whether the folder holds weights of this variant."""
    return any(path.suffix == ".safetensors" for p in patterns(part, variant) for path in folder.glob(p))


def read(folder: Path, part: str, *, variant: str | None, dtype: torch.dtype) -> Any:
    """One network from its folder.

    Raises `UserError` for weights that are absent, unreadable, of another shape or incomplete: the libraries would
    fill what is missing with random numbers.
    """
    from safetensors import SafetensorError

    files(folder, part, variant)
    try:
        network, info = network_class(part).from_pretrained(
            folder, variant=variant, torch_dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise unreadable(part, error, folder) from error
    if missing := sorted(info["missing_keys"]):
        raise incomplete(part, missing, folder)
    return network


def with_trained(family: Family, folder: Path, *, dtype: torch.dtype, device: torch.device) -> Parts:
    """All networks of a model after full training: the trained ones from their folders in `folder`, the rest its own.

    Raises `UserError` where a trained network cannot be read.
    """
    denoiser, *encoders = family.part_names
    trained = (folder / denoiser).is_dir()
    parts = family.load(("vae", "text", *(() if trained else ("denoiser",))), dtype=dtype, device=device)
    with without_bars():
        if trained:
            parts.denoiser = _frozen(folder / denoiser, denoiser, dtype, device)
        for i, name in enumerate(encoders):
            if (folder / name).is_dir():
                parts.text_encoders[i] = _frozen(folder / name, name, dtype, device)
    return parts


def _frozen(folder: Path, part: str, dtype: torch.dtype, device: torch.device) -> Any:
    return read(folder, part, variant=None, dtype=dtype).requires_grad_(False).eval().to(device)


def unreadable(part: str, error: Exception, path: Path) -> UserError:
    """The error for weights that a library refuses, with the first line of what it said."""
    said = (str(error).strip() or type(error).__name__).split("\n")[0]
    return UserError(
        f"the weights of {part} cannot be read ({said})", where=str(path), fix="fetch or export the model again"
    )


def incomplete(part: str, missing: list[str], path: Path) -> UserError:
    """The error for a network of which tensors are not in its files; `missing` may be empty if they are not known."""
    first = f" (first: {missing[0]})" if missing else ""
    return UserError(
        f"{len(missing) or 'some'} of the tensors of {part} are missing{first}",
        where=str(path),
        fix="fetch or export the model again; its files are damaged or belong to another configuration",
    )


def network_class(part: str) -> Any:
    """The diffusers or transformers class of a part."""
    import diffusers
    import transformers

    return {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }[part]


def read_json(path: Path) -> dict[str, Any]:
    """One of a model's configurations; raises `UserError` where it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model's {path.name} cannot be read ({error})", where=str(path), fix="fetch the model again"
        ) from error
    return content


def tokenizer(folder: Path) -> Any:
    """CLIP's tokenizer from its folder; raises `UserError` where it cannot be read."""
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the loader raises whatever a damaged file makes it raise
        raise UserError(
            f"the {folder.name} cannot be read ({str(error).strip().partition(chr(10))[0] or type(error).__name__})",
            where=str(folder),
            fix="fetch the model again",
        ) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the libraries' bars per network and per pipeline, which would tear ours apart."""
    import diffusers
    import transformers

    shown = [
        logging
        for logging in (transformers.utils.logging, diffusers.utils.logging)
        if logging.is_progress_bar_enabled()
    ]
    for logging in shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging in shown:
            logging.enable_progress_bar()
