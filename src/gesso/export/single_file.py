"""A whole model -> one `.safetensors` file under SDXL's original names, as model sites and other programs take it.

No file reaches its place before diffusers has loaded it and it has answered like the trained model.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gesso.core.folder import sync_folder
from gesso.core.runtime import Precision, Runtime
from gesso.core.seams import Family, Parts
from gesso.errors import ResourceError, UserError
from gesso.export import pipeline
from gesso.export.about import About
from gesso.export.pipeline import Checked, Trained
from gesso.export.proof import DTYPES, Probe
from gesso.families import model_folder, original_names, single_file


def write(trained: Trained, path: Path, *, precision: Precision, runtime: Runtime) -> Checked:
    """`export` a fully trained model."""
    family = trained.run.model
    return export(
        path,
        model_folder.with_trained(family, trained.weights, dtype=torch.float32, device=torch.device("cpu")),
        precision=precision,
        about=About.of(trained.run),
        family=family,
        expected=trained.expected,
        runtime=runtime,
    )


def export(
    path: Path,
    parts: Parts,
    *,
    precision: Precision,
    about: About,
    family: Family,
    expected: Probe,
    runtime: Runtime,
) -> Checked:
    """Write a model whose every network is in `parts`, in float32 on the CPU, as one file; `parts` is cast on the way.

    `expected` is `probe` of the trained model. Raises `UserError` when there is something at `path`, when numbers do
    not fit into `precision`, or when what was written does not load to the same model (nothing is left then), and
    `ResourceError` when it cannot be written.
    """
    if path.suffix != ".safetensors":
        raise UserError("a model file's name must end in .safetensors", where=str(path), fix="change the output name")
    if path.exists():
        what = "something is there already"
        raise UserError(what, where=str(path), fix="remove it, or choose another place: --output")
    pipeline.cast(family, parts, DTYPES[precision])
    states = {part: network.state_dict() for part, network in pipeline.networks(family, parts).items()}
    tensors = original_names.original(states) | single_file.marks(family.pipeline(parts).scheduler.config)
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, about.modelspec(whole=True) | {"format": "pt"})
        _sort_header(partial)
        sync_folder(partial)  # a file is opened and synced like a folder
        del tensors
        found = _verify(partial, family=family, wanted=parts, expected=expected, runtime=runtime)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise ResourceError(
            f"the model's file cannot be written ({error.strerror or error})",
            where=str(path),
            fix="free space or choose another place",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return found


def _sort_header(file: Path) -> None:
    """Put the metadata of a file in order: the library writes it in a random one, and equal files should be equal."""
    with file.open("r+b") as handle:
        size = int.from_bytes(handle.read(8), "little")
        header: dict[str, Any] = json.loads(handle.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        handle.seek(8)
        handle.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def _verify(file: Path, *, family: Family, wanted: Parts, expected: Probe, runtime: Runtime) -> Checked:
    """Load the file as a user would; every tensor must be there, and the answers those of the trained model."""
    networks = pipeline.networks(family, wanted)
    try:
        with tempfile.TemporaryDirectory() as configs:
            _write_configs(Path(configs), family, wanted, networks)
            single_file.check(file, list(networks))
            dtype = wanted.denoiser.dtype
            loaded = {p: single_file.read(file, p, config=Path(configs), dtype=dtype) for p in networks}
        for part, network in networks.items():
            pipeline.compare(part, network.state_dict(), loaded[part].state_dict())
        again = [loaded[part] for part in family.part_names]
        found = pipeline.answers(family, again, wanted.tokenizers, expected=expected, runtime=runtime)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the libraries raise whatever a damaged file makes them raise
        raise pipeline.unlike(file, (str(error).strip() or type(error).__name__).splitlines()[0]) from error
    return pipeline.agreed(file, found, expected, coarsest=(runtime.dtype, dtype))


def _write_configs(folder: Path, family: Family, parts: Parts, networks: Mapping[str, Any]) -> None:
    """The configurations without which one file is no model: that of the pipeline, and one of each network."""
    with model_folder.without_bars():
        family.pipeline(parts).save_config(folder)
        for part, network in networks.items():
            if part in family.part_names[1:]:
                network.config.save_pretrained(folder / part)
            else:
                network.save_config(folder / part)
