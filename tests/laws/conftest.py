"""Ends a run of the laws with the matrix: which held for which method and adapter, and what is refused, and why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MARKS = {"passed": "yes", "failed": "NO", "error": "NO"}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a row for each method and adapter, with a column for each law, and the reasons of what is refused."""
    held: dict[str, dict[str, str]] = {}
    refused: dict[str, str] = {}
    for outcome, mark in MARKS.items():
        for report in terminalreporter.stats.get(outcome, []):
            test, _, case = report.nodeid.rpartition("::")[2].removesuffix("]").partition("[")
            if "test_law_matrix.py" in report.nodeid and case:
                held.setdefault(case, {})[test.removeprefix("test_")] = mark
            if reason := dict(report.user_properties).get("reason"):
                refused[case] = reason
    if path := os.environ.get("GESSO_MATRIX_JSON"):
        found = {"held": held, "refused": refused}
        Path(path).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if held:
        _matrix(terminalreporter, held)
    if refused:
        terminalreporter.section("refused together")
        for case, reason in refused.items():
            terminalreporter.write_line(f"{case}: {reason}")


def _matrix(terminalreporter: Any, held: dict[str, dict[str, str]]) -> None:
    laws = sorted({law for row in held.values() for law in row})
    terminalreporter.section("laws by method and adapter")
    for number, law in enumerate(laws, 1):
        terminalreporter.write_line(f"({number}) {law.replace('_', ' ')}")
    width = max(map(len, held))
    terminalreporter.write_line(f"{'':{width}}  " + "  ".join(f"({n})" for n in range(1, len(laws) + 1)))
    for cell in sorted(held):
        marks = "  ".join(f"{held[cell].get(law, ''):3}" for law in laws)
        terminalreporter.write_line(f"{cell:{width}}  {marks}")
