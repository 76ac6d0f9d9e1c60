"""The demo's page, made from a folder that was written by hand."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gesso.micro import report

PROMPTS = ('a "photo" of <b>sks aldar</b> & a friend', "a white horse in the mountains")
CAPTION = "a photo of sks aldar <in> the steppe"
_KEYS = [row.key for row in (*report.LEARNT, *report.KEPT)]
FIGURES: dict[str, Any] = {
    "steps": 6,
    "pictures": 2,
    "counts": {"unseen": 64, "ordinary": 32},
    "base": dict(zip(_KEYS, (0.03, 0.12, 0.81, 0.72, 0.93, 41.4), strict=True)),
    "trained": dict(zip(_KEYS, (0.89, 0.61, 0.84, 0.75, 0.96, 42.6), strict=True)),
    "painted": dict(zip(_KEYS, (1.0, 0.83, 0.98, 0.99, 0.97, 58.2), strict=True)),
    "seconds": {"before": 40.0, "training": 60.0, "after": 45.0, "all": 145.2},
}


class Page(HTMLParser):
    """Text, sources of pictures, and whatever reaches outside."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(found)
        self.links += [found[key] for key in ("src", "srcset", "href", "data", "action") if key in found]
        if tag not in ("img", "meta", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "my demo"
    for i in range(2):
        picture(here / "pictures" / f"{i:02d}.png", i)
        (here / "pictures" / f"{i:02d}.txt").write_text(CAPTION + "\n")
    lines = []
    for step in (0, 3, 6):
        for i, prompt in enumerate(PROMPTS):
            name = f"samples/step-{step}/{i}.png"
            picture(here / "run" / name, 10 * step + i + 2)
            lines.append(json.dumps({"file": name, "prompt": prompt, "step": step}))
    (here / "run" / "samples" / "index.jsonl").write_text("\n".join(lines) + "\n")
    metrics = {
        "step": [*range(1, 7)],
        "loss": [1 / i for i in range(1, 7)],
        "learning_rate": [1e-3] * 6,
        "validation_step": [0, 3, 6],
        "validation_loss": [0.5] * 3,
    }
    (here / "run" / "metrics.json").write_text(json.dumps(metrics))
    return here


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)


def test_the_page_needs_nothing_else(folder: Path) -> None:
    text = report.write(folder, FIGURES).read_text()
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert page.links
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not re.search(r"url\(|@import|https?:", text)
    for link in page.links:
        with Image.open(io.BytesIO(base64.b64decode(link.split(",", 1)[1], validate=True))) as image:
            image.load()


def test_the_page_shows_each_picture_with_its_words(folder: Path) -> None:
    page = Page(report.page(folder, FIGURES))
    shown = {p["src"].split(",", 1)[1]: p["alt"] for p in page.pictures}
    for i, prompt in enumerate(PROMPTS):
        for step, head in ((0, "before"), (3, "3 steps"), (6, "6 steps")):
            file = folder / "run" / "samples" / f"step-{step}" / f"{i}.png"
            assert shown[base64.b64encode(file.read_bytes()).decode()] == f"{prompt}, {head}"
    for file in (folder / "pictures").glob("*.png"):
        assert shown[base64.b64encode(file.read_bytes()).decode()] == CAPTION
    assert all(p["alt"] for p in page.pictures)


def test_words_of_prompts_and_captions_are_never_markup(folder: Path) -> None:
    text = report.page(folder, FIGURES)
    for words in (PROMPTS[0], CAPTION):
        assert words not in text
        assert html.escape(words) in text
    assert "b" not in Page(text.replace("<td><b>", "<td>").replace("</b></td>", "</td>")).tags


def test_the_page_the_notes_and_the_lines_say_what_the_figures_say(folder: Path) -> None:
    words = "".join(Page(report.write(folder, FIGURES).read_text()).words)
    lines, notes = "\n".join(report.plain(FIGURES)), (folder / "README.md").read_text()
    assert json.loads((folder / "figures.json").read_text()) == FIGURES
    for said in ("3%", "89%", "0.12", "0.61", "81%", "84%", "72%", "75%", "93%", "96%", "41.4", "42.6"):
        assert said in words
        assert said in lines
        assert said in notes
    for said in ("100%", "0.83", "58.2", "of 64 pictures of him", "of 32 prompts", "2 min 25 s"):
        assert said in words
    assert "it drew him 3% of the times before and 89% after" in words
    assert "in 6 steps" in words
    assert "$" not in words


def test_the_commands_are_for_this_folder(folder: Path) -> None:
    found = [shlex.split(line) for _, line in report.commands(folder)]
    assert all(words[0] == "gesso" for words in found)
    sample, train = found[0], found[1]
    assert sample[:3] == ["gesso", "sample", f"{folder}/run"]
    assert train[:3] == ["gesso", "train", f"{folder}/run.yaml"]
    words = "".join(Page(report.page(folder, FIGURES)).words)
    for _, line in report.commands(folder):
        assert line in words


def test_the_curves_are_readable_on_dark_paper(folder: Path) -> None:
    light, dark = (Image.open(io.BytesIO(report.curves(folder, dark=dark))) for dark in (False, True))
    assert light.convert("RGBA").getpixel((2, 2)) == (255, 255, 255, 255)
    assert dark.convert("RGBA").getpixel((2, 2))[3] == 0
    ink = np.asarray(dark.convert("RGBA")).reshape(-1, 4)
    assert ink[ink[:, 3] == 255][:, :3].max(axis=1).min() > 80
