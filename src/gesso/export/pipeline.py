"""A fully trained model -> a diffusers folder with everything in it.

No folder reaches its place before diffusers has loaded it and it has answered like the trained model.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gesso.config.run import RunConfig
from gesso.core.folder import sync_folder
from gesso.core.runtime import Precision, Runtime
from gesso.core.seams import Family, Parts
from gesso.errors import ResourceError, UserError
from gesso.export.proof import AGREEMENT, DTYPES, Probe, deviation, probe
from gesso.families import model_folder

_INDEX = "model_index.json"


@dataclass(frozen=True)
class Checked:
    """Largest deviations of a folder's text embeddings and prediction from the trained model's, of their largest."""

    text_error: float
    error: float


@dataclass(frozen=True)
class Trained:
    """A fully trained model: the folder with its trained networks, and how it answered."""

    run: RunConfig
    weights: Path
    expected: Probe

    @classmethod
    def of(cls, run: RunConfig, parts: Parts, weights: Path) -> Trained:
        """Taken from a model as it is now, which `weights` holds too."""
        return cls(run, weights, probe(run.model, parts))

    @classmethod
    def load(cls, run: RunConfig, weights: Path, *, runtime: Runtime) -> Trained:
        """Taken from a checkpoint."""
        parts = model_folder.with_trained(run.model, weights, dtype=runtime.dtype, device=runtime.device)
        return cls.of(run, parts, weights)

    def write(self, path: Path, *, precision: Precision, runtime: Runtime, replace: bool = False) -> Checked:
        """`export` it."""
        family = self.run.model
        return export(
            path,
            model_folder.with_trained(family, self.weights, dtype=torch.float32, device=torch.device("cpu")),
            precision=precision,
            family=family,
            expected=self.expected,
            runtime=runtime,
            replace=replace,
        )

    def finish(self, folder: Path, *, runtime: Runtime) -> dict[str, Path]:
        """What a run leaves for use elsewhere, by what it is: the whole model. That of an earlier end is replaced."""
        path = folder / self.run.name
        self.write(path, precision="fp16", runtime=runtime, replace=True)
        return {"model": path}


def export(
    path: Path,
    parts: Parts,
    *,
    precision: Precision,
    family: Family,
    expected: Probe,
    runtime: Runtime,
    replace: bool = False,
) -> Checked:
    """Write a model whose every network is in `parts`, in float32 on the CPU, as a diffusers folder; casts `parts`.

    `expected` is `probe` of the trained model. An existing folder is only replaced with `replace`, and only a
    diffusers folder. Raises `UserError` when there is something at `path`, or what was written does not load to the
    same model (nothing is left then), and `ResourceError` when it cannot be written.
    """
    _check_free(path, replace=replace)
    cast(family, parts, DTYPES[precision])
    partial = path.with_name(f".partial-{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        try:
            _write(partial, family, parts)
            found = _verify(partial, family=family, wanted=parts, expected=expected, runtime=runtime)
            _settle(partial, path)
        except OSError as error:
            raise ResourceError(
                f"the model's folder cannot be written ({error.strerror or error})",
                where=str(path),
                fix="free space or choose another place",
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return found


def _check_free(path: Path, *, replace: bool) -> None:
    if not path.exists() or (replace and (path / _INDEX).is_file()):
        return
    raise UserError("something is there already", where=str(path), fix="remove it, or choose another place: --output")


def networks(family: Family, parts: Parts) -> dict[str, Any]:
    """All networks of a model by the names of their folders."""
    return {**dict(zip(family.part_names, [parts.denoiser, *parts.text_encoders], strict=True)), "vae": parts.vae}


def cast(family: Family, parts: Parts, dtype: torch.dtype) -> None:
    """Bring every network to `dtype` in place; raises `UserError` for numbers that do not fit into it."""
    for part, network in networks(family, parts).items():
        for tensor in [*network.parameters(), *network.buffers()]:
            if not tensor.is_floating_point():
                continue
            cast = tensor.detach().to(dtype)
            if not torch.isfinite(cast).all():
                raise UserError(
                    f"the weights of {part} do not fit into {dtype}".replace("torch.", ""),
                    fix="export in bf16 or fp32" if torch.isfinite(tensor).all() else "use an earlier checkpoint",
                )
            tensor.data = cast


def _write(folder: Path, family: Family, parts: Parts) -> None:
    """The folder as diffusers writes it, without traces of this machine, and under names that older readers know."""
    pipeline = family.pipeline(parts)
    with model_folder.without_bars():
        pipeline.save_pretrained(folder)
    # For long prompts the pipeline's class is our own; its weights are those of the class in diffusers.
    kind = next(c.__name__ for c in type(pipeline).__mro__ if c.__module__.startswith("diffusers."))
    _rewrite(folder / _INDEX, {"_class_name": kind})
    for part in ("vae", *family.part_names):
        # Told nothing, transformers loads the type in its config and diffusers float32; only alike they go together.
        encoder = part in family.part_names[1:]
        _rewrite(folder / part / "config.json", {"dtype": "float32"} if encoder else {})
    for part in family.part_names[1:]:
        for file in (folder / part).glob("*.safetensors"):
            _restore_names(file)
    for item in [*folder.rglob("*"), folder]:
        sync_folder(item)  # files are opened and synced like folders


def _rewrite(file: Path, changes: Mapping[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | dict(changes)
    content.pop("_name_or_path", None)
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _restore_names(file: Path) -> None:
    """Give a text encoder's tensors back the `text_model.` that transformers 5.6 dropped from some of them."""
    tensors = load_file(file)
    if not any(name.startswith("text_model.") for name in tensors):
        # Cloned, because the loaded ones are windows on the file that is written.
        save_file({f"text_model.{name}": tensor.clone() for name, tensor in tensors.items()}, file, {"format": "pt"})


