"""SDXL in one `.safetensors` file under the names of Stability's own code, as model sites and other tools share it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gesso.errors import UserError
from gesso.families import lora_file, model_folder
from gesso.families.original_names import PREFIXES

if TYPE_CHECKING:
    import torch

_V_PREDICTION = {"prediction_type": "v_prediction"}
ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def check(file: Path, parts: Collection[str]) -> None:
    """Raise `UserError` unless the file is a readable checkpoint with these parts of SDXL; reads its header only."""
    keys, _ = _header(file)
    if lora_file.is_lora(file):
        raise UserError(
            "this is a LoRA, not a model", where=str(file), fix="give the model that it was trained on as model.base"
        )
    lacking = [p for p in parts if not any(key.startswith(PREFIXES[p]) for key in keys)]
    if lacking == ["vae"]:
        raise UserError("this checkpoint holds no VAE", where=str(file), fix="name one with model.vae")
    if lacking:
        raise UserError(
            f"this is no SDXL checkpoint: it holds no {' and no '.join(lacking)} under SDXL's original names "
            f"(its first tensor is {min(keys, default='missing')})",
            where=str(file),
            fix="give a whole SDXL checkpoint, or a diffusers folder",
        )


def schedule(file: Path) -> dict[str, Any]:
    """What a checkpoint says about how it was trained, as changes to the scheduler's config.

    Model makers mark it with empty tensors named `v_pred` and `ztsnr` (ComfyUI reads these), or in the header with
    `modelspec.prediction_type` (Stability's ModelSpec 1.0.1). Raises `UserError` for EDM's noise, which is not DDPM's.
    """
    keys, metadata = _header(file)
    if any(key.startswith("edm_") for key in keys):
        raise UserError(
            "this checkpoint was trained with EDM's noise, which this version does not know",
            where=str(file),
            fix="use a model with epsilon or v prediction",
        )
    found: dict[str, Any] = {}
    if "v_pred" in keys or metadata.get("modelspec.prediction_type") == "v":
        found |= _V_PREDICTION
    if "ztsnr" in keys:
        found |= ZERO_TERMINAL_SNR
    return found


def marks(scheduler: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The empty tensors by which `schedule` finds in a file what a scheduler's config says of the training."""
    import torch

    v = scheduler.get("prediction_type") == "v_prediction"
    names = ["v_pred"] * v + ["ztsnr"] * bool(scheduler.get("rescale_betas_zero_snr"))
    return {name: torch.zeros(0) for name in names}


def read(file: Path, part: str, *, config: Path, dtype: torch.dtype) -> Any:
    """One network of a checkpoint, or a VAE from a file of its own, built by the configuration in the folder `config`.

    Raises `UserError` for weights that are absent, unreadable, of another shape or incomplete.
    """
    from diffusers.loaders.single_file_utils import SingleFileComponentError, create_diffusers_clip_model_from_ldm
    from safetensors import SafetensorError

    kind = model_folder.network_class(part)
    try:
        with _quiet():
            if part in ("unet", "vae"):
                network = kind.from_single_file(str(file), config=str(config), subfolder=part, torch_dtype=dtype)
            else:
                # Of a whole file diffusers tells the encoders apart by their widths, which are equal in small models.
                network = create_diffusers_clip_model_from_ldm(
                    kind, _part(file, part), subfolder=part, config=str(config), torch_dtype=dtype
                )
    except NotImplementedError as error:
        # This is how torch puts it when diffusers moves a tensor that got no data.
        raise model_folder.incomplete(part, [], file) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, SingleFileComponentError) as error:
        raise model_folder.unreadable(part, error, file) from error
    tensors = chain(network.named_parameters(), network.named_buffers())
    if missing := sorted(name for name, tensor in tensors if tensor.is_meta):
        raise model_folder.incomplete(part, missing, file)
    return network


def _part(file: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of one network, under their names in the file."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys() if key.startswith(PREFIXES[part])}  # noqa: SIM118


def _header(file: Path) -> tuple[set[str], dict[str, str]]:
    """Names of the tensors, and metadata; raises `UserError` for a file that is damaged or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as handle:
            return set(handle.keys()), dict(handle.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"not a readable safetensors file ({str(error).splitlines()[0]})",
            where=str(file),
            fix="it is damaged or incomplete: fetch it again",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' bar and its remarks on parts that are loaded one by one."""
    from diffusers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
