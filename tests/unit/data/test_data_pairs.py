"""Pairs from the index to the batch: both pictures alike in all but what they show; what teaches nothing left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import CPU, PoolingFamily, data_for, folder_of, settle
from pair_helpers import noise, table
from PIL import Image, PngImagePlugin
from source_helpers import jsonl

from gesso.config.run import Buckets, Data, RunConfig, Source
from gesso.core.batch import Batch
from gesso.data import pairs, scans
from gesso.data.cache import LatentCache, LiveLatents, Store
from gesso.data.images import decode, fit
from gesso.data.index import Index, build
from gesso.data.loader import Loader
from gesso.data.plan import Plan
from gesso.errors import Problems

Make = Callable[..., Loader]


def loader_for(data: Data, *, live: bool = False, workers: int = 0, steps: int = 12, batch_size: int = 2) -> Loader:
    plan = Plan(build(data).rows, data=data, batch_size=batch_size, seed=5)
    family = PoolingFamily()
    latents: LatentCache | LiveLatents
    if live:
        latents = LiveLatents(family=family, parts=None, device=CPU, background="white")  # type: ignore[arg-type]
    else:
        assert data.cache is not None
        latents = LatentCache(Store(data.cache / "e"), fingerprint="v", dtype=torch.float32, background="white")
        latents.fill(plan.renditions(range(steps)), family=family, parts=None, device=CPU, emit=lambda _e: None)  # type: ignore[arg-type]
    return Loader(plan, latents=latents, text=None, family=family, workers=workers, stop=steps)  # type: ignore[arg-type]


def batches(loader: Loader, steps: int = 12) -> list[Batch]:
    with loader:
        return [batch for step in range(steps) for batch in loader.window(step)]


def same(one: Batch, other: Batch) -> bool:
    assert one.rejected is not None
    assert other.rejected is not None
    tensors = all(torch.equal(vars(one)[k], vars(other)[k]) for k in ("latents", "rejected", "noise", "u", "weights"))
    return tensors and all(vars(one)[k] == vars(other)[k] for k in ("geometry", "captions", "files", "draws"))


VARIED = {"crop": "random", "flip": True, "rotation": 12.0, "colour": 0.3}
SIZES = ((64, 64), (96, 48), (50, 100))


def varied(folder: Path, cache: Path, **changes: object) -> Data:
    return data_for(folder, cache=cache, **(VARIED | changes))


class TestBatches:
    def test_swapping_the_columns_swaps_the_latents_and_nothing_else(self, tmp_path: Path) -> None:
        data = varied(table(tmp_path / "a", 7, sizes=SIZES), tmp_path / "c")
        other = varied(table(tmp_path / "b", 7, sizes=SIZES, swapped=True), tmp_path / "c")
        ours, theirs = batches(loader_for(data)), batches(loader_for(other))
        assert len(ours) == len(theirs) >= 12
        for one, two in zip(ours, theirs, strict=True):
            assert one.rejected is not None
            assert two.rejected is not None
            assert torch.equal(one.latents, two.rejected)
            assert torch.equal(one.rejected, two.latents)
            assert not torch.equal(one.latents, one.rejected)
            for name in ("noise", "u", "weights"):
                assert torch.equal(vars(one)[name], vars(two)[name])
            assert (one.captions, one.geometry, one.draws) == (two.captions, two.geometry, two.draws)

    def test_one_picture_in_two_files_has_the_same_latents_on_both_sides(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        rows = []
        for i in range(5):
            path = noise(folder / f"{i}.png", i, SIZES[i % 3])
            told = PngImagePlugin.PngInfo()
            told.add_text("made by", "somebody else")
            with Image.open(path) as image:
                image.save(folder / f"twin{i}.png", pnginfo=told)
            rows.append({"chosen": f"{i}.png", "rejected": f"twin{i}.png", "caption": str(i)})
        jsonl(folder, *rows)
        for batch in batches(loader_for(varied(folder, tmp_path / "c"))):
            assert batch.rejected is not None
            assert torch.equal(batch.latents, batch.rejected)

    def test_the_preferred_picture_is_in_the_latents(self, tmp_path: Path) -> None:
        folder = table(tmp_path / "a", 4)
        for batch in batches(loader_for(data_for(folder, cache=tmp_path / "c"))):
            for i, caption in enumerate(batch.captions):
                assert batch.rejected is not None
                number = caption.removeprefix("prompt ")
                for name, latents in ((f"good{number}", batch.latents), (f"bad{number}", batch.rejected)):
                    image = np.asarray(Image.open(folder / f"{name}.png"), np.float64).transpose(2, 0, 1) / 127.5 - 1
                    cells = image.reshape(3, 8, 8, 8, 8).mean((2, 4))
                    assert np.abs(latents[i].numpy() - cells).max() < 0.01
                assert batch.files[i] == f"{folder}/good{number}.png and {folder}/bad{number}.png"

    def test_live_is_cached_and_threads_change_nothing(self, tmp_path: Path) -> None:
        data = varied(table(tmp_path / "a", 7, sizes=SIZES), tmp_path / "c")
        cached = batches(loader_for(data))
        for other in (loader_for(data, live=True), loader_for(data, workers=4)):
            assert all(map(same, cached, batches(other)))

    def test_splitting_a_step_changes_no_pair(self, tmp_path: Path) -> None:
        data = varied(table(tmp_path / "a", 8, sizes=SIZES), tmp_path / "c")
        seen = []
        for size in (1, 4):
            found = {}
            for batch in batches(loader_for(data, batch_size=size), 8 // size):
                assert batch.rejected is not None
                for i, sample in enumerate(batch.draws.samples):
                    found[sample] = (batch.latents[i], batch.rejected[i])
            seen.append(found)
        assert seen[0].keys() == seen[1].keys()
        assert all(torch.equal(a, b) for k in seen[0] for a, b in zip(seen[0][k], seen[1][k], strict=True))

    def test_plain_pictures_have_none(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 3)
        assert all(batch.rejected is None for batch in batches(loader_for(data_for(folder, cache=tmp_path / "c"))))

    def test_held_out_pairs(self, tmp_path: Path) -> None:
        data = data_for(table(tmp_path / "a", 6), cache=tmp_path / "c", validation={"fraction": 0.3})
        with loader_for(data) as loader:
            held = loader.validation_batches(3)
            assert len(held) >= 3
            assert all(batch.rejected is not None and batch.rejected.shape == batch.latents.shape for batch in held)

    def test_moving_to_a_device_takes_both(self, tmp_path: Path) -> None:
        [batch, *_] = batches(loader_for(data_for(table(tmp_path / "a", 2), cache=tmp_path / "c")))
        moved = batch.to("meta")
        assert moved.rejected is not None
        assert moved.rejected.device.type == "meta"

    def test_a_smaller_rival_of_the_same_shape_is_fitted_alike(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        large = noise(folder / "large.png", 1, (128, 96))
        with Image.open(large) as image:
            image.resize((96, 72)).save(folder / "small.png")
        jsonl(folder, {"chosen": "large.png", "rejected": "small.png", "caption": "x"})
        [batch] = batches(loader_for(data_for(folder, cache=tmp_path / "c"), batch_size=1), 1)
        assert batch.rejected is not None
        assert batch.geometry[0][:2] == (96, 128), "the size that is told is the preferred picture's"
        visit = Plan(build(data_for(folder, cache=tmp_path / "c")).rows,
                     data=data_for(folder, cache=tmp_path / "c"), batch_size=1).window(0)[0]  # fmt: skip
        pixels, _ = fit(decode(folder / "small.png"), visit.fit)
        mean = torch.nn.functional.avg_pool2d(torch.from_numpy(pixels), 8)
        assert (batch.rejected[0] - mean).abs().max() < 0.01


class TestCache:
    def test_each_picture_has_one_entry_however_many_pairs_it_is_in(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        for i in range(3):
            noise(folder / f"{i}.png", i)
        every = [(0, 1), (1, 2), (0, 2)]
        jsonl(folder, *({"chosen": f"{a}.png", "rejected": f"{b}.png", "caption": "x"} for a, b in every))
        data = data_for(folder, cache=tmp_path / "c")
        plan = Plan(build(data).rows, data=data, batch_size=1)
        assert len(plan.renditions(range(3))) == 3
        loader_for(data, batch_size=1, steps=3)
        assert len(list((tmp_path / "c" / "e").rglob("*.gesso"))) == 3

    def test_a_rival_that_changes_afterwards_is_named(self, tmp_path: Path) -> None:
        folder = table(tmp_path / "a", 2)
        data = data_for(folder, cache=tmp_path / "c")
        plan = Plan(build(data).rows, data=data, batch_size=1)
        noise(folder / "bad1.png", 999)
        latents = LiveLatents(family=PoolingFamily(), parts=None, device=CPU, background="white")  # type: ignore[arg-type]
        [visit] = [v for v in plan.window(0) + plan.window(1) if v.caption == "prompt 1"]
        with pytest.raises(Exception, match=r"bad1\.png"):
            latents.read(pairs.sides(visit)[1])


def dropped(index: Index) -> str:
    return "\n".join(notice for notice in index.notices if "left out" in notice)


class TestWhatTeachesNothing:
    def rows(self, tmp_path: Path, *rows: tuple[str, str, str], **changes: object) -> Index:
        for i in range(4):
            noise(tmp_path / "a" / f"{i}.png", i)
        noise(tmp_path / "a" / "wide.png", 7, (96, 64))
        noise(tmp_path / "a" / "half.png", 8, (32, 32))
        listed = [{"chosen": f"{a}.png", "rejected": f"{b}.png", "caption": text} for a, b, text in rows]
        jsonl(tmp_path / "a", {"chosen": "0.png", "rejected": "1.png", "caption": "good"}, *listed)
        return build(data_for(tmp_path / "a", cache=tmp_path / "c", **changes))

    def captions(self, index: Index) -> list[str]:
        return sorted(row.caption for row in index.rows)

    def test_the_same_picture_twice(self, tmp_path: Path) -> None:
        index = self.rows(tmp_path, ("2", "2", "same"))
        assert self.captions(index) == ["good"]
        twice = f"{tmp_path}/a/2.png and {tmp_path}/a/2.png"
        assert dropped(index) == f"{tmp_path}/a: 1 of 2 pairs left out: both pictures are the same: {twice}"

    def test_another_shape_is_left_out_and_never_stretched(self, tmp_path: Path) -> None:
        index = self.rows(tmp_path, ("2", "wide", "x"), ("wide", "2", "y"), ("half", "3", "smaller"))
        assert self.captions(index) == ["good", "smaller"]
        assert "1 pair of one shape in two sizes: both are fitted alike" in "\n".join(index.notices)
        assert "2 of 4 pairs left out: the two pictures are not of one shape" in dropped(index)

    def test_a_smaller_one_where_nothing_may_be_enlarged(self, tmp_path: Path) -> None:
        index = self.rows(tmp_path, ("half", "3", "smaller"), buckets=Buckets(step=16, upscale=False))
        assert self.captions(index) == ["good"]
        assert "data.buckets.upscale is false" in dropped(index)

    def test_duplicates_count_once_and_contradictions_not_at_all(self, tmp_path: Path) -> None:
        index = self.rows(
            tmp_path, ("0", "1", "good"), ("2", "3", "both"), ("3", "2", "both"), ("2", "3", "other caption")
        )
        assert self.captions(index) == ["good", "other caption"]
        assert "1 of 5 pairs left out: the same pair is there already" in dropped(index)
        assert "2 of 5 pairs left out: another pair says the opposite" in dropped(index)

    def test_two_captions_of_one_pair_are_two_samples(self, tmp_path: Path) -> None:
        index = self.rows(tmp_path, ("0", "1", "another"), ("1", "0", "opposite taste"))
        assert self.captions(index) == ["another", "good", "opposite taste"]
        assert len({row.id for row in index.rows}) == 3

    def test_all_of_it_is_told_again_from_memory(self, tmp_path: Path) -> None:
        first = self.rows(tmp_path, ("2", "2", "same"))
        settle()
        data = data_for(tmp_path / "a", cache=tmp_path / "c")
        build(data)
        assert build(data) == first


class TestShapes:
    @pytest.mark.parametrize(
        ("one", "other", "expected"),
        [
            ((1024, 1024), (1024, 1024), True),
            ((1024, 768), (512, 384), True),
            ((1000, 667), (500, 334), True),
            ((1000, 667), (500, 333), True),
            ((1000, 667), (500, 335), False),
            ((1024, 768), (768, 1024), False),
            ((1024, 1024), (1024, 1023), False),
            ((1920, 1080), (1280, 720), True),
            ((1920, 1080), (1024, 1024), False),
            ((333, 500), (666, 1000), True),
        ],
    )
    def test_a_resize_in_proportion_and_nothing_else(
        self, one: tuple[int, int], other: tuple[int, int], expected: bool
    ) -> None:
        assert pairs.same_shape(one, other) is expected
        assert pairs.same_shape(other, one) is expected


class TestIndex:
    def test_the_fingerprint_sees_who_won(self, tmp_path: Path) -> None:
        ours = build(data_for(table(tmp_path / "a", 3), cache=tmp_path / "c"))
        theirs = build(data_for(table(tmp_path / "b", 3, swapped=True), cache=tmp_path / "c"))
        assert {row.id for row in ours.rows} == {row.id for row in theirs.rows}
        assert ours.fingerprint != theirs.fingerprint
        assert {row.image for row in ours.rows} == {row.rejected_hash for row in theirs.rows}

    def test_a_changed_rival_is_looked_at_again(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = table(tmp_path / "a", 3)
        data = data_for(folder, cache=tmp_path / "c")
        settle()
        before = build(data)
        read: list[str] = []
        original = scans._decode
        monkeypatch.setattr(
            scans, "_decode", lambda record, *rest: read.append(record.caption) or original(record, *rest)
        )
        assert build(data) == before
        assert not read
        noise(folder / "bad1.png", 555)
        settle()
        after = build(data)
        assert read == ["prompt 1"]
        assert after.fingerprint != before.fingerprint

    def test_a_picture_with_two_rivals_is_remembered_with_each(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        for i in range(3):
            noise(folder / f"{i}.png", i)
        rows = [{"chosen": "0.png", "rejected": f"{i}.png", "caption": f"over {i}"} for i in (1, 2)]
        jsonl(folder, *rows)
        settle()
        data = data_for(folder, cache=tmp_path / "c")
        before = {row.caption: row.rejected_hash for row in build(data).rows}
        jsonl(folder, *rows, {"chosen": "1.png", "rejected": "2.png", "caption": "new"})
        after = {row.caption: row.rejected_hash for row in build(data).rows}
        assert len(set(before.values())) == 2
        assert {text: after[text] for text in before} == before

    def test_a_rival_that_cannot_be_read_is_named(self, tmp_path: Path) -> None:
        folder = table(tmp_path / "a", 3)
        (folder / "bad1.png").write_bytes(b"no picture")
        data = data_for(folder, cache=tmp_path / "c")
        with pytest.raises(Problems, match=r"bad1\.png"):
            build(data)
        assert len(build(data.model_copy(update={"skip_bad": True})).rows) == 2

    def test_no_picture_is_both_trained_on_and_held_out(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        rows = []
        for i in range(12):  # chains of three pictures: a over b, b over c
            names = [noise(folder / f"{i}{letter}.png", 10 * i + k).name for k, letter in enumerate("abc")]
            rows += [{"chosen": a, "rejected": b, "caption": str(i)} for a, b in ((names[0], names[1]), names[1:])]
        jsonl(folder, *rows)
        index = build(data_for(folder, cache=tmp_path / "c", validation={"fraction": 0.3}))
        sides = [{name for row in rows for name in (row.image, row.rejected_hash)}
                 for rows in (index.train, index.validation)]  # fmt: skip
        assert min(map(len, sides)) >= 3
        assert not sides[0] & sides[1]
        assert len(index.rows) == 24

    def test_pairs_that_are_all_connected_cannot_be_shared(self, tmp_path: Path) -> None:
        folder = tmp_path / "a"
        for i in range(3):
            noise(folder / f"{i}.png", i)
        jsonl(folder, *({"chosen": "0.png", "rejected": f"{i}.png", "caption": "x"} for i in (1, 2)))
        with pytest.raises(Exception, match="pairs that share theirs"):
            build(data_for(folder, cache=tmp_path / "c", validation={"fraction": 0.5}))


class TestTheObjectiveNeedsThem:
    def run(self, *folders: Path, cache: Path, objective: str) -> None:
        data = data_for(*folders, cache=cache)
        run = RunConfig.model_validate({"data": data, "objective": {"type": objective}, "training": {"steps": 1}})
        pairs.require(run, build(data).rows)

    def test_sources_without_pairs_are_named(self, tmp_path: Path) -> None:
        paired, plain = table(tmp_path / "paired", 2), folder_of(tmp_path / "plain", 3)
        self.run(paired, cache=tmp_path / "c", objective="dpo")
        self.run(plain, cache=tmp_path / "c", objective="denoise")
        with pytest.raises(Problems, match="needs pairs of pictures") as caught:
            self.run(paired, plain, cache=tmp_path / "c", objective="dpo")
        assert [problem.where for problem in caught.value.problems] == [str(plain)]

    def test_pairs_that_nobody_compares_are_refused(self, tmp_path: Path) -> None:
        paired, plain = table(tmp_path / "paired", 2), folder_of(tmp_path / "plain", 3)
        with pytest.raises(Problems, match="2 of 2 samples here are pairs") as caught:
            self.run(paired, plain, cache=tmp_path / "c", objective="denoise")
        assert [problem.where for problem in caught.value.problems] == [str(paired)]

    def test_the_validation_folder_counts(self, tmp_path: Path) -> None:
        paired, plain = table(tmp_path / "paired", 2), folder_of(tmp_path / "plain", 3)
        data = data_for(paired, cache=tmp_path / "c", validation={"path": str(plain)})
        run = RunConfig.model_validate({"data": data, "objective": {"type": "dpo"}, "training": {"steps": 1}})
        with pytest.raises(Problems, match="needs pairs of pictures") as caught:
            pairs.require(run, build(data).rows)
        assert [problem.where for problem in caught.value.problems] == [str(plain)]

    def test_the_preferred_pictures_alone_serve_the_plain_loss(self, tmp_path: Path) -> None:
        source = Source(path=str(table(tmp_path / "paired", 2)), pairs="chosen")
        data = data_for(tmp_path, cache=tmp_path / "c").model_copy(update={"sources": (source,)})
        run = RunConfig.model_validate({"data": data, "training": {"steps": 1}})
        index = build(data)
        pairs.require(run, index.rows)
        assert sorted(row.place.name for row in index.rows) == ["good0.png", "good1.png"]
