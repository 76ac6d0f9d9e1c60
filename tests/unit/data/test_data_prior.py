"""Prior samples: as many as instances on top of them, endless, shuffled by key, and none of the instances' business."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import ClassVar

import pytest
from data_helpers import captioned, data_for, row
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.config import advice
from gesso.config.run import Buckets, Data, RunConfig, Source
from gesso.data.index import build
from gesso.data.plan import Plan, Visit
from gesso.data.preflight import preflight
from gesso.data.rows import Row
from gesso.errors import UserError

SIZES = ((64, 64), (96, 64), (64, 96))


def instances(count: int) -> list[Row]:
    return [row(i, SIZES[i % 3]) for i in range(count)]


def priors(count: int, **changes: object) -> list[Row]:
    return [row(1000 + i, SIZES[i % 2], role="prior", source=1, **changes) for i in range(count)]


def plan(rows: list[Row], step: int = 4, accumulation: int = 1, prior: bool = True, **changes: object) -> Plan:
    world, seed, prompts = (changes.pop(k, v) for k, v in (("world_size", 1), ("seed", 0), ("class_prompts", ())))
    sources = (Source(path="a"), Source(path="b", role="prior", **changes.pop("second", {})))[: 1 + prior]  # type: ignore[arg-type]
    fields: dict[str, object] = {"sources": sources, "resolution": 64, "buckets": Buckets(step=16)}
    return Plan(
        rows,
        data=Data.model_validate(fields | changes),
        batch_size=step,
        accumulation=accumulation,
        world_size=world,  # type: ignore[arg-type]
        seed=seed,  # type: ignore[arg-type]
        class_prompts=prompts,  # type: ignore[arg-type]
    )


def of(window: list[Visit], role: str) -> list[Visit]:
    return [visit for visit in window if visit.role == role]


class TestImages:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 25), st.integers(1, 30), st.integers(1, 5), st.integers(0, 3))
    def test_every_step_has_as_many_and_each_comes_once_a_pass(self, n: int, m: int, step: int, seed: int) -> None:
        step = min(step, n)
        p = plan(instances(n) + priors(m), step, seed=seed)
        seen: list[Visit] = []
        for k in range(3 * p.steps_per_epoch):
            window = p.window(k)
            taught, kept = of(window, "instance"), of(window, "prior")
            assert len(taught) == len(kept)
            assert len(window) == p.window_size(k)
            seen += kept
        passes = [Counter(v.row.id for v in seen[i : i + m]) for i in range(0, len(seen) - m + 1, m)]
        assert all(one == {f"{1000 + i:032x}": 1 for i in range(m)} for one in passes)
        assert len({(v.epoch, v.key) for v in seen}) == len(seen), "no two of them draw the same noise"

    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 25), st.integers(1, 9), st.integers(1, 5))
    def test_instances_are_seen_as_if_there_were_none(self, n: int, m: int, step: int) -> None:
        step = min(step, n)
        alone, both = plan(instances(n), step, prior=False, flip=True), plan(instances(n) + priors(m), step, flip=True)
        assert alone.steps_per_epoch == both.steps_per_epoch
        assert alone.visits_per_epoch == both.visits_per_epoch == n
        for k in range(2 * alone.steps_per_epoch):
            assert alone.window(k) == of(both.window(k), "instance")

    def test_the_split_of_a_step_changes_none_of_them_and_batches_have_one_role(self) -> None:
        rows = instances(13) + priors(5)
        wanted = [plan(rows, 4).window(k) for k in range(8)]
        for step, accumulation, world in ((1, 4, 1), (2, 2, 1), (1, 2, 2)):
            p = plan(rows, step, accumulation, world_size=world)
            for k, window in enumerate(wanted):
                assert p.window(k) == window
                shares = [p.share(window, rank) for rank in range(world)]
                batches = [batch for share in shares for batch in p.microbatches(share)]
                assert sorted(str(v.key) for b in batches for v in b) == sorted(str(v.key) for v in window)
                for batch in batches:
                    assert len(batch) <= step
                    assert len({(v.role, v.epoch, v.fit.bucket) for v in batch}) == 1

    def test_order_and_draws_follow_the_seed(self) -> None:
        rows = instances(8) + priors(8)
        one, same, other = (plan(rows, 4, flip=True, seed=s) for s in (1, 1, 2))
        kept = [[v for k in range(6) for v in of(p.window(k), "prior")] for p in (one, same, other)]
        assert kept[0] == kept[1]
        assert [v.row.id for v in kept[0]] != [v.row.id for v in kept[2]]
        assert [v.row.id for v in kept[0][:8]] != [v.row.id for v in kept[0][8:16]], "a pass is shuffled anew"

    def test_the_cache_is_told_of_every_one_that_a_step_needs(self) -> None:
        p = plan(instances(5) + priors(40), 5)
        needed = {(v.row.image, v.fit) for k in range(4) for v in p.window(k)}
        assert {(v.row.image, v.fit) for v in p.renditions(range(4))} == needed
        assert {v.caption for k in range(4) for v in p.window(k)} <= set(p.captions(range(4)))

    def test_each_has_a_size_of_its_own(self) -> None:
        kept = of(plan(instances(4) + priors(2), 4).window(0), "prior")
        for visit in kept:
            geometry = visit.geometry
            assert (geometry.original_width, geometry.original_height) == (visit.row.width, visit.row.height)
        assert len({v.geometry for v in kept}) == 2

    def test_shares_and_repeats_are_among_their_own(self) -> None:
        rows = instances(6) + priors(2, repeats=3.0)
        p = plan(rows, 6, second={"repeats": 3.0})
        assert Counter(v.row.id for v in of(p.window(0), "prior")) == {f"{1000 + i:032x}": 3 for i in range(2)}
        shared = Data.model_validate(
            {"sources": [{"path": "a", "share": 1}, {"path": "b", "role": "prior"}], "resolution": 64}
        )
        assert Plan(rows, data=shared, batch_size=1).visits_per_epoch == 6

    def test_without_instances_there_is_nothing_to_train_on(self) -> None:
        with pytest.raises(UserError, match="no picture to train on"):
            plan(priors(3), 1)


class TestSeveralClasses:
    """Two sources with role: prior are one stream, in proportion to what each brings."""

    sources: ClassVar = (
        Source(path="man", weight=2.0),
        Source(path="dog", weight=0.5),
        Source(path="men", role="prior"),
        Source(path="dogs", role="prior", repeats=2.0),
    )

    def rows(self, men: int = 6, dogs: int = 3) -> list[Row]:
        own = [row(i, SIZES[i % 3], source=i % 2, weight=(2.0, 0.5)[i % 2]) for i in range(8)]
        one = [row(1000 + i, SIZES[i % 2], role="prior", source=2) for i in range(men)]
        return own + one + [row(2000 + i, SIZES[i % 2], role="prior", source=3, repeats=2.0) for i in range(dogs)]

    def plan(self, rows: list[Row], **changes: object) -> Plan:
        fields = {"sources": self.sources, "resolution": 64, "buckets": Buckets(step=16)} | changes
        return Plan(rows, data=Data.model_validate(fields), batch_size=2, accumulation=2, seed=4)

    def test_in_a_pass_each_comes_as_often_as_its_repeats_say(self) -> None:
        p = self.plan(self.rows())
        seen = [v for k in range(6) for v in of(p.window(k), "prior")]
        assert len(seen) == 24
        for start in (0, 12):
            found = Counter(v.row.source for v in seen[start : start + 12])
            assert found == {2: 6, 3: 6}, "six men once, three dogs twice"
        assert len({(v.epoch, v.key) for v in seen}) == 24

    def test_shares_of_the_classes_are_apart_from_those_of_the_concepts(self) -> None:
        shared = (*self.sources[:2], Source(path="m", role="prior", share=3), Source(path="d", role="prior", share=1))
        p = self.plan(self.rows(), sources=shared)
        seen = Counter(v.row.source for k in range(42) for v in p.window(k))
        assert seen[0] == seen[1] == 84
        assert seen[2] == 3 * seen[3] == 126

    def test_another_class_moves_no_instance(self) -> None:
        one, both = self.plan(self.rows(dogs=0)), self.plan(self.rows())
        for k in range(4):
            assert of(one.window(k), "instance") == of(both.window(k), "instance")

    def test_the_model_is_asked_under_the_prompt_of_each_ones_source(self) -> None:
        rows = [r for r in self.rows() if r.role == "instance"]
        data = Data.model_validate({"sources": self.sources[:2], "resolution": 64, "buckets": Buckets(step=16)})
        p = Plan(rows, data=data, batch_size=2, accumulation=2, class_prompts=("a man", "a dog"))
        for k in range(4):
            taught, kept = of(p.window(k), "instance"), of(p.window(k), "prior")
            assert [v.caption for v in kept] == [("a man", "a dog")[v.row.source] for v in taught]
            assert [v.row.weight for v in kept] == [v.row.weight for v in taught]
        assert {"a man", "a dog"} <= set(p.captions(range(4)))
        assert {"a man", "a dog"} <= set(p.texts())
        assert p.texts()["a dog"].role == "prior"


class TestModel:
    def test_the_instances_come_again_under_the_class_prompt(self) -> None:
        p = plan(instances(7), 3, prior=False, class_prompts=["a thing"], flip=True, crop="random")
        alone = plan(instances(7), 3, prior=False, flip=True, crop="random")
        for k in range(2 * p.steps_per_epoch):
            taught, kept = of(p.window(k), "instance"), of(p.window(k), "prior")
            assert taught == alone.window(k)
            assert [(v.row, v.fit) for v in kept] == [(v.row, v.fit) for v in taught]
            assert {v.caption for v in kept} == {"a thing"}
            assert not {(v.epoch, v.key) for v in kept} & {(v.epoch, v.key) for v in taught}, "draws of their own"
            assert p.window_size(k) == 2 * alone.window_size(k)

    def test_it_needs_no_encoding_but_that_of_the_prompt(self) -> None:
        options = {"prior": False, "flip": True}
        p, alone = plan(instances(7), 3, class_prompts=["a thing"], **options), plan(instances(7), 3, **options)  # type: ignore[arg-type]
        steps = range(40)
        assert {(v.row.image, v.fit) for v in p.renditions(steps)} == {
            (v.row.image, v.fit) for v in alone.renditions(steps)
        }
        assert set(p.captions(steps)) == {"a thing", *alone.captions(steps)}
        assert "a thing" in p.texts()


class TestValidation:
    def test_prior_images_are_never_held_out(self, tmp_path: Path) -> None:
        for name, count in (("one", 10), ("class", 30)):
            for i in range(count):
                captioned(tmp_path / name, f"{i}.png", name, (64, 64), (8 * i, 100 if name == "one" else 0, 9))
        plain = data_for(tmp_path / "one", cache=tmp_path / "c", validation={"fraction": 0.3})
        kept = Source(path=str(tmp_path / "class"), role="prior")
        both = plain.model_copy(update={"sources": (kept, *plain.sources)})
        index, alone = build(both), build(plain)
        assert {r.role for r in index.validation} == {"instance"}
        assert [r.id for r in index.validation] == [r.id for r in alone.validation]
        assert sum(r.role == "prior" for r in index.train) == 30
        p = Plan(index.rows, data=both, batch_size=2)
        assert {v.role for v in p.validation} == {"instance"}

    def test_a_validation_folder_follows_the_first_source_of_instances(self, tmp_path: Path) -> None:
        for name in ("one", "class", "held"):
            captioned(tmp_path / name, "1.png", name, (64, 64), (len(name) * 9, 50, 9))
        sources = [
            {"path": str(tmp_path / "class"), "role": "prior", "trigger": "person"},
            {"path": str(tmp_path / "one"), "trigger": "sks"},
        ]
        held = {"path": str(tmp_path / "held")}
        data = Data.model_validate(
            {"sources": sources, "validation": held, "resolution": 64, "cache": str(tmp_path / "c")}, strict=False
        )
        p = Plan(build(data).rows, data=data, batch_size=1)
        assert [(v.caption, v.role) for v in p.validation] == [("sks, held", "instance")]


def test_a_check_goes_on_without_the_one_class_that_is_yet_to_be_drawn(tmp_path: Path) -> None:
    for name, count in (("one", 3), ("dogs", 2)):
        for i in range(count):
            captioned(tmp_path / name, f"{i}.png", name, (64, 64), (80 * i, 90 if name == "one" else 0, 9))
    men = {"path": tmp_path / "men", "role": "prior", "class_prompt": "a man", "class_images": 4}
    dogs = {"path": tmp_path / "dogs", "role": "prior", "class_prompt": "a dog"}
    run = RunConfig.model_validate(
        {
            "data": {"sources": [men, dogs, {"path": tmp_path / "one"}], "resolution": 64, "cache": tmp_path / "c"},
            "objective": {"type": "dreambooth", "class_images": 3},
            "training": {"steps": 3},
            "model": {"base": "micro:sdxl"},
        }
    )
    seen = preflight(run)
    assert seen.counted.images == (4, 3, 3)
    told = " ".join(seen.notices)
    assert f"4 class images are missing in {tmp_path / 'men'}: they are drawn from 'a man'" in told
    assert f"1 class images are missing in {tmp_path / 'dogs'}: they are drawn from 'a dog'" in told
    assert not advice.check(run, counted=seen.counted).errors


def test_a_check_goes_on_without_class_images_that_are_yet_to_be_drawn(tmp_path: Path) -> None:
    for i in range(3):
        captioned(tmp_path / "one", f"{i}.png", "one", (64, 64), (80 * i, 100, 9))
    data = {"sources": [{"path": tmp_path / "class", "role": "prior"}, {"path": tmp_path / "one"}], "resolution": 64}
    run = RunConfig.model_validate(
        {
            "data": {**data, "cache": tmp_path / "c"},
            "objective": {"type": "dreambooth", "class_prompt": "a thing", "class_images": 5},
            "training": {"steps": 3},
            "model": {"base": "micro:sdxl"},
        }
    )
    seen = preflight(run)
    assert seen.counted.images == (5, 3)
    assert seen.counted.samples_per_epoch == 3
    assert any("5 class images are missing" in notice for notice in seen.notices)
    captioned(tmp_path / "class", "mine.png", "a thing", (64, 64), "red")
    seen = preflight(run)
    assert seen.counted.images == (5, 3)
    assert any("4 class images are missing" in notice for notice in seen.notices)
    assert not advice.check(run, counted=seen.counted).errors
