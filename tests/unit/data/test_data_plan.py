"""Repeats, shares, balance, several resolutions, versions and processes: who is seen how often, and how."""

from __future__ import annotations

from collections import Counter

import pytest
from data_helpers import row
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.config.run import Buckets, Captions, Data, Source
from gesso.data import plan as planning
from gesso.data.plan import Plan, Visit
from gesso.data.rows import Row
from gesso.errors import UserError


def plan(rows: list[Row], *sources: Source, step: int = 1, world_size: int = 1, seed: int = 0, **data: object) -> Plan:
    listed = sources or (Source(path="x"),)
    fields: dict[str, object] = {"sources": listed, "resolution": 64, "buckets": Buckets(step=16)}
    return Plan(rows, data=Data.model_validate(fields | data), batch_size=step, world_size=world_size, seed=seed)


def epoch_of(p: Plan, epoch: int = 0) -> list[Visit]:
    n = p.steps_per_epoch
    return [visit for step in range(epoch * n, (epoch + 1) * n) for visit in p.window(step)]


def seen(visits: list[Visit]) -> Counter[str]:
    return Counter(visit.row.id for visit in visits)


class TestRepeats:
    @settings(max_examples=40)
    @given(st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.75, 3.0]), min_size=1, max_size=30), st.integers(0, 9))
    def test_a_part_takes_turns_and_every_epoch_is_as_long(self, repeats: list[float], seed: int) -> None:
        p = plan([row(i, repeats=r) for i, r in enumerate([*repeats, 1.0])], seed=seed)
        epochs = [seen(epoch_of(p, epoch)) for epoch in range(4)]
        assert {e.total() for e in epochs} == {p.visits_per_epoch}
        for i, r in enumerate(repeats):
            counts = [e[f"{i:032x}"] for e in epochs]
            assert all(int(r) <= count <= int(r) + (r % 1 > 0) for count in counts)
        for part in {r % 1 for r in repeats} - {0}:
            members = {f"{i:032x}": int(r) for i, r in enumerate(repeats) if r % 1 == part}
            turns = [sum(e[m] for e in epochs) - 4 * whole for m, whole in members.items()]
            # Over the epochs nobody is more than one turn ahead, and together they come as often as they should.
            assert max(turns) - min(turns) <= 1
            assert sum(turns) == 4 * max(1, round(part * len(members)))

    def test_repeat_numbers_are_distinct_so_that_draws_are(self) -> None:
        visits = epoch_of(plan([row(i, repeats=2.5) for i in range(4)]))
        assert len({(v.id, v.repeat) for v in visits}) == len(visits) == 10

    def test_shares_set_the_proportions_and_none_is_seen_less_than_once(self) -> None:
        rows = [row(i, source=0) for i in range(30)] + [row(100 + i, source=1) for i in range(10)]
        p = plan(rows, Source(path="a", share=1), Source(path="b", share=3))
        counts = seen(epoch_of(p))
        assert Counter(int(k, 16) >= 100 for k in counts.elements()) == {False: 30, True: 90}

    def test_a_share_for_some_only_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"sources\.1\.share"):
            plan([row(0), row(1, source=1)], Source(path="a", share=1), Source(path="b"))

    def test_balance_without_concepts_to_balance_is_refused(self) -> None:
        rows = [row(i, source=i % 2) for i in range(8)] + [row(90, concept="class", role="prior", source=2)]
        with pytest.raises(UserError, match="the same concept, ''") as caught:
            plan(rows, Source(path="a"), Source(path="b"), Source(path="c", role="prior"), balance=True)
        assert caught.value.where == "data.balance"

    def test_balance_gives_concepts_equal_samples_and_leaves_prior_images_alone(self) -> None:
        rows = [row(i, concept="cat") for i in range(12)] + [row(50 + i, concept="dog") for i in range(5)]
        rows += [row(90 + i, concept="class", role="prior", source=1) for i in range(3)]
        p = plan(rows, Source(path="a"), Source(path="b", role="prior"), balance=True)
        # 24 samples of what is taught, and as many prior samples on top.
        assert {name: samples for name, _, samples in p.concepts()} == {"cat": 12, "dog": 12, "class": 24}
        assert Counter(v.row.concept for v in epoch_of(p)) == {"cat": 12, "dog": 12, "class": 24}


