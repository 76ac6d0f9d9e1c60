"""Ends a run of the laws with the matrix: which held for which method and adapter."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MARKS = {"passed": "yes", "failed": "NO", "error": "NO"}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print a row for each method and adapter, and a column for each law."""
    held: dict[str, dict[str, str]] = {}
    for outcome, mark in MARKS.items():
        for report in terminalreporter.stats.get(outcome, []):
            file, _, test = report.nodeid.partition("::")
            if file.endswith("test_law_matrix.py") and test.endswith("]"):
                law, _, cell = test.removesuffix("]").partition("[")
                held.setdefault(cell, {})[law.removeprefix("test_")] = mark
    if not held:
        return
    if path := os.environ.get("GESSO_MATRIX_JSON"):
        Path(path).write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    laws = sorted({law for row in held.values() for law in row})
    terminalreporter.section("laws by method and adapter")
    for number, law in enumerate(laws, 1):
        terminalreporter.write_line(f"({number}) {law.replace('_', ' ')}")
    width = max(map(len, held))
    terminalreporter.write_line(f"{'':{width}}  " + "  ".join(f"({n})" for n in range(1, len(laws) + 1)))
    for cell in sorted(held):
        marks = "  ".join(f"{held[cell].get(law, ''):3}" for law in laws)
        terminalreporter.write_line(f"{cell:{width}}  {marks}")
