"""One run holds a folder, and what is written there is whole or absent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gesso.core import folder
from gesso.core.folder import RunFolder, write_atomic, write_json
from gesso.errors import LockedError, ResourceError

HOLD = """
import sys
from pathlib import Path
from gesso.core.folder import RunFolder
with RunFolder(Path(sys.argv[1])).held():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_prepare_makes_the_folder_and_leaves_no_probe(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "run")
    run.prepare()
    run.prepare()
    assert sorted(p.name for p in run.path.iterdir()) == ["logs", "samples"]


@pytest.mark.parametrize("way", ["run", "run/logs", "run/samples"])
def test_a_file_in_the_way_is_named(tmp_path: Path, way: str) -> None:
    (tmp_path / way).parent.mkdir(exist_ok=True)
    (tmp_path / way).write_text("mine")
    with pytest.raises(ResourceError, match="the run folder cannot be written") as caught:
        RunFolder(tmp_path / "run").prepare()
    assert caught.value.where == str(tmp_path / "run")
    assert "--output" in caught.value.fix
    assert (tmp_path / way).read_text() == "mine"


def test_a_full_disk_is_found_before_the_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        RunFolder(tmp_path / "run").prepare()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["logs", "samples"]


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=f"pid {other.pid} on ") as caught, run.held():
            pass
        assert caught.value.exit_code == 5
        assert caught.value.where == str(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
        with run.held():  # the dead leave no lock
            assert (tmp_path / ".lock").read_text().startswith(f"pid {os.getpid()} on ")
    finally:
        other.kill()
        other.communicate()


def test_the_lock_is_given_back_when_the_run_fails(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(ZeroDivisionError), run.held():
        raise ZeroDivisionError
    with run.held(), pytest.raises(LockedError), run.held():
        pass
    with run.held():
        pass


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    file.write_text("old and longer than the new one")
    write_json(file, {"step": 3})
    assert json.loads(file.read_text()) == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str, error: BaseException
) -> None:
    file = tmp_path / "status.json"
    file.write_text("old")

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(*((os, "fsync") if fails == "fsync" else (Path, "replace")), refuse)
    with pytest.raises(type(error)):
        write_atomic(file, b"new")
    assert file.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_contents_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut leaves an empty file under the good name."""
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        order.append(f"fsync {os.fstat(handle).st_size}")
        sync(handle)

    def replaced(path: Path, target: Path) -> Path:
        order.append("replace")
        return replace(path, target)

    monkeypatch.setattr(folder.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_atomic(tmp_path / "a", b"12345")
    write_atomic(tmp_path / "b", b"12345", durable=False)
    assert order == ["fsync 5", "replace", "replace"]
