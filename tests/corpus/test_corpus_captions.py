"""Captions, good and bad: which text each picture is trained with, and what stops a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from corpus_helpers import Bad, Case, Good, cases, data_of, examine, picture, put, put_files
from PIL import Image

from gesso.config.run import Captions
from gesso.data.captions import render
from gesso.data.index import build
from gesso.data.plan import Plan
from gesso.errors import UserError


def files(content: Mapping[str, bytes | str], source: dict[str, Any] | None = None) -> Any:
    """A maker of a folder with just these files; a picture is given by the name of its colour."""

    def make(folder: Path) -> dict[str, Any] | None:
        for i, (name, what) in enumerate(content.items()):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix in (".png", ".jpg", ".webp"):
                kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[file.suffix]
                file.write_bytes(picture(str(what), (80 + i, 64), kind))
            else:
                file.write_bytes(what if isinstance(what, bytes) else what.encode())
        return source

    return make


FINE: dict[str, bytes | str] = {"fine.png": "red", "fine.txt": "all well red"}
ROW = {"fine.png": "all well red"}


def good(name: str, content: dict[str, bytes | str], rows: Mapping[str, str], **more: Any) -> Case:
    source = more.pop("source", None)
    return Case(name, files(FINE | content, source), Good(ROW | dict(rows), **more))


def bad(name: str, content: dict[str, bytes | str], problems: Mapping[str, str], **more: Any) -> Case:
    fine = ("fine.png", "fine.txt")
    return Case(name, files(FINE | content, more.get("source")), Bad(problems, good=fine))


X: dict[str, bytes | str] = {"x.png": "blue"}
NO_TEXT: dict[str, dict[str, bytes | str]] = {
    "missing": X,
    "empty": X | {"x.txt": ""},
    "blank": X | {"x.txt": " \r\n\t\n"},
    "BOM alone": X | {"x.txt": "\ufeff"},
}


def policies() -> list[Case]:
    """Each way to have no caption under each policy."""
    listed = []
    for kind, content in NO_TEXT.items():
        listed.append(bad(f"{kind} caption", content, {"/x.": "caption"}))
        for policy, caption in (("empty", ""), ("trigger", "sks"), ("concept", "teapot")):
            source = {"missing_captions": policy, "trigger": "sks", "concept": "teapot"}
            name = f"{kind} caption, {policy}"
            listed.append(good(name, content, {"x.png": caption}, source=source, notices=("caption",)))
        left = {"source": {"missing_captions": "drop"}, "left_out": ("x.png",)}
        listed.append(good(f"{kind} caption, drop", content, {}, **left))
    return listed


GOOD = [
    good("byte order mark", X | {"x.txt": "\ufeffblue"}, {"x.png": "blue"}),
    good("blanks around", X | {"x.txt": "\n\n   a thing in blue \n"}, {"x.png": "a thing in blue"}),
    good("right to left", X | {"x.txt": "تصویر گل آبی"}, {"x.png": "تصویر گل آبی"}),
    good("emoji and other letters", X | {"x.txt": "👩‍🎨 写真, Käthe"}, {"x.png": "👩‍🎨 写真, Käthe"}),
    good("a long caption", X | {"x.txt": "word " * 400 + "blue"}, {"x.png": "word " * 400 + "blue"}),
    good(".caption", X | {"x.caption": "blue"}, {"x.png": "blue"}),
    good("json text", X | {"x.json": '"in blue"'}, {"x.png": "in blue"}),
    good("json object", X | {"x.json": '{"caption": "in blue", "size": [80, 64]}'}, {"x.png": "in blue"}),
    good(
        "an ending of one's own",
        {"fine.tags": "all well red"} | X | {"x.tags": "blue"},
        {"x.png": "blue"},
        source={"caption_extension": ".tags"},
    ),
    good(
        "two caption files and one named",
        {"fine.caption": "all well red"} | X | {"x.txt": "no", "x.caption": "blue"},
        {"x.png": "blue"},
        source={"caption_extension": ".caption"},
    ),
    good(
        "dots in the stem",
        {"a.png": "green", "a.txt": "in green", "a.b.png": "blue", "a.b.txt": "in blue"},
        {"a.png": "in green", "a.b.png": "in blue"},
    ),
    good(
        "one name in two folders",
        {"p/x.png": "green", "p/x.txt": "green", "q/y.png": "blue", "q/y.txt": "blue"},
        {"x.png": "green", "y.png": "blue"},
    ),
]

BAD = [
    *(case for case in policies() if isinstance(case.expect, Bad)),
    bad(
        "captions missing for some", {f"m{i}.png": "blue" for i in range(12)}, {f"/m{i}.": "caption" for i in range(12)}
    ),
    bad(
        "same stem, other ending",
        X | {"x.jpg": "green", "x.txt": "which"},
        {"x.png": "same|both|several|two|ambig", "x.jpg": "."},
    ),
    bad("two caption files", X | {"x.txt": "one", "x.caption": "other"}, {"x": r"\.caption"}),
    bad(
        "a caption of a longer name's beginning",
        {"a.txt": "a caption of a", "a_b_c_d_e.jpg": "blue"},
        {"/a_b_c_d_e.": "caption"},
    ),
    bad("a caption of a name that is longer", X | {"x_1.txt": "blue"}, {"/x.": "caption"}),
    bad("latin-1", X | {"x.txt": "Käthe in blue".encode("latin-1")}, {"x.txt": "utf-8"}),
    bad("utf-16", X | {"x.txt": "in blue".encode("utf-16")}, {"x.txt": "utf-8|utf-16"}),
    bad("NUL", X | {"x.txt": "in \0blue"}, {"x.txt": r"control|\\x00|NUL"}),
    bad("escape", X | {"x.txt": "\x1b[31min blue"}, {"x.txt": r"control|\\x1b"}),
    bad("a megabyte", X | {"x.txt": "blue " * 220_000}, {"x.txt": "long|characters|MB|bytes"}),
    bad("a megabyte on one line without blanks", X | {"x.txt": "b" * 1_100_000}, {"x.txt": "long|characters|MB|bytes"}),
    bad("broken json", X | {"x.json": '{"caption": "in blue"'}, {"x.json": "json"}),
    bad("json without a caption", X | {"x.json": '{"size": 3}'}, {"x.json": "caption"}),
    bad("json number", X | {"x.json": "17"}, {"x.json": "."}),
    bad("captions named .text", {"x.png": "blue", "x.text": "blue"}, {"/x.": "caption"}),
]


@cases([*GOOD, *(case for case in policies() if isinstance(case.expect, Good))])
def test_good_captions(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


@cases(BAD)
def test_bad_captions(case: Case, tmp_path: Path) -> None:
    examine(case, tmp_path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(("lines", "expected"), [("join", ["one two"]), ("first", ["one"]), ("choose", ["one", "two"])])
def test_line_ends_of_any_system_end_a_line(tmp_path: Path, end: str, lines: str, expected: list[str]) -> None:
    folder = put(tmp_path / "set")
    (folder / "x.png").write_bytes(picture("blue"))
    (folder / "x.txt").write_bytes(end.join(["one", "two", ""]).encode())
    data = data_of(folder, {"captions": {"lines": lines}})
    plan = Plan(build(data).rows, data=data, batch_size=1)
    assert {visit.caption for epoch in range(40) for visit in plan.window(epoch)} == set(expected)


def test_captions_for_no_picture_are_named(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", fine="red")
    (folder / "orphan.txt").write_text("nobody's")
    assert "orphan.txt" in "\n".join(build(data_of(folder)).notices)


def test_near_endings_are_suggested_where_no_caption_is_found(tmp_path: Path) -> None:
    """Captions that exist under an ending that is not read are told, not ignored."""
    folder = put_files(tmp_path / "set", {"a": "red", "b": "blue"}, ending=".tags")
    with pytest.raises(UserError) as caught:
        build(data_of(folder))
    assert ".tags" in str(caught.value)


def test_a_trigger_policy_without_a_trigger_is_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", fine="red")
    (folder / "x.png").write_bytes(picture("blue"))
    with pytest.raises((UserError, ValueError), match="trigger"):
        build(data_of(folder, {"missing_captions": "trigger"}))


def test_all_ways_to_have_no_caption_are_named_at_once(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", fine="red", empty="", blank="  \n ")
    (folder / "missing.png").write_bytes(picture("blue"))
    with pytest.raises(UserError) as caught:
        build(data_of(folder))
    said = str(caught.value)
    assert all(f"/{name}." in said for name in ("empty", "blank", "missing"))
    assert "fine.png" not in said
    assert caught.value.exit_code == 2


def test_a_visit_is_trained_with_the_caption_of_its_picture(tmp_path: Path) -> None:
    """Trigger, prefix and suffix are put in place; a caption that has the trigger is left alone."""
    captions = {"a": "sks in red", "b": "in blue", "c": "in green"}
    folder = put_files(tmp_path / "set", captions)
    source = {"trigger": "sks", "captions": {"prefix": "photo of ", "suffix": ", sharp"}}
    data = data_of(folder, source)
    plan = Plan(build(data).rows, data=data, batch_size=3)
    for epoch in range(3):
        seen = {visit.row.caption: visit.caption for visit in plan.window(epoch)}
        assert {text.count("sks") for text in seen.values()} == {1}
        for raw, text in seen.items():
            assert raw in text
            assert text.startswith("photo of ")
            assert text.endswith(", sharp")


def test_words_that_contain_the_trigger_are_not_the_trigger() -> None:
    assert render("risks of red", Captions(), trigger="sks", draws=None).split(",")[0] == "sks"


def test_equal_pictures_with_captions_of_their_own_are_both_kept(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} in red")
    index = build(data_of(folder))
    assert sorted(row.caption for row in index.rows) == ["a in red", "b in red"]
    assert len({row.id for row in index.rows}) == 2
    said = "\n".join(index.notices)
    assert "a.png" in said
    assert "b.png" in said
