"""Dataset files of sd-scripts: every key is taken, refused or reported, with its line."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from dialect_helpers import at
from kohya_helpers import DATASET, LEVELS, judge, lines_of_all, load, notes, problems

from gesso.config import files
from gesso.config.dialects import Converted, kohya, toml
from gesso.errors import UserError

SUBSET = {
    "image_dir": ('"/pictures"', "data.sources.0.path=/pictures"),
    "is_reg": ("true", "data.sources.0.role=prior"),
    "class_tokens": ('"a hare"', "data.sources.0.concept=a hare"),
    "alpha_mask": ("true", "data.sources.0.mask=alpha"),
    "metadata_file": ('"meta.json"', "?metadata.jsonl"),
    "conditioning_data_dir": ('"edges"', "?ControlNet"),
    "custom_attributes": ("{}", "!notes"),
}


def read(text: str, tmp_path: Path) -> Converted:
    (tmp_path / "dataset.toml").write_text(text)
    return kohya.read(tmp_path / "dataset.toml")


def test_the_tables_name_every_key() -> None:
    assert set(LEVELS) == set(kohya.ANYWHERE)
    assert set(SUBSET) == set(kohya.OWN)


@pytest.mark.parametrize("level", ["general", "datasets", "subsets"])
@pytest.mark.parametrize("key", [*LEVELS, *SUBSET])
def test_every_key_of_a_dataset_file(key: str, level: str, tmp_path: Path) -> None:
    value, expected = (LEVELS | SUBSET)[key]
    # On its own the bucket keys do nothing, because buckets are off.
    rest = "enable_bucket = true\n" if "bucket" in key and key != "enable_bucket" else "\n"
    line = f"{key} = {value}\n"
    text = f"[general]\n{rest}{line if level == 'general' else chr(10)}"
    text += f"[[datasets]]\n{line if level == 'datasets' else chr(10)}"
    folder = "" if key == "image_dir" else 'image_dir = "/other"\n'
    text += f"[[datasets.subsets]]\n{line if level == 'subsets' else chr(10)}{folder}"
    number = {"general": 3, "datasets": 5, "subsets": 7}[level]
    path = {"general": "general", "datasets": "datasets.0", "subsets": "datasets.0.subsets.0"}[level]
    converted = read(text, tmp_path)
    if (key in SUBSET and level != "subsets") or (key in kohya.DATASET and level == "subsets"):
        where = "one subset" if key in SUBSET else "the data set"
        assert any(f"dataset.toml:{number}: {key} belongs to {where}" in p for p in lines_of_all(converted))
    else:
        judge(converted, f"{path}.{key}", number, expected)
        assert bool(converted.problems) == (expected[0] == "?")


def test_nearest_level_wins_and_what_nobody_takes_is_said(tmp_path: Path) -> None:
    text = DATASET.replace("{root}", "/r").replace('class_tokens = "a dog"', "keep_tokens = 3")
    converted = read(text, tmp_path)
    sources = converted.data["data"]["sources"]
    assert [one["captions"]["keep"] for one in sources] == [2, 3]
    assert notes(converted.report)["general.keep_tokens"] == "what is nearer to the images says otherwise"
    assert not converted.problems


def test_a_run_file_with_a_dataset_file(tmp_path: Path) -> None:
    (tmp_path / "hare").mkdir()
    (tmp_path / "hare" / "a.png").write_bytes(b"")
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset.toml").write_text(DATASET.replace("{root}", str(tmp_path)))
    text = "preset: low_vram\ndata: sets/dataset.toml\ntraining:\n  steps: 10\n"
    loaded = load(text, tmp_path, name="run.yaml")
    run, report = loaded.run, loaded.report
    hare, dogs = run.data.sources
    assert (hare.path, hare.layout, hare.repeats) == (str(tmp_path / "hare"), "folder", 10)
    assert (hare.missing_captions, hare.caption_extension, hare.role) == ("error", ".txt", "instance")
    assert (dogs.role, dogs.concept, dogs.missing_captions, dogs.repeats) == ("prior", "a dog", "concept", 1)
    assert hare.captions is not None
    assert dogs.captions is not None
    assert (hare.captions.keep, dogs.captions.keep) == (2, 1)
    assert (hare.captions.lines, run.data.resolution, run.training.batch_size) == ("first", 1024, 2)
    buckets = run.data.buckets
    assert (buckets.enabled, buckets.smallest, buckets.largest, buckets.step) == (True, 256, 1024, 64)
    assert loaded.origins["data.sources.0.repeats"] == f"{tmp_path}/sets/dataset.toml:12"
    assert loaded.origins["training.batch_size"] == f"{tmp_path}/sets/dataset.toml:8"
    assert report is not None
    assert report.tool == kohya.NAME
    assert files.load_text(files.dump(run), folder=tmp_path).run == run.model_copy(
        update={"output": run.folder.absolute()}
    )


def test_a_dataset_file_named_by_a_run_file_that_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(DATASET)
    text = "data: dataset.toml\ntraining:\n  steps: 10\n  batch_size: 4\n"
    (found,) = problems(text, tmp_path, name="run.yaml")
    assert found == "run.yaml:4: training.batch_size is 2 in dataset.toml:8, and not the same here -> keep one of them"
    (found,) = problems("training: {steps: 1}\ndata: datset.toml\n", tmp_path, name="run.yaml")
    assert found.startswith("run.yaml:2: data: there is no file datset.toml")


def test_a_dataset_file_alone_is_not_a_run(tmp_path: Path) -> None:
    found = problems(DATASET, tmp_path, name="dataset.toml")
    assert found == [
        "dataset.toml: this file only describes images, not a run -> write a run file with `data: dataset.toml` in it"
    ]


def test_json_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "set.json").write_text(
        '{"datasets": [\n{"resolution": 512,\n"subsets": [\t{"image_dir": "/x",\n\t"num_repeets": 2}]}]}'
    )
    converted = kohya.read(tmp_path / "set.json")
    assert at(converted.data, "data.sources.0.path") == "/x"
    (found,) = lines_of_all(converted)
    assert found.replace(f"{tmp_path}/", "").startswith("set.json:4: unknown key datasets.0.subsets.0.num_repeets")
    assert "did you mean num_repeats?" in found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[generall]\n", "dataset.toml:1: unknown key generall"),
        (
            "[[datasets]]\nresolutoin = 3\n[[datasets.subsets]]\nimage_dir='/x'",
            "dataset.toml:2: unknown key datasets.0.re",
        ),
        ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats=1\n", "dataset.toml:2: image_dir is missing"),
        ("[general]\nkeep_tokens=1\n", "dataset.toml: no training images are named"),
        ("datasets = 3\n", "dataset.toml:1: datasets must be a list of tables"),
        ("[[datasets]]\nresolution=[512,768]\n[[datasets.subsets]]\nimage_dir='/x'", "512 x 768 is no square"),
        ("[[datasets]]\nresolution='big'\n[[datasets.subsets]]\nimage_dir='/x'", "must be one whole number, or width"),
        ("[[datasets]]\n[[datasets.subsets]]\nimage_dir='/x'\nflip_aug='maybe'", "flip_aug must be true or false"),
    ],
)
def test_mistakes_have_their_line(text: str, words: str, tmp_path: Path) -> None:
    found = [line.replace(f"{tmp_path}/", "") for line in lines_of_all(read(text, tmp_path))]
    assert any(words in one for one in found), found


def test_wrong_values_are_named_in_the_words_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(DATASET.replace("num_repeats = 10", 'num_repeats = "many"'))
    (found,) = problems("data: dataset.toml\ntraining: {steps: 1}\n", tmp_path, name="run.yaml")
    assert found.startswith("dataset.toml:12: datasets.0.subsets.0.num_repeats must be a number, not 'many'")


def test_toml_mistakes_have_their_line(tmp_path: Path) -> None:
    for text, line in (("a = 1\nb = tru\n", 2), ("a = 1\na = 2\n", 2), ('x = "abc', 1), ("", None)):
        with pytest.raises(UserError) as caught:
            read(text, tmp_path)
        assert caught.value.where == f"{tmp_path}/dataset.toml" + (f":{line}" if line else "")
    # An image_dir that is missing is one problem, not two.
    (tmp_path / "dataset.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 2\n")
    assert len(problems("data: dataset.toml\ntraining: {steps: 1}\n", tmp_path, name="run.yaml")) == 1
    with pytest.raises(UserError, match="there is no such dataset file"):
        kohya.read(tmp_path / "none.toml")


def test_lines_of_toml() -> None:
    text = """\
