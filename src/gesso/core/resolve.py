"""A model's name -> files on this machine: a folder, a single `.safetensors` file, a hub id, or a packaged model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from gesso.core.folder import write_json
from gesso.errors import ResourceError, UserError

PACKAGED = "micro:"
"""What the names of the models in the package begin with."""


def cache_root() -> Path:
    """Where caches live: $GESSO_CACHE, else ~/.cache/gesso."""
    return Path(os.environ.get("GESSO_CACHE") or "~/.cache/gesso").expanduser()


def locate(name: str, *, revision: str | None = None, patterns: Sequence[str] = (), key: str = "model.base") -> Path:
    """A local folder or file for `name`, fetched from the hub if it is a hub id; `micro:...` is in the package.

    `patterns` limits what is fetched. Raises `UserError` naming `key` for a path that is not there or a
    pickle checkpoint, `ResourceError` where the hub cannot be reached and nothing is cached.
    """
    if name.startswith(PACKAGED):
        return _packaged(name, key)
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


def _packaged(name: str, key: str) -> Path:
    folder = Path(__file__).parents[1] / "micro" / "weights"
    found = folder / name.removeprefix(PACKAGED)
    if found.parent != folder or not found.is_dir():
        known = ", ".join(f"{PACKAGED}{path.name}" for path in sorted(folder.glob("*/")))
        raise UserError(f"the package holds no model {name}", where=key, fix=f"it holds {known}")
    return found


def _download(name: str, revision: str | None, patterns: Sequence[str], key: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns) or None))
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
        raise UserError(
            f"{name} has no revision '{revision}'",
            where="model.revision",
            fix="give a branch, tag or commit of that model, or leave it out for the newest",
        ) from error
    except Exception as error:  # by release and route: OSError, httpx's, Xet's, RuntimeError
        raise _not_fetched(name, error, key) from error
    if not folder.is_dir():
        raise UserError(
            f"{name} on the hub holds none of the files that are needed", where=key, fix="look at its files there"
        )
    return folder


def _not_fetched(name: str, error: Exception, key: str) -> ResourceError:
    """Why a hub model could not be brought here."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    answers = [e for e in (error, error.__cause__) if isinstance(e, HfHubHTTPError)]
    if isinstance(error, OSError) and error.errno is not None and not answers:
        return ResourceError(
            f"{name} cannot be stored on this machine ({error.strerror})",
            where=str(error.filename or constants.HF_HUB_CACHE),
            fix="free space or permissions there, or set HF_HOME to another folder",
        )
    if constants.HF_HUB_OFFLINE:
        return ResourceError(
            f"{name} is not wholly on this machine, and HF_HUB_OFFLINE forbids fetching it",
            where=key,
            fix="start once without HF_HUB_OFFLINE, or give a local folder",
        )
    if answers:
        said = f"the hub answered {answers[0].response.status_code}"
        fix = "try again later; a private model needs: hf auth login"
    else:
        lines = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        said = f"fetching it failed: {lines[0]}"
        fix = "start again when the hub can be reached (what is here is kept), or give a local folder"
    return ResourceError(f"{name} is not wholly on this machine, and {said}", where=key, fix=fix)


def fingerprint(paths: Sequence[Path], *, memo: Path | None = None) -> str:
    """One SHA-256 over the names and contents of the files, in the order given, wherever they are.

    Hashes of files that did not change (path, size, times, inode) are remembered in `memo`; without it, as where it
    cannot be read or written, the answer is the same and takes longer.
    """
    memo = memo or cache_root() / "hashes.json"
    known = _remembered(memo)
    digest, grown = hashlib.sha256(), False
    for path in dict.fromkeys(paths):
        real, stat = path.resolve(), path.stat()
        entry = known.get(str(real))
        stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if entry is None or entry[:-1] != stamp:
            known[str(real)] = entry = [*stamp, file_sha256(real)]
            grown = True
        digest.update(f"{path.name}={entry[-1]}\n".encode())
    if grown:
        with suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_json(memo, known, durable=False)
    return digest.hexdigest()


def _remembered(memo: Path) -> dict[str, list[int | str]]:
    try:
        known = json.loads(memo.read_text())
    except (OSError, ValueError):
        return {}
    entries = known.items() if isinstance(known, dict) else ()
    return {path: entry for path, entry in entries if isinstance(entry, list) and len(entry) == 5}


def file_sha256(path: Path) -> str:
    """SHA-256 of one file's bytes, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
