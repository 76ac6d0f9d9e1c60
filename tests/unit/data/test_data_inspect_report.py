from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from inspect_helpers import data_of, discs, inspected, put
from PIL import Image

from gesso.data.inspection import charts, report
from gesso.errors import ResourceError


class Page(HTMLParser):
    """What a browser would load and show; complains of tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    for i in range(6):
        put(folder, f"{i}.png", discs(i, (192, 160 + 20 * i)), f"sks, hat, number {i}")
    put(folder, "copy.png", discs(0, (192, 160)), "sks, <script>alert(1)</script>, hat")
    put(folder, "wide<b>.png", discs(9, (900, 150)), "sks, wide & low")
    put(folder, "none.png", discs(10), None)
    (folder / "broken.png").write_bytes(b"nothing")
    return folder


def test_the_page_needs_nothing_else_and_shows_every_part(folder: Path) -> None:
    text = report.page(inspected(data_of(folder), trigger="sks"), title="my <set>")
    page = Page(text)
    assert "script" not in page.tags
    assert "alert(1)" in page.words, "shown, not run"
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in page.links)
    assert "my <set>" in page.words
    assert "wide<b>.png" in page.words
    for words in ("no caption", "unreadable", "broken.png", "duplicate", "extreme aspect", "Length in tokens"):
        assert words in page.words
    assert "192 × 192" in page.words
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors == set(re.findall(r'<h2 id="(\w+)"', text))


def test_what_the_crop_keeps_is_drawn_where_it_is(tmp_path: Path) -> None:
    put(tmp_path, "wide.png", discs(1, (400, 200)), "x")
    data = data_of(tmp_path, buckets={"enabled": False})
    text = report.page(inspected(data), title="x")
    assert re.search(r'<i style="left:25.00%;top:0.00%;width:50.00%;height:100.00%">', text)


def test_a_large_set_has_few_thumbnails_and_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MOST_THUMBNAILS", 10)
    for i in range(30):
        put(tmp_path, f"{i:02}.png", discs(i, (30, 30)), "x")
    text = report.page(inspected(data_of(tmp_path)), title="x")
    page = Page(text)
    assert len({link for link in page.links if link.startswith("data:")}) == 10
    assert all(f"{i:02}.png" in page.words for i in range(30))


def test_a_set_without_anything_still_makes_a_page(tmp_path: Path) -> None:
    page = Page(report.page(inspected(data_of(tmp_path)), title="empty"))
    assert "no pictures found" in page.words


def test_a_page_that_cannot_be_written_says_so(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be written"):
        report.write(tmp_path / "file" / "page.html", inspected(data_of(folder)), title="x")


def test_a_picture_that_vanished_is_left_out_of_the_page(folder: Path) -> None:
    found = inspected(data_of(folder))
    (folder / "0.png").unlink()
    assert "0.png" in Page(report.page(found, title="x")).words


def test_the_histogram_counts_every_value_once_and_marks_the_limit() -> None:
    chart = charts.histogram([3, 3, 5, 90, 200], limit=75, unit="tokens")
    counts = [int(n) for n in re.findall(r"tokens: (\d+)<", chart)]
    assert sum(counts) == 5
    assert "75 are read" in chart
    assert "are read" not in charts.histogram([3, 75], limit=75, unit="tokens")


def test_the_heat_map_is_symmetric_and_says_the_counts() -> None:
    import numpy as np

    chart = charts.heat_map(["a", "b&"], np.array([[4, 2], [2, 3]]))
    assert chart.count("<title>a + b&amp;: 2</title>") == 1
    assert chart.count("<title>b&amp; + a: 2</title>") == 1
    assert "<title>a: 4</title>" in chart


def test_thumbnails_are_small(folder: Path) -> None:
    import base64
    import io

    page = Page(report.page(inspected(data_of(folder)), title="x"))
    for link in page.links:
        if link.startswith("data:"):
            image = Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2])))
            assert max(image.size) <= report.SIDE
