"""A model's name -> files on this machine: a folder, a single `.safetensors` file, or a hub id."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from gesso.errors import ResourceError, UserError


def cache_root() -> Path:
    """Where caches live: $GESSO_CACHE, else ~/.cache/gesso."""
    return Path(os.environ.get("GESSO_CACHE") or Path.home() / ".cache" / "gesso")


def locate(name: str, *, revision: str | None = None, patterns: Sequence[str] = (), key: str = "model.base") -> Path:
    """A local folder or file for `name`, fetched from the hub if it is a hub id.

    `patterns` limits what is fetched. Raises `UserError` naming `key` for a path that is not there or a
    pickle checkpoint, `ResourceError` where the hub cannot be reached and nothing is cached.
    """
    path = Path(name).expanduser()
    if path.suffix in {".ckpt", ".pt", ".pth", ".bin"}:
        raise UserError(
            f"{name} is a pickle file, which can run code when opened",
            where=key,
            fix="convert it to .safetensors first, or use a diffusers folder",
        )
    if path.exists():
        return path.resolve()
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.suffix == ".safetensors"
    if looks_local:
        raise UserError(
            f"there is no folder or file {name}",
            where=key,
            fix="give a diffusers folder, a .safetensors checkpoint or a hub id such as "
            "stabilityai/stable-diffusion-xl-base-1.0",
        )
    return _download(name, revision, patterns, key)


def _download(name: str, revision: str | None, patterns: Sequence[str], key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns) or None))
    except GatedRepoError as error:
        raise ResourceError(
            f"{name} is gated on the hub", where=key, fix="accept its terms on its page, then run: hf auth login"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name} is neither a path here nor a model on the hub",
            where=key,
            fix="check the spelling; a private model needs: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision '{revision}'", where="model.revision", fix="check it") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ResourceError(
            f"{name} is not on this machine and the hub cannot be reached",
            where=key,
            fix=f"connect once and run: hf download {name}; or give a local folder",
        ) from error


def fingerprint(paths: Sequence[Path], *, memo: Path | None = None) -> str:
    """One SHA-256 over the contents of the files, in order of their names.

    Hashes of files that did not change (path, size, mtime) are remembered in `memo`.
    """
    memo = memo or cache_root() / "hashes.json"
    known: dict[str, list[int | str]] = {}
    if memo.exists():
        try:
            known = json.loads(memo.read_text())
        except ValueError:
            known = {}
    digest, grown = hashlib.sha256(), False
    for path in sorted(paths):
        real, stat = path.resolve(), path.stat()
        entry = known.get(str(real))
        if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
            known[str(real)] = entry = [stat.st_size, stat.st_mtime_ns, file_sha256(real)]
            grown = True
        digest.update(f"{path.name}={entry[2]}\n".encode())
    if grown:
        memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = memo.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(known))
        temporary.replace(memo)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of one file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
