"""A path that leads to no pictures: what was looked for, what was found, and the nearest that works."""

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
    cases,
    data_of,
    examine,
    members,
    put_files,
    tarred,
    zipped,
)

from gesso.data.index import build
from gesso.errors import UserError

THREE = {"a": "a thing in red", "b": "a thing in green", "c": "a thing in blue"}
ROWS = {f"{name}.png": caption for name, caption in THREE.items()}
MORE = {"d": "a thing in yellow", "e": "a thing in cyan"}
MORE_ROWS = {f"{name}.png": caption for name, caption in MORE.items()}


def kohya(folder: Path) -> None:
    put_files(folder / "10_sks hare", THREE)
    put_files(folder / "2_teapot", MORE)


def write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(str(v) for v in row.values()) for row in rows)]
        file.write_text("\n".join(lines) + "\n")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def named(image: str, caption: str, prefix: str = "") -> list[dict[str, Any]]:
    return [{image: f"{prefix}{name}.png", "size": i, caption: text} for i, (name, text) in enumerate(THREE.items())]


def saved(*splits: str, **source: str) -> Any:
    def make(folder: Path) -> dict[str, str]:
        import datasets
        from PIL import Image

        def rows(captions: dict[str, str]) -> Any:
            content = {
                "image": [Image.new("RGB", (80, 64), c.split(" ")[-1]) for c in captions.values()],
                "text": list(captions.values()),
            }
            return datasets.Dataset.from_dict(content).cast_column("image", datasets.Image())

        kept = rows(THREE)
        if splits:
            kept = datasets.DatasetDict({split: rows(THREE if split == "train" else MORE) for split in splits})
        kept.save_to_disk(str(folder / "saved"))
        return {"path": str(folder / "saved")} | source

    return make


def nothing(folder: Path) -> None:
    pass


def texts_only(folder: Path) -> None:
    for name in "abc":
        (folder / f"{name}.txt").write_text("a caption")


def misspelt(folder: Path) -> dict[str, str]:
    put_files(folder / "images", THREE)
    return {"path": str(folder / "imges")}


def sibling(folder: Path) -> dict[str, str]:
    put_files(folder / "photos", THREE)
    (folder / "empty").mkdir()
    return {"path": str(folder / "empty")}


def only_zip(folder: Path) -> None:
    zipped(folder / "photos.zip", members(THREE))


def only_heic(folder: Path) -> None:
    for name in "ab":
        (folder / f"{name}.heic").write_bytes(b"\0\0\0\x18ftypheic")


def a_picture(folder: Path) -> dict[str, str]:
    put_files(folder, THREE)
    return {"path": str(folder / "a.png")}


def inner_kohya(folder: Path) -> dict[str, str]:
    kohya(folder)
    return {"path": str(folder / "10_sks hare"), "layout": "kohya"}


def outer_kohya(folder: Path) -> dict[str, str]:
    kohya(folder / "img")
    return {"layout": "kohya"}


def with_layout(layout: str) -> Any:
    def make(folder: Path) -> dict[str, str]:
        put_files(folder, THREE)
        return {"layout": layout}

    return make


def named_table(folder: Path) -> dict[str, str]:
    put_files(folder, THREE)
    write_table(folder / "captions.jsonl", named("file_name", "text"))
    return {"metadata": "caption.jsonl"}


def missing_shards(folder: Path) -> dict[str, str]:
    tarred(folder / "set-0.tar", members(THREE))
    return {"path": str(folder / "set-{0..3}.tar"), "layout": "webdataset"}


def nested_zip(folder: Path) -> dict[str, str]:
    zipped(folder / "in.zip", members(THREE))
    path = zipped(folder / "out.zip", {"in.zip": (folder / "in.zip").read_bytes()})
    (folder / "in.zip").unlink()
    return {"path": str(path)}


def hidden_only(folder: Path) -> None:
    put_files(folder / ".photos", THREE)


WRONG = [
    Case("empty folder", nothing, Bad({"set": "no picture|empty|nothing"})),
    Case("folder of texts", texts_only, Bad({"set": r"3 .*\.?txt|\.txt"})),
    Case("misspelt folder", misspelt, Bad({"imges": "no such|not"}, fix=r"set/images\b")),
    Case("empty folder beside the right one", sibling, Bad({"empty": "nothing"}, fix=r"set/photos\b")),
    Case("folder with a zip", only_zip, Bad({"set": r"\.zip"}, fix=r"photos\.zip")),
    Case("folder of heic", only_heic, Bad({"set": r"2 \.heic"}, fix="convert")),
    Case("path of a picture", a_picture, Bad({"a.png": "picture"}, fix="folder")),
    Case("inner folder of a kohya tree", inner_kohya, Bad({"10_sks hare": "REPEATS_CONCEPT"}, fix=r"/set\b(?!/10)")),
    Case("folder around a kohya tree", outer_kohya, Bad({"set": "REPEATS_CONCEPT"}, fix=r"/img\b")),
    Case("flat folder taken for a kohya tree", with_layout("kohya"), Bad({"set": "REPEATS_CONCEPT"}, fix="to folder")),
    Case("folder without the table", with_layout("metadata"), Bad({"set": r"metadata\.jsonl"}, fix="to folder")),
    Case("folder without shards", with_layout("webdataset"), Bad({"set": r"\.tar.*3 \.png"}, fix="to folder")),
    Case("folder without parquet", with_layout("parquet"), Bad({"set": r"parquet.*3 \.png"}, fix="to folder")),
    Case("a table by a near name", named_table, Bad({"caption.jsonl": "no such"}, fix=r"captions\.jsonl")),
    Case("missing shards", missing_shards, Bad({f"set-{i}.tar": "no such" for i in (1, 2, 3)}, good=("set-0.tar: ",))),
    Case("zip in a zip", nested_zip, Bad({"out.zip": r"1 \.zip"}, fix="unpack|extract")),
    Case("all is hidden", hidden_only, Bad({"set": "no picture"}, fix=r"set/\.photos.*hidden")),
    Case("split that is not there", saved("train", "test", split="val"), Bad({"saved": "'val'.*train, test"})),
]


@cases(WRONG)
def test_a_wrong_place_says_what_is_near(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


def test_an_empty_result_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    folder = tmp_path / "project" / "notes"
    folder.mkdir(parents=True)
    (folder / "readme.md").write_text("x")
    (folder / "one.pdf").write_bytes(b"%PDF")
    put_files(tmp_path / "project" / "10_hare", THREE)
    with pytest.raises(UserError) as caught:
        build(data_of(folder))
    said = str(caught.value)
    assert ".png" in said, "what was looked for"
    assert ".pdf" in said, "what was found"
    assert "10_hare" in said or str(tmp_path / "project") in said.replace(str(folder), ""), "the nearest that works"
