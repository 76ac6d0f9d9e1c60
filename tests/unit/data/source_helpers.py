"""Sources made for a test, and what is found in them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from gesso.config.run import Source
from gesso.data.sources import Found, Record, collect, records
from gesso.errors import Problems


def look(path: object, **fields: object) -> Found:
    return collect(Source.model_validate({"path": path} | fields))


def found(path: object, **fields: object) -> list[Record]:
    return records([Source.model_validate({"path": path} | fields)])[0]


def problems(path: object, **fields: object) -> str:
    with pytest.raises(Problems) as caught:
        found(path, **fields)
    return str(caught.value)


def notices(path: object, **fields: object) -> str:
    return "\n".join(records([Source.model_validate({"path": path} | fields)])[1])


def captions(rows: list[Record]) -> dict[str, str]:
    return {r.place.name: r.caption for r in rows}


def jsonl(folder: Path, *rows: object, name: str = "metadata.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return file


def png(colour: object = "red", size: tuple[int, int] = (8, 8)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], *, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def colours(rows: list[Record]) -> dict[str, tuple[int, ...]]:
    """Caption -> the first pixel of the picture that its place leads to."""
    return {r.caption: Image.open(io.BytesIO(r.place.read())).convert("RGB").getpixel((0, 0)) for r in rows}  # type: ignore[misc]


RED, BLUE = (255, 0, 0), (0, 0, 255)
