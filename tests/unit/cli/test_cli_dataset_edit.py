"""The commands that change data sets: what they print, ask and refuse, and that undo takes each back."""

from __future__ import annotations

import base64
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

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from gesso.cli import dataset_edit
from gesso.errors import UserError

TOKEN = "hf_secretsecretsecretsecretsecretsecret"

app = typer.Typer(rich_markup_mode=None)
for name in ("metadata", "dedupe", "split", "caption_edit", "caption", "push", "undo"):
    app.command(name.replace("_", "-"))(vars(dataset_edit)[name])


def call(*arguments: object, code: int = 0) -> str:
    """What a command prints; with an exit code other than 0, its error."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if isinstance(result.exception, UserError):
        assert result.exception.exit_code == code, result.exception
        return result.output + str(result.exception)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my set"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"a cat, number {i}")
    return folder


def state(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".gesso" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_metadata(folder: Path) -> None:
    output = folder.parent / "metadata.jsonl"
    said = call("metadata", folder, "--instance_prompt", "a photo of sks aldar", "--output", output)
    assert said.splitlines() == [f"{output}: 6 pictures, 3 of them with the captions they had"]
    first, *_, last = (json.loads(line) for line in output.read_text().splitlines())
    assert first == {"file_name": "my set/0.png", "text": "a cat, number 0"}
    assert last == {"file_name": "my set/5.png", "text": "a photo of sks aldar"}
    assert "--replace" in call("metadata", folder, "--prompt", "x", "--output", output, code=2)
    assert "--prompt" in call("metadata", folder, code=2)
    call("undo", folder.parent)
    assert not output.exists()


def test_dedupe(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "0.png").read_bytes())
    before = state(folder)
    said = call("dedupe", folder, "--dry-run")
    assert "0.png stays; the same: copy.png" in said
    assert "1 of 7 pictures are duplicates; nothing was changed" in said
    assert state(folder) == before
    said = call("dedupe", folder)
    assert "1 of 7 pictures were taken away" in said
    assert f"gesso dataset undo '{folder}'" in said
    assert set(before) - set(state(folder)) == {"copy.png"}
    assert call("dedupe", folder).splitlines()[-1] == "0 of 6 pictures are duplicates"
    assert "taken back: gesso dataset dedupe" in call("undo", folder)
    assert state(folder) == before


def test_split(folder: Path, tmp_path: Path) -> None:
    before, output = state(folder), tmp_path / "val"
    said = call("split", folder, "--validation", "0.4", "--output", output, "--dry-run")
    *names, last = [line for line in said.splitlines() if line]
    assert last == f"{len(names)} of 6 pictures would go to {output}"
    said = call("split", folder, "--validation", "0.4", "--output", output)
    assert f"{len(names)} of 6 pictures were moved to {output}" in said
    assert {name for name in state(output) if name.endswith(".png")} == set(names)
    assert "--also" in call("undo", folder, code=2)
    call("undo", folder, "--also", output)
    assert state(folder) == before
    assert "no share" in call("split", folder, "--validation", "1.5", "--output", output, code=2)


def test_caption_edit_shows_and_asks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(folder)
    change = ("caption-edit", folder, "--find", "cat", "--replace", "dog")
    said = call(*change, "--show", 2, "--dry-run")
    assert said == (
        "0.png\n  - a cat, number 0\n  + a dog, number 0\n1.png\n  - a cat, number 1\n  + a dog, number 1\n"
        "3 of 3 captions change; 3 pictures have none\n"
    )
    assert "add --yes" in call(*change, code=2)
    assert state(folder) == before
    monkeypatch.setattr(typer, "confirm", lambda question: answers.pop(0))
    monkeypatch.setattr(dataset_edit, "_is_terminal", lambda: True)
    answers = [False, True]
    assert "nothing was changed" in call(*change)
    assert state(folder) == before
    call(*change)
    assert (folder / "2.txt").read_text() == "a dog, number 2"
    call("undo", folder)
    assert state(folder) == before
    call("undo", folder, "--redo")
    assert (folder / "2.txt").read_text() == "a dog, number 2"


def test_caption_edit_marks_what_differs_in_colour(folder: Path) -> None:
    arguments = ["caption-edit", str(folder), "--find", "cat", "--replace", "dog", "--show", "1", "--dry-run"]
    said = CliRunner().invoke(app, arguments, color=True).output
    assert "  - a \x1b[31m\x1b[9mcat\x1b[0m, number 0" in said
    assert "  + a \x1b[32m\x1b[1mdog\x1b[0m, number 0" in said


def test_caption_edit_options_reach_the_captions(folder: Path) -> None:
    call("caption-edit", folder, "--add-tag", "new", "--add-tag", "Other", "--remove-tag", "number 1", "--yes")
    assert (folder / "0.txt").read_text() == "a cat, number 0, new, Other"
    assert (folder / "1.txt").read_text() == "a cat, new, Other"
    call("caption-edit", folder, "--find", r"number (\d)", "--replace", r"\1", "--regex", "--lower", "-y")
    assert (folder / "2.txt").read_text() == "a cat, 2, new, other"
    (folder / "list.csv").write_text("file_name,text\n0.png,CAT\n")
    call("caption-edit", folder, "--metadata", "list.csv", "--prepend", "sks ", "--unique", "-y")
    assert (folder / "list.csv").read_text() == "file_name,text\n0.png,sks CAT\n"
    assert "nothing to change" in call("caption-edit", folder, code=2)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A captioner of one's own: it says how red a picture is, and does not like 120."""
    (tmp_path / "red_captions.py").write_text(
        "def red(picture):\n    value = picture.getpixel((0, 0))[0]\n"
        "    assert value != 120\n    return f'red {value}'\n\n\n"
        "def never(picture):\n    raise ValueError('no')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_caption(folder: Path, own: Path) -> None:
    before = state(folder)
    said = call("caption", folder, "--with", "red_captions:red", "--prefix", "sks, ", code=2)
    assert "3 of 6 pictures have a caption and are passed over" in said
    assert "2 captions written" in said
    assert "1 pictures got no caption" in said
    assert f"{folder / '3.png'}: the captioner failed: AssertionError" in said
    assert (folder / "4.txt").read_text() == "sks, red 160\n"
    assert (folder / "0.txt").read_text() == "a cat, number 0"
    said = call("caption", folder, "--with", "red_captions:red", code=2)
    assert "nothing was written" in said
    (folder / "3.txt").write_text("by hand")
    said = call("caption", folder, "--with", "red_captions:red", code=2)
    assert "all 6 pictures have a caption" in said
    assert "--overwrite" in said
    (folder / "3.txt").unlink()
    call("undo", folder)
    assert state(folder) == before


def test_caption_that_writes_nothing_fails(folder: Path, own: Path) -> None:
    before = state(folder)
    said = call("caption", folder, "--with", "red_captions:never", "--batch-size", 2, code=2)
    assert said.count("ValueError: no") == 3
    assert "nothing was written" in said
    assert state(folder) == before
    assert "either" in call("caption", folder, "--with", "wd", "--overwrite", "--append", code=2)
    assert "there is no captioner" in call("caption", folder, "--with", "magic", code=2)


def test_caption_append_and_overwrite(folder: Path, own: Path) -> None:
    (folder / "3.png").unlink()
    call("caption", folder, "--with", "red_captions:red", "--append", "--suffix", "!")
    assert (folder / "1.txt").read_text() == "a cat, number 1, red 40!"
    call("caption", folder, "--with", "red_captions:red", "--overwrite")
    assert (folder / "1.txt").read_text() == "red 40"


def test_undo_lists_and_refuses(folder: Path) -> None:
    assert "nothing to undo" in call("undo", folder, code=2)
    call("caption-edit", folder, "--append", "!", "--yes")
    (folder / "1.txt").write_text("by hand")
    said = call("undo", folder, code=2)
    assert f"{folder / '1.txt'}: the file was changed" in said
    assert "--force" in said
    said = call("undo", folder, "--list")
    assert "3 changes  done" in said
    assert "gesso dataset caption-edit" in said
    call("undo", folder, "--force")
    assert (folder / "1.txt").read_text() == "a cat, number 1"
    assert "taken back" in call("undo", folder, "--list")


@dataclass
class Hub:
    """The few calls of the hub that an upload makes."""

    address: str = ""
    status: int = 200
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            state.tokens.add(self.headers["Authorization"] or "")
            state.paths.append(self.path)
            if self.path == "/api/repos/create":
                state.created.append(json.loads(body))
                self.answer({"url": f"{state.address}/datasets/me/aldar", "name": "me/aldar", "id": "1"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []}, status=200)
            elif "/preupload/" in self.path:
                names = [f["path"] for f in json.loads(body)["files"]]
                self.answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        state.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.answer({"commitUrl": f"{state.address}/datasets/me/aldar/commit/abc", "commitOid": "abc"})
            else:
                self.answer({"error": f"unexpected {self.path}"}, status=404)

        def answer(self, content: dict[str, Any], status: int | None = None) -> None:
            text = json.dumps(content).encode()
            self.send_response(status or state.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


PUSH = """
import sys
from pathlib import Path
from gesso.cli import dataset_edit
from gesso.errors import UserError
try:
    dataset_edit.push(Path(sys.argv[1]), repo=sys.argv[2], private=True, layout="auto")
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
assert "torch" not in sys.modules
"""


def push(folder: Path, home: Path, address: str, repo: str = "me/aldar") -> subprocess.CompletedProcess[str]:
    """In a process of its own, as the hub's client reads its settings when it is imported."""
    proxies = {"http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"}
    environment = {k: v for k, v in os.environ.items() if k not in proxies | {p.upper() for p in proxies}}
    environment |= {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "NO_PROXY": "*"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    arguments = [sys.executable, "-c", PUSH, str(folder), repo]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


def test_push_sends_pictures_captions_and_a_card_and_no_token(hub: Hub, folder: Path, tmp_path: Path) -> None:
    call("caption-edit", folder, "--append", "!", "--yes")
    done = push(folder, tmp_path / "home", hub.address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{hub.address}/datasets/me/aldar" in done.stdout
    assert set(hub.files) == {"README.md", "train/metadata.jsonl", *(f"train/{i}.png" for i in range(6))}
    assert hub.files["train/3.png"] == (folder / "3.png").read_bytes()
    first = json.loads(hub.files["train/metadata.jsonl"].splitlines()[0])
    assert first == {"file_name": "0.png", "text": "a cat, number 0!"}
    assert b'load_dataset("me/aldar"' in hub.files["README.md"]
    assert hub.created[0]["type"] == "dataset"
    assert hub.created[0].get("visibility", hub.created[0].get("private")) in ("private", True)
    assert any("/api/datasets/me/aldar/commit/" in path for path in hub.paths)
    assert hub.tokens == {f"Bearer {TOKEN}"}, "the client did not log in, so the next lines prove nothing"
    written = [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert not written
    assert TOKEN not in done.stdout + done.stderr
    assert not (folder / ".gesso" / "hub").exists()


@pytest.mark.parametrize(("status", "code", "words"), [(403, 2, "hf auth login"), (507, 3, "could not take")])
def test_a_refused_push_says_how_to_go_on(
    hub: Hub, folder: Path, tmp_path: Path, status: int, code: int, words: str
) -> None:
    before, hub.status = state(folder), status
    done = push(folder, tmp_path / "home", hub.address)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout
    assert "hf upload --repo-type dataset me/aldar" in done.stdout
    assert (folder / ".gesso" / "hub" / "train" / "metadata.jsonl").is_file()
    assert state(folder) == before


def test_no_hub_at_all_and_a_name_that_is_none(folder: Path, tmp_path: Path) -> None:
    done = push(folder, tmp_path / "home", "http://127.0.0.1:9")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "cannot be reached" in done.stdout
    done = push(folder, tmp_path / "home", "http://127.0.0.1:9", repo="not a/name/at all")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "not a repository name" in done.stdout
