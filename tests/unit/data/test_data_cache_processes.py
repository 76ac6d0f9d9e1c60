"""The cache: whole after a kill, and filled by any number of processes and ranks."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_helpers import encoding, fill, latents, visits_of
from data_helpers import PoolingFamily

from gesso.core.events import Event, Progress
from gesso.data import upkeep
from gesso.data.filling import Filled
from gesso.data.plan import Visit


class Slow(PoolingFamily):
    """As much work as lets another process get a turn."""

    def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.005)
        return super().encode_images(parts, pixels)


class Big(PoolingFamily):
    """Entries of half a megabyte, so that writing them is much of the work."""

    def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
        return super().encode_images(parts, pixels).repeat(1, 350, 1, 1)


def _fill_in_a_process(visits: list[Visit], folder: Path, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    if barrier is None:
        fill(latents(folder), visits, Big())
    else:
        barrier.wait(60)
        results.put(tuple(fill(latents(folder), visits, Slow())))


def _process(context: Any, *arguments: Any) -> ForkServerProcess:
    process: ForkServerProcess = context.Process(target=_fill_in_a_process, args=arguments)
    process.start()
    return process


@pytest.fixture
def context() -> Any:
    """Processes that begin at once, with torch imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "data_helpers", "gesso.data.cache", "gesso.data.plan"])
    return context


def test_killed_at_any_moment_it_goes_on_where_it_was(tmp_path: Path, context: Any) -> None:
    visits = visits_of(tmp_path / "a", 40, ((64, 64), (96, 64)))
    moments, seen = random.Random(4), set()
    for attempt in range(10):
        folder = tmp_path / f"c{attempt}"
        process = _process(context, visits, folder, None, None)
        enough = moments.randrange(1, 36)
        while sum(1 for _ in folder.glob("*/*.gesso")) < enough:
            assert process.is_alive(), f"ended with {process.exitcode}"
            time.sleep(0.001)
        time.sleep(moments.random() * 0.003)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        found = upkeep.verify(folder)
        assert found.damaged == ()
        assert enough <= found.good < 40
        seen.add(found.good)
        cache = latents(folder)
        assert fill(cache, visits, Big()) == Filled(40 - found.good, found.good, 0)
        for visit in visits:
            assert torch.equal(cache.read(visit).moments, encoding(visit).repeat(350, 1, 1))
        shutil.rmtree(folder)
    assert len(seen) > 3, "all kills came at the same moment"


def test_two_processes_share_the_work_of_one_folder(tmp_path: Path, context: Any) -> None:
    visits, folder = visits_of(tmp_path / "a", 60, ((64, 64), (96, 64))), tmp_path / "c"
    barrier, results = context.Barrier(2), context.Queue()
    processes = [_process(context, visits, folder, barrier, results) for _ in range(2)]
    filled = [Filled(*results.get(timeout=120)) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(one.encoded + one.reused == 60 for one in filled)
    assert all(one.damaged == 0 for one in filled)
    assert all(one.encoded > 10 for one in filled), "both worked"
    assert 60 <= sum(one.encoded for one in filled) < 90
    cache = latents(folder)
    assert all(torch.equal(cache.read(visit).moments, encoding(visit)) for visit in visits)
    assert fill(cache, visits, PoolingFamily()) == Filled(0, 60, 0)
    assert not [p for p in folder.rglob(".*") if p.is_file()], "temporary files are left"


class TestRanks:
    def test_each_begins_with_its_own_share_and_misses_nothing(self, tmp_path: Path) -> None:
        class Ordered(PoolingFamily):
            def __init__(self) -> None:
                super().__init__()
                self.order: list[float] = []

            def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
                self.order.append(round(float((pixels[0, 0, 0, 0] + 1) * 127.5)))
                return super().encode_images(parts, pixels)

        visits, family = visits_of(tmp_path / "a", 9), Ordered()
        assert fill(latents(tmp_path / "c"), visits, family, rank=1, world_size=3) == Filled(9, 0, 0)
        assert sorted(family.order[:3]) == [3, 4, 5]
        assert sorted(family.order) == list(range(9))
        assert fill(latents(tmp_path / "c"), visits, family, rank=0, world_size=3) == Filled(0, 9, 0)

    def test_together_they_encode_everything_about_once(self, tmp_path: Path) -> None:
        visits, cache = visits_of(tmp_path / "a", 60), latents(tmp_path / "c")
        filled: dict[int, Filled] = {}

        def work(rank: int) -> None:
            filled[rank] = fill(cache, visits, Slow(), rank=rank, world_size=4)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(filled[rank].encoded + filled[rank].reused == 60 for rank in range(4))
        assert 60 <= sum(one.encoded for one in filled.values()) < 90
        assert all(torch.equal(cache.read(visit).moments, encoding(visit)) for visit in visits)

    def test_what_another_process_made_meanwhile_is_not_made_again(self, tmp_path: Path) -> None:
        visits, folder = visits_of(tmp_path / "a", 12), tmp_path / "c"

        class Overtaken(PoolingFamily):
            def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
                if self.images == 3:
                    fill(latents(folder), visits, PoolingFamily())
                return super().encode_images(parts, pixels)

        family = Overtaken()
        assert fill(latents(folder), visits, family) == Filled(4, 8, 0)
        assert family.images == 4

    def test_it_looks_again_just_before_it_encodes(self, tmp_path: Path) -> None:
        visits, folder, family = visits_of(tmp_path / "a", 12), tmp_path / "c", PoolingFamily()

        def overtaken(event: Event) -> None:
            if isinstance(event, Progress) and event.done == 4:
                fill(latents(folder), visits, PoolingFamily())

        assert fill(latents(folder), visits, family, emit=overtaken) == Filled(4, 8, 0)
        assert family.images == 4
