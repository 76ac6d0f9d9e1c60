"""Every law over every method and adapter: runs the whole matrix of the tests and writes it down.

    python benchmarks/quality/matrix.py            # writes matrix.json and the tables in docs/quality.md
    python benchmarks/quality/matrix.py --tables   # only the tables again

A law that does not hold means exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from mutations import between

from gesso.core.provenance import provenance

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE, FILE = ROOT / "docs" / "quality.md", HERE / "matrix.json"
TESTS = ("tests/laws/test_law_matrix.py", "tests/laws/test_law_refusals.py")


def main() -> int:
    """Run, write, and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write the tables of what was found before")
    if not parser.parse_args().tables:
        own = {"GESSO_MATRIX": "whole", "GESSO_MATRIX_JSON": str(FILE)}
        subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT, env=os.environ | own, check=False)
        found = json.loads(FILE.read_text(encoding="utf-8")) | {"provenance": provenance()}
        FILE.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    found = json.loads(FILE.read_text(encoding="utf-8"))
    between(PAGE, "matrix", matrix(found["held"]))
    rows = "\n".join(f"| {case} | {reason} |" for case, reason in sorted(found["refused"].items()))
    between(PAGE, "refused", f"| together | why it is refused |\n|---|---|\n{rows}")
    return int(any(mark != "yes" for row in found["held"].values() for mark in row.values()))


def matrix(held: dict[str, dict[str, str]]) -> str:
    """A row for each adapter and a column for each method: how many of the laws hold."""
    cells: dict[str, dict[str, str]] = {}
    for case, row in held.items():
        method, _, adapter = case.partition(" x ")
        marks = list(row.values())
        cells.setdefault(adapter, {})[method] = f"{marks.count('yes')} of {len(marks)}"
    methods = sorted({method for row in cells.values() for method in row})
    lines = [f"| | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    lines += [
        f"| {adapter} | {' | '.join(row.get(m, '') for m in methods)} |" for adapter, row in sorted(cells.items())
    ]
    laws = sorted({law for row in held.values() for law in row})
    told = "\n".join(f"- {law.replace('_', ' ')}" for law in laws)
    return "\n".join(lines) + f"\n\nThe {len(laws)} laws:\n\n{told}"


if __name__ == "__main__":
    sys.exit(main())
