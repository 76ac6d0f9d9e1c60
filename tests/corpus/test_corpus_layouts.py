"""Every common way to lay out a set: it is read as it is, with no renaming."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_helpers import (
    Case,
    Good,
    cases,
    check_rows,
    data_of,
    examine,
    members,
    picture,
    put_files,
    tarred,
    zipped,
)

from gesso.config import files
from gesso.config.run import Data
from gesso.data.index import build
from gesso.errors import UserError

THREE = {"a": "a thing in red", "b": "a thing in green", "c": "a thing in blue"}
ROWS = {f"{name}.png": caption for name, caption in THREE.items()}
MORE = {"d": "a thing in yellow", "e": "a thing in cyan"}
MORE_ROWS = {f"{name}.png": caption for name, caption in MORE.items()}


def flat(ending: str) -> Any:
    def make(folder: Path) -> None:
        for name, caption in THREE.items():
            text = json.dumps({"caption": caption}) if ending == ".json" else caption
            put_files(folder, {name: caption}, ending=ending)
            (folder / f"{name}{ending}").write_text(text)

    return make


def nested(folder: Path) -> None:
    put_files(folder / "hare" / "old", THREE)
    put_files(folder / "teapot", MORE)


def kohya(folder: Path) -> None:
    put_files(folder / "10_sks hare", THREE)
    put_files(folder / "2_teapot", MORE)


def kohya_project(folder: Path) -> dict[str, str]:
    kohya(folder / "img")
    (folder / "log").mkdir()
    (folder / "model").mkdir()
    return {"path": str(folder / "img")}


def kohya_without_captions(folder: Path) -> dict[str, str]:
    for name, text in (("3_red", "red"), ("1_in blue", "blue")):
        (folder / name).mkdir()
        (folder / name / f"{text}.png").write_bytes(picture(text))
    return {"missing_captions": "concept"}


def table(name: str, rows: list[dict[str, Any]], source: dict[str, str] | None = None, folder_name: str = "") -> Any:
    def make(folder: Path) -> dict[str, str] | None:
        put_files(folder / folder_name, THREE)
        for name_ in THREE:
            (folder / folder_name / f"{name_}.txt").unlink()
        write_table(folder / name, rows)
        return source

    return make


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


def archive(name: str, mode: str | None = None, prefix: str = "", extra: dict[str, bytes] | None = None) -> Any:
    def make(folder: Path) -> dict[str, str]:
        content = members(THREE, prefix) | (extra or {})
        path = zipped(folder / name, content) if mode is None else tarred(folder / name, content, mode)
        return {"path": str(path)}

    return make


def shards(pattern: str) -> Any:
    def make(folder: Path) -> dict[str, str]:
        tarred(folder / "set-00000.tar", members(THREE))
        tarred(folder / "set-00001.tar", members(MORE))
        return {"path": str(folder / pattern), "layout": "webdataset"}

    return make


def json_shard(folder: Path) -> dict[str, str]:
    content = {}
    for name, text in THREE.items():
        content[f"{name}.jpg"] = picture(text.split(" ")[-1], kind="JPEG")
        content[f"{name}.json"] = json.dumps({"caption": text, "width": 80}).encode()
    return {"path": str(tarred(folder / "set.tar", content)), "layout": "webdataset"}


def inside(image: Any, text: str = "text") -> pa.Table:
    return pa.Table.from_pylist([{"image": image(c.split(" ")[-1]), text: c} for c in THREE.values()])


def parquet(name: str, *, struct: bool, source: dict[str, str] | None = None, text: str = "text") -> Any:
    def make(folder: Path) -> dict[str, str]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)

        def cell(colour: str) -> Any:
            return {"bytes": picture(colour), "path": None} if struct else picture(colour)

        pq.write_table(inside(cell, text), folder / name)
        (folder / "README.md").write_text("# a set")
        return {"path": str(folder if "/" in name else folder / name)} | (source or {})

    return make


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


def imagefolder(**source: str) -> Any:
    def make(folder: Path) -> dict[str, str]:
        put_files(folder / "train", THREE)
        for name in THREE:
            (folder / "train" / f"{name}.txt").unlink()
        write_table(folder / "train" / "metadata.jsonl", named("file_name", "text"))
        return source

    return make


TABLES = [
    Case("metadata.jsonl", table("metadata.jsonl", named("file_name", "text")), Good(ROWS)),
    Case("metadata.csv", table("metadata.csv", named("file_name", "text")), Good(ROWS)),
    Case("metadata.parquet", table("metadata.parquet", named("file_name", "text")), Good(ROWS)),
    Case("columns called image and prompt", table("metadata.jsonl", named("image", "prompt")), Good(ROWS)),
    Case("columns called image_path and caption", table("metadata.csv", named("image_path", "caption")), Good(ROWS)),
    *(
        Case(f"odd columns in {name}", table(name, named("Datei", "Was es zeigt"), source), Good(ROWS))
        for name in ("list.jsonl", "list.csv", "list.parquet")
        for source in [{"metadata": name, "image_column": "Datei", "caption_column": "Was es zeigt"}]
    ),
    Case(
        "pictures in a sub-folder of the table",
        table("metadata.jsonl", named("file_name", "text", "pictures/"), folder_name="pictures"),
        Good(ROWS),
    ),
    Case(
        "pictures that the table does not list",
        table("metadata.jsonl", named("file_name", "text")[:2]),
        Good({k: v for k, v in ROWS.items() if k != "c.png"}, left_out=("c.png",)),
    ),
]
NAMELESS = Good(ROWS, unnamed=True, pictures=3)
ALL = Good(ROWS | MORE_ROWS)
LAYOUTS = [
    *(Case(f"folder with {ending}", flat(ending), Good(ROWS)) for ending in (".txt", ".caption", ".json")),
    Case("nested concepts", nested, Good(ROWS | MORE_ROWS, concepts={"a.png": "hare", "d.png": "teapot"})),
    Case("kohya tree", kohya, Good(ROWS | MORE_ROWS, repeats={"a.png": 10, "d.png": 2})),
    Case("kohya project", kohya_project, Good(ROWS | MORE_ROWS, repeats={"a.png": 10, "d.png": 2})),
    Case("kohya tree without captions", kohya_without_captions, Good({"red.png": "red", "blue.png": "in blue"})),
    *TABLES,
    Case("zip", archive("set.zip"), Good(ROWS)),
    Case("zip with one folder", archive("set.zip", prefix="my set/"), Good(ROWS)),
    Case("zip of a mac", archive("set.zip", extra={"__MACOSX/._a.png": b"\0\5\x16\7"}), Good(ROWS)),
    Case("zip of a kohya tree", archive("set.zip", prefix="4_hare/"), Good(ROWS, repeats={"a.png": 4})),
    Case("tar", archive("set.tar", "w"), Good(ROWS)),
    Case("tar.gz", archive("set.tar.gz", "w:gz"), Good(ROWS)),
    Case("tgz", archive("set.tgz", "w:gz"), Good(ROWS)),
    Case("shards by a pattern", shards("set-{00000..00001}.tar"), ALL),
    Case("shards in a folder", shards(""), ALL),
    Case("shard with json", json_shard, Good({k.replace("png", "jpg"): v for k, v in ROWS.items()})),
    Case("parquet file of bytes", parquet("set.parquet", struct=False), NAMELESS),
    Case("parquet file of structs", parquet("set.parquet", struct=True), NAMELESS),
    Case(
        "parquet file with a named column",
        parquet("set.parquet", struct=True, text="Was", source={"caption_column": "Was"}),
        NAMELESS,
    ),
    Case("parquet folder as on the hub", parquet("data/train-00000-of-00001.parquet", struct=True), NAMELESS),
    Case("save_to_disk", saved(layout="dataset"), NAMELESS),
    Case("save_to_disk found out", saved(), NAMELESS),
    Case("save_to_disk with splits", saved("train", "test", layout="dataset"), NAMELESS),
    Case("imagefolder", imagefolder(layout="dataset"), NAMELESS),
    Case("imagefolder found out", imagefolder(), Good(ROWS)),
]


@cases(LAYOUTS)
def test_each_layout_is_read_as_it_is(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


@pytest.fixture
def memory() -> Iterator[str]:
    store = fsspec.filesystem("memory")
    yield "memory://corpus"
    store.rm("/corpus", recursive=True)


class TestByUrl:
    def test_shards(self, memory: str, tmp_path: Path) -> None:
        for i, part in enumerate((THREE, MORE)):
            with fsspec.open(f"{memory}/set-{i}.tar", "wb") as file:
                file.write(tarred(io.BytesIO(), members(part)).getvalue())
        data = data_of(tmp_path / "set", {"path": f"{memory}/set-{{0..1}}.tar", "layout": "webdataset"})
        check_rows(build(data), Good(ROWS | MORE_ROWS, pictures=5), data, tmp_path)

    def test_a_folder(self, memory: str, tmp_path: Path) -> None:
        for name, content in members(THREE).items():
            with fsspec.open(f"{memory}/{name}", "wb") as file:
                file.write(content)
        data = data_of(tmp_path / "set", {"path": memory})
        check_rows(build(data), Good(ROWS, pictures=3), data, tmp_path)

    def test_a_missing_shard_is_named(self, memory: str, tmp_path: Path) -> None:
        with fsspec.open(f"{memory}/set-0.tar", "wb") as file:
            file.write(tarred(io.BytesIO(), members(THREE)).getvalue())
        with pytest.raises(UserError, match=r"set-1\.tar") as caught:
            build(data_of(tmp_path / "set", {"path": f"{memory}/set-{{0..1}}.tar", "layout": "webdataset"}))
        assert caught.value.exit_code == 2

    def test_a_damaged_picture_is_named(self, memory: str, tmp_path: Path) -> None:
        content = members(THREE) | {"b.png": b"broken"}
        with fsspec.open(f"{memory}/set-0.tar", "wb") as file:
            file.write(tarred(io.BytesIO(), content).getvalue())
        with pytest.raises(UserError, match=r"set-0\.tar.*b\.png"):
            build(data_of(tmp_path / "set", {"path": f"{memory}/set-0.tar", "layout": "webdataset"}))


def described(folder: Path) -> Data:
    """The data of a run file that takes them from dataset.toml."""
    (folder / "run.yaml").write_text("data: dataset.toml\ntraining: {steps: 1}\n")
    return files.load(folder / "run.yaml", sets=[f"data.cache={folder / 'cache'}"]).run.data


class TestOtherTools:
    def test_kohya_dataset_toml(self, tmp_path: Path) -> None:
        hare, teapot = put_files(tmp_path / "hare", THREE), put_files(tmp_path / "teapot", MORE, ending=".caption")
        (tmp_path / "dataset.toml").write_text(
            f"""[general]
