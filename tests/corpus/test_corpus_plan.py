"""The plan that is told before a run is the one that it keeps."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpus_helpers import (
    COLOURS,
    call,
    data_of,
    picture,
    pixel,
    put,
    put_files,
    run_file,
    run_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.config.run import Data
from gesso.data.index import build
from gesso.data.places import Place
from gesso.data.plan import Plan
from gesso.data.preflight import preflight
from gesso.data.rows import Row


def row(i: int, size: tuple[int, int], repeats: float = 1.0) -> Row:
    name = f"{i:032x}"
    return Row(name, name, Place(f"/nowhere/{i}.png"), *size, f"caption {i}", repeats=repeats)


def one_epoch(rows: list[Row], data: Data, batch: int, accumulation: int, world: int) -> None:
    plan = Plan(rows, data=data, batch_size=batch, accumulation=accumulation, world_size=world)
    seen: Counter[str] = Counter()
    table: Counter[tuple[int, int]] = Counter()
    for step in range(plan.steps_per_epoch):
        window = plan.window(step)
        parts = [plan.share(window, rank) for rank in range(world)]
        assert [v.key for part in parts for v in part] == [v.key for v in window]
        for part in parts:
            batches = plan.microbatches(part)
            assert Counter(v.key for b in batches for v in b) == Counter(v.key for v in part)
            for one in batches:
                assert 1 <= len(one) <= batch
                assert len({v.fit.bucket for v in one}) == 1
        seen.update(v.row.id for v in window)
        table.update(v.fit.bucket for v in window)
    assert seen == {r.id: int(r.repeats) for r in rows}
    plain = Counter({size: count for size, count, _ in plan.describe()})
    if all(r.repeats == 1 for r in rows):
        assert plain == table


class TestBuckets:
    """Each picture exactly once (or repeats times) an epoch, one shape a batch, equal steps for all ranks."""

    @settings(max_examples=40, deadline=None, database=None)
    @given(
        seed=st.integers(0, 2**31),
        count=st.integers(64, 400),
        batch=st.integers(1, 8),
        accumulation=st.integers(1, 4),
        world=st.integers(1, 4),
        repeats=st.integers(1, 3),
    )
    def test_ten_thousand_sizes(
        self, seed: int, count: int, batch: int, accumulation: int, world: int, repeats: int
    ) -> None:
        """40 sets of up to 400 pictures: about 10,000 sizes in all."""
        drawn = np.random.default_rng(seed)
        sizes = np.exp(drawn.uniform(np.log(16), np.log(6000), (max(count, batch * accumulation * world), 2))).astype(
            int
        )
        rows = [row(i, (int(w), int(h)), repeats) for i, (w, h) in enumerate(sizes)]
        data = Data.model_validate({"sources": [{"path": "x"}], "resolution": 512})
        one_epoch(rows, data, batch, accumulation, world)

    @pytest.mark.parametrize(("batch", "accumulation", "world"), [(1, 1, 1), (7, 3, 4)])
    def test_ten_thousand_at_once(self, batch: int, accumulation: int, world: int) -> None:
        drawn = np.random.default_rng(5)
        sizes = np.exp(drawn.uniform(np.log(64), np.log(4000), (10_000, 2))).astype(int)
        rows = [row(i, (int(w), int(h))) for i, (w, h) in enumerate(sizes)]
        one_epoch(rows, Data.model_validate({"sources": [{"path": "x"}]}), batch, accumulation, world)

    def test_ranks_have_work_in_every_step(self) -> None:
        """The last step of an epoch may be short, but no process may be left without a part of the others'."""
        rows = [row(i, (512, 512)) for i in range(13)]
        plan = Plan(rows, data=Data.model_validate({"sources": [{"path": "x"}]}), batch_size=1, world_size=4)
        parts = [[len(plan.share(plan.window(s), r)) for r in range(4)] for s in range(plan.steps_per_epoch)]
        assert sum(map(sum, parts)) == 13
        assert all(max(part) - min(part) <= 1 for part in parts)

    def test_the_table_of_preflight_is_what_the_plan_does(self, tmp_path: Path) -> None:
        folder = put(tmp_path / "set")
        drawn = np.random.default_rng(1)
        for i in range(25):
            width, height = (int(side) for side in drawn.integers(40, 200, 2))
            (folder / f"{i}.png").write_bytes(picture((i, i, i), (width, height)))
            (folder / f"{i}.txt").write_text(f"number {i}")
        data = data_of(folder)
        seen = preflight(run_of(data, batch_size=3, accumulation=2))
        plan = Plan(build(data).rows, data=data, batch_size=3, accumulation=2)
        visits = [v for step in range(plan.steps_per_epoch) for v in plan.window(step)]
        assert {size: count for size, count, _ in seen.buckets} == Counter(v.fit.bucket for v in visits)
        for size, _, loss in seen.buckets:
            losses = []
            for v in visits:
                if v.fit.bucket == size:
                    width, height = size
                    scale = max(width / v.row.width, height / v.row.height)
                    losses.append(1 - width * height / (v.row.width * scale * v.row.height * scale))
            # Sides are whole pixels, so up to one of about 64 more is cut away than in the exact fit.
            assert loss == pytest.approx(np.mean(losses), abs=0.02)
        assert seen.counted.samples_per_epoch == len(visits) == 25
        assert seen.counted.steps_per_epoch == plan.steps_per_epoch == 5

    def test_the_command_line_shows_that_table(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = put(tmp_path / "set", a="red", b="green")
        (folder / "c.png").write_bytes(picture("blue", (64, 128)))
        (folder / "c.txt").write_text("blue")
        data = data_of(folder)
        assert call("check", str(run_file(data))) == 0
        shown = re.findall(r"^\s*(\d+) x (\d+)\s+(\d+)\s+[\d.]+%", capsys.readouterr().out, re.MULTILINE)
        plan = Plan(build(data).rows, data=data, batch_size=1)
        assert {(int(w), int(h)): int(n) for w, h, n in shown} == {size: n for size, n, _ in plan.describe()}


class TestPairing:
    def test_colours_keep_their_captions_over_three_shuffled_epochs(self, tmp_path: Path) -> None:
        captions = {f"p{i}": f"number {i} in {name}" for i, name in enumerate([*COLOURS, *COLOURS, *COLOURS])}
        folder = put_files(tmp_path / "set", captions)
        data = data_of(folder, {"captions": {"shuffle": True}})
        plan = Plan(build(data).rows, data=data, batch_size=4, accumulation=2)
        orders = []
        for epoch in range(3):
            visits = [
                visit
                for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
                for visit in plan.window(step)
            ]
            orders.append([visit.caption for visit in visits])
            for visit in visits:
                assert pixel(visit.row.place) == COLOURS[visit.caption.split(" ")[-1]]
        assert len({tuple(order) for order in orders}) == 3
        assert [sorted(order) for order in orders] == [sorted(captions.values())] * 3
