"""The cache: never stale, never read when damaged, and filled by any number of processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_helpers import CPU, PoolingFamily, data_for, folder_of, solid

from gesso.config.run import Buckets, Data
from gesso.core.events import Event, Progress, Warned
from gesso.data.buckets import Plan, Visit
from gesso.data.cache import Filled, LatentCache, Store, TextCache
from gesso.data.images import decode, fit
from gesso.data.index import build
from gesso.errors import NumericError, ResourceError, UserError


def ignore(_event: Event) -> None:
    pass


def plan_of(data: Data, **changes: object) -> Plan:
    return Plan(build(data).rows, data=data, batch_size=1, **changes)  # type: ignore[arg-type]


def latents(folder: Path, fingerprint: str = "vae", dtype: torch.dtype = torch.float32) -> LatentCache:
    return LatentCache(Store(folder), fingerprint=fingerprint, dtype=dtype, background="white")


def fill(cache: LatentCache, visits: Sequence[Visit], family: PoolingFamily, batch_size: int = 1) -> Filled:
    return cache.fill(visits, family=family, parts=None, device=CPU, emit=ignore, batch_size=batch_size)  # type: ignore[arg-type]


class TestLatents:
    def test_an_entry_is_the_encoding_of_the_fitted_picture(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 3, ((96, 64), (64, 64), (70, 110)))
        plan = plan_of(data_for(folder, cache=tmp_path / "c", flip=True))
        visits, family, cache = plan.renditions(range(200)), PoolingFamily(), latents(tmp_path / "c")
        assert fill(cache, visits, family) == Filled(6, 0, 0)
        for visit in visits:
            pixels, _ = fit(decode(visit.row.path), visit.fit)
            expected = PoolingFamily().encode_images(None, torch.from_numpy(pixels)[None])[0]
            assert torch.equal(cache.read(visit), expected)

    def test_editing_one_of_many_encodes_exactly_one(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 12)
        data = data_for(folder, cache=tmp_path / "c")
        family, cache = PoolingFamily(), latents(tmp_path / "c")
        assert fill(cache, plan_of(data).renditions(range(20)), family) == Filled(12, 0, 0)
        old = {v.row.path: cache.read(v) for v in plan_of(data).renditions(range(20))}
        solid(folder / "007.png", (64, 64), (1, 2, 3))
        visits = plan_of(data).renditions(range(20))
        assert fill(cache, visits, family) == Filled(1, 11, 0)
        assert family.images == 13
        changed = [v.row.path.name for v in visits if not torch.equal(cache.read(v), old[v.row.path])]
        assert changed == ["007.png"]

    def test_renaming_and_captions_encode_nothing(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 3)
        data = data_for(folder, cache=tmp_path / "c")
        cache = latents(tmp_path / "c")
        fill(cache, plan_of(data).renditions(range(3)), PoolingFamily())
        (folder / "000.png").rename(folder / "z.png")
        (folder / "000.txt").rename(folder / "z.txt")
        (folder / "001.txt").write_text("another caption")
        assert fill(cache, plan_of(data).renditions(range(3)), PoolingFamily()) == Filled(0, 3, 0)

    def test_everything_that_changes_an_encoding_changes_its_name(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 1, ((96, 70),))
        [visit] = plan_of(data_for(folder, cache=tmp_path / "c")).renditions(range(1))
        base = latents(tmp_path)
        keys = {
            base.key(visit),
            latents(tmp_path, fingerprint="another").key(visit),
            latents(tmp_path, dtype=torch.bfloat16).key(visit),
            LatentCache(Store(tmp_path), fingerprint="vae", dtype=torch.float32, background="black").key(visit),
            base.key(replace(visit, row=replace(visit.row, image="0" * 32))),
            *(
                base.key(replace(visit, fit=replace(visit.fit, **change)))
                for change in ({"bucket": (8, 8)}, {"resized": (300, 300)}, {"crop": (9, 9)}, {"flip": True})
            ),
        }
        assert len(keys) == 9
        same = replace(visit, epoch=5, repeat=2, caption="x", row=replace(visit.row, path=Path("/x"), caption="y"))
        assert base.key(same) == base.key(visit)

    def test_batches_have_one_shape_and_give_the_same_entries(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 7, ((96, 64), (64, 64)))
        visits = plan_of(data_for(folder, cache=tmp_path / "c")).renditions(range(7))
        one = latents(tmp_path / "one")
        fill(one, visits, PoolingFamily(), batch_size=1)
        for size in (2, 3):
            more = latents(tmp_path / f"by {size}")
            assert fill(more, visits, PoolingFamily(), batch_size=size) == Filled(7, 0, 0)
            assert all(torch.allclose(one.read(v), more.read(v), atol=1e-6) for v in visits)

    def test_nan_names_the_picture_and_stores_nothing(self, tmp_path: Path) -> None:
        class Overflowing(PoolingFamily):
            def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
                moments = super().encode_images(parts, pixels)
                return moments * float("nan") if self.images == 2 else moments

        folder = folder_of(tmp_path / "a", 3)
        visits = plan_of(data_for(folder, cache=tmp_path / "c")).renditions(range(3))
        cache = latents(tmp_path / "c")
        with pytest.raises(NumericError) as caught:
            fill(cache, visits, Overflowing())
        assert caught.value.where == str(visits[1].row.path)
        assert caught.value.exit_code == 4
        with pytest.raises(UserError, match="missing"):
            cache.read(visits[1])

    def test_a_picture_that_changes_after_the_scan_is_refused(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 2)
        visits = plan_of(data_for(folder, cache=tmp_path / "c")).renditions(range(2))
        solid(folder / "001.png", (64, 64), "blue")
        with pytest.raises(UserError, match=r"001\.png: the picture changed"):
            fill(latents(tmp_path / "c"), visits, PoolingFamily())

    def test_progress_ends_at_the_total(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 5)
        visits = plan_of(data_for(folder, cache=tmp_path / "c")).renditions(range(5))
        events: list[Event] = []
        cache = latents(tmp_path / "c")
        for _ in range(2):
            cache.fill(visits, family=PoolingFamily(), parts=None, device=CPU, emit=events.append)  # type: ignore[arg-type]
            counts = [(e.done, e.total) for e in events if isinstance(e, Progress)]
            assert counts == [(i, 5) for i in range(1, 6)]
            events.clear()


class TestDamage:
    @pytest.mark.parametrize("harm", ["truncate", "flip", "empty", "swap"])
    def test_a_damaged_entry_is_never_read_and_made_again(self, tmp_path: Path, harm: str) -> None:
        folder = folder_of(tmp_path / "a", 4)
        visits = plan_of(data_for(folder, cache=tmp_path / "c")).renditions(range(4))
        store = Store(tmp_path / "c")
        cache = LatentCache(store, fingerprint="vae", dtype=torch.float32, background="white")
        fill(cache, visits, PoolingFamily())
        good = cache.read(visits[0])
        path = store.path(cache.key(visits[0]))
        content = bytearray(path.read_bytes())
        match harm:
            case "truncate":
                path.write_bytes(content[:-5])
            case "flip":
                content[-3] ^= 1
                path.write_bytes(content)
            case "empty":
                path.write_bytes(b"")
            case "swap":
                path.write_bytes(store.path(cache.key(visits[1])).read_bytes())
        with pytest.raises(UserError, match="damaged"):
            cache.read(visits[0])
        events: list[Event] = []
        filled = cache.fill(visits, family=PoolingFamily(), parts=None, device=CPU, emit=events.append)  # type: ignore[arg-type]
        assert filled == Filled(1, 3, 1)
        assert [e.message for e in events if isinstance(e, Warned)] == ["1 damaged cache entries were made again"]
        assert torch.equal(cache.read(visits[0]), good)

    def test_any_single_byte(self, tmp_path: Path) -> None:
        store = Store(tmp_path)
        store.put("ab" * 32, {"x": torch.arange(6.0)})
        path = store.path("ab" * 32)
        content = path.read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 0x40
            path.write_bytes(changed)
            assert store.get("ab" * 32) is None, position
        path.write_bytes(content)
        entry = store.get("ab" * 32)
        assert entry is not None
        assert torch.equal(entry["x"], torch.arange(6.0))

    def test_an_entry_appears_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(_self: Path, _target: Path) -> Path:
            raise OSError(28, "No space left on device")

        store, key = Store(tmp_path), "ab" * 32
        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(ResourceError, match="No space left") as caught:
            store.put(key, {"x": torch.zeros(1)})
        assert caught.value.exit_code == 3
        assert not [p for p in tmp_path.rglob("*") if p.is_file()]

    def test_a_folder_that_cannot_be_written_is_a_resource_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ResourceError, match="the cache cannot be used"):
            Store(tmp_path / "file").put("ab" * 32, {"x": torch.zeros(1)})


class TestText:
    def test_entries_are_each_captions_own(self, tmp_path: Path) -> None:
        family = PoolingFamily()
        cache = TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.float32)
        captions = ["a dog", "", "a café", "a dog"]
        filled = cache.fill(captions, family=family, parts=None, emit=ignore, batch_size=2)  # type: ignore[arg-type]
        assert filled == Filled(3, 0, 0)
        for caption in captions:
            expected = PoolingFamily().encode_text(None, [caption])
            assert torch.equal(cache.read(caption)["embeddings"], expected["embeddings"][0])
        assert cache.fill(captions, family=family, parts=None, emit=ignore) == Filled(0, 3, 0)  # type: ignore[arg-type]
        other = TextCache(Store(tmp_path), fingerprint="clip, chunked", dtype=torch.float32)
        with pytest.raises(UserError, match="caption 'a dog': its cache entry is missing"):
            other.read("a dog")

    def test_nan_names_the_caption(self, tmp_path: Path) -> None:
        class Broken(PoolingFamily):
            def encode_text(self, _parts: object, captions: list[str]) -> dict[str, torch.Tensor]:
                return {"x": torch.full((len(captions), 2), float("inf"))}

        cache = TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.float32)
        with pytest.raises(NumericError, match="'a dog'"):
            cache.fill(["a dog"], family=Broken(), parts=None, emit=ignore)  # type: ignore[arg-type]


def _fill_in_a_process(data: Data, folder: Path, results: multiprocessing.Queue[tuple[int, ...]]) -> None:
    torch.set_num_threads(1)
    results.put(tuple(fill(latents(folder), plan_of(data).renditions(range(30)), PoolingFamily())))


def test_two_processes_may_fill_one_folder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", 30)
    data = data_for(folder, cache=tmp_path / "c", buckets=Buckets(step=16))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=_fill_in_a_process, args=(data, tmp_path / "c", results)) for _ in range(2)]
    for process in processes:
        process.start()
    filled = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert all(encoded + reused == 30 for encoded, reused, _ in filled)
    assert all(damaged == 0 for *_, damaged in filled)
    assert fill(latents(tmp_path / "c"), plan_of(data).renditions(range(30)), PoolingFamily()) == Filled(0, 30, 0)
    assert not [p for p in (tmp_path / "c").rglob(".*") if p.is_file()], "temporary files are left"
