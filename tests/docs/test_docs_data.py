"""What the page on pictures and captions says is what the code does."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from docs_helpers import DATA, spans, tables

from gesso.config import document
from gesso.config.dialects import aitoolkit_tables, kohya, kohya_tables
from gesso.config.dialects.rules import Direct, Ignored, Refused, Rule
from gesso.config.run import Captions
from gesso.core.random import generator
from gesso.data.captions import Draws, render
from gesso.data.images import EXTENSIONS
from gesso.data.inspection import findings

KOHYA: dict[str, Rule] = kohya_tables.KEYS | kohya.SUBSET | kohya.OWN | kohya.ANYWHERE | kohya.DATASET
AITOOLKIT: dict[str, Rule] = {
    **aitoolkit_tables.TRAIN,
    **aitoolkit_tables.PROCESS,
    **aitoolkit_tables.DATASET,
}


def table(*heading: str) -> list[list[str]]:
    """The rows of the one table with this heading."""
    (found,) = [rows for rows in tables(DATA) if rows[0] == list(heading)]
    return found[1:]


def test_visits_see_what_the_page_says() -> None:
    rows = table("in the file", "with", "what visits see")
    assert len(rows) > 12
    text = ""
    for row in rows:
        written, settings, seen = ([span.replace("\\|", "|") for span in spans(cell)] for cell in row)
        text = "\n".join(written) or text
        options: dict[str, Any] = {}
        for setting in settings:
            options |= document.parse(setting, file="data.md").data
        trigger = options.pop("trigger", None)
        captions = Captions(**options)
        assert render(text, captions, trigger=trigger, draws=None) == seen[0], row
        drawn = {render(text, captions, trigger=trigger, draws=_draws(visit)) for visit in range(200)}
        assert drawn - {""} == set(seen), row
        assert ("" in drawn) == ("nothing" in row[2]), row


def _draws(visit: int) -> Draws:
    return lambda domain: generator(0, domain, visit, "picture", 0)


def test_every_finding_is_explained() -> None:
    named = {span for row in table("finding", "what it means") for span in spans(row[0])}
    rules = set()
    for node in ast.walk(ast.parse(inspect.getsource(findings))):
        match node:
            case ast.Call(func=ast.Name(id="Finding"), args=[_, ast.Constant(value=str(rule)), *_]):
                rules.add(rule)
            case ast.Tuple(elts=[ast.Constant(value="error" | "warning" | "hint"), ast.Constant(value=str(rule)), _]):
                rules.add(rule)
    assert len(rules) > 12
    assert named == rules


def test_the_kinds_of_files_that_are_read_are_all_named() -> None:
    (sentence,) = [line for line in DATA.read_text("utf-8").splitlines() if line.startswith("Still pictures in")]
    assert tuple(spans(sentence)) == EXTENSIONS


def test_other_tools_names_mean_what_the_page_says() -> None:
    rows = table("sd-scripts", "ai-toolkit", "here")
    assert len(rows) > 18
    for theirs, also, here in rows:
        key = spans(here)[0].replace("data.sources[].captions.", "captions.")
        for cell, rules in ((theirs, KOHYA), (also, AITOOLKIT)):
            for old in spans(cell):
                rule = rules[old]
                assert not isinstance(rule, Ignored | Refused), old
                if isinstance(rule, Direct):
                    assert key.endswith(rule.native), old


def test_what_is_said_to_be_refused_is() -> None:
    named = [span for row in table("asked for", "instead") for span in spans(row[0]) if span.isidentifier()]
    assert len(named) > 7
    rules = {**AITOOLKIT, **KOHYA}
    assert [key for key in named if not isinstance(rules[key], Refused)] == []
