"""The model card, and uploads against a small stand-in for the hub."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import save_file

from gesso.config.run import RunConfig
from gesso.export.hub import About, Sample, base_license, card, newest_samples, settings

TOKEN = "hf_secretsecretsecretsecretsecretsecret"
BASE = "stabilityai/stable-diffusion-xl-base-1.0"
ABOUT = About(title="aldar", architecture="stable-diffusion-xl-v1-base", base=BASE, triggers=("sks: aldar #1",))


def run_config(folder: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "aldar",
            "output": folder,
            "model": {"base": BASE},
            "data": {"sources": [{"path": folder}]},
            "adapter": {"rank": 8, "alpha": 16},
            "training": {"steps": 500, "learning_rate": 1e-4},
        }
    )


def front_matter(text: str) -> dict[str, Any]:
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    return dict(YAML(typ="safe").load(front))


def test_the_front_matter_is_what_the_hub_reads() -> None:
    samples = [Sample(Path("images/00.png"), 'a "photo": yes', "blurry"), Sample(Path("images/01.png"), "Köse")]
    text = card(ABOUT, settings={}, samples=samples, weights="pytorch_lora_weights.safetensors", repo="me/aldar")
    front = front_matter(text)
    assert front["base_model"] == BASE
    assert front["license"] == "openrail++"
    assert front["instance_prompt"] == "sks: aldar #1"
    assert {"lora", "text-to-image", "diffusers", "stable-diffusion-xl"} <= set(front["tags"])
    assert front["widget"] == [
        {"text": 'a "photo": yes', "output": {"url": "images/00.png"}, "parameters": {"negative_prompt": "blurry"}},
        {"text": "Köse", "output": {"url": "images/01.png"}},
    ]


def test_the_example_is_python_and_names_the_right_file() -> None:
    text = card(ABOUT, settings={}, samples=[], weights="aldar.safetensors", repo="me/aldar")
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'load_lora_weights("me/aldar", weight_name="aldar.safetensors")' in code
    text = card(ABOUT, settings={}, samples=[], weights="pytorch_lora_weights.safetensors", repo="me/aldar")
    assert 'load_lora_weights("me/aldar")' in text


def test_a_card_of_several_concepts_names_each_word() -> None:
    about = replace(ABOUT, triggers=("sks, man", "ohwx"))
    text = card(about, settings={}, samples=[], weights="a.safetensors", repo="me/a")
    assert front_matter(text)["instance_prompt"] == "sks, man, ohwx"
    assert "Use `sks, man`, `ohwx` in the prompt, each for what it stands for." in text
    assert '"sks, man"' in text.split("```python")[1], "the example asks for one of them"


def test_what_stands_before_the_captions_of_class_images_is_no_trigger() -> None:
    sources = [
        {"path": "a", "trigger": "sks"},
        {"path": "b", "trigger": "ohwx"},
        {"path": "more", "trigger": "sks"},
        {"path": "men", "role": "prior", "trigger": "a photo of a man"},
    ]
    fields = {"model": {"base": "micro:sdxl"}, "data": {"sources": sources}, "training": {"steps": 1}}
    run = RunConfig.model_validate(fields)
    assert About.of(run).triggers == ("sks", "ohwx")
    assert About.of(run).modelspec()["modelspec.trigger_phrase"] == "sks, ohwx"


def test_a_base_from_this_machine_is_not_given_as_a_hub_model(tmp_path: Path) -> None:
    (tmp_path / "my-sdxl").mkdir()
    (tmp_path / "my-sdxl" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
    about = replace(ABOUT, base=str(tmp_path / "my-sdxl"), triggers=())
    text = card(about, settings={}, samples=[], weights="a.safetensors", repo="me/a")
    assert str(tmp_path) not in text
    assert "base_model" not in front_matter(text)
    assert "instance_prompt" not in front_matter(text)
    assert front_matter(text)["license"] == "apache-2.0"


@pytest.mark.parametrize("readme", ["no front matter", "---\nlicense: [\n---\n", "---\ntags: []\n---\nlicense: x"])
def test_an_unknown_license_is_left_open(tmp_path: Path, readme: str) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert base_license(str(tmp_path)) == ""
    assert base_license("someone/else") == ""


def test_settings_are_in_the_table(tmp_path: Path) -> None:
    said = settings(run_config(tmp_path))
    assert said["rank, alpha"] == "8, 16"
    assert said["length"] == "500 steps"
    assert said["learning rate"].startswith("0.0001")
    text = card(ABOUT, settings=said, samples=[], weights="a.safetensors", repo="me/a")
    assert "| rank, alpha | 8, 16 |" in text


def write_samples(folder: Path) -> None:
    rows = []
    for step in (0, 10):
        for i in range(2):
            name = f"samples/step-{step:08d}/{i:02d}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(f"picture {step} {i}".encode())
            rows.append({"file": name, "prompt": f"prompt {i}", "negative": "", "step": step})
    lines = [json.dumps(row) for row in [*rows, rows[-1]]]
    (folder / "samples" / "index.jsonl").write_text("\n".join(lines) + "\n")


def test_the_newest_previews_are_shown_once(tmp_path: Path) -> None:
    assert newest_samples(run_config(tmp_path)) == []
    write_samples(tmp_path)
    found = newest_samples(run_config(tmp_path))
    assert [s.file.relative_to(tmp_path).as_posix() for s in found] == [
        "samples/step-00000010/00.png",
        "samples/step-00000010/01.png",
    ]
    assert [s.prompt for s in found] == ["prompt 0", "prompt 1"]


@dataclass
class Hub:
    """The few calls of the hub that an upload makes."""

    address: str = ""
    status: int = 200
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)


@pytest.fixture
def hub() -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            state.tokens.add(self.headers["Authorization"] or "")
            if self.path == "/api/repos/create":
                state.created.append(json.loads(body))
                self.answer({"url": f"{state.address}/me/aldar", "name": "me/aldar", "id": "1"})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []}, status=200)
            elif "/preupload/" in self.path:
                names = [f["path"] for f in json.loads(body)["files"]]
                modes = [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]
                self.answer({"files": modes})
            elif "/commit/" in self.path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        state.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.answer({"commitUrl": f"{state.address}/me/aldar/commit/abc", "commitOid": "abc"})
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


PUBLISH = """
import sys
from pathlib import Path
from gesso.config.run import RunConfig
from gesso.errors import UserError
from gesso.export.hub import About, publish
run = RunConfig.model_validate_json(sys.argv[2])
about = About(title="aldar", architecture="stable-diffusion-xl-v1-base", base=run.model.base, triggers=("sks aldar",))
try:
    print("address", publish(Path(sys.argv[1]), run, about=about, repo=sys.argv[3]))
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
assert "torch" not in sys.modules
"""


def publish(weights: Path, folder: Path, address: str, repo: str = "me/aldar") -> subprocess.CompletedProcess[str]:
    """In a process of its own, as the hub's client reads its settings when it is imported."""
    proxies = {"http_proxy", "https_proxy", "all_proxy", "HF_HUB_OFFLINE"}
    environment = {k: v for k, v in os.environ.items() if k not in proxies | {p.upper() for p in proxies}}
    environment |= {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN, "HF_HOME": str(folder / "home"), "NO_PROXY": "*"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    arguments = [sys.executable, "-c", PUBLISH, str(weights), run_config(folder).model_dump_json(), repo]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300)


