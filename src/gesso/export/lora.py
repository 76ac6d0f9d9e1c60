"""Trained adapters -> a file for diffusers, or for kohya's tools, ComfyUI and the web UIs.

No file reaches its place before a fresh base model has loaded it and answered like the trained one: through diffusers
where that reads the kind, and by the published formulas where it does not (LoHa, LoKr).
"""

from __future__ import annotations

import io
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from gesso.adapters import OFT, LoRA
from gesso.config.run import RunConfig
from gesso.core.changes import Change, Pair, Rotation
from gesso.core.folder import WEIGHTS, sync_folder, write_atomic
from gesso.core.runtime import Precision, Runtime
from gesso.core.seams import Adapter, Attached, Family, Parts
from gesso.errors import ResourceError, UserError
from gesso.export import kohya_tensors
from gesso.export.about import About
from gesso.export.proof import AGREEMENT, DTYPES, Probe, deviation, probe
from gesso.families import lora_file, lora_names
from gesso.families.lora_file import Format, LoRAFile, read

__all__ = [
    "About",
    "Format",
    "LoRAFile",
    "Probe",
    "Verified",
    "convert",
    "export",
    "probe",
    "read",
    "suited",
    "taken",
    "verify",
]

_ROUNDING = {torch.float32: (1e-6, 0.0), torch.float16: (2.0**-10, 2.0**-24), torch.bfloat16: (2.0**-8, 0.0)}
"""Relative and absolute change that a cast to each dtype may bring; fp16 loses small numbers absolutely."""


@dataclass(frozen=True)
class Verified:
    """What a check of a written file found.

    `text_error` and `error` are the largest deviations of embeddings and prediction from the trained model's, and
    `effect` that of the base model without the LoRA, each relative to the largest value.
    """

    layers: int
    text_error: float
    error: float
    effect: float


@dataclass(frozen=True)
class Trained:
    """A trained adapter away from its networks, and how the model answered with it in place."""

    run: RunConfig
    file: LoRAFile
    expected: Probe

    @classmethod
    def of(cls, run: RunConfig, parts: Parts, adapter: Attached) -> Trained:
        """Taken from a model as it is now."""
        return cls(run, taken(adapter), probe(run.model, parts))

    def write(self, path: Path, *, format: Format, precision: Precision, runtime: Runtime) -> Verified:
        """`export` it."""
        return export(
            path,
            self.file,
            format=format,
            precision=precision,
            about=About.of(self.run),
            family=self.run.model,
            expected=self.expected,
            runtime=runtime,
        )

    def finish(self, folder: Path, *, runtime: Runtime) -> dict[str, Path]:
        """What a run leaves for use elsewhere, by what it is: the file for web UIs, where they read such adapters."""
        if "OFT" in self.file.kinds:
            return {}
        path = folder / f"{self.run.name}.safetensors"
        self.write(path, format="kohya", precision="fp16", runtime=runtime)
        return {" and ".join(sorted(self.file.kinds)): path}


def suited(adapter: Adapter) -> Literal["diffusers", "kohya", "merged"]:
    """The format for a kind of adapter that is read by most: diffusers' where that has names for it."""
    if isinstance(adapter, OFT):
        return "merged"
    lora = isinstance(adapter, LoRA) and not (adapter.dora and adapter.train_text_encoders)
    return "diffusers" if lora else "kohya"


def taken(adapter: Attached) -> LoRAFile:
    """What an adapter in place does, as if read from a file in diffusers' names; copied to the main memory."""
    changes = {name: change.to("cpu") for name, change in adapter.changes().items()}
    return LoRAFile(Path("the trained adapter"), "diffusers", changes, adapter.layout().headers.get(WEIGHTS, {}))


def export(
    path: Path,
    trained: LoRAFile,
    *,
    format: Format,
    precision: Precision,
    about: About,
    family: Family,
    expected: Probe,
    runtime: Runtime,
    fold_alpha: bool = False,
) -> Verified:
    """Write a trained adapter as a LoRA file, checked before it is in place.

    `expected` is `probe` of the trained model, in the same runtime. `fold_alpha` multiplies alpha / rank into the
    weights of a diffusers file, for readers that know no alpha. Raises `UserError` when the format has no names for
    this kind of adapter or the file does not load to the same model (nothing is left then), and `ResourceError` when
    it cannot be written.
    """
    if path.suffix != ".safetensors":
        raise UserError("a LoRA file's name must end in .safetensors", where=str(path), fix="change the output name")
    parts = family.load(("denoiser", "text"), dtype=runtime.dtype, device=runtime.device)
    modules = lora_names.modules(_networks(family, parts))
    tensors, metadata = convert(
        trained, format=format, dtype=DTYPES[precision], modules=modules, about=about, fold_alpha=fold_alpha
    )
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.safetensors")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(temporary, serialise(tensors, metadata))
    try:
        report = verify(temporary, trained=trained, family=family, fresh=parts, expected=expected)
        with _writing(path):
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    return report


