from __future__ import annotations

import json
from pathlib import Path

import pytest
from inspect_helpers import data_of, discs, inspected, names, put, rules
from PIL import Image, ImageDraw, ImageFilter

from gesso.config.run import Buckets, Captions, Holdout, Source
from gesso.data import index, tokens
from gesso.data.inspection import look
from gesso.data.inspection.findings import BLURRED
from gesso.data.plan import Plan
from gesso.errors import Problems


def test_a_good_folder_has_no_findings(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path, f"{i}.png", discs(i), f"thing number {i}")
    found = inspected(data_of(tmp_path))
    assert found.findings == ()
    assert [picture.name for picture in found.pictures] == ["0.png", "1.png", "2.png", "3.png"]
    assert [(b.size, b.images, b.crop_loss) for b in found.buckets] == [((192, 192), 4, 0.0)]
    assert found.as_json()["ok"] is True


def test_each_picture_that_cannot_be_read_is_named_with_its_reason(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "good")
    whole = put(tmp_path, "cut.png", discs(1), "cut").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    put(tmp_path, "empty.png", discs(2), "empty").write_bytes(b"")
    put(tmp_path, "text.png", discs(2), "text").write_text("not a picture")
    finding = rules(inspected(data_of(tmp_path)))["unreadable"]
    assert finding.severity == "error"
    assert names(finding) == ["cut.png", "empty.png", "text.png"]
    for item, words in zip(finding.items, ("damaged", "file is empty", "not a picture"), strict=True):
        assert words in item.note

    skipping = inspected(data_of(tmp_path, skip_bad=True))
    assert rules(skipping)["unreadable"].severity == "warning"
    assert [item.name for item in skipping.left_out] == ["cut.png", "empty.png", "text.png"]
    assert "skip_bad" in skipping.left_out[0].note


def test_sizes_and_shapes(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "good")
    put(tmp_path, "tiny.png", discs(1, (40, 60)), "tiny")
    put(tmp_path, "small.png", discs(2, (100, 100)), "small")
    put(tmp_path, "wide.png", discs(3, (1200, 190)), "wide")
    found = rules(inspected(data_of(tmp_path)))
    assert names(found["tiny"]) == ["tiny.png"]
    assert "under 48 pixels" in found["tiny"].what
    assert names(found["enlarged"]) == ["small.png"], "the tiny one is told as tiny"
    assert found["enlarged"].items[0].note == "100 x 100, enlarged 1.9 times"
    assert names(found["extreme aspect"]) == ["wide.png"]
    assert found["extreme aspect"].items[0].note == "1200 x 190, 6.3 : 1"
    assert names(found["cropped"]) == ["wide.png"], "buckets of at most 4 : 1 cut it"


def test_what_fits_no_bucket_would_stop_a_run(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "good")
    put(tmp_path, "dot.png", discs(1, (10, 10)), "dot")
    data = data_of(tmp_path, buckets=Buckets(step=16, upscale=False))
    finding = rules(inspected(data))["too small for a bucket"]
    assert (finding.severity, names(finding)) == ("error", ["dot.png"])
    with pytest.raises(Problems, match="less than one bucket step"):
        Plan(index.build(data).rows, data=data, batch_size=1)


def sharp_pictures() -> list[Image.Image]:
    ground = Image.new("RGB", (700, 500), "white")
    ImageDraw.Draw(ground).ellipse([200, 100, 500, 400], fill="navy")
    portrait = discs(9, (512, 512)).filter(ImageFilter.GaussianBlur(8))
    portrait.paste(discs(10, (150, 150)), (180, 180))
    foggy = Image.blend(discs(11, (512, 512)), Image.new("RGB", (512, 512), "grey"), 0.7)
    return [*(discs(i, (512 + 90 * i, 700)) for i in range(5)), ground, portrait, foggy]


@pytest.mark.parametrize("number", range(8))
def test_sharp_pictures_pass_and_blurred_ones_do_not(number: int) -> None:
    sharp = sharp_pictures()[number]
    blurred = sharp.filter(ImageFilter.GaussianBlur(2.5 * max(sharp.size) / look.SIDE))
    assert look.sharpness(look.reduced(sharp)) > 5 * BLURRED
    assert look.sharpness(look.reduced(blurred)) < BLURRED


def test_blurred_and_plain_pictures_are_told_apart(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "good")
    put(tmp_path, "soft.png", discs(1).filter(ImageFilter.GaussianBlur(5)), "soft")
    put(tmp_path, "plain.png", Image.new("RGB", (192, 192), "teal"), "plain")
    found = rules(inspected(data_of(tmp_path)))
    assert names(found["blurred"]) == ["soft.png"]
    assert names(found["flat"]) == ["plain.png"]
    assert found["flat"].severity == "hint"