shuffle_caption = false
caption_extension = ".txt"
[[datasets]]
resolution = 64
bucket_reso_steps = 16
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
  [[datasets.subsets]]
  image_dir = "{hare}"
  num_repeats = 3
  [[datasets.subsets]]
  image_dir = "{teapot}"
  caption_extension = ".caption"
"""
        )
        data = described(tmp_path)
        repeats = {"a.png": 3.0, "d.png": 1.0}
        check_rows(build(data), Good(ROWS | MORE_ROWS, repeats=repeats, pictures=5), data, tmp_path)

    def test_kohya_class_tokens_stand_in_for_captions(self, tmp_path: Path) -> None:
        put_files(tmp_path / "dogs", {"a": "a dog in red"})
        (tmp_path / "dogs" / "b.png").write_bytes(picture("blue"))
        (tmp_path / "dataset.toml").write_text(
            f"""[[datasets]]
resolution = 64
caption_extension = ".txt"
enable_bucket = true
bucket_reso_steps = 16
  [[datasets.subsets]]
  image_dir = "{tmp_path / "dogs"}"
  class_tokens = "a dog in blue"
"""
        )
        data = described(tmp_path)
        check_rows(build(data), Good({"a.png": "a dog in red", "b.png": "a dog in blue"}, pictures=2), data, tmp_path)

    def test_ai_toolkit_datasets(self, tmp_path: Path) -> None:
        one, other = put_files(tmp_path / "one", THREE), put_files(tmp_path / "other", MORE)
        (tmp_path / "job.yaml").write_text(
            f"""job: extension