def convert(
    trained: LoRAFile,
    *,
    format: Format,
    dtype: torch.dtype,
    modules: lora_names.Modules,
    about: About,
    fold_alpha: bool = False,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a LoRA file; raises `UserError` for layers not in `modules` or numbers beyond `dtype`."""
    changes = trained.match(modules)
    header = about.modelspec()
    tensors: dict[str, Tensor] = {}
    if format == "diffusers":
        for layer, change in changes.items():
            if not isinstance(change, Pair):
                other = "merged" if isinstance(change, Rotation) else "kohya"
                raise _unnamed(change, "diffusers'", f"--format {other}")
            if change.magnitude is not None and not layer.startswith("unet."):
                raise _unnamed(change, "diffusers'", "--format kohya", of=" of text encoders")
            ready = lora_file.folded(change) if fold_alpha else change
            tensors |= {f"{layer}.{k}": _cast(t, dtype, layer) for k, t in kohya_tensors.diffusers(ready).items()}
        settings = trained.metadata.get("lora_adapter_metadata")
        if settings:
            header["lora_adapter_metadata"] = _without_alpha(settings) if fold_alpha else settings
        return tensors, {"format": "pt", **header}
    names = lora_names.kohya(modules)
    changes = kohya_tensors.of_one_alpha(changes)
    for layer, change in changes.items():
        if isinstance(change, Rotation):
            raise _unnamed(change, "kohya's", "--format merged")
        matrices, alpha = kohya_tensors.kohya(change)
        tensors |= {f"{names[layer]}.{k}": _cast(t, dtype, layer) for k, t in matrices.items()}
        tensors[f"{names[layer]}.alpha"] = _alpha(alpha, dtype)
    training = about.kohya(kohya_tensors.network(changes.values()))
    return tensors, {**training, **header, **hashes(tensors, training)}


def _unnamed(change: Change, format: str, instead: str, *, of: str = "") -> UserError:
    what = f"{format} format has no names for {change.kind}{of} that are read"
    return UserError(what, where="--format", fix=f"export with {instead}")


def serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content alone: the library writes header keys in random order."""
    raw = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    start = 8 + int.from_bytes(raw[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(raw[8:start])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[start:]


def hashes(tensors: Mapping[str, Tensor], training: Mapping[str, str]) -> dict[str, str]:
    """The two hashes by which web UIs know a LoRA: of the data, and of 64 KiB at 1 MiB with only `ss_` header keys."""
    file = serialise(tensors, {k: v for k, v in training.items() if k.startswith("ss_")})
    data = file[8 + int.from_bytes(file[:8], "little") :]
    window = io.BytesIO(file).getbuffer()[0x100000 : 0x100000 + 0x10000]
    return {"sshs_model_hash": sha256(data).hexdigest(), "sshs_legacy_hash": sha256(window).hexdigest()[:8]}


def verify(path: Path, *, trained: LoRAFile, family: Family, fresh: Parts, expected: Probe) -> Verified:
    """Load a written file into fresh base networks as a user would, and compare with the trained model.

    Every layer must be there with its weights and strength, and embeddings and prediction must agree within what the
    dtypes allow. On any difference the file is deleted and `UserError` raised. `fresh` keeps the LoRA afterwards.
    """
    base = probe(family, fresh, cond=expected.cond)
    try:
        coarsest = _coarsest(path, fresh)
        networks = _networks(family, fresh)
        file = read(path)
        wanted, found = (one.match(lora_names.modules(networks)) for one in (trained, file))
        # diffusers loses the norms of a DoRA in kohya's names.
        if trained.kinds == {"LoRA"} or (file.kinds == {"DoRA"} and file.format == "diffusers"):
            # It also overlooks some strengths (alphas that differ between a text encoder's layers), so read it twice.
            _compare_layers(wanted, found, coarsest)
            found = _through_diffusers(path, family, fresh)
            _compare_layers(wanted, found, coarsest)
        else:
            _compare_weights(wanted, found, networks, coarsest[0])
            lora_names.merge(networks, found)
        again = probe(family, fresh, cond=expected.cond)
        report = Verified(
            layers=len(found),
            text_error=max(deviation(again.text[k], expected.text[k]) for k in expected.text),
            error=deviation(again.prediction, expected.prediction),
            effect=deviation(base.prediction, expected.prediction),
        )
        limit = AGREEMENT[coarsest[0]]
        if not (report.error <= limit and report.text_error <= limit):
            raise _Mismatch(
                f"predictions differ by {report.error:.1e} and text embeddings by {report.text_error:.1e} of their "
                f"largest value, where {limit:.0e} is allowed"
            )
    except (_Mismatch, UserError, ValueError, RuntimeError, KeyError, IndexError, TypeError) as error:
        path.unlink(missing_ok=True)
        raise UserError(
            f"the exported LoRA does not reload as the trained model, so it was not kept: {str(error).splitlines()[0]}",
            where=str(path),
            fix="export in fp32 or in the other format; the checkpoint itself is untouched",
        ) from error
    return report


class _Mismatch(Exception):
    """A reloaded file differs from the trained model."""


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"the LoRA file cannot be written ({error.strerror})",
            where=str(path),
            fix="free space or choose another place",
        ) from error


def _networks(family: Family, parts: Parts) -> dict[str, Any]:
    return dict(zip(family.part_names, [parts.denoiser, *parts.text_encoders], strict=False))


def _through_diffusers(path: Path, family: Family, parts: Parts) -> dict[str, Change]:
    """Load a file into networks through diffusers, and read the layers that it and peft put in place."""
    from diffusers.utils import logging
    from peft.tuners.lora import LoraLayer

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        family.pipeline(parts).load_lora_weights(str(path), adapter_name="export")
    finally:
        logging.set_verbosity(level)
    found: dict[str, Change] = {}
    for part, network in _networks(family, parts).items():
        layers: Any = network.named_modules()
        for name, layer in layers:
            if isinstance(layer, LoraLayer) and "export" in layer.lora_A:
                a: Any = layer.lora_A["export"]
                b: Any = layer.lora_B["export"]
                norms = layer.lora_magnitude_vector["export"].weight.detach() if layer.lora_magnitude_vector else None
                pair = Pair(a.weight.detach(), b.weight.detach(), layer.scaling["export"], norms)
                found[lora_names.canonical(part, name)] = pair
    return found


def _compare_layers(trained: Mapping[str, Change], loaded: Mapping[str, Change], coarsest: list[torch.dtype]) -> None:
    _compare_names(trained, loaded)
    relative = sum(_ROUNDING[dtype][0] for dtype in coarsest)
    absolute = sum(_ROUNDING[dtype][1] for dtype in coarsest)
    for name, pair in trained.items():
        other = loaded[name]
        assert isinstance(pair, Pair)
        assert isinstance(other, Pair)
        sides = [("down", pair.down, other.down), ("up", pair.scale * pair.up.float(), other.scale * other.up.float())]
        if pair.magnitude is not None:
            norms = other.magnitude if other.magnitude is not None else torch.zeros(1)
            sides.append(("norms", pair.magnitude.flatten(), norms.flatten()))
        for side, wanted, got in sides:
            slack = absolute * max(pair.scale, other.scale, 1.0)
            own, theirs = wanted.float().cpu(), got.float().cpu()
            if own.shape != theirs.shape or not torch.allclose(theirs, own, rtol=relative, atol=slack):
                raise _Mismatch(f"the weights or the strength of {name} changed ({side})")


def _compare_weights(
    trained: Mapping[str, Change], loaded: Mapping[str, Change], networks: Mapping[str, Any], coarsest: torch.dtype
) -> None:
    """What both make of each weight; the difference may be as large in relation to the change as the dtype allows."""
    _compare_names(trained, loaded)
    for name, weight in lora_names.weights(networks).items():
        if name not in trained:
            continue
        base = weight.detach().float().cpu()
        own, theirs = (changes[name].applied(base) for changes in (trained, loaded))
        # The norms of DoRA are those of whole weights, and so is what rounding them does.
        rounding = _ROUNDING[coarsest][0] * own.norm() if trained[name].kind == "DoRA" else 0.0
        if not (own - theirs).norm() <= AGREEMENT[coarsest] * (own - base).norm() + rounding:
            raise _Mismatch(f"the change of {name} is another one")


def _compare_names(trained: Mapping[str, Change], loaded: Mapping[str, Change]) -> None:
    missing, unexpected = sorted(trained.keys() - loaded.keys()), sorted(loaded.keys() - trained.keys())
    if missing or unexpected:
        raise _Mismatch(
            f"{len(missing)} layers are missing and {len(unexpected)} unexpected (first: {(missing + unexpected)[0]})"
        )


def _coarsest(path: Path, parts: Parts) -> list[torch.dtype]:
    """The dtypes of the file and of the model it was loaded into, the coarser first."""
    assert parts.denoiser is not None
    largest = max(load_file(path).values(), key=lambda tensor: tensor.numel())
    dtypes = [largest.dtype, next(parts.denoiser.parameters()).dtype]
    return sorted(dtypes, key=lambda dtype: -AGREEMENT[dtype])


def _cast(tensor: Tensor, dtype: torch.dtype, layer: str) -> Tensor:
    cast = tensor.detach().cpu().to(dtype)
    if not torch.isfinite(cast).all():
        raise UserError(
            f"the trained weights of {layer} do not fit into {dtype}".replace("torch.", ""),
            fix="export in bf16 or fp32" if torch.isfinite(tensor).all() else "use an earlier checkpoint",
        )
    return cast


def _alpha(alpha: float, dtype: torch.dtype) -> Tensor:
    """kohya's 0-d alpha in the file's dtype, or in float32 where that would change it."""
    exact = torch.tensor(alpha, dtype=torch.float32)
    return exact.to(dtype) if exact.to(dtype).float() == exact else exact


def _without_alpha(settings: str) -> str:
    """peft's settings with alpha = rank everywhere."""
    content = json.loads(settings)
    for part in {key.split(".")[0] for key in content}:
        content[f"{part}.lora_alpha"] = content[f"{part}.r"]
        content[f"{part}.alpha_pattern"] = content.get(f"{part}.rank_pattern", {})
        content[f"{part}.use_rslora"] = False
    return json.dumps(content, indent=2, sort_keys=True)
