"""Tables and archives: what they list is found inside the set and nowhere else, and faults are named by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_helpers import (
    Bad,
    Case,
    Good,
    cases,
    examine,
    link,
    members,
    picture,
    put_files,
    tarred,
    zipped,
)

THREE = {"a": "a thing in red", "b": "a thing in green", "c": "a thing in blue"}


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


LEADS_OUT = "outside|out of|leads|relative|absolute|inside"
NAMES_OUT = ("../secret.png", "sub/../../secret.png", "/etc/secret.png", "..\\secret.png", "C:\\secret.png")


@pytest.mark.parametrize("name", NAMES_OUT)
@pytest.mark.parametrize("kind", ["table", "zip", "tar"])
def test_no_name_leads_out_of_the_set(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "secret.png").write_bytes(picture("red"))

    def make(folder: Path) -> dict[str, str]:
        put_files(folder, {"fine": "red"})
        if kind == "table":
            write_table(folder / "metadata.jsonl", [{"file_name": n, "text": "red"} for n in ("fine.png", name)])
            return {}
        content = members({"fine": "red"}) | {name: picture("red"), name.replace(".png", ".txt"): b"red"}
        return {"path": str(zipped(folder / "s.zip", content) if kind == "zip" else tarred(folder / "s.tar", content))}

    examine(Case(name, make, Bad({name: LEADS_OUT})), tmp_path)


def test_a_table_does_not_reach_out_by_a_link(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        put_files(folder, {"fine": "red"})
        (folder.parent / "secret.png").write_bytes(picture("red"))
        link(folder.parent / "secret.png", folder / "x.png")
        write_table(folder / "metadata.jsonl", [{"file_name": n, "text": "red"} for n in ("fine.png", "x.png")])

    examine(Case("link", make, Bad({"x.png": LEADS_OUT}, good=("fine.png",))), tmp_path)


LISTED = '{"file_name": "fine.png", "text": "in red"}\n'


def listing(name: str, text: str | bytes, **source: str) -> Any:
    def make(folder: Path) -> dict[str, str]:
        put_files(folder, {"fine": "red"})
        (folder / "fine.txt").unlink()
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return source

    return make


J, C = "metadata.jsonl", "metadata.csv"
LISTINGS = [
    Case("BOM in jsonl", listing(J, "\ufeff" + LISTED), Good({"fine.png": "in red"})),
    Case("BOM in csv", listing(C, "\ufefffile_name,text\nfine.png,in red\n"), Good({"fine.png": "in red"})),
    Case("blank lines in jsonl", listing(J, "\n" + LISTED + "\n\n"), Good({"fine.png": "in red"})),
    Case(
        "quotes in csv", listing(C, 'file_name,text\n"fine.png","a, ""b"",\nred"\n'), Good({"fine.png": 'a, "b",\nred'})
    ),
    Case("no such column", listing(J, LISTED, caption_column="txt"), Bad({J: "(?s)txt.*text|text.*txt"})),
    Case("no column of pictures", listing(J, '{"name": "x", "text": "red"}\n'), Bad({J: "(?s)image_column|file_name"})),
    Case("no column of captions", listing(J, '{"file_name": "fine.png", "size": 3}\n'), Bad({J: "size"})),
    Case("bad line of json", listing(J, LISTED + '{"file_name": "fine.png", \n'), Bad({J: r":2\b|line 2"})),
    Case("line that is a list", listing(J, LISTED + '["fine.png", "red"]\n'), Bad({J: r":2\b|line 2"})),
    Case("row without the column", listing(J, LISTED + '{"file_name": "fine.png"}\n'), Bad({J: r":2\b|line 2"})),
    Case("row without the picture", listing(J, LISTED + '{"text": "red"}\n'), Bad({J: r":2\b|line 2"})),
    Case(
        "row with no caption",
        listing(J, LISTED[:-9] + '"}\n' + '{"file_name": "fine.png", "text": null}\n'),
        Bad({J: r":2\b|line 2"}),
    ),
    Case("ragged csv", listing(C, "file_name,text\nfine.png,in red\nfine.png,red, green\n"), Bad({C: r":3\b|line 3"})),
    Case("short line of csv", listing(C, "file_name,text\nfine.png,in red\nfine.png\n"), Bad({C: r":3\b|line 3"})),
    Case("latin-1 csv", listing(C, "file_name,text\nfine.png,K\xe4the\n".encode("latin-1")), Bad({C: "utf-8"})),
    Case(
        "latin-1 jsonl",
        listing(J, '{"file_name": "fine.png", "text": "K\xe4the"}\n'.encode("latin-1")),
        Bad({J: "utf-8"}),
    ),
    Case("table without rows", listing(J, ""), Bad({J: "empty|no row|nothing|no picture"})),
    Case("head alone", listing(C, "file_name,text\n"), Bad({C: "empty|no row|nothing|no picture"})),
    Case(
        "picture that is not there",
        listing(J, LISTED + '{"file_name": "gone.png", "text": "x"}\n'),
        Bad({"gone.png": r"(?s).*(:2\b|line 2)"}),
    ),
    Case(
        "address instead of a picture",
        listing(J, '{"file_name": "https://x.y/z.png", "text": "x"}\n'),
        Bad({"https://x.y/z.png": "."}),
    ),
    Case("folder instead of a picture", listing(J, '{"file_name": ".", "text": "x"}\n'), Bad({J: r":1\b|line 1"})),
    Case(
        "control characters in json",
        listing(J, '{"file_name": "fine.png", "text": "a \\u0000 b"}\n'),
        Bad({J: "control|NUL"}),
    ),
]


@cases(LISTINGS)
def test_tables(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


def broken(name: str, cut: int, mode: str | None) -> Any:
    def make(folder: Path) -> dict[str, str]:
        content = members(THREE) | {"big.bin": bytes(range(256)) * 100}
        path = zipped(folder / name, content) if mode is None else tarred(folder / name, content, mode)
        path.write_bytes(path.read_bytes()[:-cut])
        return {"path": str(path)}

    return make


def one_bad_member(name: str, mode: str | None) -> Any:
    def make(folder: Path) -> dict[str, str]:
        content = members(THREE) | {"b.png": b"broken"}
        path = zipped(folder / name, content) if mode is None else tarred(folder / name, content, mode)
        return {"path": str(path)}

    return make


def bad_cell(folder: Path) -> dict[str, str]:
    cells = [picture("red"), b"broken", picture("blue"), None]
    pq.write_table(pa.table({"image": cells, "text": ["in red", "in green", "in blue", "none"]}), folder / "s.parquet")
    return {"path": str(folder / "s.parquet")}


def no_caption_in_shard(folder: Path) -> dict[str, str]:
    content = members(THREE)
    del content["b.txt"]
    return {"path": str(tarred(folder / "s.tar", content)), "layout": "webdataset"}


def foreign(name: str) -> Any:
    def make(folder: Path) -> dict[str, str]:
        (folder / name).write_bytes(b"no archive, no table")
        return {"path": str(folder / name)}

    return make


PACKED = [
    Case("cut zip", broken("s.zip", 300, None), Bad({"s.zip": "."})),
    Case("cut tar", broken("s.tar", 12000, "w"), Bad({"s.tar": "."})),
    Case("cut tar.gz", broken("s.tar.gz", 100, "w:gz"), Bad({"s.tar.gz": "."})),
    Case("bad picture in a zip", one_bad_member("s.zip", None), Bad({"b.png": r"s\.zip"}, good=("a.png",))),
    Case("bad picture in a tar", one_bad_member("s.tar", "w"), Bad({"b.png": r"s\.tar"}, good=("a.png",))),
    Case("bad picture in a tar.gz", one_bad_member("s.tgz", "w:gz"), Bad({"b.png": r"s\.tgz"}, good=("a.png",))),
    Case("bad cells of a parquet table", bad_cell, Bad({"s.parquet": r"row 2\b"})),
    Case("no caption in a shard", no_caption_in_shard, Bad({"b.": "caption"}, good=("a.png",))),
    *(
        Case(f"text named {name}", foreign(name), Bad({name: "."}))
        for name in ("s.zip", "s.tar", "s.tar.gz", "s.parquet")
    ),
]


@cases(PACKED)
def test_packed_sets_with_faults(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)
