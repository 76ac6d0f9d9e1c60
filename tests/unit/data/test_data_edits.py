"""The record of edits: every change can be taken back to the byte, also after a crash at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gesso.data.editing import journal as edits
from gesso.data.editing.journal import Journal, Transaction
from gesso.errors import LockedError, Problems, UserError


def state(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes and every folder, the record aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if ".gesso" not in name.parts:
            found[str(name)] = None if path.is_dir() else path.read_bytes()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n")
    (folder / "b.png").write_bytes(bytes(range(256)))
    (folder / "sub" / "c.txt").write_bytes(b"three")
    return folder


def change_much(edit: Transaction, folder: Path) -> None:
    """Every kind of change, some of them twice on one file."""
    edit.write(folder / "a.txt", b"ONE")
    edit.write(folder / "new" / "deep" / "n.txt", b"new")
    edit.rename(folder / "b.png", folder / "moved" / "b2.png")
    edit.remove(folder / "sub" / "c.txt")
    edit.write(folder / "a.txt", b"TWO")
    edit.rename(Path("a.txt"), Path("sub/c.txt"))


def test_undo_restores_every_byte_and_redo_repeats_it(folder: Path) -> None:
    before = state(folder)
    journal = Journal(folder)
    with journal.begin("change much") as edit:
        change_much(edit, folder)
    after = state(folder)
    assert after == {
        "moved": None,
        "moved/b2.png": bytes(range(256)),
        "new": None,
        "new/deep": None,
        "new/deep/n.txt": b"new",
        "sub": None,
        "sub/c.txt": b"TWO",
    }
    for _ in range(2):
        (undone,) = journal.undo()
        assert (undone.command, undone.changes) == ("change much", 6)
        assert state(folder) == before
        assert [u.command for u in journal.redo()] == ["change much"]
        assert state(folder) == after


def test_several_commands_are_taken_back_and_repeated_in_their_order(folder: Path) -> None:
    journal = Journal(folder)
    states = [state(folder)]
    for text in (b"1", b"2", b"3"):
        with journal.begin(text.decode()) as edit:
            edit.write(folder / "a.txt", text)
        states.append(state(folder))
    assert [u.command for u in journal.undo(last=2)] == ["3", "2"]
    assert state(folder) == states[1]
    assert [u.command for u in journal.undo()] == ["1"]
    assert state(folder) == states[0]
    with pytest.raises(UserError, match="nothing to undo"):
        journal.undo()
    assert [u.command for u in journal.redo(last=2)] == ["1", "2"]
    assert state(folder) == states[2]
    assert [u.command for u in journal.redo()] == ["3"]
    assert state(folder) == states[3]
    journal.undo()
    with journal.begin("another") as edit:
        edit.write(folder / "sub" / "c.txt", b"x")
    with pytest.raises(UserError, match="nothing to redo"):
        journal.redo()


def test_the_record_says_when_what_and_which_hashes(folder: Path) -> None:
    with Journal(folder).begin("caption-edit --lower") as edit:
        edit.write(folder / "a.txt", b"ONE")
        edit.rename(folder / "b.png", folder / "c.png")
    lines = [json.loads(line) for line in (folder / ".gesso" / "edits.jsonl").read_text().splitlines()]
    begin, write, rename, end = lines
    assert begin["command"] == "caption-edit --lower"
    assert begin["time"].startswith("20")
    assert write["before"] == hashlib.sha256(b"\xef\xbb\xbfone\r\n").hexdigest()
    assert write["after"] == hashlib.sha256(b"ONE").hexdigest()
    assert (rename["path"], rename["to"]) == ("b.png", "c.png")
    assert end == {"end": begin["begin"], "state": "done", "made": 2}
    originals = folder / ".gesso" / "originals" / begin["begin"]
    assert [p.read_bytes() for p in originals.iterdir()] == [b"\xef\xbb\xbfone\r\n"]


def test_what_changes_nothing_is_not_recorded(folder: Path) -> None:
    journal = Journal(folder)
    with journal.begin("nothing") as edit:
        edit.write(folder / "sub" / "c.txt", b"three")
    assert journal.entries() == []
    assert not (folder / ".gesso" / "edits.jsonl").exists()


def test_undo_refuses_by_name_what_was_changed_since(folder: Path) -> None:
    journal = Journal(folder)
    with journal.begin("change much") as edit:
        change_much(edit, folder)
    (folder / "sub" / "c.txt").write_bytes(b"by hand")
    (folder / "b.png").write_bytes(b"in the way")
    (folder / "new" / "deep" / "n.txt").unlink()
    untouched = state(folder)
    with pytest.raises(Problems) as caught:
        journal.undo()
    named = {Path(problem.where).name for problem in caught.value.problems}
    assert named == {"c.txt", "b.png", "n.txt"}
    assert state(folder) == untouched


def test_even_a_forced_undo_loses_nothing(folder: Path) -> None:
    before = state(folder)
    journal = Journal(folder)
    with journal.begin("change") as edit:
        edit.write(folder / "a.txt", b"ONE")
        edit.rename(folder / "b.png", folder / "c.png")
    (folder / "a.txt").write_bytes(b"by hand")
    (folder / "b.png").write_bytes(b"in the way")
    by_hand = state(folder)
    journal.undo(force=True)
    assert state(folder) == before
    journal.redo()
    assert state(folder) == by_hand


def test_a_damaged_original_is_not_put_back(folder: Path) -> None:
    journal = Journal(folder)
    with journal.begin("change") as edit:
        edit.write(folder / "a.txt", b"ONE")
    (kept,) = (folder / ".gesso" / "originals").rglob("*a.txt")
    kept.write_bytes(b"other")
    with pytest.raises(Problems, match=r"original of a\.txt"):
        journal.undo(force=True)
    assert (folder / "a.txt").read_bytes() == b"ONE"


def test_an_error_in_the_middle_leaves_what_was_done_and_undo_takes_it_back(folder: Path) -> None:
    before = state(folder)
    journal = Journal(folder)
    with pytest.raises(RuntimeError), journal.begin("fails") as edit:
        edit.write(folder / "a.txt", b"ONE")
        raise RuntimeError
    assert (folder / "a.txt").read_bytes() == b"ONE"
    assert journal.undo()[0].changes == 1
    assert state(folder) == before


CRASH = """
import os, sys
from pathlib import Path
from gesso.data.editing import journal as edits
from gesso.data.editing.journal import Journal
sys.path.insert(0, {tests!r})
from unit.data.test_data_edits import change_much
folder, countdown = Path({folder!r}), {moment}

