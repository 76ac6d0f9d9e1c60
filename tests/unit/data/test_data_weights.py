"""What each picture counts in the loss, from a column of its table: read where it is named, and never guessed."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pair_helpers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_helpers import captioned, data_for, folder_of, settle
from source_helpers import found, jsonl, look, notices, png, problems, tar
from test_data_loader import loader_for

from gesso.config.run import Data, Source
from gesso.core.batch import Batch
from gesso.core.noise import DDPM
from gesso.data import scans
from gesso.data.index import build
from gesso.data.sources import Record, hub
from gesso.objectives.denoise import Denoise

KINDS = ("jsonl", "csv", "metadata.parquet", "pictures.parquet", "saved")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    yield
    hub.forget()


def listed(folder: Path, kind: str, cells: Sequence[Any], column: str = "weight") -> str:
    """A set of one picture a cell, in a table of this kind; the path of the source."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"picture {i}" for i in range(len(cells))]
    pictures = [pair_helpers.png(i, (64, 64)) for i in range(len(cells))]
    if kind == "pictures.parquet":
        table = pa.table({"image": pictures, "text": texts, column: list(cells)})
        pq.write_table(table, folder / "set.parquet", row_group_size=2)
        return str(folder / "set.parquet")
    if kind == "saved":
        rows = {"image": [{"bytes": data, "path": None} for data in pictures], "text": texts, column: list(cells)}
        made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        made.save_to_disk(folder / "set")
        return str(folder / "set")
    names = [f"{i}.png" for i in range(len(cells))]
    for name, data in zip(names, pictures, strict=True):
        (folder / name).write_bytes(data)
    if kind == "jsonl":
        rows_ = zip(names, texts, cells, strict=True)
        jsonl(folder, *({"file_name": name, "text": text, column: cell} for name, text, cell in rows_))
    elif kind == "csv":
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("file_name", "text", column), *zip(names, texts, cells, strict=True)])
    else:
        table = pa.table({"file_name": names, "text": texts, column: list(cells)})
        pq.write_table(table, folder / "metadata.parquet")
    return str(folder)


def weights(records: Sequence[Record]) -> dict[str, float]:
    return {record.caption: record.weight for record in records}


def data_of(path: str, cache: Path, **changes: object) -> Data:
    return data_for(cache=cache, sources=(Source.model_validate({"path": path} | changes),))


