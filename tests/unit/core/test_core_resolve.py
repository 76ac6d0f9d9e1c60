"""A name becomes files, or the reason why not; a fingerprint is a function of names and contents alone."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from gesso.core import resolve
from gesso.errors import UserError


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    """What would be asked of the hub."""
    asked: list[tuple[str, str | None, str]] = []

    def download(name: str, revision: str | None, patterns: list[str], key: str) -> Path:
        asked.append((name, revision, key))
        return Path("/from/the/hub")

    monkeypatch.setattr(resolve, "_download", download)
    return asked


def test_folders_and_files_are_taken_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_hub: list[object]
) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("models/mine", "./models/mine", "~/models/mine", str(tmp_path / "models/mine")):
        assert resolve.locate(name) == tmp_path / "models" / "mine"
    assert resolve.locate("model.safetensors") == tmp_path / "model.safetensors"
    assert not no_hub, "a folder that is here is not looked for on the hub"


@pytest.mark.parametrize(
    "name", ["./models/mine", "/models/mine", "~/models/mine", "mine", "a/b/c", "models/mine.safetensors", "../mine"]
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name: str, no_hub: list[object]) -> None:
    with pytest.raises(UserError, match="there is no folder or file") as caught:
        resolve.locate(name, key="model.vae")
    assert caught.value.what.endswith(name)
    assert caught.value.where == "model.vae"
    assert not no_hub


def test_owner_and_name_mean_the_hub(no_hub: list[object]) -> None:
    found = resolve.locate("someone/model-1.0", revision="abc", key="model.config")
    assert found == Path("/from/the/hub")
    assert no_hub == [("someone/model-1.0", "abc", "model.config")]


@pytest.mark.parametrize("ending", ["ckpt", "pt", "pth", "bin"])
def test_pickles_are_refused_unopened(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"model.{ending}"
    file.write_bytes(b"")
    with pytest.raises(UserError, match="is a pickle file, which can run code") as caught:
        resolve.locate(str(file))
    assert "safetensors" in caught.value.fix


def test_caches_go_where_they_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GESSO_CACHE", str(tmp_path / "c"))
    assert resolve.cache_root() == tmp_path / "c"
    monkeypatch.setenv("GESSO_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve.cache_root() == tmp_path / ".cache" / "gesso"


def files(folder: Path, **contents: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content)
    return [folder / name for name in contents]


def test_a_fingerprint_is_of_names_contents_and_order(tmp_path: Path) -> None:
    def printed(paths: list[Path]) -> str:
        return resolve.fingerprint(paths, memo=tmp_path / "memo.json")

    a, b = files(tmp_path / "one", a="first", b="second")
    text = "".join(f"{p.name}={hashlib.sha256(p.read_bytes()).hexdigest()}\n" for p in (a, b))
    first = printed([a, b])
    assert first == hashlib.sha256(text.encode()).hexdigest()
    assert printed(files(tmp_path / "zz", a="first", b="second")) == first, "places must not matter"
    assert printed([a, b, a]) == first
    others = [printed([b, a]), printed([a]), printed(files(tmp_path / "two", a="second", b="first"))]
    others.append(printed(files(tmp_path / "three", a="first", c="second")))
    assert len({first, *others}) == 5


def test_only_what_changed_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memo = tmp_path / "deep" / "memo.json"
    paths = files(tmp_path / "one", a="first", b="second")
    read: list[str] = []
    honest = resolve.file_sha256

    def counted(path: Path) -> str:
        read.append(path.name)
        return honest(path)

    monkeypatch.setattr(resolve, "file_sha256", counted)
    before = resolve.fingerprint(paths, memo=memo)
    assert (resolve.fingerprint(paths, memo=memo), read) == (before, ["a", "b"])
    paths[1].write_text("third!")  # as long as before
    os.utime(paths[1], ns=(0, 12345))
    after = resolve.fingerprint(paths, memo=memo)
    assert after != before
    assert read == ["a", "b", "b"]
    linked = tmp_path / "a"
    linked.symlink_to(paths[0])
    resolve.fingerprint([linked], memo=memo)
    assert read == ["a", "b", "b"], "the hub's cache is made of links; the contents are known"


@pytest.mark.parametrize("damage", ["{", "[]", '{"x": 1}', "null", "\x00"])
def test_a_damaged_memory_is_forgotten(tmp_path: Path, damage: str) -> None:
    memo = tmp_path / "memo.json"
    paths = files(tmp_path / "one", a="first")
    wanted = resolve.fingerprint(paths, memo=memo)
    memo.write_text(damage)
    assert resolve.fingerprint(paths, memo=memo) == wanted
    assert list(json.loads(memo.read_text())) == [str(paths[0])]


def test_a_memory_that_cannot_be_kept_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    paths = files(tmp_path / "one", a="first")
    wanted = resolve.fingerprint(paths, memo=tmp_path / "memo.json")
    assert resolve.fingerprint(paths, memo=tmp_path / "file" / "memo.json") == wanted


def test_a_packaged_model_is_found_by_its_name() -> None:
    folder = resolve.locate("micro:sdxl")
    assert (folder / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["micro:sd15", "micro:", "micro:../weights/sdxl", "micro:sdxl/unet"])
def test_a_packaged_model_that_is_not_there_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(UserError, match=r"the package holds no model (.|\n)*micro:clip, micro:identity, micro:sdxl"):
        resolve.locate(name)
