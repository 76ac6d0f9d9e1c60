"""Models from the hub, against a small stand-in for it on this machine: what is fetched, and what is said."""

from __future__ import annotations

import hashlib
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

import original_layout
import pytest
from family_helpers import ALL, answers, load, rewrite

from gesso.families.sdxl import SDXL

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE, VAE, SINGLE = "someone/tiny-sdxl", "someone/tiny-vae", "someone/single"
JUNK = ["unet/model.onnx", "unet/model.onnx_data", "unet/flax_model.msgpack", "unet/diffusion_pytorch_model.bin"]
JUNK += ["text_encoder/pytorch_model.bin", "vae/openvino_model.xml", "vae_1_0/diffusion_pytorch_model.safetensors"]
JUNK += ["tiny.safetensors", "README.md", ".gitattributes", "vae_decoder/config.json", "tokenizer/model.bin"]
CONFIGS = {"model_index.json", "scheduler/scheduler_config.json"}
CONFIGS |= {f"{part}/config.json" for part in ("unet", "vae", "text_encoder", "text_encoder_2")}
CONFIGS |= {
    f"tokenizer{suffix}/{name}"
    for suffix in ("", "_2")
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
}
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
STEMS |= {"text_encoder": "model", "text_encoder_2": "model"}


def weights(mark: str = "") -> set[str]:
    return {f"{part}/{stem}{mark}.safetensors" for part, stem in STEMS.items()}


@dataclass
class Hub:
    """Repositories, refusals of a kind of request (status and headers), and what was asked for.

    Of the file `dropped` only a half is sent before the connection ends.
    """

    address: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    dropped: str = ""
    requests: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """The endpoints that `snapshot_download` uses."""

    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(path)
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        rest = path.removeprefix("/api/models").split("/", 3)[3:]
        kind, _, name = (rest[0] if rest else "").partition("/")
        files = self.hub.repos.get(repo)
        status, headers = self.hub.refusals.get(f"{repo}:{kind}", (0, {}))
        if status:
            self.send(status, b"", headers, body)
        elif files is None:
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif kind == "revision" and name not in ("main", "v2", COMMIT):
            self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        elif kind == "revision":
            info = {"id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
            self.send(200, json.dumps(info | {"siblings": [{"rfilename": f} for f in files]}).encode(), {}, body)
        elif kind == "tree":
            tree = [{"type": "file", "path": f, "size": len(c), "oid": git(c)} for f, c in files.items()]
            self.send(200, json.dumps(tree).encode(), {}, body)
        elif kind == "resolve" and (file := name.split("/", 1)[1]) in files:
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git(files[file])}"'}
            if body:
                self.hub.fetched.append(file)
            cut = len(files[file]) // 2 if file == self.hub.dropped and body else None
            self.send(200, files[file], headers, body, cut=cut)
        else:
            self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool, *, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[:cut])
        self.close_connection = cut is not None

    def log_message(self, *_: Any) -> None:
        pass


def git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def hub(tiny_base: Path) -> Iterator[Hub]:
    """With the tiny model, plain and as fp16, among everything else that repositories hold."""
    hub = Hub()
    files = contents(tiny_base)
    assert files.keys() == CONFIGS | weights()
    marked = {name.replace(".safetensors", ".fp16.safetensors"): files[name] for name in sorted(weights())}
    hub.repos[BASE] = files | marked | dict.fromkeys(JUNK, b"junk")
    hub.repos[VAE] = {n.removeprefix("vae/"): c for n, c in files.items() if n.startswith("vae/")}
    hub.repos[VAE] |= {"diffusion_pytorch_model.bin": b"junk", "sdxl_vae.safetensors": b"junk", "README.md": b""}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


PROLOGUE = """
import json, sys
from pathlib import Path
from gesso.errors import UserError
from gesso.families.sdxl import SDXL
def outcome(**settings):
    part = settings.pop("part", "denoiser")
    try:
        return {"print": SDXL(**settings).fingerprint(part)}
    except UserError as error:
        return {"kind": type(error).__name__, "code": error.exit_code, "what": error.what, "where": error.where,
                "fix": error.fix}
def contents(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
def say(**values):
    print("SAID " + json.dumps(values))
"""


def run(address: str, home: Path, script: str, **environment: str) -> dict[str, Any]:
    """Run a script in a process of its own, as the hub's client reads its settings when it is imported."""
    done = start(address, home, [sys.executable, "-c", PROLOGUE + script], **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("SAID ")]
    return dict(json.loads(line.removeprefix("SAID ")))