def test_duplicates_exact_and_near(tmp_path: Path) -> None:
    for i in range(5):
        put(tmp_path, f"{i}.png", discs(i), f"number {i}")
    (tmp_path / "copy.png").write_bytes((tmp_path / "1.png").read_bytes())
    (tmp_path / "copy.txt").write_text("a copy")
    put(tmp_path, "smaller.jpg", discs(2).resize((150, 150)), "smaller", quality=70)
    found = rules(inspected(data_of(tmp_path)))
    assert [[item.name for item in group] for group in found["duplicate"].groups] == [["1.png", "copy.png"]]
    assert [[item.name for item in group] for group in found["near duplicate"].groups] == [["2.png", "smaller.jpg"]]
    assert "leakage" not in found


def test_leakage_into_a_validation_folder(tmp_path: Path) -> None:
    train, held = tmp_path / "train", tmp_path / "held"
    for i in range(4):
        put(train, f"{i}.png", discs(i), f"number {i}")
    put(held, "same.png", discs(0), "same")
    put(held, "nearly.jpg", discs(1).resize((160, 160)), "nearly", quality=80)
    (held / "nearly too.jpg").write_bytes((held / "nearly.jpg").read_bytes())
    (held / "nearly too.txt").write_text("the same as nearly")
    put(held, "new.png", discs(20), "new")
    found = inspected(data_of(train, validation=Holdout(path=held)))
    finding = rules(found)["leakage"]
    pairs = [sorted((Path(item.name).name, item.note) for item in group) for group in finding.groups]
    assert pairs == [
        [("0.png", "trained on"), ("same.png", "held out")],
        [("1.png", "trained on"), ("nearly too.jpg", "held out"), ("nearly.jpg", "held out")],
    ]
    assert "3 held-out pictures" in finding.what
    assert sum(bucket.images for bucket in found.buckets) == 4, "held-out pictures are in no bucket of training"


def test_pictures_are_held_out_as_a_run_does(tmp_path: Path) -> None:
    for i in range(24):
        put(tmp_path, f"{i:02}.png", discs(i), f"number {i}")
    data = data_of(tmp_path, validation=Holdout(fraction=0.3), cache=tmp_path / "cache")
    found = inspected(data)
    held = {picture.look.image for picture in found.pictures if picture.split == "validation"}
    assert held == {row.image for row in index.build(data).validation}
    assert 0 < len(held) < 24


def test_buckets_and_crops_are_those_of_the_plan(tmp_path: Path) -> None:
    for i, size in enumerate([(192, 192), (300, 200), (200, 300), (310, 200), (150, 190)]):
        put(tmp_path, f"{i}.png", discs(i, size), f"number {i}")
    source = Source(path=str(tmp_path), resolution=(192, 128))
    data = data_of(tmp_path, sources=(source,), cache=tmp_path / "cache")
    plan = Plan(index.build(data).rows, data=data, batch_size=1)
    found = inspected(data)
    ours = [(tuple(bucket.size), bucket.images, pytest.approx(bucket.crop_loss)) for bucket in found.buckets]
    assert ours == [tuple(row) for row in plan.describe()]


@pytest.mark.parametrize(
    ("policy", "severity", "caption"),
    [("error", "error", ""), ("empty", "hint", ""), ("trigger", "hint", "sks"), ("concept", "hint", "dogs")],
)
def test_missing_and_empty_captions(tmp_path: Path, policy: str, severity: str, caption: str) -> None:
    put(tmp_path / "dogs", "good.png", discs(0), "good")
    put(tmp_path / "dogs", "none.png", discs(1), None)
    put(tmp_path / "dogs", "blank.png", discs(2), " \n ")
    source = Source(path=str(tmp_path), missing_captions=policy, trigger="sks" if policy == "trigger" else None)
    found = inspected(data_of(tmp_path, sources=(source,)))
    finding = rules(found)["no caption"]
    assert (finding.severity, names(finding)) == (severity, ["dogs/blank.png", "dogs/none.png"])
    assert {picture.caption for picture in found.pictures if not picture.has_caption} == {caption}
    assert not any("no caption" in other.what for other in found.findings if other is not finding), "told once"


def test_what_is_dropped_for_want_of_a_caption_is_named(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "good")
    put(tmp_path, "none.png", discs(1), None)
    source = Source(path=str(tmp_path), missing_captions="drop")
    found = inspected(data_of(tmp_path, sources=(source,)))
    assert [tuple(item)[:2] for item in found.left_out] == [
        ("none.png", "it has no caption, and missing_captions is drop")
    ]
    assert [picture.name for picture in found.pictures] == ["good.png"]


def test_long_captions_are_named_with_their_length(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "good")
    put(tmp_path, "long.png", discs(1), "a hat " * 38)
    found = rules(inspected(data_of(tmp_path)))
    assert names(found["long caption"]) == ["long.png"]
    assert found["long caption"].items[0].note == "about 76 tokens"
    assert "estimated" in found["long caption"].what
    exact = rules(inspected(data_of(tmp_path), tokens=tokens.counter("micro:sdxl"), most_tokens=150))
    assert "long caption" not in exact