class TestResolutions:
    def test_each_image_is_seen_at_each_resolution_with_draws_of_its_own(self) -> None:
        rows = [row(i, (200, 120), split="validation" if i == 0 else "train") for i in range(5)]
        p = plan(rows, Source(path="a", resolution=(64, 128)), buckets=Buckets(step=16), flip=True)
        visits = epoch_of(p)
        assert Counter(v.id for v in visits) == {f"{i:032x}@{side}": 1 for i in range(1, 5) for side in (64, 128)}
        for v in visits:
            area = v.fit.bucket[0] * v.fit.bucket[1]
            assert area <= (64 if v.id.endswith("@64") else 128) ** 2
        assert len({area for v in visits if (area := v.fit.bucket[0] * v.fit.bucket[1])}) == 2
        assert sorted(v.id for v in p.validation) == [f"{0:032x}@128", f"{0:032x}@64"]

    def test_one_resolution_of_a_source_replaces_that_of_the_run(self) -> None:
        p = plan([row(0), row(1, source=1)], Source(path="a"), Source(path="b", resolution=128))
        assert {v.row.source: v.fit.bucket for v in epoch_of(p)} == {0: (64, 64), 1: (128, 128)}
        assert {v.id for v in epoch_of(p)} == {f"{0:032x}", f"{1:032x}"}


class TestVersions:
    def test_sources_have_crops_and_flips_of_their_own(self) -> None:
        rows = [row(i, (90, 64), source=i % 2) for i in range(40)]
        p = plan(rows, Source(path="a", crop="random", flip=True), Source(path="b"), buckets=Buckets(enabled=False))
        visits = epoch_of(p)
        assert {v.fit.flip for v in visits if v.row.source == 0} == {True, False}
        assert len({v.fit.crop for v in visits if v.row.source == 0}) > 5
        assert {(v.fit.flip, v.fit.crop) for v in visits if v.row.source == 1} == {(False, (13, 0))}

    def test_so_many_versions_of_a_picture_and_its_caption_as_asked_for(self) -> None:
        rows = [row(i, (90, 64), caption="a, b, c, d, e, f") for i in range(3)]
        changes = {"crop": "random", "rotation": 5.0, "colour": 0.1, "captions": Captions(shuffle=True)}
        p = plan(rows, variants=4, **changes)
        visits = [v for epoch in range(60) for v in epoch_of(p, epoch)]
        for i in range(3):
            of = [v for v in visits if v.row.id == f"{i:032x}"]
            assert len({v.fit for v in of}) == 4
            assert len({(v.fit, v.caption) for v in of}) == 4
        assert len({v.fit for v in p.renditions(range(10_000))}) == 12
        assert set(p.captions(range(180))) == {v.caption for v in visits}
        fresh = plan(rows, **changes)
        assert len({v.fit for epoch in range(20) for v in epoch_of(fresh, epoch)}) == 60

    def test_turns_and_colours_stay_within_their_bounds_and_are_not_all_alike(self) -> None:
        visits = epoch_of(plan([row(i) for i in range(60)], rotation=10.0, colour=0.2))
        angles = [v.fit.angle for v in visits]
        assert -10 <= min(angles) < -5
        assert 5 < max(angles) <= 10
        for part in range(3):
            factors = [v.fit.colour[part] for v in visits]
            assert 0.8 <= min(factors) < 0.9
            assert 1.1 < max(factors) <= 1.2

    def test_validation_varies_in_nothing(self) -> None:
        rows = [row(i, caption="a, b, c", split="validation" if i < 3 else "train") for i in range(6)]
        captions = Captions(shuffle=True, tag_dropout=0.5, dropout=0.5)
        p = plan(rows, crop="random", rotation=5.0, colour=0.3, flip=True, captions=captions)
        plain = plan(rows)
        assert [(v.fit, v.caption) for v in p.validation] == [(v.fit, v.caption) for v in plain.validation]

    def test_too_many_words_are_refused_with_advice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(planning, "MOST_UNREPEATED", 10)
        rows = [row(i, caption=", ".join(f"tag{j}" for j in range(12))) for i in range(20)]
        with pytest.raises(UserError, match=r"random captions need .* over 10"):
            plan(rows, captions=Captions(shuffle=True)).captions(range(100))

    def test_masks_of_one_picture_are_renditions_of_their_own(self) -> None:
        shared = {"place": row(0).place}
        one = Row(id="a", image="x", width=64, height=64, caption="", mask_hash="m", **shared)
        two = Row(id="b", image="x", width=64, height=64, caption="", **shared)
        assert len(plan([one, two]).renditions(range(10))) == 2


class TestProcesses:
    @settings(max_examples=30)
    @given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4))
    def test_parts_are_disjoint_whole_and_even(self, count: int, world: int, batch: int) -> None:
        rows = [row(i, ((64, 64), (96, 48))[i % 2]) for i in range(max(count, world * batch))]
        p = plan(rows, step=batch, world_size=world)
        for step in range(p.steps_per_epoch):
            window = p.window(step)
            parts = [p.share(window, rank) for rank in range(world)]
            assert [v.id for part in parts for v in part] == [v.id for v in window]
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
