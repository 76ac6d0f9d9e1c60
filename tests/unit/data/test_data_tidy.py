"""Changes to whole data sets: metadata files, duplicates, held-out parts, many captions at once, uploads laid out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gesso.data.editing import publish, tidy
from gesso.data.editing.caption_edit import CaptionEdit, apply, preview
from gesso.data.editing.collection import Library
from gesso.data.editing.journal import Journal
from gesso.errors import Problems, UserError


def picture(path: Path, seed: int, size: tuple[int, int] = (48, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Smooth and different for each seed, so that another size of it still looks the same.
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    for i in range(4):
        picture(folder / f"{i}.png", i)
    picture(folder / "sub" / "4.jpg", 4)
    (folder / "0.txt").write_bytes("Köse, ein Mann\r\nzweite Zeile\r\n".encode())
    (folder / "1.caption").write_text("one")
    (folder / "2.json").write_text('{\n  "caption": "two",\n  "score": 3\n}')
    (folder / ".hidden.png").write_bytes(b"x")
    return folder


def state(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and ".gesso" not in p.parts)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def rows(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_metadata_lists_every_picture_and_keeps_captions(folder: Path) -> None:
    before = state(folder)
    written = tidy.write_metadata(folder, prompt="a photo of sks aldar")
    assert (written.rows, written.kept) == (5, 3)
    assert rows(folder / "metadata.jsonl") == [
        {"file_name": "0.png", "text": "Köse, ein Mann\nzweite Zeile"},
        {"file_name": "1.png", "text": "one"},
        {"file_name": "2.png", "text": "two"},
        {"file_name": "3.png", "text": "a photo of sks aldar"},
        {"file_name": "sub/4.jpg", "text": "a photo of sks aldar"},
    ]
    with pytest.raises(UserError, match="exists"):
        tidy.write_metadata(folder, prompt="other", overwrite=True)
    tidy.write_metadata(folder, prompt="other", overwrite=True, replace=True)
    assert {row["text"] for row in rows(folder / "metadata.jsonl")} == {"other"}
    Journal(folder).undo(last=2)
    assert state(folder) == before


def test_metadata_in_a_folder_above_as_the_old_command_wrote_it(folder: Path) -> None:
    output = folder.parent / "metadata.jsonl"
    tidy.write_metadata(folder, prompt="a photo of sks aldar", output=output, overwrite=True)
    assert rows(output)[4] == {"file_name": "set/sub/4.jpg", "text": "a photo of sks aldar"}
    assert {row["text"] for row in rows(output)} == {"a photo of sks aldar"}
    library = Library(folder.parent)
    assert [item.caption for item in library.items] == ["a photo of sks aldar"] * 5


def test_metadata_needs_a_caption_for_each_and_a_place_from_which_paths_lead(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 pictures have no caption, such as 3\.png"):
        tidy.write_metadata(folder, prompt=None)
    with pytest.raises(UserError, match="cannot lead out"):
        tidy.write_metadata(folder, prompt="x", output=tmp_path / "elsewhere" / "metadata.jsonl")
    assert not (folder / "metadata.jsonl").exists()


def test_exact_duplicates_go_with_their_captions_and_the_caption_is_kept(folder: Path) -> None:
    for copy, caption in (("0 (1).png", "longer caption of the same picture here"), ("sub/0.png", None)):
        (folder / copy).write_bytes((folder / "0.png").read_bytes())
        if caption:
            (folder / copy).with_suffix(".txt").write_text(caption)
    (folder / "3 copy.png").write_bytes((folder / "3.png").read_bytes())
    before = state(folder)
    library = Library(folder)
    groups = tidy.duplicates(library)
    assert {group.keep.name: [i.name for i in group.others] for group in groups} == {
        "0 (1).png": ["0.png", "sub/0.png"],
        "3.png": ["3 copy.png"],
    }
    assert tidy.remove_duplicates(library, groups) == 3
    gone = set(before) - set(state(folder))
    assert gone == {"0.png", "0.txt", "sub/0.png", "3 copy.png"}
    assert all(before[name] == content for name, content in state(folder).items())
    Journal(folder).undo()
    assert state(folder) == before


def test_near_duplicates_keep_the_largest_which_takes_over_the_caption(folder: Path) -> None:
    picture(folder / "big.jpg", 1, (96, 64))
    Image.new("RGB", (8, 8), "red").save(folder / "flat.png")
    (folder / "flat2.png").write_bytes((folder / "flat.png").read_bytes())
    library = Library(folder)
    assert tidy.duplicates(library)[0].keep.name == "flat.png"
    groups = tidy.near_duplicates(library, 6)
    assert {group.keep.name: [i.name for i in group.others] for group in groups} == {
        "big.jpg": ["1.png"],
        "flat.png": ["flat2.png"],
    }
    tidy.remove_duplicates(library, groups)
    assert not (folder / "1.png").exists()
    assert not (folder / "1.caption").exists()
    assert (folder / "big.txt").read_text() == "one\n"


def test_duplicates_leave_the_table_and_other_lines_as_they_are(folder: Path) -> None:
    (folder / "5.png").write_bytes((folder / "0.png").read_bytes())
    lines = ['{"text":"n\\u00fcll",  "file_name":"0.png"}', '{"file_name":"5.png","text":""}', '{"file_name":"1.png"}']
    (folder / "metadata.jsonl").write_bytes("\r\n".join(lines).encode())
    library = Library(folder)
    tidy.remove_duplicates(library, tidy.duplicates(library))
    assert (folder / "metadata.jsonl").read_bytes().decode() == f"{lines[0]}\r\n{lines[2]}"


def many(folder: Path, count: int) -> Library:
    for i in range(count):
        picture(folder / f"sub{i % 2}" / f"{i}.png", 100 + i)
        (folder / f"sub{i % 2}" / f"{i}.txt").write_text(f"picture {i}")
        (folder / f"sub{i % 2}" / f"{i}-masklabel.png").write_bytes(b"mask %d" % i)
    return Library(folder)


def test_a_split_holds_out_what_a_run_would_hold_out(tmp_path: Path) -> None:
    from gesso.config.run import Data, Holdout, Source
    from gesso.data import index

    library = many(tmp_path / "set", 12)
    held = tidy.held_out(library, 0.4)
    assert 0 < len(held) < 12
    data = Data(sources=(Source(path=str(tmp_path / "set")),), validation=Holdout(fraction=0.4), cache=tmp_path / "c")
    assert {row.place.path for row in index.build(data).validation} == {item.picture for item in held}


def test_a_split_moves_pictures_with_all_that_is_theirs_and_back(tmp_path: Path) -> None:
    library = many(tmp_path / "set", 8)
    before = state(tmp_path / "set")
    held = tidy.held_out(library, 0.3)
    tidy.split(library, held, tmp_path / "val")
    moved = state(tmp_path / "val")
    stems = {item.name.removesuffix(".png") for item in held}
    assert set(moved) == {f"{stem}{ending}" for stem in stems for ending in (".png", ".txt", "-masklabel.png")}
    assert state(tmp_path / "set") | moved == before
    assert len(state(tmp_path / "set")) == len(before) - len(moved)
    Journal(tmp_path / "set", also=[tmp_path / "val"]).undo()
    assert state(tmp_path / "set") == before
    assert not (tmp_path / "val").exists()


def test_a_split_takes_the_rows_of_the_table_along(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for i in range(6):
        picture(folder / f"{i}.png", i)
    lines = [f'{i}.png,"caption, {i}"\n' for i in range(6)]
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(lines))
    library = Library(folder)
    held = tidy.held_out(library, 0.3)
    numbers = [int(item.name[0]) for item in held]
    tidy.split(library, held, tmp_path / "val")
    assert (tmp_path / "val" / "metadata.csv").read_text() == "file_name,text\n" + "".join(lines[i] for i in numbers)
    rest = "".join(line for i, line in enumerate(lines) if i not in numbers)
    assert (folder / "metadata.csv").read_text() == "file_name,text\n" + rest


def test_a_split_that_cannot_be_whole_moves_nothing(tmp_path: Path) -> None:
    library = many(tmp_path / "set", 8)
    before = state(tmp_path / "set")
    held = tidy.held_out(library, 0.3)
    (tmp_path / "val" / held[-1].name).parent.mkdir(parents=True)
    (tmp_path / "val" / held[-1].name).write_bytes(b"other")
    with pytest.raises(Problems, match="nothing was moved"):
        tidy.split(library, held, tmp_path / "val")
    assert state(tmp_path / "set") == before
    with pytest.raises(UserError, match="read twice"):
        tidy.split(library, held, tmp_path / "set" / "val")
    tidy.split(library, held, tmp_path / "other", copy=True)
    assert state(tmp_path / "set") == before
    assert set(state(tmp_path / "other")) < set(before)


@pytest.mark.parametrize(
    ("change", "before", "after"),
    [
        (CaptionEdit(find="cat", replace="dog"), "a cat, cats", "a dog, dogs"),
        (CaptionEdit(find="a.c", replace=r"\1"), "a.c abc", r"\1 abc"),
        (CaptionEdit(find=r"(\w+) cat\b", replace=r"\1 dog", regex=True), "red cat cats", "red dog cats"),
        (CaptionEdit(find="CAT", replace="dog", ignore_case=True), "Cat cAt", "dog dog"),
        (
            CaptionEdit(prepend="sks, ", append=" end"),
            "one\ntwo\n\nthree",
            "sks, one end\nsks, two end\n\nsks, three end",
        ),
        (CaptionEdit(remove_tags=("1girl", "hat")), "1Girl, red hat, hat ,x", "red hat, x"),
        (CaptionEdit(add_tags=("x", "new")), "X, y", "X, y, new"),
        (CaptionEdit(unique=True), "b, a, B, a, c", "b, a, c"),
        (CaptionEdit(lower=True), "Ein MANN Ö", "ein mann ö"),
        (CaptionEdit(remove_tags=("a",), separator=";"), "a; b, a; c", "b, a; c"),
        (CaptionEdit(remove_tags=("a",)), "a\nb", "b"),
    ],
)
def test_caption_changes(change: CaptionEdit, before: str, after: str) -> None:
    assert change.apply(before) == after


def test_caption_changes_that_are_none() -> None:
    with pytest.raises(UserError, match="nothing to change"):
        CaptionEdit()
    with pytest.raises(UserError, match="regular expression"):
        CaptionEdit(find="(", regex=True)
    with pytest.raises(UserError, match="--replace"):
        CaptionEdit(find="a", replace=r"\2", regex=True).apply("a")


def test_captions_change_in_files_of_every_kind_and_come_back(folder: Path) -> None:
    before = state(folder)
    library = Library(folder)
    edited = preview(library, CaptionEdit(append=" x"))
    assert [(e.item.name, e.after) for e in edited] == [
        ("0.png", "Köse, ein Mann x\nzweite Zeile x"),
        ("1.png", "one x"),
        ("2.png", "two x"),
    ]
    assert state(folder) == before
    apply(library, edited)
    assert (folder / "0.txt").read_bytes() == "Köse, ein Mann x\r\nzweite Zeile x\r\n".encode()
    assert (folder / "1.caption").read_bytes() == b"one x"
    assert (folder / "2.json").read_bytes() == b'{\n  "caption": "two x",\n  "score": 3\n}'
    assert set(state(folder)) == set(before)
    Journal(folder).undo()
    assert state(folder) == before


def test_captions_change_in_tables_and_other_lines_stay(folder: Path) -> None:
    table = folder / "metadata.csv"
    table.write_bytes(b'\xef\xbb\xbffile_name,text,n\r\n0.png,"cat\r\nhat, x",1\r\n1.png,"dog",2\r\nsub/4.jpg,cat,"3"')
    library = Library(folder)
    edited = preview(library, CaptionEdit(find="cat", replace='a "cow"'))
    assert [e.item.name for e in edited] == ["0.png", "sub/4.jpg"]
    apply(library, edited)
    assert table.read_bytes() == (
        b'\xef\xbb\xbffile_name,text,n\r\n0.png,"a ""cow""\r\nhat, x",1\r\n1.png,"dog",2\r\nsub/4.jpg,"a ""cow""",3\r\n'
    )
    (folder / "metadata.jsonl").write_text(
        '{"image": "0.png", "prompt": "cat", "k": 1}\n\n{"image":"1.png","prompt":null}\n'
    )
    library = Library(folder)
    apply(library, preview(library, CaptionEdit(find="cat", replace="Kuh ö")))
    assert (folder / "metadata.jsonl").read_text("utf-8") == (
        '{"image": "0.png", "prompt": "Kuh ö", "k": 1}\n{"image":"1.png","prompt":null}\n'
    )


