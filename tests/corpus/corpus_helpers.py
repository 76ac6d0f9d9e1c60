"""Sets of pictures made for a test, each with the outcome that was laid down for it before any code was read."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gesso import cli
from gesso.config.run import Data, RunConfig
from gesso.data import images
from gesso.data.index import Index, build
from gesso.errors import Problems, UserError

Settings = dict[str, Any]
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 128, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
}
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".apng", ".avif", ".heic", ".psd")


@dataclass(frozen=True)
class Good:
    """The rows: name of the picture -> its caption as written. A caption that ends in a colour promises that colour."""

    rows: Mapping[str, str]
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    repeats: Mapping[str, float] = field(default_factory=dict)
    concepts: Mapping[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    """Patterns, each of which a notice must match."""
    left_out: tuple[str, ...] = ()
    """Pictures that are no rows; a notice must name each."""
    pictures: int | None = None
    """How many pictures there are, where files, ZIP and TAR members do not tell."""
    unnamed: bool = False
    """The pictures have no names of their own: only their captions are compared."""


@dataclass(frozen=True)
class Bad:
    """The problems: name -> pattern of the reason. None may name one of `good`; `fix` says what to do instead."""

    problems: Mapping[str, str]
    good: tuple[str, ...] = ()
    fix: str = ""


@dataclass(frozen=True)
class Case:
    """A set that `make` writes into an empty folder (it returns the source's settings), and what becomes of it."""

    name: str
    make: Callable[[Path], Settings | None]
    expect: Good | Bad
    data: Mapping[str, Any] = field(default_factory=dict)


def cases(listed: list[Case]) -> Any:
    """The decorator that runs a test once for each."""
    names = [case.name for case in listed]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize("case", listed, ids=names)


def data_of(folder: Path, source: Settings | None = None, **settings: Any) -> Data:
    """Small buckets, and a cache beside the folder."""
    base: Settings = {
        "sources": [{"path": str(folder)} | (source or {})],
        "resolution": 64,
        "buckets": {"step": 16},
        "cache": str(folder.parent / "cache"),
    }
    return Data.model_validate(base | settings)


def run_of(data: Data, **training: Any) -> RunConfig:
    """A run over this data."""
    return RunConfig.model_validate({"data": data.model_dump(mode="json"), "training": {"steps": 1} | training})


def call(*arguments: str) -> int:
    """The command line in this process; its exit code."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return caught.value.code if isinstance(caught.value.code, int) else 0


def run_file(data: Data, *, batch_size: int = 1, **extra: Any) -> Path:
    """A run file for this data, beside the set."""
    folder = Path(data.sources[0].path).parent
    values = {"output": str(folder / "out"), "data": data.model_dump(mode="json"), "trackers": []} | extra
    values["training"] = {"steps": 4, "batch_size": batch_size, "device": "cpu", "precision": "fp32"}
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


def examine(case: Case, tmp_path: Path) -> None:
    """Make the set, look at it as a run does, and compare all of it with what was laid down."""
    folder = tmp_path / "set"
    folder.mkdir()
    source = case.make(folder)
    data = data_of(folder, source, **case.data)
    with deadline(20):
        if isinstance(case.expect, Bad):
            with pytest.raises(UserError) as caught:
                build(data)
            check_problems(caught.value, case.expect)
        else:
            check_rows(build(data), case.expect, data, folder)


def check_problems(error: UserError, expect: Bad) -> None:
    """Exit code 2; each bad thing with its reason in one problem; what to do; nothing that is good."""
    assert error.exit_code == 2
    listed = error.problems if isinstance(error, Problems) else (error,)
    texts = ["\n".join(problem.lines()) for problem in listed]
    shown = "\n".join(texts)
    assert all(problem.fix for problem in listed), f"what to do is missing:\n{shown}"
    for name, reason in expect.problems.items():
        assert any(name in text and re.search(reason, text, re.IGNORECASE) for text in texts), (name, reason, shown)
    for name in expect.good:
        assert name not in shown, shown
    assert any(re.search(expect.fix, problem.fix) for problem in listed), (expect.fix, shown)


def check_rows(index: Index, expect: Good, data: Data, folder: Path) -> None:
    """Every row as stated, with its own pixels; every picture on the disk is a row or named in a notice."""
    rows, notices = list(index.rows), "\n".join(index.notices)
    if expect.unnamed:
        assert sorted(row.caption for row in rows) == sorted(expect.rows.values())
    else:
        assert sorted((row.place.name, row.caption) for row in rows) == sorted(expect.rows.items())
    for row in rows:
        name = row.place.name
        colour = COLOURS.get(row.caption.split(" ")[-1])
        if colour is not None:
            assert near(pixel(row.place, data.background), colour), (name, row.caption)
        if name in expect.sizes:
            assert (row.width, row.height) == expect.sizes[name]
        if name in expect.repeats:
            assert row.repeats == expect.repeats[name]
        if name in expect.concepts:
            assert row.concept == expect.concepts[name]
    for pattern in expect.notices:
        assert any(re.search(pattern, notice, re.IGNORECASE) for notice in index.notices), (pattern, notices)
    for name in expect.left_out:
        assert name in notices, (name, notices)
    there = pictures_in(folder) if expect.pictures is None else expect.pictures
    assert there == len(rows) + len(expect.left_out), notices


def pictures_in(folder: Path) -> int:
    """Pictures by their ending: files, and members of archives; masks are none."""
    names: list[str] = []
    for file in folder.rglob("*"):
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as packed:
                names += packed.namelist()
        elif ".tar" in file.name or file.suffix == ".tgz":
            with tarfile.open(file) as shard:
                names += shard.getnames()
        elif file.is_file():
            names.append(file.name)
    return sum(n.lower().endswith(_ENDINGS) and "-masklabel" not in n and not n.startswith("__MACOSX") for n in names)


def pixel(place: Any, background: str = "white") -> tuple[int, int, int]:
    """The middle pixel of the picture at a place, decoded as a run decodes it."""
    image = images.decode_bytes(place.read(), path=place, background=background).image
    return image.getpixel((image.width // 2, image.height // 2))  # type: ignore[return-value]


def near(one: tuple[int, ...], other: tuple[int, ...], by: int = 6) -> bool:
    """Equal but for the rounding of JPEG."""
    return all(abs(a - b) <= by for a, b in zip(one, other, strict=True))


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Turns a hang into a failure."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it hangs: no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def picture(colour: Any = "red", size: tuple[int, int] = (80, 64), kind: str = "PNG", **options: Any) -> bytes:
    """A file of one colour; `colour` may be an image."""
    image = colour if isinstance(colour, Image.Image) else Image.new("RGB", size, colour)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size: tuple[int, int] = (96, 96), kind: str = "JPEG") -> bytes:
    """A file with something in every block, so that damage shows."""
    return picture(Image.frombytes("RGB", size, _bytes(size[0] * size[1] * 3)), kind=kind)


def _bytes(count: int) -> bytes:
    state, out = 12345, bytearray()
    for _ in range(count):
        state = (1103515245 * state + 12345) & 0x7FFFFFFF
        out.append(state >> 23)
    return bytes(out)


def put(folder: Path, **captions: str) -> Path:
    """NAME.png with NAME.txt for each; the picture has the colour that the caption ends in."""
    return put_files(folder, captions)


def put_files(folder: Path, captions: Mapping[str, str], *, ending: str = ".txt", kind: str = "PNG") -> Path:
    """As `put`, for names that are no words."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, caption) in enumerate(captions.items()):
        colour = caption.strip().split(" ")[-1]
        suffix = {"PNG": ".png", "JPEG": ".jpg"}[kind]
        data = picture(colour if colour in COLOURS else "red", (80 + i, 64), kind)
        (folder / f"{name}{suffix}").write_bytes(data)
        (folder / f"{name}{ending}").write_text(caption, "utf-8")
    return folder


def members(captions: Mapping[str, str], prefix: str = "") -> dict[str, bytes]:
    """The same as members of an archive."""
    found: dict[str, bytes] = {}
    for i, (name, caption) in enumerate(captions.items()):
        found[f"{prefix}{name}.png"] = picture(caption.split(" ")[-1], (80 + i, 64))
        found[f"{prefix}{name}.txt"] = caption.encode()
    return found


def zipped(path: Path, content: Mapping[str, bytes]) -> Path:
    """A ZIP file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path | io.BytesIO, content: Mapping[str, bytes], mode: str = "w") -> Any:
    """A TAR file, compressed as `mode` says."""
    where: Settings = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode=mode, **where) as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def png_file(width: int, height: int, *, depth: int, colour_type: int, rows: bytes | None) -> bytes:
    """A PNG written by hand; without rows it is a header with nothing behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))]
    if rows is not None:
        stride = len(rows) // height
        lines = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
        parts.append(chunk(b"IDAT", zlib.compress(lines)))
    return b"".join([*parts, chunk(b"IEND", b"")])


def linear_profile() -> bytes:
    """An ICC profile with the primaries of sRGB and a gamma of 1 (ICC.1:2001, matrix-shaper)."""

    def xyz(x: float, y: float, z: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in (x, y, z))

    text = b"text\0\0\0\0none\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 7) + b"linear\0" + bytes(4 + 4 + 2 + 1 + 67)
    gamma = b"curv\0\0\0\0" + struct.pack(">I", 1) + struct.pack(">H", 256)
    tags = {
        b"desc": name,
        b"cprt": text,
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.4361, 0.2225, 0.0139),
        b"gXYZ": xyz(0.3851, 0.7169, 0.0971),
        b"bXYZ": xyz(0.1431, 0.0606, 0.7141),
        b"rTRC": gamma,
        b"gTRC": gamma,
        b"bTRC": gamma,
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        padded = content + bytes(-len(content) % 4)
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += padded
    header = struct.pack(">I", start + len(body)) + b"none" + struct.pack(">I", 0x02100000) + b"mntrRGB XYZ "
    header += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249))
    return header + bytes(128 - len(header)) + table + body


def link(target: Path | str, at: Path) -> None:
    """A symbolic link."""
    os.symlink(target, at)