def start(address: str, home: Path, command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    dropped = {"http_proxy", "https_proxy", "all_proxy", "hf_hub_offline", "hf_token", "hf_hub_cache"}
    settings = {k: v for k, v in os.environ.items() if k.lower() not in dropped}
    settings |= {"HF_ENDPOINT": address, "HF_HOME": str(home / "hf"), "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "GESSO_CACHE": str(home / "gesso"), "OMP_NUM_THREADS": "1"}
    settings |= {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    return subprocess.run(command, env=settings | environment, capture_output=True, text=True, timeout=300)


LOAD = """
import torch
sys.path.insert(0, HELPERS)
from family_helpers import ALL, answers, load
torch.set_num_threads(1)
family = SDXL(base="someone/tiny-sdxl", revision="v2")
found = answers(family, load(family))
say(root=str(family._root), prints={n: family.fingerprint(n) for n in ALL},
    answers={k: v.double().sum().item().hex() for k, v in found.items()})
"""


def test_a_hub_model_is_the_folder_and_only_what_it_needs_is_fetched(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    said = run(hub.address, tmp_path, f"HELPERS = {str(Path(__file__).parent)!r}\n" + LOAD)
    family = SDXL(base=str(tiny_base))
    wanted = answers(family, load(family))
    assert said["answers"] == {k: v.double().sum().item().hex() for k, v in wanted.items()}
    assert said["prints"] == {name: family.fingerprint(name) for name in ALL}
    assert len(hub.fetched) == len(set(hub.fetched)), "each file once"
    assert contents(Path(said["root"])) == contents(tiny_base)
    assert f"/api/models/{BASE}/revision/v2" in hub.requests


def test_the_variant_decides_what_is_fetched(hub: Hub, tmp_path: Path) -> None:
    said = run(
        hub.address,
        tmp_path,
        f"""
family = SDXL(base={BASE!r}, variant="fp16")
say(print=family.fingerprint("denoiser"), files=contents(family._root))
""",
    )
    assert set(said["files"]) == CONFIGS | weights(".fp16")
    assert set(hub.fetched) <= CONFIGS | weights(".fp16")


def test_another_vae_is_fetched_alone_and_in_the_place_of_the_own(hub: Hub, tmp_path: Path) -> None:
    script = f"""
family = SDXL(base={BASE!r}, vae={VAE!r})
say(vae=family.fingerprint("vae"), unet=family.fingerprint("denoiser"), factor=family.latent_factor,
    files=contents(family._root), vae_files=contents(family._vae_root),
    own=SDXL(base={BASE!r}).fingerprint("vae"))
"""
    said = run(hub.address, tmp_path, script)
    assert said["vae"] == said["own"], "the same contents"
    assert said["factor"] == 8
    vae = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert set(said["vae_files"]) == vae
    assert set(said["files"]) == CONFIGS | (weights() - {f"vae/{name}" for name in vae}) | {"vae/config.json"}
    assert not set(JUNK) & set(hub.fetched)


def test_a_single_file_fetches_configs_and_tokenizers_only(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    file = original_layout.write(tiny_base, tmp_path / "model.safetensors")
    script = f"""
family = SDXL(base={str(file)!r}, config={BASE!r})
say(prints=[family.fingerprint(n) for n in ("denoiser", "vae", "text")], files=contents(family._config_root))
"""
    said = run(hub.address, tmp_path, script)
    assert set(said["files"]) == CONFIGS
    local = SDXL(base=str(file), config=str(tiny_base))
    assert said["prints"] == [local.fingerprint(name) for name in ALL]


def test_a_model_asks_the_hub_once(hub: Hub, tmp_path: Path) -> None:
    """Latents are scaled for each batch of a run: that must not read the config from the network, or at all."""
    script = f"""
import torch
family = SDXL(base={BASE!r}, vae={VAE!r})
for _ in range(3):
    family.latents(torch.ones(1, 8, 2, 2), torch.ones(1, 4, 2, 2)), family.noise, family.latent_factor
say()
"""
    run(hub.address, tmp_path, script)
    for repo in (BASE, VAE):
        assert hub.requests.count(f"/api/models/{repo}/revision/main") == 1


def test_each_refusal_has_its_own_words(hub: Hub, tmp_path: Path) -> None:
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}
    hub.repos |= {f"someone/{n}": hub.repos[BASE] for n in ("gated", "closed", "broken", "blocked")}
    hub.refusals["someone/gated:revision"] = (401, gated)
    hub.refusals["someone/closed:resolve"] = (403, gated)
    hub.refusals["someone/broken:revision"] = (500, {})
    hub.refusals["someone/blocked:revision"] = (403, {"X-Error-Message": "Forbidden"})
    script = f"""
say(missing=outcome(base="someone/mistyped"), gated=outcome(base="someone/gated"),
    closed=outcome(base="someone/closed"), broken=outcome(base="someone/broken"),
    blocked=outcome(base="someone/blocked"),
    revision=outcome(base={BASE!r}, revision="v9"), invalid=outcome(base="some one/x y"),
    vae=outcome(base={BASE!r}, vae="someone/mistyped", part="vae"))
"""
    said = run(hub.address, tmp_path, script)
    user, resource = ("UserError", 2), ("ResourceError", 3)
    wanted = {
        "missing": (user, "someone/mistyped is neither a path here nor a model on the hub", "model.base"),
        "gated": (resource, "someone/gated is gated on the hub", "model.base"),
        "closed": (resource, "someone/closed is gated on the hub", "model.base"),
        "broken": (resource, "someone/broken is not wholly on this machine, and the hub answered 500", "model.base"),
        "blocked": (resource, "someone/blocked is not wholly on this machine, and the hub answered 403", "model.base"),
        "revision": (user, f"{BASE} has no revision 'v9'", "model.revision"),
        "invalid": (user, "some one/x y is neither a path here nor a model on the hub", "model.base"),
        "vae": (user, "someone/mistyped is neither a path here nor a model on the hub", "model.vae"),
    }
    for name, ((kind, code), what, where) in wanted.items():
        assert said[name] | {"fix": ""} == {"kind": kind, "code": code, "what": what, "where": where, "fix": ""}, name
        assert said[name]["fix"]
    assert "accept its terms" in said["gated"]["fix"]


def test_a_connection_that_breaks_off_leaves_nothing_that_passes_for_the_model(hub: Hub, tmp_path: Path) -> None:
    hub.dropped = "unet/diffusion_pytorch_model.safetensors"
    script = f"say(**outcome(base={BASE!r}))"
    said = run(hub.address, tmp_path, script)
    assert (said["kind"], said["code"]) == ("ResourceError", 3), said
    assert "not wholly on this machine, and fetching it failed: peer closed connection" in said["what"]
    offline = run(hub.address, tmp_path, script, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids fetching it" in offline["what"]
    hub.dropped = ""
    assert "print" in run(hub.address, tmp_path, script)


def test_offline(hub: Hub, tmp_path: Path) -> None:
    """With nothing here, with everything here, and with no hub at all."""
    script = f"say(**outcome(base={BASE!r}))"
    said = run(hub.address, tmp_path, script, HF_HUB_OFFLINE="1")
    assert (said["kind"], said["code"], said["where"]) == ("ResourceError", 3, "model.base")
    assert said["what"] == f"{BASE} is not wholly on this machine, and HF_HUB_OFFLINE forbids fetching it"
    assert not hub.requests
    nobody = run("http://127.0.0.1:9", tmp_path, script)
    assert (nobody["kind"], nobody["code"]) == ("ResourceError", 3)
    assert nobody["what"].startswith(f"{BASE} is not wholly on this machine, and fetching it failed: ")
    assert "refused" in nobody["what"]
    online = run(hub.address, tmp_path, script)
    assert "print" in online
    assert run(hub.address, tmp_path, script, HF_HUB_OFFLINE="1") == online
    assert run("http://127.0.0.1:9", tmp_path, script) == online


def test_a_cache_that_cannot_be_written_is_named(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("a file in the way")
    said = run(hub.address, tmp_path, f"say(**outcome(base={BASE!r}))")
    assert (said["kind"], said["code"]) == ("ResourceError", 3)
    assert said["what"].startswith(f"{BASE} cannot be stored on this machine")
    assert str(tmp_path / "hf") in said["where"]
    assert "HF_HOME" in said["fix"]


def test_a_repository_without_safetensors_is_refused_in_plain_words(hub: Hub, tmp_path: Path) -> None:
    hub.repos["someone/old"] = {
        name: content for name, content in hub.repos[BASE].items() if not name.endswith(".safetensors")
    }
    hub.repos["someone/lora"] = {"pytorch_lora_weights.safetensors": b"x", "README.md": b""}
    said = run(hub.address, tmp_path, """say(old=outcome(base="someone/old"), lora=outcome(base="someone/lora"))""")
    assert (said["old"]["kind"], said["old"]["code"]) == ("UserError", 2)
    assert "no .safetensors weights of unet" in said["old"]["what"]
    assert (said["lora"]["kind"], said["lora"]["code"]) == ("UserError", 2)
    assert said["lora"]["what"] == "someone/lora on the hub holds none of the files that are needed"


def test_check_fetches_nothing(hub: Hub, tmp_path: Path, pictures: Path) -> None:
    file = tmp_path / "run.yaml"
    model = {"base": BASE, "vae": VAE}
    data = {"sources": [{"path": str(pictures)}], "resolution": 64}
    values = {"name": "run", "output": str(tmp_path / "out"), "model": model, "data": data}
    file.write_text(json.dumps(values | {"training": {"precision": "fp32", "steps": 2}}))
    done = start(hub.address, tmp_path, [sys.executable, "-m", "gesso", "check", str(file)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert hub.requests == []


def test_a_changed_file_on_the_hub_changes_the_fingerprint(hub: Hub, tiny_base: Path, tmp_path: Path) -> None:
    changed = tmp_path / "model.safetensors"
    changed.write_bytes(hub.repos[BASE]["text_encoder/model.safetensors"])
    rewrite(changed, lambda state: {k: v + 1 for k, v in state.items()})
    hub.repos["someone/changed"] = hub.repos[BASE] | {"text_encoder/model.safetensors": changed.read_bytes()}
    script = """
families = [SDXL(base=base) for base in ("someone/tiny-sdxl", "someone/changed")]
say(**{name: [family.fingerprint(name) for family in families] for name in ("denoiser", "vae", "text")})
"""
    said = run(hub.address, tmp_path, script)
    assert said["denoiser"][0] == said["denoiser"][1]
    assert said["vae"][0] == said["vae"][1]
    assert said["text"][0] != said["text"][1]
    assert said["text"][0] == SDXL(base=str(tiny_base)).fingerprint("text")
