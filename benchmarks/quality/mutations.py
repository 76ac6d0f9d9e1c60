"""The check of the checks: seeds one fault at a time into a copy of the package, and runs tests that should notice.

    python benchmarks/quality/mutations.py              # all of them; writes mutations.json and the table in docs/
    python benchmarks/quality/mutations.py --formulas   # the wrong formulas instead, with a file and table of their own
    python benchmarks/quality/mutations.py --only "sign of the target flipped"     # prints, writes nothing
    python benchmarks/quality/mutations.py --changed    # only those that are new, or whose source or tests have changed
    python benchmarks/quality/mutations.py --places     # only looks whether every fault of both lists has its place

Every fault is silent: the code runs on and trains, with wrong numbers. A fault that no test notices, or that stops a
test before its own assertions (in an import or a fixture) and does nothing else, has survived: exit status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # read when the libraries are imported

import diffusers
import hypothesis
import peft
import pydantic
import pytest
import torch
from faults import ASKED, MORE, Fault
from formulas import FORMULAS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PACKAGE = ROOT / "src" / "gesso"
PAGE = ROOT / "docs" / "quality.md"
FAULTS = (*ASKED, *MORE)
HEAVY = (torch.optim, peft.LoraConfig, diffusers.StableDiffusionXLPipeline, pydantic.BaseModel, hypothesis.given)
"""Named so that they are imported before the processes of the tests are forked."""


def main() -> int:
    """Run the faults, print the table, and write it unless only some were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formulas", action="store_true", help="the wrong formulas instead of the faults")
    parser.add_argument("--only", action="append", help="name of a fault; can be given several times")
    parser.add_argument(
        "--changed", action="store_true", help="keep the rows of what has not changed since they were made"
    )
    parser.add_argument("--table", action="store_true", help="only write the table in docs/ again")
    parser.add_argument("--places", action="store_true", help="only look whether each fault can be put in")
    args = parser.parse_args()
    if args.places:
        return missing_places([*FAULTS, *FORMULAS])
    every, mark = (FORMULAS, "formulas") if args.formulas else (FAULTS, "mutations")
    result = HERE / f"{mark}.json"
    if args.table:
        write_table(json.loads(result.read_text())["faults"], mark)
        return 0
    faults = [f for f in every if not args.only or f.name in args.only]
    if not faults:
        parser.error(f"no such fault; there are: {'; '.join(f.name for f in every)}")
    known = json.loads(result.read_text())["faults"] if args.changed and result.exists() else []
    with tempfile.TemporaryDirectory() as compiled:  # of the tests, once for all faults
        sys.pycache_prefix, sys.dont_write_bytecode = compiled, False
        rows, seconds = run(faults, {row["fault"]: row for row in known})
    if not args.only:
        from gesso.core.provenance import provenance  # not before: what a test process imports must be its copy's

        record = {"provenance": provenance(), "seconds": seconds, "faults": rows}
        result.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        write_table(rows, mark)
    survived = [row["fault"] for row in rows if not row["caught"]]
    print(f"{len(rows) - len(survived)} of {len(rows)} faults caught")
    return 1 if survived else 0


