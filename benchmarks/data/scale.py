"""Large data sets: indexing a hundred thousand files, planning a million rows, and waiting for data in the demo.

    python benchmarks/data/scale.py            # all three; writes scale.json
    python benchmarks/data/scale.py --files 5000 --rows 50000 --output /tmp/small.json

Each measurement is a process of its own, so that its peak memory is its own. Files are PNGs of 32 x 32 pixels, each
with a caption beside it, on the disk that $TMPDIR names; the page cache is warm for the scans after the first.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
PER_FOLDER = 1000


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=HERE / "scale.json")
    parser.add_argument("--part", choices=("scan", "plan", "wait"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        part = {"scan": lambda: scan(args.folder), "plan": lambda: plan(args.rows), "wait": lambda: wait(args.folder)}
        print(json.dumps(part[args.part]()))
        return 0
    from gesso.core.provenance import provenance

    record = {"provenance": provenance(), "index": index(args.files), "plan": alone("plan", "--rows", str(args.rows))}
    with tempfile.TemporaryDirectory() as folder:
        record["wait"] = alone("wait", "--folder", folder)
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    return 0


def alone(part: str, *arguments: str) -> dict[str, Any]:
    """What one part measures, in a process of its own."""
    command = [sys.executable, __file__, "--part", part, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def index(files: int) -> dict[str, Any]:
    """First scan, scan of the untouched folder, and scan after one picture and one caption were edited."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "pictures")
        write(folder, files)
        first = alone("scan", "--folder", temporary)
        again = min((alone("scan", "--folder", temporary) for _ in range(3)), key=lambda one: one["seconds"])
        (folder / "000" / "000000.txt").write_text("edited")
        (folder / "000" / "000001.png").write_bytes(picture(files + 1))
        edited = alone("scan", "--folder", temporary)
    return {
        "files": files,
        "first": first,
        "untouched": again,
        "after_two_edits": edited,
        "first_over_untouched": round(first["seconds"] / again["seconds"], 1),
    }


def picture(number: int) -> bytes:
    """A small PNG that no other number has."""
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def write(folder: Path, files: int) -> None:
    """Pictures and captions, a thousand a folder."""
    for i in range(files):
        place = folder / f"{i // PER_FOLDER:03}"
        if i % PER_FOLDER == 0:
            place.mkdir(parents=True)
        (place / f"{i:06}.png").write_bytes(picture(i))
        (place / f"{i:06}.txt").write_text(f"picture number {i}, with a caption of usual length, in the style of tests")


def scan(temporary: Path) -> dict[str, Any]:
    """One `data.index.build`, imports not counted."""
    from gesso.config.run import Data, Source
    from gesso.data.index import build

    data = Data(sources=(Source(path=str(temporary / "pictures")),), cache=temporary / "cache", resolution=32)
    base, began = peak(), time.perf_counter()
    found = build(data)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 3), "rows": len(found.rows), "peak_memory": peak(), "before": base}


def plan(rows: int) -> dict[str, Any]:
    """Planning and the first windows of two epochs, for pictures of many sizes from two sources."""
    import pyarrow as pa

    from gesso.config.run import Data, Source
    from gesso.data.plan import Plan
    from gesso.data.rows import SCHEMA, Rows

    draw = np.random.default_rng(0)
    names = pa.array([f"{i:032x}" for i in range(rows)])
    place = pa.StructArray.from_arrays(
        [
            pa.array([f"/data/pictures/{i // 1000:06}/{i:09}.jpg" for i in range(rows)]),
            pa.repeat("file", rows),
            pa.repeat("", rows),
            pa.repeat(pa.scalar(0, pa.int64()), rows),
            pa.repeat(pa.scalar(0, pa.int64()), rows),
        ],
        ["url", "kind", "part", "start", "size"],
    )
    columns: dict[str, Any] = {
        "id": names,
        "image": names,
        "place": place,
        "width": pa.array(draw.integers(512, 3000, rows).astype(np.int32)),
        "height": pa.array(draw.integers(512, 3000, rows).astype(np.int32)),
        "caption": pa.array([f"picture number {i}, with a caption of usual length, of tests" for i in range(rows)]),
        "split": pa.repeat("train", rows).dictionary_encode(),
        "weight": pa.repeat(1.0, rows),
        "repeats": pa.repeat(1.5, rows),
        "role": pa.repeat("instance", rows).dictionary_encode(),
        "concept": pa.array([f"concept {i % 100}" for i in range(rows)]).dictionary_encode(),
        "source": pa.array((np.arange(rows) % 2).astype(np.int32)),
        "mask": pa.nulls(rows, SCHEMA.field("mask").type),
        "mask_hash": pa.repeat("", rows).dictionary_encode(),
    }
    table = Rows(pa.table(columns, schema=SCHEMA))
    del columns, names, place
    data = Data(sources=(Source(path="/a"), Source(path="/b")))
    began, before = time.perf_counter(), resident()
    made = Plan(table, data=data, batch_size=8, accumulation=4)
    planned = time.perf_counter() - began
    began = time.perf_counter()
    made.window(0)
    first = time.perf_counter() - began
    began = time.perf_counter()
    for step in range(1, 101):
        made.window(step)
    windows = (time.perf_counter() - began) / 100
    began = time.perf_counter()
    made.describe()
    described = time.perf_counter() - began
    return {
        "rows": rows,
        "samples_per_epoch": made.visits_per_epoch,
        "plan_seconds": round(planned, 3),
        "first_window_of_an_epoch_seconds": round(first, 3),
        "window_of_32_seconds": round(windows, 5),
        "bucket_table_seconds": round(described, 3),
        "table_bytes_per_row": round(table.table.nbytes / rows, 1),
        "plan_bytes_per_row": round((resident() - before) / rows, 1),
        "peak_memory": peak(),
    }


def resident() -> int:
    """Resident memory now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def wait(folder: Path) -> dict[str, Any]:
    """The share of the demo's training steps that is spent on waiting for data."""
    from gesso import stages
    from gesso.config import files
    from gesso.micro import lessons

    lessons.write(folder, lessons.CHARACTER)
    (folder / "run.yaml").write_text(lessons.run_file(lessons.CHARACTER, steps=200, every=200), encoding="utf-8")
    run = files.load(folder / "run.yaml", sets=[f"output={json.dumps(str(folder / 'run'))}"]).run
    stages.train(run)
    lines = (folder / "run" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "StepDone"]
    seconds, waited = sum(e["seconds"] for e in steps), sum(e["data_seconds"] for e in steps)
    return {"steps": len(steps), "seconds": round(seconds, 2), "waited": round(waited, 4), "share": waited / seconds}


if __name__ == "__main__":
    sys.exit(main())
