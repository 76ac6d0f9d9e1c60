"""Buckets and the plan: who is seen when, and that nothing but the samples per step decides it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
from data_helpers import row
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.config.run import Buckets, Data, Source
from gesso.data import plan as planning
from gesso.data.buckets import assign, bucket_sizes, sizes_for
from gesso.data.places import Place
from gesso.data.plan import Plan, Visit
from gesso.data.rows import Row
from gesso.errors import Problems, UserError

SIDES = st.integers(24, 400)


def data(**changes: object) -> Data:
    fields: dict[str, object] = {"sources": (Source(path=Path("x")),), "resolution": 64, "buckets": Buckets(step=16)}
    return Data.model_validate(fields | changes)


def plan(rows: list[Row], batch_size: int = 1, accumulation: int = 1, **changes: object) -> Plan:
    world = int(changes.pop("world_size", 1))  # type: ignore[call-overload]
    seed = int(changes.pop("seed", 0))  # type: ignore[call-overload]
    return Plan(
        rows, data=data(**changes), batch_size=batch_size, accumulation=accumulation, world_size=world, seed=seed
    )


def epoch_of(p: Plan, epoch: int = 0) -> list[list[Visit]]:
    n = p.steps_per_epoch
    return [p.window(step) for step in range(epoch * n, (epoch + 1) * n)]


class TestSizes:
    @given(st.integers(64, 1024), st.sampled_from([8, 16, 32, 64]))
    def test_area_sides_and_squares(self, resolution: int, step: int) -> None:
        sizes = bucket_sizes(resolution, step=step)
        assert len(set(sizes)) == len(sizes)
        square = resolution // step * step
        assert (square, square) in sizes
        for w, h in sizes:
            assert w % step == h % step == 0
            assert w * h <= resolution**2
            assert resolution // 2 <= min(w, h)
            assert max(w, h) <= 2 * resolution
            assert (h, w) in sizes
            if (w, h) != (square, square) and max(w, h) + step <= 2 * resolution:
                assert (
                    min((w + step) * h, w * (h + step)) > resolution**2
                    or (w, h + step) in sizes
                    or (w + step, h) in sizes
                )

    def test_sdxl(self) -> None:
        sizes = bucket_sizes(1024, step=64)
        known = {
            (1024, 1024),
            (1152, 896),
            (896, 1152),
            (1216, 832),
            (832, 1216),
            (1536, 640),
            (640, 1536),
            (2048, 512),
        }
        assert known <= set(sizes)
        assert min(w * h for w, h in sizes) > 0.85 * 1024**2

    def test_bounds_are_kept_and_impossible_ones_refused(self) -> None:
        assert bucket_sizes(64, step=16, smallest=64, largest=64) == [(64, 64)]
        assert max(max(s) for s in bucket_sizes(64, step=16, largest=80)) == 80
        with pytest.raises(UserError, match=r"data\.buckets"):
            bucket_sizes(32, step=64)

    def test_a_step_the_model_cannot_use(self) -> None:
        with pytest.raises(UserError, match=r"data\.buckets\.step: 12 is not a multiple of 8"):
            sizes_for(data(buckets=Buckets(step=12)))

    def test_off_means_one_square_in_multiples_the_model_can_use(self) -> None:
        assert sizes_for(data(resolution=70, buckets=Buckets(enabled=False))) == ([(64, 64)], 8)


class TestAssign:
    @given(SIDES, SIDES, st.booleans())
    def test_covers_its_bucket_with_the_least_resize(self, width: int, height: int, upscale: bool) -> None:
        fit = assign(width, height, sizes=bucket_sizes(64, step=16), step=16, upscale=upscale)
        (bw, bh), (rw, rh), (left, top) = fit.bucket, fit.resized, fit.crop
        assert rw >= bw
        assert rh >= bh
        assert rw == bw or rh == bh
        scale = max(bw / width, bh / height)
        assert abs(rw - width * scale) <= 0.5 + 1e-6
        assert abs(rh - height * scale) <= 0.5 + 1e-6
        assert (left, top) == ((rw - bw) // 2, (rh - bh) // 2)
        if not upscale:
            assert rw <= width
            assert rh <= height
            assert bw * bh <= 64 * 64

    @given(SIDES, SIDES)
    def test_no_bucket_is_nearer_in_aspect(self, width: int, height: int) -> None:
        sizes = bucket_sizes(64, step=16)

        def distance(size: tuple[int, int]) -> float:
            return abs(math.log(size[0] / size[1]) - math.log(width / height))

        assert distance(assign(width, height, sizes=sizes, step=16).bucket) <= min(map(distance, sizes)) + 1e-8

    def test_a_bucket_size_is_left_alone(self) -> None:
        for width, height in bucket_sizes(1024, step=64):
            fit = assign(width, height, sizes=bucket_sizes(1024, step=64), step=64)
            assert (fit.bucket, fit.resized, fit.crop) == ((width, height), (width, height), (0, 0))

    def test_without_upscaling_small_pictures_go_to_smaller_buckets(self) -> None:
        sizes = bucket_sizes(1024, step=64)
        assert assign(500, 700, sizes=sizes, step=64, upscale=False).bucket == (448, 640)
        assert assign(500, 700, sizes=[(1024, 1024)], step=64, upscale=False).bucket == (448, 448)
        assert assign(1100, 1100, sizes=sizes, step=64, upscale=False).bucket == (1024, 1024)
        with pytest.raises(UserError, match="less than one bucket step"):
            assign(63, 900, sizes=sizes, step=64, upscale=False)


rows_strategy = st.lists(st.tuples(SIDES, SIDES, st.integers(1, 3)), min_size=1, max_size=24)


class TestOrder:
    @settings(max_examples=200)
    @given(rows_strategy, st.integers(1, 5), st.integers(1, 4), st.integers(1, 2), st.integers(0, 99))
    def test_every_visit_once_an_epoch_in_batches_of_one_shape(
        self, shapes: list[tuple[int, int, int]], batch: int, accumulation: int, world: int, seed: int
    ) -> None:
        rows = [row(i, (w, h), repeats=r) for i, (w, h, r) in enumerate(shapes)]
        total, size = sum(r for *_, r in shapes), batch * accumulation * world
        if total < size:
            with pytest.raises(UserError, match=f"an epoch has {total} samples"):
                plan(rows, batch, accumulation, world_size=world)
            return
        p = plan(rows, batch, accumulation, world_size=world, seed=seed)
        assert p.steps_per_epoch == -(-total // size)
        assert p.visits_per_epoch == total
        for epoch in (0, 1):
            windows = epoch_of(p, epoch)
            assert [len(w) for w in windows[:-1]] == [size] * (len(windows) - 1)
            assert 0 < len(windows[-1]) <= size
            seen = Counter((v.row.id, v.repeat) for w in windows for v in w)
            assert seen == Counter((r.id, k) for r in rows for k in range(r.repeats))
            assert {v.epoch for w in windows for v in w} == {epoch}
            for step, window in enumerate(windows, start=epoch * len(windows)):
                assert p.window_size(step) == len(window)
                batches = p.microbatches(window)
                assert sorted(map(id, itertools.chain(*batches))) == sorted(map(id, window))
                for group in batches:
                    assert 0 < len(group) <= batch
                    assert len({v.fit.bucket for v in group}) == 1

    @settings(max_examples=30)
    @given(rows_strategy, st.integers(0, 3))
    def test_only_the_samples_per_step_matter(self, shapes: list[tuple[int, int, int]], seed: int) -> None:
        rows = [row(i, (w, h), repeats=r + 8) for i, (w, h, r) in enumerate(shapes)]
        settings_ = {"crop": "random", "flip": True, "captions": {"dropout": 0.3}, "seed": seed}
        splits = [(1, 8, 1), (8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)]
        plans = [plan(rows, b, a, world_size=w, **settings_) for b, a, w in splits]
        for step in range(2 * plans[0].steps_per_epoch):
            windows = [p.window(step) for p in plans]
            assert all(w == windows[0] for w in windows)

    def test_file_names_and_listing_order_do_not_matter(self) -> None:
        rows = [row(i, repeats=2) for i in range(9)]
        moved = [row(i, repeats=2, place=Place(f"/elsewhere/{99 - i}.png")) for i in reversed(range(9))]

        def names(p: Plan) -> list[list[tuple[str, int]]]:
            return [[(v.row.id, v.repeat) for v in w] for w in epoch_of(p)]

        assert names(plan(rows, 2)) == names(plan(moved, 2))

    def test_epochs_and_seeds_differ(self) -> None:
        rows = [row(i) for i in range(12)]
        orders = {
            tuple(v.row.id for w in epoch_of(plan(rows, 2, seed=seed), epoch) for v in w)
            for seed in (0, 1)
            for epoch in (0, 1, 2)
        }
        assert len(orders) == 6

    def test_company_changes_from_epoch_to_epoch(self) -> None:
        p = plan([row(i) for i in range(24)], 4)
        companies = [{frozenset(v.row.id for v in w) for w in epoch_of(p, epoch)} for epoch in range(3)]
        assert not companies[0] & companies[1]
        assert not companies[1] & companies[2]

    def test_full_windows_have_one_shape_and_the_short_one_comes_last(self) -> None:
        rows = [row(i, (64, 64)) for i in range(9)] + [row(i + 50, (128, 32)) for i in range(9)]
        for epoch in range(6):
            windows = epoch_of(plan(rows, 4), epoch)
            shapes = [len({v.fit.bucket for v in w}) for w in windows]
            assert [len(w) for w in windows] == [4, 4, 4, 4, 2]
            assert sorted(shapes[:-1]) == [1, 1, 1, 1]
            assert shapes[-1] == 2

    def test_windows_of_different_shapes_are_mixed_over_the_epoch(self) -> None:
        rows = [row(i, (64, 64)) for i in range(20)] + [row(i + 50, (128, 32)) for i in range(20)]
        orders = {tuple(w[0].fit.bucket for w in epoch_of(plan(rows, 2), epoch)) for epoch in range(4)}
        assert len(orders) == 4
        assert not any(list(order) == sorted(order) for order in orders)


class TestVisits:
    def test_random_crops_lie_inside_reach_the_edges_and_change_each_epoch(self) -> None:
        rows = [row(i, (70, 64), repeats=2) for i in range(6)]
        p = plan(rows, 2, crop="random", buckets=Buckets(enabled=False))
        seen = [v for epoch in range(12) for w in epoch_of(p, epoch) for v in w]
        assert {v.fit.crop[0] for v in seen} == set(range(7))
        assert {v.fit.crop[1] for v in seen} == {0}
        one = [v.fit.crop for v in seen if v.row.id == rows[0].id]
        assert len(set(one)) > 3

    def test_flips_and_dropout_come_at_their_rates_and_are_keyed_apart(self) -> None:
        rows = [row(i, repeats=10) for i in range(30)]
        seen = [v for w in epoch_of(plan(rows, 5, flip=True, captions={"dropout": 0.2})) for v in w]
        assert 110 < sum(v.fit.flip for v in seen) < 190
        dropped = [v for v in seen if v.caption == ""]
        assert 35 < len(dropped) < 90
        assert 0.25 < sum(v.fit.flip for v in dropped) / len(dropped) < 0.75
        assert all(v.caption in ("", v.row.caption) for v in seen)

    def test_adding_a_picture_changes_nothing_about_the_others_visits(self) -> None:
        rows = [row(i, (90, 64), repeats=3) for i in range(8)]

        def visits(rows: list[Row]) -> dict[tuple[str, int], Visit]:
            p = plan(rows, 3, crop="random", flip=True, captions={"dropout": 0.5})
            return {(v.row.id, v.repeat): v for w in epoch_of(p, 2) for v in w}

        before, after = visits(rows), visits([*rows, row(99, (90, 64))])
        assert all(after[key] == visit for key, visit in before.items())

    def test_the_geometry_of_a_flipped_visit_is_in_the_flipped_frame(self) -> None:
        rows = [row(i, (80, 64)) for i in range(40)]
        p = plan(rows, 1, crop="random", flip=True, buckets=Buckets(enabled=False))
        for visit in itertools.chain(*epoch_of(p)):
            left = visit.fit.crop[0]
            assert visit.geometry.crop_left == (16 - left if visit.fit.flip else left)
            assert visit.geometry[:2] == (64, 80)
            assert visit.geometry[4:] == (64, 64)

    def test_validation_is_never_trained_on_and_never_augmented(self) -> None:
        rows = [row(i, (90, 64), split="validation" if i < 3 else "train") for i in range(10)]
        p = plan(rows, 2, crop="random", flip=True, captions={"dropout": 1.0})
        held = {r.id for r in rows[:3]}
        assert not held & {v.row.id for w in epoch_of(p) for v in w}
        assert {v.row.id for v in p.validation} == held
        assert all(v.caption and not v.fit.flip for v in p.validation)
        for visit in p.validation:
            (rw, rh), (bw, bh) = visit.fit.resized, visit.fit.bucket
            assert visit.fit.crop == ((rw - bw) // 2, (rh - bh) // 2) != (0, 0)


class TestRenditions:
    def test_one_for_each_picture_and_flip(self) -> None:
        rows = [row(i, repeats=3, split="validation" if i == 0 else "train") for i in range(6)]
        assert len(plan(rows, 2).renditions(range(10_000_000))) == 6
        flipped = plan(rows, 2, flip=True).renditions(range(10_000_000))
        assert len(flipped) == 5 * 2 + 1

    def test_they_cover_exactly_the_steps_asked_for(self) -> None:
        rows = [row(i, (90, 64)) for i in range(10)]
        p = plan(rows, 1, crop="random")
        wanted = {(v.row.image, v.fit) for step in range(3, 17) for v in p.window(step)}
        assert {(v.row.image, v.fit) for v in p.renditions(range(3, 17))} == wanted

    def test_too_many_random_crops_are_refused_with_advice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planning, "MOST_UNREPEATED", 50)
        rows = [row(i, (200, 64)) for i in range(10)]
        p = plan(rows, 1, crop="random", buckets=Buckets(enabled=False))
        with pytest.raises(UserError, match=r"data\.crop, .*: random images need .* over 50"):
            p.renditions(range(200))


class TestWords:
    def test_describe(self) -> None:
        rows = [row(0, (64, 64)), row(1, (64, 64)), row(2, (144, 32))]
        table = plan(rows, 1).describe()
        assert [(r.bucket, r.images) for r in table] == [((64, 64), 2), ((128, 32), 1)]
        assert table[0].crop_loss == 0
        assert table[1].crop_loss == pytest.approx(16 / 144)

    def test_notices_name_blurred_and_much_cropped_pictures(self) -> None:
        rows = [row(0, (64, 64)), row(1, (20, 20)), row(2, (900, 64))]
        text = "\n".join(plan(rows, 1).notices)
        assert "enlarged more than 1.5 times (blurred): 1.png" in text
        assert "more than 30 % cropped away: 2.png" in text
        assert "0.png" not in text

    def test_pictures_too_small_without_upscaling_are_all_named(self) -> None:
        rows = [row(0), row(1, (15, 400)), row(2, (400, 9))]
        with pytest.raises(Problems) as caught:
            plan(rows, 1, buckets=Buckets(step=16, upscale=False))
        assert "/nowhere/1.png" in str(caught.value)
        assert "/nowhere/2.png" in str(caught.value)

    def test_nothing_to_train_on(self) -> None:
        with pytest.raises(UserError, match="no picture to train on"):
            plan([row(0, split="validation")])

    def test_fewer_samples_than_a_step_takes_shows_the_arithmetic(self) -> None:
        with pytest.raises(UserError, match=r"3 samples .* takes 8 = batch_size 4 x accumulation 2 x 1 process"):
            plan([row(i) for i in range(3)], 4, 2)
