from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gesso.config import document
from gesso.errors import Problems, UserError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(), TREES, min_size=1, max_size=4))
def test_what_is_emitted_reads_back_equal(data: dict[str, Any]) -> None:
    assert document.parse(document.emit(data), file="x").data == data


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("1e3", 1000),
        ("yes", "yes"),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("010", 10),
        ("0x1F", 31),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("400-500", "400-500"),
        ("'1e-4'", "1e-4"),
        ("!!str 12", "12"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read = document.parse(f"key: {text}\n", file="x").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_infinity_is_a_number() -> None:
    assert document.parse("a: -.inf", file="x").data["a"] == -math.inf


def test_every_key_and_item_has_its_line() -> None:
    doc = document.parse("a: 1\n\nb:\n  # note\n  c: 2\n  d:\n    - 3\n    - e: 4\n", file="x")
    assert doc.lines == {
        ("a",): 1,
        ("b",): 3,
        ("b", "c"): 5,
        ("b", "d"): 6,
        ("b", "d", 0): 7,
        ("b", "d", 1): 8,
        ("b", "d", 1, "e"): 8,
    }


def test_comments_stand_above_their_keys_and_change_nothing() -> None:
    data = {"a": {"b": [{"c": 1, "d": 2}]}}
    text = document.emit(data, comments={("a", "b", 0, "c"): "about c", ("a", "b", 0, "d"): "about d", ("a",): "all"})
    assert text == "# all\na:\n  b:\n    # about c\n    - c: 1\n      # about d\n      d: 2\n"
    assert document.parse(text, file="x").data == data


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "a is given twice (first on line 1)"),
        ("a:\n  b: 1\n  b: 1\n", 3, "a.b is given twice"),
        ("a:\n\tb: 1\n", 2, "a tab"),
        ("a: 1\nb: [1, 2\nc: 3\n", 3, "not valid YAML"),
        ("a: 1\n  b: 2\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 1\n", 2, "not valid YAML"),
        ("a: !python/object 1\n", 1, "YAML tag"),
        ("- 1\n- 2\n", 1, "no `key: value` lines"),
        ("a: \x07\n", 1, "does not allow"),
    ],
)
def test_bad_yaml_names_the_line(text: str, line: int, words: str) -> None:
    with pytest.raises(UserError) as caught:
        document.parse(text, file="run.yaml")
    assert caught.value.where == f"run.yaml:{line}"
    assert words in caught.value.what


def test_all_duplicates_are_named_at_once() -> None:
    with pytest.raises(Problems) as caught:
        document.parse("a: 1\na: 2\nb: 1\nb: 2\n", file="x")
    assert [problem.where for problem in caught.value.problems] == ["x:2", "x:4"]


def test_an_anchor_that_holds_itself_is_refused() -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        document.parse("a: &x\n  b: *x\n", file="x")


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("a: 1\nb: ü\n".encode("latin-1"))
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "run.yaml").write_text("a: 1")
    with pytest.raises(UserError, match=r"latin\.yaml:2: not UTF-8"):
        document.read(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="is empty"):
        document.read(tmp_path / "empty.yaml")
    with pytest.raises(UserError, match=r"folder, not a run file\n.*folder/run\.yaml"):
        document.read(tmp_path / "folder")
    with pytest.raises(UserError, match=r"no such run file\n.*empty\.yaml"):
        document.read(tmp_path / "emty.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert document.read(tmp_path / "bom.yaml").data == {"a": 1}
