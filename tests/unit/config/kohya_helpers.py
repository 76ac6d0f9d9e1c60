"""A dataset file of sd-scripts, the keys that both kinds of file have, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from dialect_helpers import at, lines_of

from gesso.config import files
from gesso.config.dialects import Converted, DialectReport
from gesso.config.files import Loaded
from gesso.errors import UserError

DATASET = """\
[general]
enable_bucket = true
caption_extension = ".txt"
keep_tokens = 1

[[datasets]]
resolution = 1024
batch_size = 2

  [[datasets.subsets]]
  image_dir = "{root}/hare"
  num_repeats = 10
  keep_tokens = 2

  [[datasets.subsets]]
  image_dir = "{root}/dogs"
  is_reg = true
  class_tokens = "a dog"
"""

# Every key of a dataset file, with a value that asks for something, and what becomes of it: our key and value, a word
# of the reason why it has no effect (!), or of the refusal (?).
LEVELS = {
    "resolution": ("768", "data.resolution=768"),
    "batch_size": ("3", "training.batch_size=3"),
    "enable_bucket": ("true", "data.buckets.enabled=True"),
    "min_bucket_reso": ("320", "data.buckets.smallest=320"),
    "max_bucket_reso": ("1536", "data.buckets.largest=1536"),
    "bucket_reso_steps": ("32", "data.buckets.step=32"),
    "bucket_no_upscale": ("true", "data.buckets.upscale=False"),
    "network_multiplier": ("0.5", "?one strength"),
    "validation_split": ("0.1", "data.validation.fraction=0.1"),
    "validation_seed": ("4", "!held out by their content"),
    "resize_interpolation": ('"area"', "?Lanczos"),
    "num_repeats": ("3", "data.sources.0.repeats=3"),
    "shuffle_caption": ("true", "data.captions.shuffle=True"),
    "keep_tokens": ("2", "data.captions.keep=2"),
    "keep_tokens_separator": ('"|||"', "data.captions.keep_separator=|||"),
    "secondary_separator": ('";;;"', "?second separator"),
    "caption_separator": ('";"', "data.captions.separator=;"),
    "caption_prefix": ('"photo of"', "data.captions.prefix=photo of "),
    "caption_suffix": ('"sharp"', "data.captions.suffix= sharp"),
    "enable_wildcard": ("true", "data.captions.wildcards=True"),
    "color_aug": ("true", "?colours"),
    "flip_aug": ("true", "data.sources.0.flip=True"),
    "face_crop_aug_range": ("[2.0, 4.0]", "?faces"),
    "random_crop": ("true", "data.sources.0.crop=random"),
    "caption_dropout_rate": ("0.1", "data.captions.dropout=0.1"),
    "caption_dropout_every_n_epochs": ("2", "?at random"),
    "caption_tag_dropout_rate": ("0.2", "data.captions.tag_dropout=0.2"),
    "token_warmup_min": ("2", "!token_warmup_step"),
    "token_warmup_step": ("10", "?grow"),
    "caption_extension": ('".cap"', "data.sources.0.caption_extension=.cap"),
    "cache_info": ("true", "!always kept"),
}


def load(text: str, tmp_path: Path, *, name: str = "train.toml") -> Loaded:
    path = tmp_path / name
    path.write_text(text)
    return files.load(path)


def problems(text: str, tmp_path: Path, *, name: str = "train.toml") -> list[str]:
    with pytest.raises(UserError) as caught:
        load(text, tmp_path, name=name)
    return [line.replace(f"{tmp_path}/", "") for line in lines_of(caught.value)]


def notes(report: DialectReport) -> dict[str, str]:
    return {e.key: e.note for part in (report.mapped, report.ignored, report.refused) for e in part}


def judge(converted: Converted, key: str, line: int, expected: str) -> None:
    """The key has become what was expected, and the report names it with its line."""
    report = converted.report
    if expected[0] in "?!":
        entries = report.refused if expected[0] == "?" else report.ignored
        assert any(e.key.startswith(key) and expected[1:] in e.note + str(lines_of_all(converted)) for e in entries)
    else:
        native, _, value = expected.partition("=")
        assert str(at(converted.data, native)) == value
        entries = report.mapped
    assert any(e.key.startswith(key) and e.line == line for e in entries), (key, line, entries)


def lines_of_all(converted: Converted) -> list[str]:
    return [line for problem in converted.problems for line in lines_of(problem)]
