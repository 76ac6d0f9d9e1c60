"""Captions by an OpenAI-compatible endpoint, at a stand-in server."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from captioning_helpers import picture
from PIL import Image

from gesso.data.captioning.plugins import Settings, load
from gesso.errors import ResourceError, UserError


@dataclass
class Server:
    """Answers chat completions as its plan says, then properly."""

    address: str = ""
    plan: list[Any] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                step = state.plan.pop(0) if state.plan else 200
                state.requests.append({"path": self.path, **body})
                state.keys.append(self.headers.get("Authorization", ""))
            if step == "slow":
                time.sleep(1.5)
                return
            if step == "hang up":
                return
            if step == "redirect":
                self.send_response(307)
                self.send_header("Location", f"{state.address}/elsewhere")
                self.end_headers()
                return
            self.answer(step, body)

        def answer(self, step: Any, body: dict[str, Any]) -> None:
            status = step if isinstance(step, int) else 200
            text = step if isinstance(step, bytes) else json.dumps(reply(body, status)).encode()
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    def reply(body: dict[str, Any], status: int) -> dict[str, Any]:
        if status != 200:
            return {"error": {"message": f"trouble {status}"}}
        return {"choices": [{"message": {"content": f"{shown(body).size[0]} wide"}}]}

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{httpd.server_address[1]}"
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def shown(body: dict[str, Any]) -> Image.Image:
    """The picture in a request."""
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def settings(server: Server, **changes: Any) -> Settings:
    given = {"endpoint": f"{server.address}/v1", "backoff": 0.01, "timeout": 0.5, "retries": 3}
    return Settings(**(given | changes))


def test_openai_sends_picture_prompt_and_model(server: Server) -> None:
    captioner = load("openai", settings(server, model="llava", prompt="What is this?", max_tokens=33))
    assert captioner.caption([picture("red", (40, 30)), picture("blue", (2100, 700))]) == ["40 wide", "1024 wide"]
    first = min(server.requests, key=lambda r: shown(r).size)
    assert (first["path"], first["model"], first["max_tokens"]) == ("/v1/chat/completions", "llava", 33)
    assert first["messages"][0]["content"][0] == {"type": "text", "text": "What is this?"}
    red, green, blue = shown(first).getpixel((5, 5))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("trouble", [429, 500, 503, "slow", "hang up"])
def test_openai_tries_again(server: Server, trouble: Any) -> None:
    server.plan = [trouble, trouble]
    assert load("openai", settings(server)).caption([picture("red")]) == ["40 wide"]
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("trouble", "words"),
    [(429, "answered 429: trouble 429, after 3 attempts"), (500, "answered 500"), ("slow", "no answer")],
)
def test_openai_gives_up_by_name(server: Server, trouble: Any, words: str) -> None:
    server.plan = [trouble] * 3
    failed, *_ = load("openai", settings(server, retries=2)).caption([picture("red")])
    assert isinstance(failed, UserError)
    assert words in failed.what


@pytest.mark.parametrize(
    "answer",
    [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}', b"[1]", b"\xff", 400],
)
def test_openai_answers_that_are_none_fail_one_picture_only(server: Server, answer: Any) -> None:
    server.plan = [answer]
    captioner = load("openai", settings(server))
    (failed,) = captioner.caption([picture("red")])
    assert isinstance(failed, UserError)
    assert len(server.requests) == 1, "asking again would cost again and change nothing"
    assert captioner.caption([picture("red")]) == ["40 wide"]


def test_openai_stops_where_going_on_is_no_use(server: Server) -> None:
    for status in (401, 403, 404):
        server.plan = [status]
        with pytest.raises(ResourceError, match=f"answered {status}"):
            load("openai", settings(server)).caption([picture("red")])
    with pytest.raises(ResourceError, match="nobody answers"):
        load("openai", Settings(endpoint="http://127.0.0.1:9/v1")).caption([picture("red")])


def test_the_key_goes_where_it_should_and_nowhere_else(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-openai")
    monkeypatch.setenv("MY_KEY", "secret-mine")
    load("openai", settings(server)).caption([picture("red")])
    load("openai", settings(server, key_env="MY_KEY")).caption([picture("red")])
    assert server.keys == ["", "Bearer secret-mine"]
    server.plan = ["redirect"]
    with pytest.raises(ResourceError, match="answered 307"):
        load("openai", settings(server, key_env="MY_KEY")).caption([picture("red")])
    assert [r["path"] for r in server.requests] == ["/v1/chat/completions"] * 3
    with pytest.raises(UserError, match="unencrypted"):
        load("openai", Settings(endpoint="http://example.com/v1", key_env="MY_KEY"))
    with pytest.raises(UserError, match="OTHER is not set"):
        load("openai", settings(server, key_env="OTHER"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="there is no key"):
        load("openai", Settings())
    with pytest.raises(UserError, match="not an address"):
        load("openai", Settings(endpoint="localhost:8000"))