def run(faults: Sequence[Fault], known: Mapping[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """What each fault was caught by, and the seconds that it all took; `known` rows that are still true are kept."""
    began = time.monotonic()
    rows = {f.name: known[f.name] for f in faults if f.name in known and known[f.name].get("of") == state(f)}
    left = [fault for fault in faults if fault.name not in rows]
    if left:
        check_clean(sorted({test for fault in left for test in fault.tests}))
    for fault in left:
        rows[fault.name] = row = measure(fault)
        print(f"{'caught' if row['caught'] else 'SURVIVED':9} {row['seconds']:5.0f} s  {fault.name}", flush=True)
        for test in row["failed"]:
            print(f"{'':19}{test}")
    return [rows[fault.name] for fault in faults], round(time.monotonic() - began)


def state(fault: Fault) -> str:
    """A hash of the file with the fault and of the files of its tests."""
    tests = sorted({ROOT / test.partition("::")[0] for test in fault.tests})
    files = [path for place in tests for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    content = [changed_text(PACKAGE, fault).encode(), *(path.read_bytes() for path in files)]
    return hashlib.sha256(b"\0".join(content)).hexdigest()[:16]


def missing_places(faults: Sequence[Fault]) -> int:
    """Name the faults whose text is no longer in the source, or more than once: 1 if there are any."""
    lost = [f for f in faults if (PACKAGE / f.file).read_text(encoding="utf-8").count(f.old) != 1]
    for fault in lost:
        print(f"{fault.file}: {fault.name}")
    print(f"{len(faults) - len(lost)} of {len(faults)} faults have their place")
    return 1 if lost else 0


def check_clean(tests: Sequence[str]) -> None:
    """The tests must pass on the package as it is, or a failure would prove nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy_package(Path(folder))
        outcome = run_tests(Path(folder), tests)
    if outcome["failed"] or outcome["stopped"]:
        names = "\n  ".join(outcome["failed"] + outcome["stopped"])
        sys.exit(f"these fail on the package as it is, so nothing can be checked:\n  {names}")
    print(f"{outcome['passed']} tests pass on the package as it is ({outcome['seconds']:.0f} s)", flush=True)


def measure(fault: Fault) -> dict[str, Any]:
    """Run the fault's tests against a package with the fault."""
    with tempfile.TemporaryDirectory() as folder:
        seed(copy_package(Path(folder)), fault)
        outcome = run_tests(Path(folder), fault.tests)
    return {
        "fault": fault.name,
        "file": f"src/gesso/{fault.file}",
        "asked": fault in ASKED or fault.known,
        "of": state(fault),
        "caught": bool(outcome["failed"]),
        **outcome,
    }


def copy_package(folder: Path) -> Path:
    """The package's source in `folder`; the weights, which no fault touches, by a link."""
    copied = folder / "gesso"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    if (PACKAGE / "micro" / "weights").is_dir():
        (copied / "micro" / "weights").symlink_to(PACKAGE / "micro" / "weights")
    return copied


def seed(package: Path, fault: Fault) -> None:
    """Put the fault in."""
    (package / fault.file).write_text(changed_text(package, fault), encoding="utf-8")


def changed_text(package: Path, fault: Fault) -> str:
    """The file with the fault: its old text must be there exactly once, and the file must still compile."""
    path = package / fault.file
    text = path.read_text(encoding="utf-8")
    if (count := text.count(fault.old)) != 1:
        sys.exit(f"'{fault.name}': its text is {count} times in {fault.file}, so the fault cannot be seeded")
    changed = text.replace(fault.old, fault.new)
    compile(changed, str(path), "exec")
    return changed


def run_tests(folder: Path, tests: Sequence[str]) -> dict[str, Any]:
    """Run tests of the checkout against the package in `folder`, by pytest's own report.

    `failed` are tests whose assertions (or the code under them) failed, `stopped` those that did not get that far.
    """
    report, began = folder / "report.xml", time.monotonic()
    # Forked, so that torch and its kin are imported once and not for every fault.
    process = multiprocessing.get_context("fork").Process(target=_pytest, args=(folder, report, tests))
    process.start()
    process.join()
    if process.exitcode not in (0, 1):
        sys.exit(f"pytest could not run ({process.exitcode}):\n{(folder / 'output').read_text()[-4000:]}")
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    return {
        "failed": list(dict.fromkeys(_name(case) for case in cases if case.find("failure") is not None)),
        "stopped": list(dict.fromkeys(_name(case) for case in cases if case.find("error") is not None)),
        "passed": sum(case.find("failure") is None and case.find("error") is None for case in cases),
        "seconds": round(time.monotonic() - began, 1),
    }


def _pytest(folder: Path, report: Path, tests: Sequence[str]) -> NoReturn:
    """In a process of its own: the tests against the package in `folder`, which nothing has imported before."""
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "GESSO_CACHE": str(folder / "cache")}
    os.chdir(ROOT)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).resolve() != HERE)]  # `formulas` is a test's name too
    for name in ("faults", *(n for n in sys.modules if n.startswith("formulas"))):
        sys.modules.pop(name, None)
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import gesso

    if Path(gesso.__file__).resolve() != (folder / "gesso" / "__init__.py").resolve():
        print(f"the tests would run against {gesso.__file__}, not against the copy")
        os._exit(2)
    options = ["-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}", f"--junitxml={report}"]
    code = int(pytest.main([*options, *tests]))
    sys.stdout.flush()
    os._exit(code)


def _name(case: ElementTree.Element) -> str:
    """tests/laws/test_law_parts.py::test_trained_parts[...] in short: test_law_parts.test_trained_parts."""
    parts = [p for p in case.get("classname", "").split(".") if p not in ("tests", "unit")]
    return ".".join([*parts, re.sub(r"\[.*", "", case.get("name", ""))])


def write_table(rows: Sequence[dict[str, Any]], mark: str) -> None:
    """Put the table into the page, between the marks of this name."""
    lines = ["| fault | caught by |", "|---|---|"]
    for row in rows:
        tests = list(dict.fromkeys(name.rpartition(".")[2] for name in row["failed"]))
        shown = ", ".join(f"`{name}`" for name in tests[:3]) + (f" and {len(tests) - 3} more" if len(tests) > 3 else "")
        name = f"**{row['fault']}**" if row["asked"] else row["fault"]
        lines.append(f"| {name} | {shown or 'nothing: it survived'} |")
    between(PAGE, mark, "\n".join(lines))


def between(page: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->`."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    content = page.read_text(encoding="utf-8")
    head, _, rest = content.partition(start)
    _, found, tail = rest.partition(end)
    if not found:
        sys.exit(f"{page} has no marks {start} and {end}")
    page.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
