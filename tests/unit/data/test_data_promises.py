"""Small promises of the data part that were once broken."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_helpers import captioned, data_for, folder_of, row

from gesso.config import advice
from gesso.config.run import Buckets, Captions, Data, RunConfig, Source
from gesso.data import plan as planning
from gesso.data.index import build
from gesso.data.plan import Plan
from gesso.data.preflight import preflight
from gesso.data.rows import Row
from gesso.errors import Problems


def plan_of(rows: list[Row], *sources: Source, seed: int = 0, **changes: object) -> Plan:
    fields: dict[str, object] = {"sources": sources, "resolution": 64, "buckets": Buckets(step=16)}
    return Plan(rows, data=Data.model_validate(fields | changes), batch_size=1, seed=seed)


def all_of(p: Plan, epochs: int) -> set[tuple[str, object]]:
    steps = range(epochs * p.steps_per_epoch)
    return {(v.row.image, v.fit) for step in steps for v in p.window(step)}


def twins(**changes: object) -> list[Row]:
    """Two rows of one picture, and two pictures beside them."""
    first = Row("x", "same", row(0).place, 90, 64, "one")
    second = Row("x-2", "same", row(0).place, 90, 64, "two", **changes)  # type: ignore[arg-type]
    return [first, second, row(1, (90, 64)), row(2, (90, 64))]


def test_renditions_hold_every_version_of_a_picture_that_is_there_twice() -> None:
    varied = plan_of(twins(), Source(path="a"), rotation=5.0, variants=3)
    flipped = plan_of(twins(source=1), Source(path="a"), Source(path="b", flip=True))
    for p in (varied, flipped):
        held = {(v.row.image, v.fit) for v in p.renditions(range(40 * p.steps_per_epoch))}
        assert all_of(p, 40) <= held


def test_a_share_counts_samples_and_not_pictures() -> None:
    rows = [row(i) for i in range(4)] + [row(10 + i, source=1) for i in range(4)]
    several = Source(path="a", share=1, resolution=(32, 48, 64))
    p = plan_of(rows, several, Source(path="b", share=1))
    counts = [0, 0]
    for step in range(p.steps_per_epoch):
        for visit in p.window(step):
            counts[visit.row.source] += 1
    assert counts == [12, 12]


def test_small_concepts_take_turns_with_their_source() -> None:
    rows = [row(i, concept=f"c{i}", repeats=0.25) for i in range(80)]
    assert plan_of(rows, Source(path="a")).visits_per_epoch == 20


def test_what_does_not_vary_is_not_counted_as_if_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_UNREPEATED", 5)
    rows = [row(i, (90, 64), caption=f"caption {i}") for i in range(20)] + [row(50, (90, 64), source=1)]
    p = plan_of(rows, Source(path="a"), Source(path="b", crop="random"), captions=Captions(wildcards=True))
    assert len(p.captions(range(p.steps_per_epoch))) == 21
    assert len(p.renditions(range(p.steps_per_epoch))) == 21


def test_swapped_sources_are_another_data_set(tmp_path: Path) -> None:
    one, two = folder_of(tmp_path / "one", 3), tmp_path / "two"
    captioned(two, "x.png", "x", colour="blue")
    there = build(data_for(one, two, cache=tmp_path / "cache")).fingerprint
    assert build(data_for(two, one, cache=tmp_path / "cache")).fingerprint != there


def test_a_damaged_memory_is_never_believed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "one", 3)
    data = data_for(folder, cache=tmp_path / "cache")
    first = build(data)
    [memory] = (tmp_path / "cache" / "scans").iterdir()
    content = memory.read_bytes()
    for place in range(0, len(content), 97):
        memory.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert build(data) == first


def test_bad_keep_separators_are_named_with_their_pictures(tmp_path: Path) -> None:
    for i in range(3):
        captioned(tmp_path / "one", f"{i}.png", "a ||| b ||| c ||| d", colour=(i, 0, 0))
    data = data_for(tmp_path / "one", cache=tmp_path / "cache", captions=Captions(keep_separator="|||"))
    with pytest.raises(Problems) as caught:
        build(data)
    assert all(f"{i}.png" in str(caught.value) for i in range(3))


def run_of(tmp_path: Path, folder: Path, **data: object) -> RunConfig:
    fields: dict[str, object] = {"sources": [{"path": str(folder)}], "resolution": 64, "cache": str(tmp_path / "cache")}
    return RunConfig.model_validate(
        {
            "output": str(tmp_path / "out"),
            "data": fields | {"buckets": {"step": 16}} | data,
            "training": {"steps": 10, "batch_size": 8},
        }
    )


def test_repeats_in_folder_names_are_no_reason_to_refuse_a_run(tmp_path: Path) -> None:
    folder_of(tmp_path / "set" / "10_sks dog", 5)
    run = run_of(tmp_path, tmp_path / "set")
    assert not [f for f in advice.check(run).errors if "one step takes" in f.what]
    counted = preflight(run).counted
    assert counted.samples_per_epoch == 50
    assert not advice.check(run, counted=counted).errors


def test_a_run_folder_among_the_pictures_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", 8)
    run = run_of(tmp_path, folder).model_copy(update={"output": folder / "runs" / "x"})
    assert [f.key for f in advice.check(run).errors] == ["data.sources.0.path"]


def test_a_validation_folder_is_read_in_any_layout(tmp_path: Path) -> None:
    folder_of(tmp_path / "set" / "2_sks dog", 3)
    captioned(tmp_path / "held", "v.png", "held", colour="blue")
    source = {"path": str(tmp_path / "set"), "layout": "kohya"}
    run = run_of(tmp_path, tmp_path / "set", sources=[source], validation={"path": str(tmp_path / "held")})
    assert len(build(run.data).validation) == 1


def test_a_fraction_beside_a_validation_folder_never_takes_the_only_picture(tmp_path: Path) -> None:
    folder_of(tmp_path / "set", 2)
    folder_of(tmp_path / "held", 12, ((48, 48),))
    held = {"path": str(tmp_path / "held"), "fraction": 0.5}
    index = build(run_of(tmp_path, tmp_path / "set", validation=held).data)
    assert (len(index.train), len(index.validation)) == (1, 13)


def test_what_stands_behind_a_url_is_asked_for_anew(tmp_path: Path) -> None:
    import io
    import zipfile

    import fsspec
    from PIL import Image

    store = fsspec.filesystem("memory")

    def put(colour: str) -> None:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            picture = io.BytesIO()
            Image.new("RGB", (64, 64), colour).save(picture, "PNG")
            archive.writestr("a.png", picture.getvalue())
            archive.writestr("a.txt", colour)
        store.pipe("/anew/set.zip", packed.getvalue())

    data = data_for(tmp_path, cache=tmp_path / "cache", sources=(Source(path="memory://anew/set.zip"),))
    seen = []
    for colour in ("red", "blue"):
        put(colour)
        [row] = build(data).rows
        seen.append((row.image, row.caption))
    assert [caption for _, caption in seen] == ["red", "blue"]
    assert seen[0][0] != seen[1][0]


def test_a_caption_that_varies_in_one_source_is_held_for_another_where_it_does_not() -> None:
    rows = [row(i, caption="a, b, c", source=i % 2) for i in range(6)]
    shuffled = Source(path="a", captions=Captions(shuffle=True))
    for sources in ((shuffled, Source(path="b")), (Source(path="a"), shuffled.model_copy(update={"path": "b"}))):
        p = plan_of(rows, *sources, variants=2)
        steps = range(20 * p.steps_per_epoch)
        assert {v.caption for step in steps for v in p.window(step)} <= set(p.captions(steps))


def test_random_crops_of_pictures_without_anything_to_crop_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "MOST_UNREPEATED", 12)
    p = plan_of([row(i) for i in range(10)], Source(path="a", crop="random"))
    assert len(p.renditions(range(20 * p.steps_per_epoch))) == 10