def weights_file(folder: Path, key: str) -> Path:
    path = folder / "aldar.safetensors"
    save_file({key: torch.ones(2, 2)}, path)
    return path


def test_publishing_sends_card_weights_and_pictures_and_no_token(hub: Hub, tmp_path: Path) -> None:
    write_samples(tmp_path)
    weights = weights_file(tmp_path, "unet.a.lora_A.weight")
    done = publish(weights, tmp_path, hub.address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"address {hub.address}/me/aldar" in done.stdout
    assert hub.files["pytorch_lora_weights.safetensors"] == weights.read_bytes()
    assert hub.files["images/01.png"] == b"picture 10 1"
    front = front_matter(hub.files["README.md"].decode())
    assert [w["output"]["url"] for w in front["widget"]] == ["images/00.png", "images/01.png"]
    assert set(hub.files) == {"pytorch_lora_weights.safetensors", "images/00.png", "images/01.png", "README.md"}
    # The client says it one way or the other, by its release.
    assert hub.created[0].get("visibility", hub.created[0].get("private")) in ("private", True)
    assert hub.tokens == {f"Bearer {TOKEN}"}, "the client did not log in, so the next line proves nothing"
    written = [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert not written
    assert TOKEN not in done.stdout + done.stderr


def test_a_kohya_file_keeps_its_name(hub: Hub, tmp_path: Path) -> None:
    weights = weights_file(tmp_path, "lora_unet_a.lora_down.weight")
    assert publish(weights, tmp_path, hub.address).returncode == 0
    assert hub.files["aldar.safetensors"] == weights.read_bytes()
    assert b'weight_name="aldar.safetensors"' in hub.files["README.md"]


@pytest.mark.parametrize(("status", "code", "words"), [(403, 2, "hf auth login"), (507, 3, "could not take")])
def test_a_refused_upload_loses_nothing_and_says_how_to_go_on(
    hub: Hub, tmp_path: Path, status: int, code: int, words: str
) -> None:
    weights = weights_file(tmp_path, "unet.a.lora_A.weight")
    before, hub.status = weights.read_bytes(), status
    done = publish(weights, tmp_path, hub.address)
    assert done.returncode == code, done.stdout + done.stderr
    assert words in done.stdout
    assert f"hf upload me/aldar {tmp_path / 'aldar-hub'}" in done.stdout
    assert weights.read_bytes() == before
    assert (tmp_path / "aldar-hub" / "README.md").is_file()
    assert (tmp_path / "aldar-hub" / "pytorch_lora_weights.safetensors").read_bytes() == before
    assert TOKEN not in done.stdout + done.stderr


def test_no_hub_at_all(tmp_path: Path) -> None:
    weights = weights_file(tmp_path, "unet.a.lora_A.weight")
    done = publish(weights, tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "cannot be reached" in done.stdout
    assert "hf upload" in done.stdout


def test_a_name_that_is_none(tmp_path: Path) -> None:
    weights = weights_file(tmp_path, "unet.a.lora_A.weight")
    done = publish(weights, tmp_path, "http://127.0.0.1:9", repo="not a/name/at all")
    assert done.returncode == 2
    assert "not a repository name" in done.stdout