def test_caption_files_that_hold_lists_or_have_large_endings_stay_as_they_are(folder: Path) -> None:
    (folder / "3.TXT").write_text("three")
    (folder / "2.json").write_text('{"tags": ["a", "b c"], "n": 1}')
    (folder / "sub" / "4.json").write_text('["first", "second"]')
    library = Library(folder)
    apply(library, preview(library, CaptionEdit(append="!")))
    assert (folder / "3.TXT").read_text() == "three!"
    assert not (folder / "3.txt").exists()
    assert json.loads((folder / "2.json").read_text()) == {"tags": ["a", "b c!"], "n": 1}
    assert json.loads((folder / "sub" / "4.json").read_text()) == ["first!", "second!"]


def test_tables_in_sub_folders_are_not_passed_over(folder: Path) -> None:
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "4.jpg", "text": ["one", "two"]}\n')
    with pytest.raises(UserError, match="table in a sub-folder"):
        Library(folder)
    library = Library(folder / "sub")
    apply(library, preview(library, CaptionEdit(append="!")))
    assert rows(folder / "sub" / "metadata.jsonl") == [{"file_name": "4.jpg", "text": ["one!", "two!"]}]


def test_a_caption_that_would_vanish_stops_the_change(folder: Path) -> None:
    with pytest.raises(UserError, match=r"1 captions would become empty, such as that of 1\.png"):
        preview(Library(folder), CaptionEdit(find="one"))


