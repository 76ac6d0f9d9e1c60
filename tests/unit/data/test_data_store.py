"""The store: nothing damaged is ever given out, nothing is copied, and upkeep removes only what it says."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from gesso.data import store as stores
from gesso.data import upkeep
from gesso.data.store import Array, Store
from gesso.errors import ResourceError

KEY = "ab" * 32
HOUR, DAY = 3600, 86400


def array(values: np.ndarray) -> Array:
    return Array(str(values.dtype), values.shape, np.ascontiguousarray(values).reshape(-1).view(np.uint8))


def key(number: int) -> str:
    return f"{number:064x}"[::-1]


def put(store: Store, name: str = KEY, *, kind: str = "latents", encoder: str = "vae", size: int = 6) -> Path:
    store.put(
        name, {"x": array(np.arange(size, dtype=np.float32))}, kind=kind, encoder=encoder, of=f"picture {name[:4]}"
    )
    return store.path(name)


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


class TestEntries:
    def test_arrays_come_back_bit_for_bit_with_what_they_are_of(self, tmp_path: Path) -> None:
        store, rng = Store(tmp_path), np.random.default_rng(0)
        arrays = {
            "moments": rng.normal(size=(8, 5, 3)).astype(np.float32),
            "mask": rng.random((1, 7)),
            "scalar": np.array(3, np.int64),
            "empty": np.zeros((0, 4), np.float32),
        }
        store.put(KEY, {n: array(a) for n, a in arrays.items()}, kind="latents", encoder="vae", of="a.png", made=12.5)
        entry = store.get(KEY)
        assert entry is not None
        assert entry.about == ("latents", "vae", "a.png", 12.5)
        assert list(entry.arrays) == list(arrays)
        for name, expected in arrays.items():
            found = entry.arrays[name]
            assert (found.dtype, found.shape) == (str(expected.dtype), expected.shape)
            assert np.array_equal(found.data.view(expected.dtype).reshape(expected.shape), expected)

    def test_arrays_are_aligned_views_of_one_buffer(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        sizes = {"a": 1, "b": 63, "c": 4096, "d": 5}
        store.put(KEY, {n: array(np.zeros(s, np.uint8)) for n, s in sizes.items()}, kind="k", encoder="e", of="")
        entry = store.get(KEY)
        assert entry is not None
        buffers = [found.data.base for found in entry.arrays.values()]
        assert buffers[0] is not None
        assert all(buffer is buffers[0] for buffer in buffers)
        assert buffers[0].nbytes == store.path(KEY).stat().st_size
        begin = buffers[0].ctypes.data
        assert all((found.data.ctypes.data - begin) % 64 == 0 for found in entry.arrays.values())
        assert all(found.data.ctypes.data % 16 == 0 for found in entry.arrays.values())

    def test_every_byte_counts(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        path = put(store)
        content = path.read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 0x40
            path.write_bytes(changed)
            assert store.get(KEY) is None, position
        for length in range(len(content)):
            path.write_bytes(content[:length])
            assert store.get(KEY) is None, length
        path.write_bytes(content + b"\0")
        assert store.get(KEY) is None
        path.write_bytes(content)
        assert store.get(KEY) is not None

    def test_an_entry_under_another_name_is_damaged(self, tmp_path: Path) -> None:
        store, other = Store(tmp_path), "ab" + "cd" * 31
        put(store).replace(store.path(other))
        assert store.get(other) is None
        assert store.check(other) == "damaged"
        assert store.get(KEY) is None
        assert store.check(KEY) == "missing"

    def test_an_entry_appears_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, replace, seen = Store(tmp_path), Path.replace, []

        def watched(written: Path, target: Path) -> Path:
            seen.append((target, target.exists(), written.stat().st_size, written.parent == target.parent))
            return replace(written, target)

        monkeypatch.setattr(Path, "replace", watched)
        path = put(store)
        assert seen == [(path, False, path.stat().st_size, True)]
        assert store.get(KEY) is not None

    def test_a_failed_write_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_self: Path, _target: Path) -> Path:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(ResourceError, match="No space left") as caught:
            put(Store(tmp_path))
        assert caught.value.exit_code == 3
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]

    def test_a_folder_that_cannot_be_used_is_a_resource_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ResourceError, match="the cache cannot be used"):
            put(Store(tmp_path / "file"))
        with pytest.raises(ResourceError, match="the cache cannot be used"):
            Store(tmp_path / "file").get(KEY)

    def test_a_bad_sector_is_one_damaged_entry(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_path: str) -> None:
            raise OSError(errno.EIO, "Input/output error")

        store = Store(tmp_path)
        path = put(store)
        os.utime(path)
        monkeypatch.setattr(stores, "_load", fail)
        assert store.get(KEY) is None
        assert store.check(KEY) == "damaged"
        found = upkeep.verify(tmp_path)
        assert [one.of for one in found.damaged] == ["picture abab"]


class TestSeal:
    """What may be trusted without being read."""

    def test_a_new_entry_is_trusted(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        assert store.glance(KEY) == "missing"
        put(store)
        assert store.glance(KEY) == "good"

    def test_any_write_copy_or_swap_breaks_it(self, tmp_path: Path) -> None:
        store = Store(tmp_path / "a")
        path = put(store)
        content = path.read_bytes()
        path.write_bytes(content)
        assert store.glance(KEY) == "unsure"
        assert store.check(KEY) == "good"
        assert store.glance(KEY) == "good", "a check that succeeds seals"
        shutil.copytree(tmp_path / "a", tmp_path / "b")  # times are copied too
        copied = Store(tmp_path / "b")
        assert copied.path(KEY).stat().st_mtime_ns == path.stat().st_mtime_ns
        assert copied.glance(KEY) == "unsure"
        other = put(store, key(2))
        times = path.stat().st_mtime_ns
        other.replace(path)
        os.utime(path, ns=(times, times))
        assert store.glance(KEY) == "unsure"
        assert store.check(KEY) == "damaged"

    def test_a_change_that_hides_itself_is_found_by_reading_and_then_remembered(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        path = put(store)
        times = path.stat().st_mtime_ns
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        with path.open("r+b") as file:
            file.write(content)
        os.utime(path, ns=(times, times))
        assert store.glance(KEY) == "good", "as bits that a disk loses"
        assert store.get(KEY) is None
        assert store.check(KEY) == "damaged"

    @pytest.mark.parametrize("use", ["get", "glance", "check"])
    def test_use_is_remembered_and_keeps_it(self, tmp_path: Path, use: str) -> None:
        store = Store(tmp_path)
        path = put(store)
        recent = path.stat().st_mtime_ns
        {"get": store.get, "glance": store.glance, "check": store.check}[use](KEY)
        assert path.stat().st_mtime_ns == recent, "a use within minutes of the last writes nothing"
        stores._seal(path, KEY, path.stat(), int(time.time()) - 5 * HOUR)
        {"get": store.get, "glance": store.glance, "check": store.check}[use](KEY)
        assert time.time() - path.stat().st_mtime < 60
        assert store.glance(KEY) == "good"


class TestStats:
    def test_counts_by_kind_and_encoder(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        paths = [put(store, key(i), encoder="vae 1" if i < 3 else "vae 2") for i in range(5)]
        paths += [put(store, key(9), kind="text", encoder="clip")]
        age(paths[0], 3 * DAY)
        old = tmp_path / "00" / "1234.entry"
        old.write_bytes(b"0" * 100)
        paths[3].write_bytes(b"not an entry")
        (tmp_path / "00" / ".77-being-written").write_bytes(b"12345")
        (tmp_path / "notes.txt").write_text("not ours")
        found = upkeep.stats(tmp_path)
        size = paths[0].stat().st_size
        counted = {(part.kind, part.encoder): (part.entries, part.bytes) for part in found.parts}
        assert counted == {
            ("latents", "vae 1"): (3, 3 * size),
            ("latents", "vae 2"): (1, size),
            ("text", "clip"): (1, paths[5].stat().st_size),
            (upkeep.OLD, ""): (1, 100),
            (upkeep.UNKNOWN, ""): (1, 12),
        }
        assert (found.unfinished, found.unfinished_bytes) == (1, 5)
        assert found.entries == 7
        first = found.parts[0]
        assert first.newest - first.oldest == pytest.approx(3 * DAY, abs=60)

    def test_a_cache_that_is_not_there_yet_is_empty(self, tmp_path: Path) -> None:
        assert upkeep.stats(tmp_path / "none") == upkeep.Contents((), 0, 0)
        assert upkeep.verify(tmp_path / "none").good == 0
        assert upkeep.prune(tmp_path / "none", larger_than=0).entries == 0


class TestVerify:
    def test_names_the_damaged_and_removes_only_them(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        paths = [put(store, key(i)) for i in range(6)]
        age(paths[1], 10 * DAY)
        used = paths[1].stat().st_mtime
        content = bytearray(paths[2].read_bytes())
        content[-2] ^= 8
        paths[2].write_bytes(content)
        paths[4].write_bytes(paths[5].read_bytes())
        (tmp_path / "00").mkdir(exist_ok=True)
        (tmp_path / "00" / "1234.entry").write_bytes(b"old")
        told: list[tuple[int, int]] = []
        found = upkeep.verify(tmp_path, progress=lambda done, total: told.append((done, total)))
        assert told == [(i, 6) for i in range(1, 7)]
        assert (found.good, found.skipped) == (4, 1)
        assert {(one.path, one.of, one.deleted) for one in found.damaged} == {
            (paths[2], "picture 2000", False),
            (paths[4], "picture 5000", False),
        }
        assert int(paths[1].stat().st_mtime) == int(used), "a check is not a use"
        assert store.glance(key(1)) == "good", "what was found good need not be read again"
        again = upkeep.verify(tmp_path, delete=True)
        assert all(one.deleted for one in again.damaged)
        assert len(again.damaged) == 2
        assert [path.exists() for path in paths] == [True, True, False, True, False, True]
        assert upkeep.verify(tmp_path).damaged == ()


class TestPrune:
    def test_least_recently_used_first_until_small_enough(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        paths = [put(store, key(i)) for i in range(6)]
        size = paths[0].stat().st_size
        for i, days in enumerate([5, 9, 7, 1, 3, 2]):
            age(paths[i], days * DAY)
        planned = upkeep.prune(tmp_path, larger_than=3 * size + 1, dry_run=True)
        assert all(path.exists() for path in paths)
        found = upkeep.prune(tmp_path, larger_than=3 * size + 1)
        assert found == planned
        assert (found.entries, found.bytes, found.kept_entries, found.kept_bytes) == (3, 3 * size, 3, 3 * size)
        assert [path.exists() for path in paths] == [False, False, False, True, True, True]
        assert found.newest == pytest.approx(time.time() - 5 * DAY, abs=60)

    def test_what_was_not_used_for_so_long(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        paths = [put(store, key(i)) for i in range(3)]
        for path, days in zip(paths, [31, 29, 40], strict=True):
            age(path, days * DAY)
        stores._seal(paths[2], key(2), paths[2].stat(), int(time.time()) - 40 * DAY)
        store.get(key(2))
        found = upkeep.prune(tmp_path, unused_for=timedelta(days=30))
        assert found.entries == 1
        assert [path.exists() for path in paths] == [False, True, True], "reading an entry is a use"

    def test_nothing_of_the_last_hour_goes(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        paths = [put(store, key(i)) for i in range(3)]
        age(paths[0], 2 * HOUR)
        age(paths[1], 0.9 * HOUR)
        found = upkeep.prune(tmp_path, unused_for=timedelta(0), larger_than=0)
        assert (found.entries, found.kept_entries) == (1, 2)
        assert [path.exists() for path in paths] == [False, True, True]

    def test_without_a_wish_only_old_leftovers_go(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        path = put(store)
        age(path, 1000 * DAY)
        left, writing = path.with_name(".1-left"), path.with_name(".2-writing")
        for file in (left, writing):
            file.write_bytes(b"123")
        age(left, 1.1 * DAY)
        found = upkeep.prune(tmp_path)
        assert (found.entries, found.leftovers, found.leftover_bytes) == (0, 1, 3)
        assert (path.exists(), left.exists(), writing.exists()) == (True, False, True)

    def test_what_is_used_while_pruning_stays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = Store(tmp_path)
        path = put(store)
        age(path, 50 * DAY)
        remove = upkeep._remove_unused

        def used_first(file: upkeep._File) -> bool:
            assert store.check(KEY) == "good"
            return remove(file)

        monkeypatch.setattr(upkeep, "_remove_unused", used_first)
        found = upkeep.prune(tmp_path, larger_than=0)
        assert (found.entries, found.kept_entries) == (0, 1)
        assert path.exists()


def test_neither_store_nor_upkeep_needs_torch() -> None:
    program = "import sys, gesso.data.upkeep, gesso.data.store, gesso.cli.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
