"""Trained vectors of new words -> one small file a word, and one with the LoRA that they were trained with.

A word's file holds its vectors for each text encoder, `clip_l` [n, 768] and `clip_g` [n, 1280] for SDXL, as ComfyUI and
the web UIs read them. None reaches its place before a fresh model has loaded it through diffusers and read prompts like
the trained one.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from gesso.config.run import RunConfig
from gesso.core.changes import Pair
from gesso.core.folder import sync_folder, write_atomic
from gesso.core.runtime import Precision, Runtime
from gesso.core.seams import Attached, Cond, Family, Parts
from gesso.core.tokens import NewToken
from gesso.errors import ResourceError, UserError
from gesso.export import lora
from gesso.export.about import About
from gesso.export.lora import Format
from gesso.export.proof import AGREEMENT, DTYPES, deviation

Vectors = Mapping[str, Mapping[str, Tensor]]
"""Of each token the vectors [n, width] by the key of the text encoder."""


@dataclass(frozen=True)
class Trained:
    """New words away from their networks: their vectors, and how prompts with them were read."""

    run: RunConfig
    vectors: Vectors
    expected: Cond

    @classmethod
    def of(cls, run: RunConfig, parts: Parts, adapter: Attached) -> Trained:
        """Taken from a model as it is now."""
        files = adapter.layout().split(adapter.state())
        vectors = {t.token: {k: v.to("cpu", copy=True) for k, v in files[t.file].items()} for t in run.tokens}
        return cls(run, vectors, _read(run.model, parts, run.tokens))

    def write(
        self, folder: Path, *, precision: Precision, runtime: Runtime, beside: Path | None = None
    ) -> dict[str, Path]:
        """Write `<word>.safetensors` for each word into a folder; returns the files by token.

        `beside` is the file of the LoRA that was trained with them, for the check. Raises `UserError` when a file does
        not load to the same model (nothing is left then) and `ResourceError` when it cannot be written.
        """
        partial = folder.with_name(f".partial-{folder.name}-{uuid.uuid4().hex[:8]}")
        try:
            try:
                partial.mkdir(parents=True)
                for token in self.run.tokens:
                    write_atomic(partial / f"{token.stem}.safetensors", self._file(token, DTYPES[precision]))
                self._verify(partial, DTYPES[precision], runtime, beside)
                folder.mkdir(exist_ok=True)
                written = {t.token: folder / f"{t.stem}.safetensors" for t in self.run.tokens}
                for file in written.values():
                    (partial / file.name).replace(file)
                sync_folder(folder)
            except OSError as error:
                raise _unwritten(folder, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return written

    def finish(self, folder: Path, *, runtime: Runtime) -> dict[str, Path]:
        """What a run leaves for use elsewhere: `embeddings/<word>.safetensors` in float32."""
        written = self.write(folder / "embeddings", precision="fp32", runtime=runtime)
        return {f"embedding {token}": file for token, file in written.items()}

    def _file(self, token: NewToken, dtype: torch.dtype) -> bytes:
        header = About.of(self.run).modelspec()
        header["modelspec.architecture"] = f"{self.run.model.architecture}/textual-inversion"
        header |= {"modelspec.title": token.stem, "modelspec.trigger_phrase": token.token, "token": token.token}
        tensors = {key: _cast(tensor, dtype, token) for key, tensor in self.vectors[token.token].items()}
        return lora.serialise(tensors, {"format": "pt", **header})

    def _verify(self, folder: Path, dtype: torch.dtype, runtime: Runtime, beside: Path | None) -> None:
        """Load the files as users do, one of diffusers' calls for each text encoder, and compare what is read."""
        family, coarse = self.run.model, _text_matrices(beside)
        wanted = ("text", "denoiser") if coarse else ("text",)
        fresh = family.load(wanted, dtype=runtime.dtype, device=runtime.device)
        pipeline, level = family.pipeline(fresh), logging.get_verbosity()
        logging.set_verbosity_error()  # it tells of values that it draws and that are replaced at once
        try:
            if coarse:
                pipeline.load_lora_weights(str(beside))
            for token in self.run.tokens:
                saved = load_file(folder / f"{token.stem}.safetensors")
                for key, encoder, words in zip(
                    self.vectors[token.token], fresh.text_encoders, fresh.tokenizers, strict=True
                ):
                    pipeline.load_textual_inversion(
                        saved[key], token=token.token, text_encoder=encoder, tokenizer=words
                    )
            found = _read(family, fresh, self.run.tokens)
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            raise _unlike(folder, str(error).splitlines()[0]) from error
        finally:
            logging.set_verbosity(level)
        worst = max(deviation(found[key], self.expected[key]) for key in self.expected)
        limit = max(AGREEMENT[each] for each in (dtype, runtime.dtype, *coarse))
        if not worst <= limit:  # NaN too
            raise _unlike(folder, f"prompts are read with a difference of {worst:.1e}, where {limit:.0e} is allowed")


