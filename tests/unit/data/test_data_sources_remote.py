"""Sources behind URLs: stores that fsspec reads, and files of a web server."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_helpers import BLUE, RED, captions, colours, found, notices, png, problems, tar
from test_data_sources_archives import SET, pack

from gesso.config.run import Source
from gesso.data import places
from gesso.data.places import Place, stamp_of
from gesso.data.sources import collect
from gesso.errors import UserError


def put(url: str, members: dict[str, bytes]) -> str:
    """Write files into a store; gives back its address."""
    for name, data in members.items():
        with fsspec.open(f"{url}/{name}", "wb") as file:
            file.write(data)
    return url


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield "memory://sets"
    store.store.clear()


class TestStores:
    def test_a_folder_with_side_files_and_masks(self, memory: str) -> None:
        put(
            memory, SET | {".hidden/c.png": png(), "a-masklabel.png": png("white"), "dog/b-masklabel.png": png("black")}
        )
        rows = found(memory, mask="file")
        assert colours(rows) == {"r": RED, "b": BLUE}
        assert {r.caption: r.concept for r in rows} == {"r": "", "b": "dog"}
        assert [r.mask and r.mask.read() for r in rows] == [png("white"), png("black")]

    def test_a_table_in_a_folder_and_by_itself(self, memory: str) -> None:
        put(memory, {"images/a.png": png(), "metadata.csv": b"file_name,text\na.png,x\ngone.png,y\n"})
        for path in (memory, f"{memory}/metadata.csv"):
            message = problems(path)
            assert "metadata.csv:3: there is no picture 'gone.png'" in message
        put(memory, {"metadata.csv": b"file_name,text\na.png,x\n"})
        assert captions(found(memory)) == {"a.png": "x"}
        assert captions(found(f"{memory}/metadata.csv")) == {"a.png": "x"}

    def test_archives_tables_and_shards(self, memory: str, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image": [png("red"), png("blue")], "text": ["r", "b"]}), tmp_path / "x.parquet")
        shard = tar(tmp_path / "x.tar", SET).read_bytes()
        members = {
            "x.zip": pack(tmp_path / "x.zip", SET).read_bytes(),
            "x.tar": shard,
            "x.tar.gz": tar(tmp_path / "x.tar.gz", SET, mode="w:gz").read_bytes(),
            "x.parquet": (tmp_path / "x.parquet").read_bytes(),
            "shards/s-0.tar": shard,
        }
        put(memory, members)
        for name in ("x.zip", "x.tar", "x.tar.gz", "x.parquet", "shards", "shards/s-{0..0}.tar"):
            assert colours(found(f"{memory}/{name}")) == {"r": RED, "b": BLUE}, name

    def test_missing_shards_and_damaged_ones_are_named(self, memory: str, tmp_path: Path) -> None:
        put(memory, {"s-0.tar": tar(tmp_path / "x.tar", SET).read_bytes(), "s-1.tar": b"no tar at all" * 100})
        message = problems(f"{memory}/s-{{0..2}}.tar")
        assert "memory://sets/s-1.tar: no TAR archive" in message
        assert "memory://sets/s-2.tar" in message
        assert "s-0.tar" not in message

    def test_an_empty_one_says_what_was_found(self, memory: str) -> None:
        put(memory, {"a.heic": b"x", "b.md": b"x"})
        message = problems(memory)
        assert "found: 1 .heic, 1 .md" in message
        assert "convert these" in message
        assert "no pictures found" in problems("memory://nowhere")

    def test_file_urls_are_local_folders(self, tmp_path: Path) -> None:
        for name, data in SET.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        rows = found(f"file://{tmp_path}")
        assert colours(rows) == {"r": RED, "b": BLUE}
        assert rows[0].place == Place(str(tmp_path / "a.png"))

    def test_a_store_that_needs_a_package_or_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def lack(url: str) -> None:
            raise ImportError("Install s3fs to access S3")

        assert "nonsense:// cannot be read" in problems("nonsense://x/y")
        monkeypatch.setattr(fsspec.core, "url_to_fs", lack)
        assert "install s3fs (pip install s3fs)" in problems("s3://bucket/set")

    def test_what_the_store_refuses_is_told(self, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: object, path: str) -> None:
            raise PermissionError("Access Denied")

        monkeypatch.setattr(type(fsspec.filesystem("memory")), "find", refuse)
        monkeypatch.setattr(places.time, "sleep", lambda seconds: None)
        assert "memory://sets: cannot be listed: Access Denied" in problems(memory)

    def test_a_request_that_fails_twice_is_made_again(self, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
        put(memory, SET)
        store = type(fsspec.filesystem("memory"))
        real, failures = store.cat_file, [OSError("reset"), TimeoutError("slow")]

        def flaky(self: object, path: str, **options: object) -> bytes:
            if failures:
                raise failures.pop()
            return bytes(real(self, path, **options))

        monkeypatch.setattr(store, "cat_file", flaky)
        monkeypatch.setattr(places.time, "sleep", lambda seconds: None)
        assert Place(f"{memory}/a.png").read() == png("red")
        failures += [OSError("gone")] * 3
        with pytest.raises(UserError, match=r"a\.png: cannot be read: gone"):
            Place(f"{memory}/a.png").read()

    def test_a_picture_that_is_no_longer_there(self, memory: str) -> None:
        with pytest.raises(UserError, match="it is not there any more"):
            Place(f"{memory}/none.png").read()


@dataclass
class Web:
    """A server of files that answers ranges, and what was asked of it."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)


