"""Captions by models: each plug-in at work on a tiny model or a stand-in server, and the run over a folder."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gesso.data.captioning import plugins as captioners
from gesso.data.captioning.plugins import Settings, Wanted, load, pending
from gesso.data.editing.journal import Journal
from gesso.data.editing.library import Library
from gesso.errors import ResourceError, UserError

COLOURS = ("red", "lime", "blue", "white", "black")


def picture(colour: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    folder.mkdir()
    for colour in COLOURS:
        picture(colour).save(folder / f"{colour}.png")
    (folder / "red.txt").write_text("mine")
    return folder


class Namer:
    """Says the colour; fails, or dies, where it is told to."""

    def __init__(self, *, fail: Sequence[str] = (), die: str = "") -> None:
        self.fail, self.die, self.seen = fail, die, []

    def caption(self, pictures: Sequence[Image.Image]) -> list[str | UserError]:
        answers: list[str | UserError] = []
        for one in pictures:
            value = one.getpixel((0, 0))
            name = next(c for c in COLOURS if picture(c).getpixel((0, 0)) == value)
            if name == self.die:
                raise ResourceError("out of memory")
            self.seen.append(name)
            answers.append(UserError("no idea") if name in self.fail else f"a {name}\npicture")
        return answers


def run(folder: Path, captioner: Any, *, mode: str = "missing", batch_size: int = 2, **wanted: str) -> Any:
    library = Library(folder)
    how = Wanted(mode=mode, **wanted)
    command = f"caption {mode}"
    items = pending(library, how, command=command)
    return captioners.run(library, captioner, items, wanted=how, batch_size=batch_size, command=command)


def texts(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text() for path in folder.glob("*.txt")}


def test_pictures_with_a_caption_are_passed_over_and_undo_takes_the_others_away(folder: Path) -> None:
    report = run(folder, Namer(), prefix="sks, ", suffix=".")
    assert (report.written, report.skipped, report.failed) == (4, 1, [])
    written = {name: f"sks, a {name} picture.\n" for name in COLOURS if name != "red"}
    assert texts(folder) == written | {"red": "mine"}
    Journal(folder).undo()
    assert texts(folder) == {"red": "mine"}


def test_overwrite_and_append(folder: Path) -> None:
    run(folder, Namer(), mode="append")
    assert texts(folder)["red"] == "mine, a red picture"
    run(folder, Namer(), mode="overwrite", prefix="new ")
    assert texts(folder)["red"] == "new a red picture"
    assert texts(folder)["blue"] == "new a blue picture\n"
    Journal(folder).undo(last=2)
    assert texts(folder) == {"red": "mine"}


@pytest.mark.parametrize("mode", ["missing", "overwrite", "append"])
def test_a_run_that_died_goes_on_where_it_stopped(folder: Path, mode: str) -> None:
    first, second = Namer(die="red"), Namer()
    if mode == "missing":
        (folder / "red.txt").unlink()
    with pytest.raises(ResourceError, match="out of memory"):
        run(folder, first, mode=mode)
    run(folder, second, mode=mode)
    assert sorted(first.seen[:2] + second.seen) == sorted(COLOURS)
    expected = {name: f"a {name} picture\n" for name in COLOURS}
    endings = {"missing": "a red picture\n", "overwrite": "a red picture", "append": "mine, a red picture"}
    assert texts(folder) == expected | {"red": endings[mode]}


def test_each_failure_is_named_and_the_rest_is_written(folder: Path) -> None:
    (folder / "bad.png").write_bytes(b"not a picture")
    report = run(folder, Namer(fail=["lime"]), batch_size=3)
    assert report.written == 3
    assert sorted(Path(error.where).name for error in report.failed) == ["bad.png", "lime.png"]
    assert set(texts(folder)) == {"red", "blue", "white", "black"}


def test_captions_go_into_the_table_where_there_is_one(folder: Path) -> None:
    rows = [{"file_name": "red.png", "text": "mine"}, {"file_name": "blue.png", "text": None, "k": 1}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(folder, Namer())
    assert (report.written, report.skipped) == (4, 1)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert lines[:2] == [rows[0], {"file_name": "blue.png", "text": "a blue picture", "k": 1}]
    assert {row["file_name"]: row["text"] for row in lines[2:]} == {
        f"{name}.png": f"a {name} picture" for name in ("lime", "white", "black")
    }


def test_an_empty_answer_is_a_failure_and_no_caption(folder: Path) -> None:
    report = run(folder, Own(lambda _: " \n\x00 "))
    assert report.written == 0
    assert len(report.failed) == 4
    assert texts(folder) == {"red": "mine"}


@dataclass
class Own:
    function: Callable[[Image.Image], Any]

    def caption(self, pictures: Sequence[Image.Image]) -> list[Any]:
        return [self.function(one) for one in pictures]


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_captions.py").write_text(
        "def size(picture):\n    return f'{picture.width} wide'\n\n"
        "def bad(picture):\n    return 1 / 0\n\ndef number(picture):\n    return 7\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load("my_captions:size", Settings()).caption([picture("red")] * 2) == ["40 wide"] * 2
    (failed,) = load("my_captions:bad", Settings()).caption([picture("red")])
    assert isinstance(failed, UserError)
    assert "ZeroDivisionError" in failed.what
    (number,) = load("my_captions:number", Settings()).caption([picture("red")])
    assert isinstance(number, UserError)
    for name in ("my_captions:nothing", "no_such_module:x"):
        with pytest.raises(UserError, match="cannot be used"):
            load(name, Settings())
    with pytest.raises(UserError, match="there is no captioner 'blib'"):
        load("blib", Settings())


def tiny_blip(folder: Path) -> Path:
    """A random BLIP with the real processor's files."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "photo", "of", "cat", "dog", "red", "tree"]
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer(str(folder / "words" / "vocab.txt"), bos_token="[DEC]")
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 5,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    import torch

    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(std=1.0)  # so that it does not say the same about everything
    model.save_pretrained(folder / "blip")
    images = BlipImageProcessorPil(size={"height": 16, "width": 16})
    BlipProcessor(images, tokenizer).save_pretrained(folder / "blip")
    return folder / "blip"


