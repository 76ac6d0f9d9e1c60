"""Data sets of Hugging Face: saved to a disk, read by `datasets` from a folder, and from a stand-in for the hub."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import solid
from source_helpers import BLUE, RED, colours, found, jsonl, png, problems

from gesso.data.places import Place
from gesso.data.sources import hub
from gesso.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    yield
    hub.open_dataset.cache_clear()


def dataset(cells: list[object], **columns: list[Any]) -> datasets.Dataset:
    features: dict[str, Any] = {"image": datasets.Image()}
    for name, values in columns.items():
        sample = values[0]
        features[name] = [datasets.Value("string")] if isinstance(sample, list) else datasets.Value("string")
    return datasets.Dataset.from_dict({"image": cells, **columns}, features=datasets.Features(features))


def cell(colour: str) -> dict[str, object]:
    return {"bytes": png(colour), "path": None}


class TestSaved:
    def test_rows_with_their_pictures(self, tmp_path: Path) -> None:
        dataset([cell("red"), cell("blue")], text=["r", "b"]).save_to_disk(tmp_path / "set")
        rows = found(tmp_path / "set")
        assert colours(rows) == {"r": RED, "b": BLUE}
        assert rows[1].place == Place(f"{tmp_path}/set#train", "dataset", "image", 1)

    def test_splits(self, tmp_path: Path) -> None:
        both = {name: dataset([cell("red")], caption=[name]) for name in ("train", "test")}
        datasets.DatasetDict(both).save_to_disk(tmp_path / "set")
        assert [r.caption for r in found(tmp_path / "set")] == ["train"]
        assert [r.caption for r in found(tmp_path / "set", split="test")] == ["test"]
        assert "no split 'val'; the splits are: train, test" in problems(tmp_path / "set", split="val")

    def test_lists_of_captions_and_classes(self, tmp_path: Path) -> None:
        dataset([cell("red")], captions=[["one", "two"]]).save_to_disk(tmp_path / "lists")
        assert [r.caption for r in found(tmp_path / "lists")] == ["one\ntwo"]
        labelled = datasets.Dataset.from_dict(
            {"image": [cell("red")], "label": [1]},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}),
        )
        labelled.save_to_disk(tmp_path / "classes")
        assert [r.caption for r in found(tmp_path / "classes", caption_column="label")] == ["dog"]
        assert "no caption column" in problems(tmp_path / "classes")

    def test_columns_that_are_not_there(self, tmp_path: Path) -> None:
        dataset([cell("red")], words=["x"]).save_to_disk(tmp_path / "set")
        assert "no caption column" in problems(tmp_path / "set")
        assert "the columns are: image, words" in problems(tmp_path / "set")
        assert [r.caption for r in found(tmp_path / "set", caption_column="words")] == ["x"]
        assert "the column 'pic' is not there" in problems(tmp_path / "set", image_column="pic")
        assert "there is no column 'texts'" in problems(tmp_path / "set", caption_column="texts")

    def test_paths_out_of_it_are_not_followed(self, tmp_path: Path) -> None:
        secret = str(solid(tmp_path / "secret.png"))
        table = pa.table(
            {"image": [{"bytes": png(), "path": None}, {"bytes": None, "path": secret}], "text": ["a", "b"]}
        )
        folder = tmp_path / "set"
        dataset([cell("red")], text=["r"]).save_to_disk(folder)
        [arrow] = folder.glob("*.arrow")
        info = json.loads((folder / "dataset_info.json").read_text())
        metadata = {"huggingface": json.dumps({"info": {"features": info["features"]}})}
        with pa.OSFile(str(arrow), "wb") as sink, pa.ipc.new_stream(sink, table.schema.with_metadata(metadata)) as out:
            out.write_table(table)
        assert f"1 row of 2 has no picture in 'image': row 2 (only the path '{secret}')" in problems(folder)
        with pytest.raises(UserError, match="not followed"):
            Place(f"{folder}#train", "dataset", "image", 1).read()

    def test_masks_beside_rows_do_not_exist(self, tmp_path: Path) -> None:
        dataset([cell("red")], text=["r"]).save_to_disk(tmp_path / "set")
        assert "data sets have no mask files" in problems(tmp_path / "set", mask="file")


class TestThroughDatasets:
    def test_an_image_folder(self, tmp_path: Path) -> None:
        solid(tmp_path / "set" / "a.png", colour="blue")
        jsonl(tmp_path / "set", {"file_name": "a.png", "text": "b"})
        rows = found(tmp_path / "set", layout="dataset")
        assert rows[0].place.kind == "dataset"
        assert colours(rows) == {"b": BLUE}

    def test_a_folder_of_parquet(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        dataset([cell("red")], text=["r"]).to_parquet(tmp_path / "set" / "train.parquet")
        assert colours(found(tmp_path / "set", layout="dataset")) == {"r": RED}
        assert colours(found(tmp_path / "set")) == {"r": RED}

    def test_a_folder_that_it_cannot_read(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        assert f"{tmp_path}/set: the data set cannot be read" in problems(tmp_path / "set", layout="dataset")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:someone/dogs", ("someone/dogs", None, None)),
        ("hub:someone/dogs@v1.0", ("someone/dogs", "v1.0", None)),
        ("hub:someone/dogs/small", ("someone/dogs", None, "small")),
        ("hub:someone/dogs@refs/pr/1/small", ("someone/dogs", "refs/pr/1", "small")),
        ("hub:some-one/dogs.v2@abc/1024 px", ("some-one/dogs.v2", "abc", "1024 px")),
    ],
)
def test_names_of_the_hub(text: str, expected: tuple[str, str | None, str | None]) -> None:
    assert hub.parse(text) == expected


@pytest.mark.parametrize("text", ["hub:", "hub:dogs", "hub:../etc/passwd", "hub:a/b@", "hub:a/b/c/d", "hub:/a/b"])
def test_what_is_no_name_of_the_hub(text: str) -> None:
    assert "write hub:OWNER/NAME" in problems(text)


def test_a_local_folder_of_the_same_name_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "someone" / "dogs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "a local folder is called someone/dogs, too" in problems("hub:someone/dogs")


@dataclass
class Hub:
    """Data sets, the status with which those of `refused` are answered, and what was asked."""

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """The endpoints that `load_dataset` uses."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(b"")

    def do_GET(self) -> None:
        self.answer(b"")

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def answer(self, sent: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        files = self.hub.repos.get(repo)
        if files is None or repo in self.hub.refused:
            status = self.hub.refused.get(repo, 404)
            self.send(status, b"", {"X-Error-Code": "GatedRepo" if status == 403 else "RepoNotFound"})
        elif rest[:1] == ["resolve"] and "/".join(rest[2:]) in files:
            data = files["/".join(rest[2:])]
            self.send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{git(data)}"'})
        elif path.startswith("/api") and rest[:1] in ([], ["revision"]):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self.send(200, json.dumps(info | {"siblings": siblings}).encode(), {})
        elif rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            inside = {name: data for name, data in files.items() if name.startswith(folder)}
            if folder and not inside:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
            else:
                listed = [entry(name, data) for name, data in inside.items() if "/" not in name[len(folder) :]]
                deeper = {name[len(folder) :].partition("/")[0] for name in inside if "/" in name[len(folder) :]}
                folders = [{"type": "directory", "path": folder + name, "oid": git(b"")} for name in sorted(deeper)]
                self.send(200, json.dumps(listed + folders).encode(), {})
        elif rest[:1] == ["paths-info"]:
            asked = json.loads(sent)["paths"] if sent[:1] == b"{" else []
            self.send(200, json.dumps([entry(n, files[n]) for n in asked if n in files]).encode(), {})
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": git(content)}


@pytest.fixture
def server() -> Iterator[Hub]:
    state = Hub()
    table = io.BytesIO()
    features = {"info": {"features": {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}}}
    rows = pa.table({"image": [{"bytes": png("red"), "path": "a.png"}], "text": ["r"]})
    pq.write_table(rows.replace_schema_metadata({"huggingface": json.dumps(features)}), table)
    lines = b'{"file_name": "a.png", "text": "b"}\n'
    state.repos = {
        "someone/dogs": {"data/train-00000-of-00001.parquet": table.getvalue(), "README.md": b"# Dogs"},
        "someone/folder": {"a.png": png("blue"), "metadata.jsonl": lines},
    }
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.address = f"http://127.0.0.1:{http.server_port}"
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield state
    http.shutdown()
    http.server_close()


SCRIPT = """
import json, sys
sys.path.insert(0, "HELPERS")
from source_helpers import look, colours
out = []
for path, fields in json.loads(sys.argv[1]):
    seen = look(path, **fields)
    out.append({"colours": colours(seen.records), "problems": ["\\n".join(p.lines()) for p in seen.problems]})
print(json.dumps(out))
"""


def ask(folder: Path, *sources: tuple[str, dict[str, object]], **environment: str) -> list[dict[str, Any]]:
    """What a fresh process finds: the hub's address is read once, when its library is imported."""
    script = SCRIPT.replace("HELPERS", str(Path(__file__).parent))
    own = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own |= {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(sources)], env=own, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_data_sets_of_the_hub_with_and_without_it(tmp_path: Path, server: Hub) -> None:
    server.repos["someone/gated"] = server.repos["someone/dogs"]
    server.refused["someone/gated"] = 403
    sources = [(f"hub:someone/{name}", {}) for name in ("dogs", "folder", "nothing", "gated")]
    sources.append(("someone/dogs", {"layout": "dataset"}))
    dogs, folder, nothing, gated, plain = ask(tmp_path, *sources, HF_ENDPOINT=server.address)
    assert dogs == plain == {"colours": {"r": list(RED)}, "problems": []}
    assert folder == {"colours": {"b": list(BLUE)}, "problems": []}
    assert f"check the name; the hub that is asked is HF_ENDPOINT={server.address}" in nothing["problems"][0]
    assert "log in (hf auth login)" in gated["problems"][0]

    asked = len(server.asked)
    offline = ask(tmp_path, sources[0], sources[2], HF_ENDPOINT=server.address, HF_HUB_OFFLINE="1")
    assert len(server.asked) == asked, "nothing is asked without a connection"
    assert offline[0] == dogs, "what is in the cache is read"
    assert "it is not in the cache, and HF_HUB_OFFLINE is set" in offline[1]["problems"][0]