# [comment]
[general]  # x = [
a."b c" = '''x
[not a header]'''
[[datasets]]
r = [
  1, # one ]
  2,
]
[[datasets.subsets]]
s = "q\\"] #"
[[datasets.subsets]]
t = { u = 1, v = [ { w = 2 } ] }
[[datasets]]
subsets = [{ x = 1 },
  { x = 2 }]
"""
    parsed = toml.parse(text, file="f")
    assert parsed.data == tomllib.loads(text)
    lines = parsed.lines
    assert lines["general", "a", "b c"] == 3
    assert (lines["datasets", 0, "r"], lines["datasets", 0, "r", 1]) == (6, 8)
    assert lines["datasets", 0, "subsets", 0, "s"] == 11
    assert lines["datasets", 0, "subsets", 1, "t", "v", 0, "w"] == 13
    assert lines["datasets", 1, "subsets", 1, "x"] == 16


def test_one_folder_at_several_resolutions_is_one_source(tmp_path: Path) -> None:
    one = "[[datasets]]\nresolution = {}\n[[datasets.subsets]]\nimage_dir = '/x'\n"
    converted = read(one.format(512) + one.format(1024), tmp_path)
    (source,) = converted.data["data"]["sources"]
    assert source["resolution"] == [512, 1024]
    assert {e.line for e in converted.report.mapped if e.key.endswith(".resolution")} == {2, 6}
    converted = read(one.format(512) + one.format(1024).replace("/x", "/y"), tmp_path)
    assert [s["resolution"] for s in converted.data["data"]["sources"]] == [512, 1024]
    assert converted.data["data"]["resolution"] == 1024
    assert at(read(one.format("[512, 2048]"), tmp_path).data, "data.resolution") == 1024, "the area counts"


def test_data_sets_that_differ_where_one_value_counts(tmp_path: Path) -> None:
    one = "[[datasets]]\nbatch_size = {}\n[[datasets.subsets]]\nimage_dir = '/x'\n"
    (found,) = lines_of_all(read(one.format(1) + one.format(2).replace("/x", "/y"), tmp_path))
    assert "dataset.toml:6: datasets.1.batch_size is 2 but datasets.0.batch_size (line 2) is 1" in found
    (found,) = lines_of_all(read(one.format(2) + "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/y'\n", tmp_path))
    assert "datasets.0.batch_size is for some of the data sets" in found


def test_what_several_subsets_share_is_one_problem(tmp_path: Path) -> None:
    text = DATASET.replace("{root}", "/r").replace("keep_tokens = 1", "color_aug = true\nflip_aug = 3")
    assert len(lines_of_all(read(text, tmp_path))) == 2


def test_images_that_sd_scripts_would_not_see(tmp_path: Path) -> None:
    (tmp_path / "hare" / "old").mkdir(parents=True)
    (tmp_path / "hare" / "old" / "a.png").write_bytes(b"")
    found = lines_of_all(read(DATASET.replace("{root}", str(tmp_path)), tmp_path))
    assert len(found) == 1
    assert "has images in folders inside, such as old/a.png" in found[0]


def test_captions_of_sd_scripts(tmp_path: Path) -> None:
    one = "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '/x'\n"
    assert at(read(one, tmp_path).data, "data.captions.lines") == "first"
    assert at(read(one, tmp_path).data, "data.sources.0.caption_extension") == ".caption"
    assert at(read(one + "enable_wildcard = true\n", tmp_path).data, "data.captions.lines") == "choose"
    both = read(one + "keep_tokens = 1\nkeep_tokens_separator = '|||'\n", tmp_path)
    assert both.data["data"]["captions"] == {"keep_separator": "|||", "lines": "first"}
    assert "says what is kept" in notes(both.report)["datasets.0.subsets.0.keep_tokens"]
    empty = read(one + "keep_tokens = 1\nkeep_tokens_separator = ''\n", tmp_path)
    assert empty.data["data"]["captions"]["keep"] == 1