def counted(function):
    def call(*given, **named):
        global countdown
        countdown -= 1
        if countdown == 0:
            os._exit(9)
        return function(*given, **named)
    return call

for name in ("rename", "replace", "unlink", "mkdir"):
    setattr(Path, name, counted(getattr(Path, name)))
os.link, os.fsync = counted(os.link), counted(os.fsync)
if {undo}:
    Journal(folder).undo()
else:
    with Journal(folder).begin("crash") as edit:
        change_much(edit, folder)
"""


def crash(folder: Path, moment: int, *, undo: bool) -> bool:
    """Whether the command died at that step of its work, as with kill -9."""
    script = CRASH.format(tests=str(Path(__file__).parents[2]), folder=str(folder), moment=moment, undo=undo)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode in (0, 9), process.stderr
    return process.returncode == 9


@pytest.mark.parametrize("moment", [2, 4, 5, 7, 9, 11, 13, 14, 17, 19, 21])
def test_a_crash_at_any_moment_can_be_undone(folder: Path, moment: int) -> None:
    before = state(folder)
    assert crash(folder, moment, undo=False)
    journal = Journal(folder)
    if without_temporary(state(folder)) != before:
        journal.undo()
    assert without_temporary(state(folder)) == before


@pytest.mark.parametrize("moment", [3, 6, 9, 12, 16, 20])
def test_a_crash_while_undoing_can_be_undone(folder: Path, moment: int) -> None:
    before = state(folder)
    journal = Journal(folder)
    with journal.begin("change much") as edit:
        change_much(edit, folder)
    after = state(folder)
    assert crash(folder, moment, undo=True)
    journal.undo()
    assert without_temporary(state(folder)) == before
    journal.redo()
    assert without_temporary(state(folder)) == after


def without_temporary(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """Without hidden leftovers of a write, and without folders that were still empty."""
    files = {name for name, content in found.items() if content is not None and not Path(name).name.startswith(".")}
    kept = files | {str(parent) for name in files for parent in Path(name).parents}
    return {name: content for name, content in found.items() if name in kept or name == "sub"}


def test_a_line_torn_by_a_crash_is_passed_over_and_a_damaged_one_named(folder: Path) -> None:
    before = state(folder)
    journal = Journal(folder)
    with journal.begin("one") as edit:
        edit.write(folder / "a.txt", b"ONE")
    record = folder / ".gesso" / "edits.jsonl"
    with record.open("ab") as file:
        file.write(b'{"begin": "x", "ki')
    with journal.begin("two") as edit:
        edit.write(folder / "a.txt", b"TWO")
    assert [entry.command for entry in journal.entries()] == ["one", "two"]
    journal.undo(last=2)
    assert state(folder) == before
    lines = record.read_bytes().split(b"\n")
    record.write_bytes(b"\n".join([lines[0], b"garbage", *lines[2:]]))
    with pytest.raises(UserError, match=r"edits\.jsonl:2"):
        journal.undo()


def test_another_process_is_kept_out(folder: Path) -> None:
    with Journal(folder).begin("one"), pytest.raises(LockedError):
        Journal(folder).undo()


def test_nothing_outside_is_touched_unless_it_is_named(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    journal = Journal(folder)
    with journal.begin("outside") as edit:
        for path in (other / "x", Path("../x"), Path(".gesso/edits.jsonl")):
            with pytest.raises(UserError, match=r"outside|itself"):
                edit.write(path, b"x")
    before = state(folder)
    with Journal(folder, also=[other]).begin("split") as edit:
        edit.rename(folder / "b.png", other / "deep" / "b.png")
    with pytest.raises(UserError, match="--also"):
        journal.undo()
    assert (other / "deep" / "b.png").is_file()
    Journal(folder, also=[other]).undo()
    assert state(folder) == before
    assert not other.exists()


def test_a_hostile_record_reaches_nothing(folder: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    value = hashlib.sha256(b"precious").hexdigest()
    home = folder / ".gesso"
    home.mkdir()
    begin = {"begin": "x", "kind": "edit", "command": "", "time": ""}
    end = {"end": "x", "state": "done", "made": 1}
    for change in (
        {"op": "write", "path": str(victim), "before": None, "after": value},
        {"op": "rename", "path": "stolen", "to": str(victim), "before": value, "after": value},
        {"op": "remove", "path": "stolen", "before": value, "kept": "../../../../victim"},
    ):
        lines = (json.dumps(line) for line in (begin, {"change": "x", **change}, end))
        (home / "edits.jsonl").write_text("".join(f"{line}\n" for line in lines))
        with pytest.raises(UserError, match=r"outside|elsewhere"):
            Journal(folder).undo(force=True)
        assert victim.read_bytes() == b"precious"
        assert not (folder / "stolen").exists()


def test_a_link_is_not_edited_through(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.txt").write_bytes(b"x")
    (folder / "link.txt").symlink_to(tmp_path / "elsewhere.txt")
    with Journal(folder).begin("link") as edit, pytest.raises(UserError, match="link"):
        edit.write(folder / "link.txt", b"y")
    assert (tmp_path / "elsewhere.txt").read_bytes() == b"x"


def test_a_move_between_file_systems_keeps_the_bytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(edits.errno.EXDEV, "other file system")

    before = state(folder)
    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "rename", refuse)
    with Journal(folder).begin("change much") as edit:
        change_much(edit, folder)
    assert state(folder)["moved/b2.png"] == bytes(range(256))
    Journal(folder).undo()
    assert state(folder) == before


def test_a_file_in_the_way_stops_a_move(folder: Path) -> None:
    with Journal(folder).begin("move") as edit, pytest.raises(UserError, match="exists"):
        edit.rename(folder / "b.png", folder / "a.txt")
    assert (folder / "a.txt").read_bytes() == b"\xef\xbb\xbfone\r\n"