@pytest.fixture
def web() -> Iterator[Web]:
    state = Web()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            data = state.files.get(self.path)
            wanted = self.headers.get("Range")
            state.asked.append((self.path, wanted or ""))
            if data is None:
                self.send_error(404)
                return
            part, size = data, len(data)
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
            if match:
                first, last = int(match[1]), int(match[2] or size - 1)
                part = data[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


class TestWeb:
    def test_shards_are_read_by_ranges(self, web: Web, tmp_path: Path) -> None:
        shard = tar(tmp_path / "x.tar", SET)
        web.files = {f"/set-{i}.tar": shard.read_bytes() for i in range(2)}
        rows = found(f"{web.address}/set-{{0..1}}.tar")
        assert len(rows) == 4
        web.asked.clear()
        assert rows[0].place.read() == png("red")
        [(path, wanted)] = [(path, wanted) for path, wanted in web.asked if wanted]
        start, size = rows[0].place.start, rows[0].place.size
        assert (path, wanted) == ("/set-0.tar", f"bytes={start}-{start + size - 1}")

    def test_an_archive_and_a_table(self, web: Web, tmp_path: Path) -> None:
        table = io.BytesIO()
        pq.write_table(pa.table({"image": [png("red")], "text": ["r"]}), table)
        web.files = {"/x.zip": pack(tmp_path / "x.zip", SET).read_bytes(), "/x.parquet": table.getvalue()}
        assert colours(found(f"{web.address}/x.zip")) == {"r": RED, "b": BLUE}
        assert colours(found(f"{web.address}/x.parquet")) == {"r": RED}

    def test_a_page_is_no_folder(self, web: Web) -> None:
        assert "cannot be listed" in problems(f"{web.address}/set/")
        assert "cannot be listed" in problems(f"{web.address}/metadata.csv")

    def test_what_is_not_there_is_named(self, web: Web) -> None:
        for name in ("x.zip", "x.tar", "x.parquet"):
            assert f"{web.address}/{name}" in problems(f"{web.address}/{name}")


def test_a_store_tells_whether_a_file_was_touched(memory: str) -> None:
    put(memory, {"a.png": png()})
    assert stamp_of(Place(f"{memory}/a.png")) == "", "a store that tells only the size cannot be trusted"


def test_notices_and_problems_of_a_store_are_collected(memory: str) -> None:
    put(memory, {"a.png": png(), "a.txt": b"\xff", "b.psd": b"x"})
    looked = collect(Source(path=memory))
    assert "1 .psd (b.psd)" in "".join(looked.notices)
    assert [problem.where for problem in looked.problems] == ["memory://sets/a.txt:1"]
    assert "not UTF-8" in looked.problems[0].what
    put(memory, {"a.txt": b"fine"})
    assert "b.psd" in notices(memory)
