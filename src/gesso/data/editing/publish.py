"""A folder of captioned pictures as a data set on the Hugging Face hub, with a card. No token is read or kept here."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from gesso.core.folder import write_atomic
from gesso.data.editing.collection import Item, Library
from gesso.data.editing.journal import FOLDER
from gesso.data.editing.tables import json_line
from gesso.errors import ResourceError, UserError

Layout = Literal["auto", "imagefolder", "parquet"]

MOST_FILES = 5_000
"""Above so many pictures they are packed into Parquet: the hub takes 10,000 files a folder, and many are slow."""

_SHARD = 400 * 2**20
_ROWS = 100
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def publish(folder: Path, repo: str, *, private: bool = True, layout: Layout = "auto") -> str:
    """Lay the data set out below its hidden folder, upload it and return the page's address.

    What was laid out stays if the upload fails, so that it can be tried again. Raises as `push` does.
    """
    staging = prepare(folder, repo=repo, layout=layout)
    address = push(staging, repo, private=private)
    shutil.rmtree(staging)
    return address


def prepare(folder: Path, *, repo: str, layout: Layout = "auto") -> Path:
    """Lay out what is to be sent, in `.gesso/hub` inside the folder: pictures and captions as `datasets` reads them,
    and README.md (the folder's own, if it has one)."""
    library = Library(folder)
    packed = layout == "parquet" or (layout == "auto" and len(library.items) > MOST_FILES)
    staging = library.folder / FOLDER / "hub"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        if packed:
            _write_parquet(library.items, staging / "data")
        else:
            _write_folder(library.items, staging)
        own = library.folder / "README.md"
        text = own.read_bytes() if own.is_file() else card(library.items, repo=repo, packed=packed).encode()
        write_atomic(staging / "README.md", text)
    except OSError as error:
        raise ResourceError(
            f"the folder for the hub cannot be written ({error.strerror})", where=str(staging), fix="free space there"
        ) from error
    return staging


def push(staging: Path, repo: str, *, private: bool = True) -> str:
    """Upload a folder as a data set, creating it if need be; returns the page's address.

    Uses the login of `hf auth login` or HF_TOKEN. An existing data set keeps its visibility and its other files.
    Raises `UserError` where the hub refuses and `ResourceError` where it cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, repo_type="dataset", folder_path=staging, commit_message="Data set from gesso"
        )
    except Exception as error:  # whatever the hub's client and its network library raise
        raise _failure(error, staging, repo) from error
    return str(url)


def card(items: Sequence[Item], *, repo: str, packed: bool) -> str:
    """README.md: front matter that the hub reads, what is in it, and how to load it."""
    size = next((name for most, name in _SIZES if len(items) < most), "n>1M")
    front: dict[str, Any] = {"task_categories": ["text-to-image"], "size_categories": [size], "tags": ["gesso"]}
    if packed:
        front["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}]
    yaml, text = YAML(), io.StringIO()
    yaml.dump(front, text)
    captioned = sum(item.caption is not None for item in items)
    return (
        f"---\n{text.getvalue()}---\n\n# {repo.rpartition('/')[2]}\n\n"
        f"{len(items)} pictures, {captioned} of them with captions, for fine-tuning text-to-image models.\n\n"
        f"## Use\n\n```python\nfrom datasets import load_dataset\n\n"
        f'dataset = load_dataset({json.dumps(repo)}, split="train")\nprint(dataset[0]["text"])\n```\n\n'
        f"In a run file of gesso:\n\n```yaml\ndata:\n  sources:\n    - path: hub:{repo}\n```\n"
    )


def _write_folder(items: Sequence[Item], staging: Path) -> None:
    lines = []
    for item in items:
        target = staging / "train" / item.name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(item.picture, target)
        except OSError:
            shutil.copyfile(item.picture, target)
        lines.append(json_line(item.name, item.caption or ""))
    write_atomic(staging / "train" / "metadata.jsonl", "".join(lines).encode())


def _write_parquet(items: Sequence[Item], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    # `datasets` reads from this that the first column is a picture.
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", image), ("text", pa.string())], metadata=about)
    shards = _shards(items)
    folder.mkdir()
    for number, shard in enumerate(shards):
        with pq.ParquetWriter(folder / f"train-{number:05}-of-{len(shards):05}.parquet", schema) as writer:
            for start in range(0, len(shard), _ROWS):
                rows = [
                    {"image": {"bytes": item.picture.read_bytes(), "path": item.name}, "text": item.caption or ""}
                    for item in shard[start : start + _ROWS]
                ]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=_ROWS)


def _shards(items: Sequence[Item]) -> list[list[Item]]:
    shards: list[list[Item]] = [[]]
    size = 0
    for item in items:
        length = item.picture.stat().st_size
        if shards[-1] and size + length > _SHARD:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += length
    return shards


def _failure(error: Exception, staging: Path, repo: str) -> UserError:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    again = f"nothing is lost; try again with: hf upload --repo-type dataset {repo} {staging}"
    if isinstance(error, HFValidationError):
        return UserError(f"'{repo}' is not a repository name", where="--repo", fix="use user/name")
    if isinstance(error, LocalTokenNotFoundError):
        return UserError("not logged in to the hub", where=repo, fix=f"hf auth login; {again}")
    if isinstance(error, HfHubHTTPError):
        code = error.response.status_code
        if code in (401, 403):
            fix = f"log in with a token that may write there: hf auth login; {again}"
            return UserError(f"the hub refused the upload ({code})", where=repo, fix=fix)
        return ResourceError(f"the hub could not take the upload ({code})", where=repo, fix=again)
    return ResourceError(f"the hub cannot be reached ({type(error).__name__})", where=repo, fix=again)
