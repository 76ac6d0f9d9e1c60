"""Reading the Markdown pages: code blocks, tables, inline code, links and the anchors of headings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
README, REFERENCE = ROOT / "README.md", ROOT / "docs" / "reference.md"
GUIDE, DATA = ROOT / "docs" / "guide.md", ROOT / "docs" / "data.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_BAR = re.compile(r"(?<!\\)\|")
_SPAN = re.compile(r"`([^`]+)`")


class Block(NamedTuple):
    """A fenced code block: where it stands, its language and its text."""

    where: str
    language: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    """The code blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(f"{page.name}:{text.count(chr(10), 0, m.start()) + 1}", m[1], m[2])
        for m in _BLOCK.finditer(text)
        if m[1] == language
    ]


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """What `#...` can name on a page, in GitHub's spelling."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def tables(page: Path) -> Iterator[list[list[str]]]:
    """Tables as rows of cells, the heading first."""
    for paragraph in prose(page).split("\n\n"):
        lines = [line for line in paragraph.strip().splitlines() if line.startswith("|")]
        if len(lines) > 2:
            yield [[cell.strip() for cell in _BAR.split(line.strip()[1:-1])] for line in [lines[0], *lines[2:]]]


def spans(text: str) -> list[str]:
    """Inline code."""
    return _SPAN.findall(text)


@cache
def source_strings() -> str:
    """Every string constant of the package, one a line: what messages are made of."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return "\n".join(found)