@dataclass(frozen=True)
class WithLoRA:
    """A LoRA and the new words that were trained with it."""

    matrices: lora.Trained
    words: Trained

    def write(self, path: Path, *, format: Format, precision: Precision, runtime: Runtime) -> dict[str, Path]:
        """Write the LoRA to `path`, the words into `<its name>-embeddings` beside it, and both in one file.

        That one, `<its name>-bundled`, is written where the format is kohya, whose readers know such files.
        """
        self.matrices.write(path, format=format, precision=precision, runtime=runtime)
        folder = path.with_name(f"{path.stem}-embeddings")
        return self._words(path, folder, bundle=format == "kohya", runtime=runtime)

    def finish(self, folder: Path, *, runtime: Runtime) -> dict[str, Path]:
        """What a run leaves for use elsewhere, by what it is."""
        files = self.matrices.finish(folder, runtime=runtime)
        return files | self._words(files["LoRA"], folder / "embeddings", bundle=True, runtime=runtime)

    def _words(self, path: Path, folder: Path, *, bundle: bool, runtime: Runtime) -> dict[str, Path]:
        written = self.words.write(folder, precision="fp32", runtime=runtime, beside=path)
        found = {f"embedding {token}": file for token, file in written.items()}
        return found | ({"LoRA with embeddings": bundled(path, self.words.vectors)} if bundle else {})


def bundled(path: Path, vectors: Vectors) -> Path:
    """Copy a LoRA file with vectors of words in it, as `bundle_emb.<token>.clip_l`, to `<its name>-bundled`.

    OneTrainer's layout, which AUTOMATIC1111's webui reads too; diffusers refuses such a file.
    """
    with safe_open(str(path), framework="pt") as handle:
        header = dict(handle.metadata() or {})
    tensors = load_file(path)
    for token, encoders in vectors.items():
        tensors |= {f"bundle_emb.{token}.{key}": tensor.float() for key, tensor in encoders.items()}
    training = {k: v for k, v in header.items() if k.startswith("ss_")}
    target = path.with_name(f"{path.stem}-bundled{path.suffix}")
    try:
        write_atomic(target, lora.serialise(tensors, header | lora.hashes(tensors, training)))
    except OSError as error:
        raise _unwritten(target, error) from error
    return target


def _read(family: Family, parts: Parts, tokens: Sequence[NewToken]) -> Cond:
    """Embeddings of prompts with each word and with all of them, float32 on the CPU."""
    prompts = [*(f"a photo of {token.token}, 3/4 view" for token in tokens), " and ".join(t.token for t in tokens)]
    modes = [(module, module.training) for encoder in parts.text_encoders for module in encoder.modules()]
    try:
        for encoder in parts.text_encoders:
            encoder.eval()
        with torch.no_grad():
            return {k: v.float().cpu() for k, v in family.encode_text(parts, prompts).items()}
    finally:
        for module, mode in modes:
            module.training = mode


def _text_matrices(file: Path | None) -> set[torch.dtype]:
    """The types of a LoRA's matrices on text encoders."""
    if file is None:
        return set()
    layers = lora.read(file).layers
    text = [change for name, change in layers.items() if name.startswith(("lora_te", "text_encoder"))]
    return {change.up.dtype for change in text if isinstance(change, Pair)}


def _cast(tensor: Tensor, dtype: torch.dtype, token: NewToken) -> Tensor:
    cast = tensor.to(dtype)
    if not torch.isfinite(cast).all():
        raise UserError(
            f"the vectors of {token.token} do not fit into {dtype}".replace("torch.", ""),
            fix="export in bf16 or fp32" if torch.isfinite(tensor).all() else "use an earlier checkpoint",
        )
    return cast


def _unlike(folder: Path, why: str) -> UserError:
    return UserError(
        f"the exported embedding does not reload as the trained one, so it was not kept: {why}",
        where=str(folder),
        fix="export with --precision fp32; the checkpoint itself is untouched",
    )


def _unwritten(path: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"the embedding cannot be written ({error.strerror or error})",
        where=str(path),
        fix="free space or choose another place",
    )
