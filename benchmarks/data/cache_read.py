"""How fast the cache gives out SDXL latents, beside plain copies of the same bytes from memory-mapped files.

    python benchmarks/data/cache_read.py

Entries of [8, 128, 128] float32 (a picture of 1024 x 1024) are read in random order with everything in the page cache,
so that the disk is out of the comparison. The cache makes a tensor of each and compares its checksum; `numpy.memmap`
copies the same bytes out of a file a picture, as the cache has them, and out of one big file that stays mapped, which
is what the page cache can give at most: a plain read() of a file without any check is well below it, too. Each figure
is the median of several passes, which take turns. Takes under a minute, 1 GB of disk and 1 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gesso.core.provenance import provenance
from gesso.data.buckets import Fit
from gesso.data.cache import Encoded, LatentCache
from gesso.data.places import Place
from gesso.data.plan import Visit
from gesso.data.rows import Row
from gesso.data.store import Array, Store

SHAPE = (8, 128, 128)
GOAL = 0.5
"""The cache is to be at least this fast, as a share of memory-mapped copies out of a file a picture."""

FIT = Fit((1024, 1024), (1024, 1024), (0, 0))


def visit(number: int) -> Visit:
    """A picture that is nowhere: only its name is needed to read its entry."""
    row = Row(f"{number:032x}", f"{number:032x}", Place(f"/{number}.png"), 1024, 1024, "")
    return Visit(row=row, id=row.id, epoch=0, repeat=0, fit=FIT, caption="")


def readers(folder: Path, count: int) -> dict[str, Callable[[int], Any]]:
    """Write the same moments in three ways; a reader of number i for each."""
    moments = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(0))
    size = moments[0].nbytes
    moments.numpy().tofile(folder / "one.bin")
    (folder / "many").mkdir()
    for i, one in enumerate(moments):
        one.numpy().tofile(folder / "many" / f"{i}.bin")
    # `rebuild` stands in for the encoder, so that the entries are written by the cache itself.
    store = Store(folder / "encodings")
    facts: dict[str, Any] = {"fingerprint": "vae", "dtype": torch.float32, "background": "white"}
    writer = LatentCache(store, **facts, rebuild=lambda v: Encoded(moments[int(v.row.id, 16)], None))
    visits = [visit(i) for i in range(count)]
    for i, one in enumerate(visits):
        writer.read(one)
        assert torch.equal(LatentCache(store, **facts).read(one).moments, moments[i])
    cache = LatentCache(store, **facts)
    keys = [cache.key(one) for one in visits]
    whole = np.memmap(folder / "one.bin", np.float32, "r", shape=(count, *SHAPE))

    def plain(i: int) -> object:
        content = np.empty(size, np.uint8)
        with open(folder / "many" / f"{i}.bin", "rb", buffering=0) as file:
            file.readinto(content.data)
        return content

    return {
        "cache": lambda i: cache.read(visits[i]),
        "store": lambda i: store.get(keys[i]),
        "memmap, one file": lambda i: np.array(whole[i]),
        "memmap, a file a picture": lambda i: np.array(np.memmap(folder / "many" / f"{i}.bin", np.float32, "r")),
        "read, a file a picture": plain,
    }


def throughput(read: dict[str, Callable[[int], Any]], count: int, passes: int) -> dict[str, list[float]]:
    """GB/s of each way in each pass, after one pass that warms up."""
    size = int(np.prod(SHAPE)) * 4
    rates: dict[str, list[float]] = {name: [] for name in read}
    # As in a run, where larger blocks have come and gone: the C library now keeps freed memory instead of giving it
    # back to the system and clearing it anew for every read, whichever way that is done.
    block = np.ones(24_000_000, np.uint8)
    del block
    shuffle = random.Random(0)
    for turn in range(passes + 1):
        for name, one in read.items():
            order = shuffle.sample(range(count), count)
            began = time.perf_counter()
            for i in order:
                one(i)
            if turn:
                rates[name].append(round(count * size / (time.perf_counter() - began) / 1e9, 3))
    return rates


def checks(folder: Path, small: int, large: Store, keys: list[str]) -> dict[str, float]:
    """Microseconds that a fill spends to find out whether an entry is there and whole."""
    store = Store(folder / "small")
    names = [f"{i * 7919:064x}"[::-1] for i in range(small)]
    for name in names:
        store.put(name, {"x": Array("uint8", (64,), np.zeros(64, np.uint8))}, kind="text", encoder="clip", of="")

    def each(look: Callable[[str], str], expected: str, asked: list[str]) -> float:
        began = time.perf_counter()
        for name in asked:
            assert look(name) == expected
        return round((time.perf_counter() - began) / len(asked) * 1e6, 2)

    sealed = each(store.glance, "good", names)
    missing = each(store.glance, "missing", [name[:-1] + "f" for name in names])
    for name in keys:
        os.utime(large.path(name))
    return {"sealed": sealed, "missing": missing, "unsealed, read whole": each(large.check, "good", keys)}


def processor() -> str:
    """The processor's model, without anything that names the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.*)$", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=400, help="how many entries of 512 KiB")
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--small", type=int, default=10_000, help="how many entries for the check of what is there")
    parser.add_argument("--folder", type=Path, help="where to write, for another file system")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("cache_read.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        read = readers(folder, options.entries)
        rates = throughput(read, options.entries, options.passes)
        cache = LatentCache(Store(folder / "encodings"), fingerprint="vae", dtype=torch.float32, background="white")
        keys = [cache.key(visit(i)) for i in range(options.entries)]
        checked = checks(folder, options.small, Store(folder / "encodings"), keys)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    shares = {name: round(medians["cache"] / medians[name], 3) for name in medians if name != "cache"}
    document = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": 1},
        "provenance": provenance(),
        "settings": {"entries": options.entries, "bytes": int(np.prod(SHAPE)) * 4, "passes": options.passes},
        "gigabytes_per_second": {name: {"median": medians[name], "passes": rates[name]} for name in rates},
        "cache_as_share_of": shares,
        "goal": {"memmap, a file a picture": GOAL},
        "microseconds_to_check_an_entry": checked,
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for name, median in medians.items():
        share = f"   the cache reaches {shares[name]:.0%} of it" if name in shares else ""
        print(f"{name:26} {median:7.2f} GB/s{share}")
    for name, value in checked.items():
        print(f"check of an entry, {name}: {value} us")
    if shares["memmap, a file a picture"] < GOAL:
        raise SystemExit("below the goal")


if __name__ == "__main__":
    main()