def test_blip(tmp_path: Path) -> None:
    settings = Settings(model=str(tiny_blip(tmp_path)), device="cpu", max_tokens=8)
    captioner = load("blip", settings)
    pictures = [picture(colour, (20, 50)) for colour in COLOURS]
    texts = captioner.caption(pictures)
    assert len(texts) == len(pictures)
    known = {"a", "photo", "of", "cat", "dog", "red", "tree"}
    assert all(text and set(str(text).split(" ")) <= known for text in texts)
    assert len(set(map(str, texts))) > 1, "it did not look at the pictures"
    assert captioner.caption(pictures) == texts, "the same picture must get the same caption"
    assert [captioner.caption([one])[0] for one in pictures] == texts, "a batch must change no caption"
    begun = load("blip", Settings(model=settings.model, device="cpu", max_tokens=8, prompt="a photo of"))
    assert all(str(text).startswith("a photo of") for text in begun.caption(pictures))


def tiny_florence(folder: Path) -> Path:
    """A random Florence-2 that knows the letters of its tasks."""
    import torch
    from transformers import (
        BartTokenizer,
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    letters = sorted(set("What does the image describe? Describe with a paragraph in detail what is shown."))
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġ"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})
    side = {"height": 64, "width": 64}
    images = CLIPImageProcessorPil(size=side, crop_size=side)
    images.image_seq_length = 5  # 2 x 2 patches and their mean
    fours = {"embed_dim": [8] * 4, "num_heads": [1] * 4, "num_groups": [1] * 4, "depths": [1] * 4}
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 200,
    }
    config = Florence2Config(
        text_config=text,
        vision_config={**fours, "projection_dim": 16, "window_size": 2},
        image_token_id=tokenizer.image_token_id,
    )
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(std=1.0)
    model.save_pretrained(folder)
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def test_florence(tmp_path: Path) -> None:
    settings = Settings(model=str(tiny_florence(tmp_path / "florence")), device="cpu", max_tokens=8)
    captioner = load("florence", settings)
    pictures = [picture(colour, (20, 50)) for colour in COLOURS]
    texts = captioner.caption(pictures)
    assert len(set(map(str, texts))) > 1, "it did not look at the pictures"
    assert not any("<" in str(text) for text in texts)
    assert [captioner.caption([one])[0] for one in pictures] == texts
    assert load("florence", replace(settings, prompt="<MORE_DETAILED_CAPTION>")).caption(pictures) == texts
    assert load("florence", replace(settings, prompt="<CAPTION>")).caption(pictures) != texts


def test_a_model_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load("blip", Settings(model=str(tmp_path), device="cpu"))


TAGS = ["general", "red_thing", "green_thing", "blue_thing", "0_0", "some_one_(show)"]


def tiny_tagger(folder: Path, *, batch: int | str = "n", tags: Sequence[str] = tuple(TAGS)) -> Path:
    """A model whose scores are the mean red, green and blue of what it is given as BGR, and constants."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(exist_ok=True)
    # Scores: rating, red, green, blue, face, character.
    weights = np.zeros((3, 6), np.float32)
    weights[2, 1] = weights[1, 2] = weights[0, 3] = 1 / 255
    weights[2, 5] = 0.86 / 255
    bias = np.array([0.9, 0, 0, 0, 0.4, 0], np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 4, 4, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 6])],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    categories = {"general": 9, "some_one_(show)": 4}
    lines = [f"{i},{name},{categories.get(name, 0)},1\n" for i, name in enumerate(tags)]
    (folder / "selected_tags.csv").write_text("tag_id,name,category,count\n" + "".join(lines))
    return folder


@pytest.mark.parametrize("batch", ["n", 1])
def test_wd_tags(tmp_path: Path, batch: int | str) -> None:
    tagger = load("wd", Settings(model=str(tiny_tagger(tmp_path / "wd", batch=batch)), device="cpu"))
    squares = [picture(colour, (8, 8)) for colour in ("red", "blue", "black")]
    assert tagger.caption(squares) == ["some one (show), red thing, 0_0", "blue thing, 0_0", "0_0"]


def test_wd_pads_with_white_and_obeys_its_thresholds(tmp_path: Path) -> None:
    model = str(tiny_tagger(tmp_path / "wd"))
    tall = picture("black", (4, 8))
    assert load("wd", Settings(model=model, threshold=0.45)).caption([tall]) == ["red thing, green thing, blue thing"]
    (none,) = load("wd", Settings(model=model, threshold=0.6)).caption([tall])
    assert isinstance(none, UserError)
    low = Settings(model=model, threshold=0.95, character_threshold=0.4)
    assert load("wd", low).caption([tall]) == ["some one (show)"]


def test_wd_files_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny_tagger(tmp_path / "wd", tags=TAGS[:-1])
    with pytest.raises(UserError, match="6 scores, but there are 5 tags"):
        load("wd", Settings(model=str(model)))
    (model / "model.onnx").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be loaded"):
        load("wd", Settings(model=str(model)))
    (model / "selected_tags.csv").unlink()
    with pytest.raises(UserError, match=r"no selected_tags\.csv"):
        load("wd", Settings(model=str(model)))


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
