"""Each picture with its own caption, whatever is cached, shuffled, threaded or shared between processes.

Every picture is one colour, and its caption says which: what a batch holds can be read back from its numbers.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from data_helpers import CPU, PoolingFamily, caption_of, captioned, data_for

from gesso.core.seams import Parts
from gesso.data.cache import LatentCache, LiveLatents, LiveText, Store, TextCache
from gesso.data.index import build
from gesso.data.loader import Loader
from gesso.data.plan import Plan

PICTURES, EPOCHS, STEP = 26, 3, 4


class Seen(NamedTuple):
    """One sample of a batch, as its numbers say."""

    step: int
    colour: tuple[int, ...]
    caption: str
    file: str


def colour_of(number: int) -> tuple[int, int, int]:
    return (9 * number % 256, 255 - 7 * number, 40 + 5 * number)


def folder_of_colours(folder: Path) -> Path:
    for i in range(PICTURES):
        red, green, blue = colour_of(i)
        size = ((64, 64), (96, 48), (48, 96))[i % 3]
        captioned(folder, f"{i:02}.png", f"{red} {green} {blue}", size, (red, green, blue))
    return folder


def walk(folder: Path, cache: Path, encoding: str, workers: int, rank: int, world_size: int) -> list[Seen]:
    """Every sample that one process gets in three epochs."""
    data = data_for(folder, cache=cache, flip=True)
    plan = Plan(build(data).rows, data=data, batch_size=STEP // world_size, world_size=world_size, seed=5)
    family, steps = PoolingFamily(), range(EPOCHS * plan.steps_per_epoch)
    if encoding == "live":
        latents = LiveLatents(family=family, parts=Parts(), device=CPU, background="white")  # type: ignore[arg-type]
        text = LiveText(family=family, parts=Parts())  # type: ignore[arg-type]
    else:
        store = Store(cache / "encodings")
        latents = LatentCache(store, fingerprint="vae", dtype=torch.float32, background="white")  # type: ignore[assignment]
        text = TextCache(store, fingerprint="text", dtype=torch.float32)  # type: ignore[assignment]
        shares = {"rank": rank, "world_size": world_size}
        latents.fill(plan.renditions(steps), family=family, parts=Parts(), device=CPU, emit=ignore, **shares)  # type: ignore[attr-defined]
        text.fill(plan.captions(steps), family=family, parts=Parts(), emit=ignore, **shares)  # type: ignore[attr-defined]
    seen = []
    with Loader(plan, latents=latents, text=text, family=family, workers=workers, rank=rank, stop=len(steps)) as loader:  # type: ignore[arg-type]
        for step in steps:
            for batch in loader.window(step):
                assert batch.text is not None
                colours = ((batch.latents.mean((2, 3)) + 1) * 127.5).round().int()
                for i in range(len(batch)):
                    caption = caption_of(batch.text["embeddings"][i])
                    assert caption == batch.captions[i]
                    seen.append(Seen(step, tuple(colours[i].tolist()), caption, batch.files[i]))
    return seen


def ignore(event: object) -> None:
    """Drop an event."""


@pytest.mark.parametrize("encoding", ["cached", "live"])
@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_sample_is_paired_with_its_own_caption(
    tmp_path: Path, encoding: str, workers: int, world_size: int
) -> None:
    folder = folder_of_colours(tmp_path / "pictures")
    jobs = [(folder, tmp_path / "cache", encoding, workers, rank, world_size) for rank in range(world_size)]
    if world_size == 1:
        parts = [walk(*jobs[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(world_size) as pool:
            parts = pool.starmap(walk, jobs)
    everything = [one for part in parts for one in part]
    wrong = [one for one in everything if " ".join(map(str, one.colour)) != one.caption]
    assert not wrong
    assert all(one.caption == " ".join(map(str, colour_of(int(Path(one.file).stem)))) for one in everything)
    # Each process takes every step, and together they see each picture once an epoch.
    assert len({len({one.step for one in part}) for part in parts}) == 1
    per_epoch = -(-PICTURES // STEP)
    for epoch in range(EPOCHS):
        names = Counter(one.file for one in everything if one.step // per_epoch == epoch)
        assert set(names.values()) == {1}
        assert len(names) == PICTURES


def test_the_same_numbers_whether_cached_or_live_with_or_without_threads(tmp_path: Path) -> None:
    folder = folder_of_colours(tmp_path / "pictures")
    runs = [
        walk(folder, tmp_path / "cache", encoding, workers, 0, 1)
        for encoding in ("cached", "live")
        for workers in (0, 4)
    ]
    assert all(run == runs[0] for run in runs)
    assert len({one.file for one in runs[0][:PICTURES]}) == PICTURES
    orders = [[one.file for one in runs[0][epoch * PICTURES : (epoch + 1) * PICTURES]] for epoch in range(EPOCHS)]
    assert orders[0] != orders[1] != orders[2]
