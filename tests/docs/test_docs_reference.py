"""The reference page is what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from gesso.config import schema
from gesso.config.run import RunConfig

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "make_reference.py"))


def test_the_committed_page_is_up_to_date(generator: dict[str, Any]) -> None:
    committed = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert generator["text"]() == committed, "run: python docs/make_reference.py"


def test_every_key_has_a_row_with_a_meaning(generator: dict[str, Any]) -> None:
    rows = [line.split(" | ") for line in generator["text"]().splitlines() if line.startswith("| `")]
    meanings = {row[0].removeprefix("| ").strip("`"): row[-1].removesuffix(" |") for row in rows if len(row) == 4}
    for name in schema.all_keys():
        assert meanings[name].strip(), f"{name} says nothing of itself"


def test_links_inside_the_page_lead_somewhere(generator: dict[str, Any]) -> None:
    page = generator["text"]()
    for name, info in RunConfig.model_fields.items():
        kinds = schema.models_in(info.annotation)
        if len(kinds) == 1:
            assert f"](#{name})" in page
            assert f"\n### `{name}`\n" in page
        for kind in kinds if len(kinds) > 1 and name != "trackers" else ():
            tag = kind.model_fields["type"].default
            assert f"](#{name}-with-type-{tag})" in page
            assert f"\n### `{name}` with `type: {tag}`\n" in page