class Scaled:
    """A policy whose prediction is the noisy latents times one number, which is trained."""

    noise = DDPM(torch.linspace(0.999, 0.01, 100, dtype=torch.float64))

    def __init__(self) -> None:
        self.gain = torch.tensor(0.7, requires_grad=True)

    def condition(self, batch: Batch) -> object:
        return batch.text

    def predict(self, noisy: torch.Tensor, _t: torch.Tensor, _cond: object) -> torch.Tensor:
        return self.gain * noisy

    def reference(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def gradients(data: Data, cache: Path) -> dict[str, torch.Tensor]:
    """Caption -> the gradient of what its picture adds to the loss of the first step."""
    made = {}
    for batch in loader_for(data, cache, batch_size=3, steps=1).window(0):
        policy = Scaled()
        losses = Denoise().loss(policy, batch)  # type: ignore[arg-type]
        for i, caption in enumerate(batch.captions):
            [made[caption]] = torch.autograd.grad(losses[i], [policy.gain], retain_graph=True)
    return made


class TestRead:
    @pytest.mark.parametrize("kind", KINDS)
    def test_each_kind_of_table(self, tmp_path: Path, kind: str) -> None:
        path = listed(tmp_path, kind, [1.0, 2.0, 0.25])
        assert weights(found(path, weight_column="weight")) == {"picture 0": 1, "picture 1": 2, "picture 2": 0.25}

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_column_that_is_not_named_changes_nothing(self, tmp_path: Path, kind: str) -> None:
        path = listed(tmp_path, kind, [3.0, -1.0, 0.0])
        assert set(weights(found(path)).values()) == {1.0}
        assert "weight" not in notices(path)

    @pytest.mark.parametrize("kind", KINDS)
    def test_numbers_that_are_written_as_text(self, tmp_path: Path, kind: str) -> None:
        path = listed(tmp_path, kind, [" 2 ", "1e-1", ".5"], column="score")
        rows = weights(found(path, weight_column="score"))
        assert rows == {"picture 0": 2, "picture 1": 0.1, "picture 2": 0.5}

    def test_decimals_and_whole_numbers(self, tmp_path: Path) -> None:
        for kind, cells in (("pictures.parquet", [Decimal("1.50")]), ("saved", [4]), ("jsonl", [4])):
            [row] = found(listed(tmp_path / kind, kind, cells), weight_column="weight")
            assert row.weight == float(cells[0])

    def test_a_list_of_pairs(self, tmp_path: Path) -> None:
        rows = []
        for i, weight in enumerate((0.5, 3)):
            names = [pair_helpers.noise(tmp_path / f"{i}{side}.png", 10 * i + k).name for k, side in enumerate("ab")]
            rows.append({"chosen": names[0], "rejected": names[1], "text": f"pair {i}", "w": weight})
        jsonl(tmp_path, *rows)
        assert weights(found(tmp_path, weight_column="w")) == {"pair 0": 0.5, "pair 1": 3}
        index = build(data_of(str(tmp_path), tmp_path / "cache", weight_column="w", weight=2.0))
        assert {row.caption: row.weight for row in index.rows} == {"pair 0": 1, "pair 1": 6}
        assert all(row.other is not None and row.other.weight == row.weight for row in index.rows)

    def test_tables_of_pairs_keep_rows_and_weights_together(self, tmp_path: Path) -> None:
        columns = pair_helpers.pick() | {"w": [1.0, 2.0, 3.0, 4.0, 5.0]}  # the third and the last teach nothing
        want = {"prompt 0": 1, "prompt 1": 2, "prompt 3": 4}
        file = pair_helpers.parquet(tmp_path / "set.parquet", columns)
        assert weights(found(file, weight_column="w")) == want
        made = datasets.Dataset.from_dict(columns)
        for name in ("jpg_0", "jpg_1"):
            made = made.cast_column(name, datasets.Image())
        made.save_to_disk(tmp_path / "saved")
        assert weights(found(tmp_path / "saved", weight_column="w")) == want
        assert weights(found(file, weight_column="w", pairs="chosen")) == want


class TestRefused:
    @pytest.mark.parametrize("kind", KINDS)
    def test_empty_cells_all_at_once_with_their_lines(self, tmp_path: Path, kind: str) -> None:
        told = problems(listed(tmp_path, kind, ["1", None, "2", None]), weight_column="weight")
        assert told.count("no weight: 'weight' is empty") == 2
        for line in {"jsonl": (2, 4), "csv": (3, 5)}.get(kind, (2, 4)):
            assert f"metadata.{kind}:{line}" in told if kind in ("jsonl", "csv") else f"row {line}" in told

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("cell", ["-0.5", "nan", "inf", "-inf", "1e39", "much", "1,5", "1_000", "٣"])
    def test_what_is_no_weight(self, tmp_path: Path, kind: str, cell: str) -> None:
        told = problems(listed(tmp_path, kind, ["1", cell]), weight_column="weight")
        assert f"'weight' is {cell!r}; a weight is a finite number, 0 or more" in told
        assert (":3" if kind == "csv" else ":2" if kind == "jsonl" else "row 2") in told

    @pytest.mark.parametrize("kind", KINDS[2:])
    @pytest.mark.parametrize("number", [-1.0, float("nan"), float("inf")])
    def test_numbers_of_columns(self, tmp_path: Path, kind: str, number: float) -> None:
        told = problems(listed(tmp_path, kind, [1.0, number]), weight_column="weight")
        assert f"'weight' is {number!r}; a weight" in told

    @pytest.mark.parametrize("value", [True, [1], {"a": 1}, 10**400, float("nan"), float("-inf")])
    def test_other_values_of_json(self, tmp_path: Path, value: object) -> None:
        assert "'weight' is " in problems(listed(tmp_path, "jsonl", [1, value]), weight_column="weight")

    def test_a_line_without_the_column(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "a").with_suffix(".txt").unlink()
        jsonl(tmp_path, {"file_name": "a.png", "text": "a", "w": 1}, {"file_name": "a.png", "text": "b"})
        told = problems(tmp_path, weight_column="w")
        assert "metadata.jsonl:2: no column 'w'; this row has: file_name, text" in told

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_column_that_is_not_there(self, tmp_path: Path, kind: str) -> None:
        told = problems(listed(tmp_path, kind, [1.0]), weight_column="weigth")
        assert "there is no column 'weigth'; the columns are:" in told
        assert "set weight_column to weight" in told

    @pytest.mark.parametrize("kind", ["pictures.parquet", "saved"])
    def test_columns_of_no_numbers(self, tmp_path: Path, kind: str) -> None:
        for name, cells in (("flags", [True]), ("lists", [["1"]])):
            path = listed(tmp_path / name, kind, cells, column=name)
            assert f"the weight column '{name}' holds" in problems(path, weight_column=name)
        assert "the weight column 'image' holds" in problems(path, weight_column="image")

    def test_names_of_classes_are_no_numbers(self, tmp_path: Path) -> None:
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["cat", "dog"]),
            }
        )
        rows = {"image": [{"bytes": png(), "path": None}], "text": ["a"], "label": [1]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
        assert "'label' is 'dog'" in problems(tmp_path / "set", weight_column="label")

    @pytest.mark.parametrize("layout", ["folder", "kohya", "webdataset", "pairs"])
    def test_layouts_without_a_table(self, tmp_path: Path, layout: str) -> None:
        path = tmp_path / "set"
        if layout == "folder":
            folder_of(path, 2)
        elif layout == "kohya":
            folder_of(path / "10_sks dog", 2)
        elif layout == "pairs":
            folder_of(path / "chosen", 2)
            folder_of(path / "rejected", 2)
        else:
            path = tar(tmp_path / "set.tar", {"0.png": png(), "0.txt": b"a", "1.png": png("blue"), "1.txt": b"b"})
        assert not look(path).problems
        told = problems(path, weight_column="w")
        assert "weight_column is 'w', but 2 of 2 pictures come from no table, and caption files have no columns" in told

    def test_pictures_outside_of_the_folders_that_have_tables(self, tmp_path: Path) -> None:
        listed(tmp_path / "inner", "jsonl", [1, 2])
        captioned(tmp_path, "bare.png", "bare")
        assert len(found(tmp_path)) == 3
        told = problems(tmp_path, weight_column="weight")
        assert "1 of 3 pictures comes from no table" in told
        assert "bare.png" in told


class TestInARun:
    def test_batches_have_the_products(self, tmp_path: Path) -> None:
        path = listed(tmp_path / "set", "csv", [1, 2.5, 0, 4])
        data = data_of(path, tmp_path / "cache", weight_column="weight", weight=0.5)
        seen = {}
        for batch in loader_for(data, tmp_path / "cache", batch_size=2, steps=2).window(0):
            seen |= dict(zip(batch.captions, batch.weights.tolist(), strict=True))
        for batch in loader_for(data, tmp_path / "cache", batch_size=2, steps=2).window(1):
            seen |= dict(zip(batch.captions, batch.weights.tolist(), strict=True))
        assert seen == {"picture 0": 0.5, "picture 1": 1.25, "picture 2": 0.0, "picture 3": 2.0}

    def test_the_gradient_of_a_picture_is_in_proportion(self, tmp_path: Path) -> None:
        path = listed(tmp_path / "set", "jsonl", [1, 2, 0])
        plain = gradients(data_of(path, tmp_path / "cache"), tmp_path / "cache")
        weighed = gradients(data_of(path, tmp_path / "cache", weight_column="weight"), tmp_path / "cache")
        assert all(abs(one) > 1e-3 for one in plain.values())
        for i, factor in enumerate((1, 2, 0)):
            assert weighed[f"picture {i}"] == factor * plain[f"picture {i}"]

    def test_zeros_are_counted(self, tmp_path: Path) -> None:
        path = listed(tmp_path / "set", "csv", [0, 1, "-0.0"])
        data = data_of(path, tmp_path / "cache", weight_column="weight")
        settle()
        for _ in range(2):  # the second time from memory
            index = build(data)
            assert len(index.train) == 3
            [told] = [notice for notice in index.notices if "weight 0" in notice]
            assert "2 of 3 pictures have the weight 0 in 'weight': they are seen, but do not count" in told
            assert "0.png" in told
            assert "1.png" not in told
        one = notices(listed(tmp_path / "other", "csv", [0, 1]), weight_column="weight")
        assert "1 of 2 pictures has the weight 0 in 'weight': it is seen, but does not count" in one

    def test_the_fingerprint_and_the_memory_see_a_weight(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = data_of(listed(tmp_path / "set", "jsonl", [1, 1]), tmp_path / "cache", weight_column="weight")
        settle()
        first = build(data)
        listed(tmp_path / "set", "jsonl", [1, 7])
        changed = build(data)
        assert {row.caption: row.weight for row in changed.rows} == {"picture 0": 1, "picture 1": 7}
        assert changed.fingerprint != first.fingerprint
        settle()
        assert build(data).fingerprint == changed.fingerprint
        monkeypatch.setattr(scans, "collect", None)  # what was not touched is not listed again
        assert build(data).rows == changed.rows
        doubled = data.sources[0].model_copy(update={"weight": 2.0})
        remembered = build(data.model_copy(update={"sources": (doubled,)}))
        assert {row.caption: row.weight for row in remembered.rows} == {"picture 0": 2, "picture 1": 14}

    def test_naming_the_column_is_seen_after_a_run_without(self, tmp_path: Path) -> None:
        path = listed(tmp_path / "set", "csv", [1, 3])
        settle()
        plain = build(data_of(path, tmp_path / "cache"))
        weighed = build(data_of(path, tmp_path / "cache", weight_column="weight"))
        assert [row.weight for row in plain.rows] == [1, 1]
        assert sorted(row.weight for row in weighed.rows) == [1, 3]
        assert plain.fingerprint != weighed.fingerprint

    def test_one_picture_listed_with_two_weights_is_the_same_in_either_order(self, tmp_path: Path) -> None:
        made = []
        for order in ((1, 5), (5, 1)):
            folder = tmp_path / str(order[0])
            captioned(folder, "a.png", "a").with_suffix(".txt").unlink()
            jsonl(folder, *({"file_name": "a.png", "text": "a", "w": weight} for weight in order))
            made.append(build(data_of(str(folder), tmp_path / "cache", weight_column="w")))
        assert made[0].fingerprint == made[1].fingerprint
        assert [row.weight for row in made[0].rows] == [row.weight for row in made[1].rows]

    def test_a_validation_folder_needs_no_weights(self, tmp_path: Path) -> None:
        path = listed(tmp_path / "set", "csv", [2, 3])
        data = data_of(path, tmp_path / "cache", weight_column="weight", weight=2.0)
        held = folder_of(tmp_path / "held", 2)
        data = data.model_copy(update={"validation": data.validation.model_copy(update={"path": held})})
        index = build(data)
        assert [row.weight for row in index.validation] == [1, 1]
        assert sorted(row.weight for row in index.train) == [4, 6]