config:
  name: hare
  process:
    - type: sd_trainer
      training_folder: {tmp_path}/out
      network: {{type: lora, linear: 4, linear_alpha: 4}}
      datasets:
        - {{folder_path: {one}, caption_ext: txt, resolution: 64, num_repeats: 2}}
        - {{folder_path: {other}, caption_ext: txt, resolution: 64}}
      train: {{batch_size: 1, steps: 5, lr: 1e-4, optimizer: adamw, dtype: bf16, noise_scheduler: ddpm}}
      model: {{name_or_path: stabilityai/stable-diffusion-xl-base-1.0, arch: sdxl}}
"""
        )
        data = files.load(tmp_path / "job.yaml", sets=[f"data.cache={tmp_path / 'cache'}"]).run.data
        repeats = {"a.png": 2.0, "d.png": 1.0}
        check_rows(build(data), Good(ROWS | MORE_ROWS, repeats=repeats, pictures=5), data, tmp_path)

    @pytest.mark.parametrize("offline", [True])
    def test_a_name_of_the_hub_without_a_network(
        self, tmp_path: Path, offline: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", str(int(offline)))
        with pytest.raises(UserError, match="nobody/no-such-set") as caught:
            build(data_of(tmp_path / "set", {"path": "hub:nobody/no-such-set"}))
        assert caught.value.exit_code == 2
        assert "offline" in str(caught.value).lower() or "network" in str(caught.value).lower()
