"""What a look at a data set says about pairs: how many, which are left out and why, and both pictures side by side."""

from __future__ import annotations

from pathlib import Path

from inspect_helpers import data_of, discs, inspected, names, put, rules
from pair_helpers import parquet, pick
from source_helpers import jsonl

from gesso.config.run import Data
from gesso.data.index import build
from gesso.data.inspection import report


def votes(folder: Path) -> Path:
    """Three pairs that can be trained on, and one of each that cannot."""
    for i in range(6):
        put(folder, f"{i}.png", discs(i), None)
    put(folder, "wide.png", discs(9, (256, 128)), None)
    rows = [(0, 1, 1), (2, 3, 0), (1, 2, 1), (4, 5, 0.5), (4, 5, None), (3, 3, 1), (4, "wide", 1), (0, 1, 1)]
    jsonl(
        folder,
        *({"jpg_0": f"{a}.png", "jpg_1": f"{b}.png", "label_0": label, "caption": "a thing"} for a, b, label in rows),
        *({"jpg_0": f"{a}.png", "jpg_1": f"{b}.png", "label_0": 1, "caption": "it"} for a, b in ((4, 5), (5, 4))),
        {"jpg_0": "0.png", "label_0": 1, "caption": "alone"},
    )
    return folder


def data(folder: Path, **changes: object) -> Data:
    return data_of(votes(folder)).model_copy(update={"cache": folder.parent / "cache"} | changes)


def test_every_pair_that_is_left_out_is_told_by_its_reason(tmp_path: Path) -> None:
    found = inspected(data(tmp_path / "a"))
    told = rules(found)
    assert told["pairs"].what == "3 of 11 pairs of pictures can be trained on"
    counts = {rule: len(told[rule].items) for rule in told if rule not in ("pairs", "note", "same caption")}
    assert counts == {
        "tie": 1,
        "pair without a label": 1,
        "half a pair": 1,
        "identical pair": 1,
        "pair of two shapes": 1,
        "duplicate pair": 1,
        "contradiction": 2,
    }
    assert names(told["tie"]) == [f"{tmp_path}/a/metadata.jsonl:4"]
    assert names(told["pair of two shapes"]) == ["4.png and wide.png"]
    summary = found.as_json()["summary"]
    assert (summary["pairs"], summary["pictures"], summary["left_out"]) == (3, 3, 8)


def test_it_agrees_with_a_run(tmp_path: Path) -> None:
    run = data(tmp_path / "a")
    found, index = inspected(run), build(run)
    assert sorted(p.look.image for p in found.pictures) == sorted(row.image for row in index.rows)
    assert sorted(p.rejected.image for p in found.pictures if p.rejected) == sorted(r.rejected_hash for r in index.rows)


def test_held_out_as_a_run_would(tmp_path: Path) -> None:
    rows = {"jpg_0": [], "jpg_1": [], "label_0": [], "caption": []}  # type: ignore[var-annotated]
    for name, values in pick(3).items():
        rows[name] = [*values[:2], values[0], *values[1:2]]
    rows["label_0"], rows["caption"] = [1, 1, 0, 1], ["a", "b", "c", "d"]
    file = parquet(tmp_path / "pairs.parquet", rows)
    run = data_of(file, validation={"fraction": 0.4}, cache=str(tmp_path / "cache"))
    held = sorted(p.caption for p in inspected(run).pictures if p.split == "validation")
    assert held == sorted(row.caption for row in build(run).validation)
    assert held in (["a", "c"], ["b", "d"]), "pairs of the same pictures stay together"


def test_a_rival_that_cannot_be_read(tmp_path: Path) -> None:
    run = data(tmp_path / "a")
    (tmp_path / "a" / "3.png").write_bytes(b"broken")
    told = rules(inspected(run))
    assert all("3.png" in item.note for item in told["unreadable"].items if item.name != "3.png")
    assert told["unreadable"].severity == "error"


def test_alike_pictures_of_a_pair_are_no_duplicates(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / "a", f"{i}.png", discs(1), None, compress_level=i)
    jsonl(
        tmp_path / "a", *({"chosen": f"{a}.png", "rejected": f"{b}.png", "caption": "x"} for a, b in ((0, 1), (0, 2)))
    )
    told = rules(inspected(data_of(tmp_path / "a")))
    assert not {"duplicate", "near duplicate", "leakage"} & told.keys()


def test_the_page_shows_both_side_by_side(tmp_path: Path) -> None:
    page = report.page(inspected(data(tmp_path / "a")), title="votes")
    assert page.count("<b>preferred</b>") == page.count("<b>rejected</b>") == 3
    plain = put(tmp_path / "plain", "a.png", discs(1)).parent
    assert "<b>rejected</b>" not in report.page(inspected(data_of(plain)), title="plain")