def _verify(folder: Path, *, family: Family, wanted: Parts, expected: Probe, runtime: Runtime) -> Checked:
    """Load the folder as a user would; every tensor must be there, and the answers those of the trained model."""
    try:
        again = _reloaded(folder, family=family, wanted=wanted, expected=expected, runtime=runtime)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged folder makes them raise
        raise unlike(folder, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
    return agreed(folder, again, expected, coarsest=(runtime.dtype, wanted.denoiser.dtype))


def agreed(path: Path, found: Probe, expected: Probe, *, coarsest: Sequence[torch.dtype]) -> Checked:
    """How far answers are from the expected ones; raises `UserError` if further than rounding to `coarsest` is."""
    checked = Checked(
        text_error=max(deviation(found.text[k], expected.text[k]) for k in expected.text),
        error=deviation(found.prediction, expected.prediction),
    )
    limit = max(AGREEMENT[dtype] for dtype in coarsest)
    # A comparison with NaN is false, so that one fails as well.
    if not (checked.error <= limit and checked.text_error <= limit):
        raise unlike(
            path,
            f"predictions differ by {checked.error:.1e} and text embeddings by {checked.text_error:.1e} of their "
            f"largest value, where {limit:.0e} is allowed",
        )
    return checked


def _reloaded(folder: Path, *, family: Family, wanted: Parts, expected: Probe, runtime: Runtime) -> Probe:
    """The answers of the model in a folder; raises `ValueError` where its tensors are not those of `wanted`."""
    from diffusers import DiffusionPipeline

    with model_folder.without_bars():
        loaded = DiffusionPipeline.from_pretrained(folder)
    for part, network in networks(family, wanted).items():
        compare(part, network.state_dict(), loaded.components[part].state_dict())
    tokenizers = [part for name, part in loaded.components.items() if name.startswith("tokenizer")]
    again = [loaded.components[part] for part in family.part_names]
    return answers(family, again, tokenizers, expected=expected, runtime=runtime)


def answers(
    family: Family, loaded: Sequence[Any], tokenizers: Sequence[Any], *, expected: Probe, runtime: Runtime
) -> Probe:
    """What a loaded denoiser and text encoders answer, computed as the trained model's answers were."""
    for network in loaded:
        network.to(runtime.device)
        if network.dtype != runtime.dtype:  # diffusers warns of every cast, needed or not
            network.to(runtime.dtype)
    fresh = Parts(denoiser=loaded[0], text_encoders=list(loaded[1:]), tokenizers=list(tokenizers))
    return probe(family, fresh, cond=expected.cond)


def compare(part: str, wanted: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Raise `ValueError` unless a loaded network has the tensors of the trained one, in name and value."""
    # diffusers loads some of the networks in float32, which changes no number of a coarser type.
    wrong = sorted(wanted.keys() ^ loaded.keys())
    wrong = wrong or [key for key, t in wanted.items() if not torch.equal(t.to(loaded[key].dtype), loaded[key])]
    if wrong:
        raise ValueError(f"{len(wrong)} tensors of {part} are not as trained (first: {wrong[0]})")


def unlike(path: Path, why: str) -> UserError:
    """The error for an export that is not the trained model."""
    return UserError(
        f"the exported model does not reload as the trained model, so it was not kept: {why}",
        where=str(path),
        fix="export with --precision fp32; the checkpoint itself is untouched",
    )


def _settle(partial: Path, path: Path) -> None:
    """Rename a finished folder into its place; an older one there is moved away first and then deleted."""
    if not path.exists():
        partial.rename(path)
    else:
        old = path.with_name(f".trash-{path.name}-{uuid.uuid4().hex[:8]}")
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)
