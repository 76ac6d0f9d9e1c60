"""Masks beside pictures, kohya's trees, and that no picture of a folder is ever passed over in silence."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from data_helpers import captioned, solid
from hypothesis import given, settings
from hypothesis import strategies as st
from source_helpers import captions, found, jsonl, look, notices, problems


class TestMasks:
    def test_a_mask_beside_the_picture_is_its_mask_and_no_picture(self, tmp_path: Path) -> None:
        picture = captioned(tmp_path / "dog", "a.v2.png", "one")
        mask = solid(tmp_path / "dog" / "a.v2-masklabel.png")
        [record] = found(tmp_path, mask="file")
        assert (record.place.path, record.mask and record.mask.path) == (picture, mask)

    def test_missing_masks_are_listed(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        captioned(tmp_path, "b.png", "two")
        solid(tmp_path / "a-masklabel.png")
        solid(tmp_path / "c-masklabel.png")
        message = problems(tmp_path, mask="file")
        assert f"1 of 2 pictures has no mask: {tmp_path}/b.png" in message
        assert any(
            "mask files without a picture" in n and "c-masklabel" in n for n in look(tmp_path, mask="file").notices
        )

    @pytest.mark.parametrize("mask", ["none", "alpha"])
    def test_masks_that_are_not_used_are_told(self, tmp_path: Path, mask: str) -> None:
        captioned(tmp_path, "a.png", "one")
        solid(tmp_path / "a-masklabel.png")
        [record] = found(tmp_path, mask=mask)
        assert record.mask is None
        assert f"1 mask file not used, because mask is '{mask}'" in notices(tmp_path, mask=mask)

    def test_masks_of_other_kinds_are_told_and_are_no_pictures(self, tmp_path: Path) -> None:
        captioned(tmp_path, "a.png", "one")
        captioned(tmp_path, "a-masklabel.jpg", "two")
        assert captions(found(tmp_path)) == {"a.png": "one"}
        assert "not used: a-masklabel.jpg" in notices(tmp_path)

    def test_masks_beside_pictures_that_a_table_lists(self, tmp_path: Path) -> None:
        solid(tmp_path / "p" / "a.png")
        mask = solid(tmp_path / "p" / "a-masklabel.png")
        jsonl(tmp_path, {"file_name": "p/a.png", "text": "x"})
        [record] = found(tmp_path, mask="file")
        assert record.mask is not None
        assert record.mask.path == mask

    def test_a_table_that_lists_a_mask_is_wrong(self, tmp_path: Path) -> None:
        solid(tmp_path / "a-masklabel.png")
        jsonl(tmp_path, {"file_name": "a-masklabel.png", "text": "x"})
        assert "metadata.jsonl:1: 'a-masklabel.png' is a mask, not a picture" in problems(tmp_path)


class TestKohya:
    def test_folder_names_give_repeats_and_concepts(self, tmp_path: Path) -> None:
        captioned(tmp_path / "10_sks dog", "a.png", "one")
        captioned(tmp_path / "2_cat" / "deep", "b.png", "two")
        rows = {r.place.name: (r.repeats, r.concept) for r in found(tmp_path)}
        assert rows == {"a.png": (10.0, "sks dog"), "b.png": (2.0, "cat")}
        assert "10_sks dog: 10 times, 'sks dog', 2_cat: 2 times, 'cat'" in notices(tmp_path)

    def test_they_give_captions_where_there_are_none(self, tmp_path: Path) -> None:
        solid(tmp_path / "10_sks dog" / "a.png")
        assert captions(found(tmp_path, missing_captions="concept")) == {"a.png": "sks dog"}

    def test_one_folder_of_another_name_makes_it_a_plain_folder(self, tmp_path: Path) -> None:
        captioned(tmp_path / "10_dog", "a.png", "one")
        captioned(tmp_path / "cats", "b.png", "two")
        assert {r.repeats for r in found(tmp_path)} == {1.0}
        assert "1 picture not in a sub-folder named REPEATS_CONCEPT: cats/b.png" in problems(tmp_path, layout="kohya")

    def test_a_root_one_too_deep_or_too_high_is_named(self, tmp_path: Path) -> None:
        inner = tmp_path / "set" / "img" / "10_dog"
        captioned(inner, "a.png", "one")
        said = "1 picture not in a sub-folder named REPEATS_CONCEPT"
        assert f"{said}: a.png\n  -> name the folder that it lies in: {inner.parent}\n" in (
            problems(inner, layout="kohya") + "\n"
        )
        for root in (tmp_path, tmp_path / "set"):
            assert problems(root, layout="kohya").endswith(f"-> name the folder in it: {inner.parent}")
        captioned(tmp_path / "set" / "reg" / "1_dog", "b.png", "two")
        assert 'name the folders as in "10_sks dog"' in problems(tmp_path, layout="kohya"), "which one is not clear"

    def test_repeats_of_the_source_win_unless_the_layout_is_named(self, tmp_path: Path) -> None:
        captioned(tmp_path / "10_dog", "a.png", "one")
        assert found(tmp_path, repeats=3)[0].repeats == 3
        assert found(tmp_path, repeats=3, layout="kohya")[0].repeats == 30

    def test_zero_repeats_leave_out_by_name(self, tmp_path: Path) -> None:
        captioned(tmp_path / "0_dog", "a.png", "one")
        captioned(tmp_path / "1_cat", "b.png", "two")
        assert captions(found(tmp_path)) == {"b.png": "two"}
        assert "0 repeats: 0_dog" in notices(tmp_path)


NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "dog/", "10_dog/", "dog/deep/", "dog/sub/"]),
    st.sampled_from(["a", "b", "a.b", "a-masklabel", "B-MaskLabel"]),
    st.sampled_from([".png", ".jpg", ".PNG", ".heic", ".txt", ".caption", ".json", ".jfif"]),
)


@given(
    names=st.sets(NAMES, min_size=1, max_size=9),
    fields=st.fixed_dictionaries(
        {
            "mask": st.sampled_from(["none", "file"]),
            "missing_captions": st.sampled_from(["error", "empty", "drop", "concept"]),
            "layout": st.sampled_from(["auto", "folder", "kohya", "parquet", "webdataset"]),
        }
    ),
    listed=st.none() | st.sets(NAMES, max_size=3),
)
@settings(max_examples=150)
def test_every_picture_is_a_record_or_is_spoken_of(
    names: set[str], fields: dict[str, str], listed: set[str] | None
) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text('"x"')
        if listed is not None:
            jsonl(folder, *({"file_name": name, "text": "x"} for name in sorted(listed)))
        seen = look(folder, **fields)
        places = {str(r.place) for r in seen.records} | {str(r.mask) for r in seen.records}
        said = "\n".join([*seen.notices, *(line for problem in seen.problems for line in problem.lines())])
        for name in names:
            if name.lower().endswith((".png", ".jpg", ".heic", ".jfif")):
                nothing_found = "no pictures found" in said and f" {Path(name).suffix.lower()}" in said
                # The mask of a picture that is spoken of goes with it.
                stem = f"{name[: -len('-masklabel.png')]}." if name.lower().endswith("-masklabel.png") else name
                spoken = name in said or stem in said or nothing_found
                assert f"{folder}/{name}" in places or spoken, (name, said)