def test_pictures_that_share_a_caption_file_are_refused_by_name(folder: Path) -> None:
    picture(folder / "1.jpg", 9)
    library = Library(folder)
    with pytest.raises(UserError, match=r"1\.\w+: another picture has the same name"):
        apply(library, preview(library, CaptionEdit(lower=True, append="X")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,text\na.png,one,two\n", r"metadata\.csv:2.*3 cells"),
        ("x,y\n1,2\n", "no image column; the columns are: x, y"),
        ("file_name,text\n", "no rows"),
    ],
)
def test_a_table_that_cannot_be_edited_is_named(folder: Path, content: str, message: str) -> None:
    (folder / "metadata.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        Library(folder)


@pytest.mark.parametrize("layout", ["imagefolder", "parquet"])
def test_what_is_sent_to_the_hub_loads_as_a_data_set(
    folder: Path, tmp_path: Path, layout: publish.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    before = state(folder)
    # Several shards, as of a large set.
    monkeypatch.setattr(publish, "_SHARD", 3_000)
    staging = publish.prepare(folder, repo="me/aldar", layout=layout)
    shards = len(list(staging.rglob("*.parquet")))
    assert shards == 0 if layout == "imagefolder" else shards > 1
    loaded = datasets.load_dataset(str(staging), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(loaded["text"]) == ["", "", "Köse, ein Mann\nzweite Zeile", "one", "two"]
    at = loaded["text"].index("two")
    assert np.array_equal(np.asarray(loaded[at]["image"]), np.asarray(Image.open(folder / "2.png")))
    assert (staging / "README.md").read_text().startswith("---\ntask_categories:")
    assert state(folder) == before


def test_a_card_of_ones_own_is_sent_as_it_is(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# mine\n")
    assert (publish.prepare(folder, repo="me/x") / "README.md").read_text() == "---\nlicense: cc0-1.0\n---\n# mine\n"
