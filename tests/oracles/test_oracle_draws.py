"""Keyed random numbers: the same everywhere, different for every key, and really normal and uniform."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import formulas
import numpy as np
import pytest

from gesso.core.random import Draws, SampleKey, generator, key, permutation

SAMPLES = tuple(SampleKey(f"image-{i}", i % 2) for i in range(8))
SCRIPT = """
import hashlib, sys
import numpy as np
from gesso.core.random import Draws, SampleKey, permutation
np.random.seed(int(sys.argv[1]))
draws = Draws(5, 3, tuple(SampleKey(f"image-{i}", i % 2) for i in range(8)))
h = hashlib.sha256()
h.update(draws.normal("noise", (4, 6, 5)).tobytes())
h.update(draws.uniform("timestep").tobytes())
h.update(permutation(100, 5, "order", 3).tobytes())
print(h.hexdigest())
"""


def test_other_processes_draw_the_same() -> None:
    """Neither hash randomisation nor the global generator nor the process matters."""
    found = hashlib.sha256()
    draws = Draws(5, 3, SAMPLES)
    found.update(draws.normal("noise", (4, 6, 5)).tobytes())
    found.update(draws.uniform("timestep").tobytes())
    found.update(permutation(100, 5, "order", 3).tobytes())
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, seed],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        )
        assert done.stdout.strip() == found.hexdigest()


def test_generator_is_philox() -> None:
    """Against ten rounds of Philox-4x64 written out in whole numbers."""
    for parts in [(0, "noise", 0, "a", 0), (12345678901234567890, "crop", 7, "b", 3)]:
        wanted = formulas.philox_uniform(key(*parts), 40)
        assert generator(*parts).random(40).tolist() == wanted


def test_uniform_of_a_batch_is_philox() -> None:
    draws = Draws(5, 3, SAMPLES)
    wanted = [formulas.philox_uniform(key(5, "timestep", 3, s.id, s.repeat), 1)[0] for s in SAMPLES]
    found = draws.uniform("timestep")
    assert found.dtype == np.float64
    assert found.tolist() == wanted


def test_shapes_and_dtypes() -> None:
    found = Draws(5, 3, SAMPLES).normal("noise", (4, 6, 5))
    assert found.shape == (8, 4, 6, 5)
    assert found.dtype == np.float32
    assert Draws(5, 3, SAMPLES[:1]).normal("noise", ()).shape == (1,)


def test_no_draw_repeats_over_seed_epoch_image_repeat_and_domain() -> None:
    grid = itertools.product([0, 1, 2**40], ["noise", "timestep", "noise offset"], range(6), range(20), range(3))
    seen = {
        Draws(seed, epoch, (SampleKey(f"image-{i}", repeat),)).normal(domain, (4,)).tobytes()
        for seed, domain, epoch, i, repeat in grid
    }
    assert len(seen) == 3 * 3 * 6 * 20 * 3


def test_100_000_keys_are_distinct() -> None:
    """In all 128 bits, and in every 64-bit half: no part of the key is left out of the hash."""
    keys = [
        key(seed, "noise", epoch, f"{i:x}", repeat)
        for seed in (0, 1)
        for epoch in range(50)
        for i in range(500)
        for repeat in (0, 1)
    ]
    assert len(keys) == 100_000
    assert len(set(keys)) == len({k & (2**64 - 1) for k in keys}) == len({k >> 64 for k in keys}) == len(keys)


def test_neighbouring_fields_do_not_run_together() -> None:
    keys = [
        key(1, "a", 1, "1"),
        key(11, "a", 1),
        key(1, "a1", 1),
        key(1, "a", 11),
        key(1, "a", 1, 1, ""),
        key(1, "a", "", 1, 1),
    ]
    assert len(set(keys)) == len(keys)


def test_a_row_depends_on_its_own_sample_alone() -> None:
    whole = Draws(5, 3, SAMPLES)
    normals, uniforms = whole.normal("noise", (4, 3, 3)), whole.uniform("timestep")
    for order in ([3], [7, 0], [5, 4, 3, 2, 1, 0]):
        part = Draws(5, 3, tuple(SAMPLES[i] for i in order))
        assert np.array_equal(part.normal("noise", (4, 3, 3)), normals[order])
        assert np.array_equal(part.uniform("timestep"), uniforms[order])


def test_drawing_twice_or_in_another_order_changes_nothing() -> None:
    one, two = Draws(5, 3, SAMPLES), Draws(5, 3, SAMPLES)
    first = one.normal("noise", (4, 3, 3)), one.uniform("timestep")
    late = two.uniform("timestep")
    assert np.array_equal(two.normal("noise", (4, 3, 3)), first[0])
    assert np.array_equal(late, first[1])
    assert np.array_equal(one.normal("noise", (4, 3, 3)), first[0])


@pytest.mark.parametrize("shape", [(4, 16, 16), (1,)])
def test_normals_are_normal(shape: tuple[int, ...]) -> None:
    """Both inside one stream and across streams (the first number of each of 4000 images)."""
    count = 40_000 // int(np.prod(shape)) if len(shape) > 1 else 4_000
    values = Draws(1, 0, tuple(SampleKey(f"{i:064x}") for i in range(count))).normal("noise", shape).ravel()
    assert formulas.ks_normal(values) < 1.95
    assert abs(values.mean()) < 5 / np.sqrt(values.size)
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / values.size)


def test_neighbouring_streams_are_independent() -> None:
    """Images, epochs, repeats and domains that differ by one give uncorrelated noise."""
    count, size = 200, 400

    def noise(epoch: int, repeat: int, domain: str) -> np.ndarray:
        return Draws(1, epoch, tuple(SampleKey(f"image-{i}", repeat) for i in range(count))).normal(domain, (size,))

    base = noise(0, 0, "noise")
    for other in (np.roll(base, 1, axis=0), noise(1, 0, "noise"), noise(0, 1, "noise"), noise(0, 0, "noise offset")):
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(base.size)


def test_permutations() -> None:
    assert sorted(permutation(1000, 1, "order", 0)) == list(range(1000))
    orders = {permutation(20, seed, "order", epoch).tobytes() for seed in range(20) for epoch in range(50)}
    assert len(orders) == 1000
    # Each position is equally likely for each item: 20 x 20 cells of 1000 shuffles.
    table = np.zeros((20, 20))
    for epoch in range(1000):
        table[np.arange(20), permutation(20, 9, "order", epoch)] += 1
    assert abs(formulas.chi_square(table.ravel())) < 5