def test_characters_that_nobody_sees(tmp_path: Path) -> None:
    put(tmp_path, "bell.png", discs(0), "a bell \x07")
    put(tmp_path, "turned.png", discs(1), "right \u202e to left")
    put(tmp_path, "broken.png", discs(2), "caf\ufffd")
    put(tmp_path, "family.png", discs(3), "a family \U0001f468\u200d\U0001f469, naïve café, 日本")
    found = rules(inspected(data_of(tmp_path)))
    assert found["source"].severity == "error"
    assert "U+0007" in found["source"].what
    assert {item.name: item.note for item in found["odd characters"].items} == {
        "turned.png": "U+202E",
        "broken.png": "U+FFFD",
    }


def test_trigger_coverage_counts_whole_words(tmp_path: Path) -> None:
    for i, caption in enumerate(["a photo of SKS", "sks, hat", "he asks", "no such word"]):
        put(tmp_path, f"{i}.png", discs(i), caption)
    wanted = rules(inspected(data_of(tmp_path), trigger="sks"))["trigger"]
    assert wanted.severity == "warning"
    assert wanted.what == "'sks' is in 50.0% of the captions (2 of 4)"
    assert names(wanted) == ["2.png", "3.png"]
    own = inspected(data_of(tmp_path, sources=(Source(path=str(tmp_path), trigger="sks"),)))
    assert rules(own)["trigger"].severity == "hint"
    assert "puts it before 2 others" in rules(own)["trigger"].what
    assert own.pictures[2].caption == "sks, he asks"


def test_wildcards_that_cannot_be_read(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "a {red|blue} hat")
    put(tmp_path, "bad.png", discs(1), "a {red|blue hat")
    finding = rules(inspected(data_of(tmp_path, captions=Captions(wildcards=True))))["malformed"]
    assert (finding.severity, names(finding)) == ("error", ["bad.png"])
    assert "malformed" not in rules(inspected(data_of(tmp_path)))


def test_what_a_file_is_and_how_it_is_stored(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "good")
    (put(tmp_path, "other.png", discs(1), "other")).rename(tmp_path / "other.jpg")
    exif = Image.Exif()
    exif[0x112] = 6
    put(tmp_path, "turned.jpg", discs(2, (192, 128)), "turned", exif=exif)
    put(tmp_path, "clear.png", discs(3).convert("RGBA").rotate(20), "clear")
    found = inspected(data_of(tmp_path))
    told = rules(found)
    assert [tuple(item)[:2] for item in told["wrong ending"].items] == [("other.jpg", "it is PNG")]
    assert names(told["orientation"]) == ["turned.jpg"]
    assert names(told["converted"]) == ["clear.png"]
    turned = next(picture for picture in found.pictures if picture.name == "turned.jpg")
    assert (turned.look.width, turned.look.height) == (128, 192)


def test_problems_of_one_kind_are_one_finding(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path, f"{i}.png", discs(i), "x").with_suffix(".txt").write_bytes(b"caf\xe9" if i else b"good")
    finding = rules(inspected(data_of(tmp_path)))["source"]
    assert finding.severity == "error"
    assert [Path(item.name).name for item in finding.items] == ["1.txt:1", "2.txt:1", "3.txt:1"]


def test_tags_and_what_comes_together(tmp_path: Path) -> None:
    for i, caption in enumerate(["sks, hat, night", "sks, hat", "SKS, day, day", "sks, hat, day"]):
        put(tmp_path, f"{i}.png", discs(i), caption)
    words = inspected(data_of(tmp_path)).wording
    assert (words.unit, words.captions, words.distinct) == ("tags", 4, 4)
    assert words.terms == (("sks", 4), ("hat", 3), ("day", 2), ("night", 1))
    assert [tuple(pair) for pair in words.pairs(3)] == [("sks", "hat", 3), ("sks", "day", 2), ("sks", "night", 1)]
    assert words.everywhere() == ["sks"]


def test_prose_is_counted_by_its_words(tmp_path: Path) -> None:
    for i, caption in enumerate(["A dog in the garden, with a ball.", "The dog sleeps", "A cat."]):
        put(tmp_path, f"{i}.png", discs(i), caption)
    words = inspected(data_of(tmp_path)).wording
    assert words.unit == "words"
    assert words.terms[0] == ("dog", 2)
    assert "the" not in dict(words.terms)


def test_the_answer_is_json_with_every_file(tmp_path: Path) -> None:
    put(tmp_path, "good.png", discs(0), "good")
    put(tmp_path, "none.png", discs(1), None)
    (tmp_path / "broken.png").write_bytes(b"x")
    answer = json.loads(json.dumps(inspected(data_of(tmp_path)).as_json()))
    assert answer["ok"] is False
    assert answer["summary"]["pictures"] == 2
    assert answer["summary"]["unreadable"] == 1
    assert {finding["rule"] for finding in answer["findings"]} >= {"unreadable", "no caption"}
    assert answer["pictures"][0]["file"] == "good.png"
    assert answer["pictures"][0]["buckets"] == [[192, 192]]


def test_an_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    found = inspected(data_of(tmp_path))
    assert found.pictures == ()
    assert rules(found)["source"].severity == "error"
    assert "no pictures found" in rules(found)["source"].what
