"""The cache: never stale, never read when damaged, whole after a kill, and filled by any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import CPU, PoolingFamily, data_for, folder_of, solid
from PIL import Image

from gesso.core.events import Event, Progress, Warned
from gesso.data import upkeep
from gesso.data.buckets import Fit, assign
from gesso.data.cache import LatentCache, LiveLatents, LiveText, TextCache, encoder_batch
from gesso.data.filling import Filled
from gesso.data.images import content_hash, decode, fit
from gesso.data.index import build
from gesso.data.places import Place
from gesso.data.plan import Plan, Visit
from gesso.data.rows import ALPHA, Row
from gesso.data.store import Store
from gesso.errors import NumericError, UserError

SQUARE = [(64, 64)]


def ignore(_event: Event) -> None:
    pass


def visit_of(path: Path, caption: str = "", sizes: Sequence[tuple[int, int]] = SQUARE, **changes: Any) -> Visit:
    """A visit of a picture file, fitted to the nearest of `sizes`."""
    with Image.open(path) as image:
        width, height = image.size
    name = content_hash(path.read_bytes())
    row = Row(id=name, image=name, place=Place(str(path)), width=width, height=height, caption=caption)
    planned = assign(width, height, sizes=list(sizes), step=16)
    return Visit(row=replace(row, **changes), id=name, epoch=0, repeat=0, fit=planned, caption=caption)


def visits_of(folder: Path, count: int, sizes: Sequence[tuple[int, int]] = ((64, 64),)) -> list[Visit]:
    folder_of(folder, count, tuple(sizes))
    return [visit_of(path, sizes=sizes) for path in sorted(folder.glob("*.png"))]


def latents(folder: Path, **changes: Any) -> LatentCache:
    facts: dict[str, Any] = {"fingerprint": "vae", "dtype": torch.float32, "background": "white"}
    return LatentCache(Store(folder), **(facts | changes))


def fill(cache: LatentCache, visits: Sequence[Visit], family: PoolingFamily, **changes: Any) -> Filled:
    options: dict[str, Any] = {"device": CPU, "emit": ignore}
    return cache.fill(visits, family=family, parts=None, **(options | changes))  # type: ignore[arg-type]


def fill_text(cache: TextCache, captions: Sequence[str], family: PoolingFamily, **changes: Any) -> Filled:
    return cache.fill(captions, family=family, parts=None, **({"emit": ignore} | changes))  # type: ignore[arg-type]


def encoding(visit: Visit) -> torch.Tensor:
    """What the stand-in family makes of a visit's picture."""
    pixels, _ = fit(decode(visit.row.place.path), visit.fit)
    return PoolingFamily().encode_images(None, torch.from_numpy(pixels)[None])[0]


def harm(store: Store, key: str, other: str, how: str) -> None:
    path = store.path(key)
    content = bytearray(path.read_bytes())
    match how:
        case "truncate":
            path.write_bytes(content[:-5])
        case "flip":
            content[-3] ^= 1
            path.write_bytes(content)
        case "empty":
            path.write_bytes(b"")
        case "swap":
            aside = path.with_suffix(".aside")
            path.rename(aside)
            store.path(other).rename(path)
            aside.rename(store.path(other))


class TestLatents:
    def test_an_entry_is_the_encoding_of_the_fitted_picture(self, tmp_path: Path) -> None:
        visits = visits_of(tmp_path / "a", 3, ((96, 64), (64, 64), (48, 80)))
        visits += [replace(visit, fit=replace(visit.fit, flip=True)) for visit in visits]
        cache = latents(tmp_path / "c")
        assert fill(cache, visits, PoolingFamily()) == Filled(6, 0, 0)
        for visit in visits:
            found = cache.read(visit)
            assert torch.equal(found.moments, encoding(visit))
            assert found.mask is None

    def test_tensors_are_views_of_one_buffer(self, tmp_path: Path) -> None:
        [visit] = visits_of(tmp_path / "a", 1)
        visit = replace(visit, row=replace(visit.row, mask_hash=ALPHA))
        cache = latents(tmp_path / "c")
        fill(cache, [visit], PoolingFamily())
        moments, mask = cache.read(visit)
        assert mask is not None
        apart = mask.data_ptr() - moments.data_ptr()
        assert apart == -(-moments.nbytes // 64) * 64
        assert moments.data_ptr() % 16 == 0
        moments += 1  # what a reader does with its copy is nobody else's business
        assert torch.equal(cache.read(visit).moments, encoding(visit))

    def test_everything_that_changes_an_encoding_changes_its_name(self, tmp_path: Path) -> None:
        [visit] = visits_of(tmp_path / "a", 1, ((96, 70),))
        base = latents(tmp_path)
        changed_fits = [
            {"bucket": (8, 8)},
            {"resized": (300, 300)},
            {"crop": (9, 9)},
            {"flip": True},
            {"angle": 3.0},
            {"colour": (1.0, 1.1, 1.0)},
        ]
        assert {name for change in changed_fits for name in change} == set(Fit.__dataclass_fields__)
        masked = [
            replace(visit.row, mask_hash=ALPHA),
            replace(visit.row, mask_hash="1" * 32, mask=Place("/m.png")),
            replace(visit.row, mask_hash="2" * 32, mask=Place("/m.png")),
        ]
        keys = [
            base.key(visit),
            latents(tmp_path, fingerprint="another").key(visit),
            latents(tmp_path, dtype=torch.bfloat16).key(visit),
            latents(tmp_path, background="black").key(visit),
            base.key(replace(visit, row=replace(visit.row, image="0" * 32))),
            *(base.key(replace(visit, row=row)) for row in masked),
            *(base.key(replace(visit, fit=replace(visit.fit, **change))) for change in changed_fits),  # type: ignore[arg-type]
        ]
        assert len(set(keys)) == len(keys)
        row = replace(visit.row, place=Place("/x"), caption="y", id="z", weight=2.0, repeats=3.0, concept="c", source=4)
        assert base.key(replace(visit, epoch=5, repeat=2, caption="x", id="z", row=row)) == base.key(visit)

    def test_another_setting_never_reads_an_old_entry(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path / "a", 4, ((96, 64), (64, 64)))
        data = data_for(folder, cache=tmp_path / "c")
        old = Plan(build(data).rows, data=data, batch_size=1).renditions(range(4))
        fill(latents(tmp_path / "c"), old, PoolingFamily())
        smaller = data_for(folder, cache=tmp_path / "c", resolution=32)
        visits = Plan(build(smaller).rows, data=smaller, batch_size=1).renditions(range(4))
        cases = [
            (latents(tmp_path / "c"), visits),
            (latents(tmp_path / "c", fingerprint="new"), old),
            (latents(tmp_path / "c", dtype=torch.bfloat16), old),
            (latents(tmp_path / "c", background="black"), old),
            (latents(tmp_path / "c"), [replace(visit, fit=replace(visit.fit, flip=True)) for visit in old]),
        ]
        for cache, asked in cases:
            with pytest.raises(UserError, match="missing"):
                cache.read(asked[0])
            assert fill(cache, asked, PoolingFamily()) == Filled(4, 0, 0)
            assert all(torch.equal(cache.read(visit).moments, encoding(visit)) for visit in asked)

    def test_renaming_and_captions_encode_nothing(self, tmp_path: Path) -> None:
        visits = visits_of(tmp_path / "a", 3)
        cache = latents(tmp_path / "c")
        fill(cache, visits, PoolingFamily())
        (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "z.png")
        again = [visit_of(path, caption="another") for path in (tmp_path / "a").glob("*.png")]
        assert fill(cache, again, PoolingFamily()) == Filled(0, 3, 0)

    def test_batches_have_one_shape_and_give_the_same_entries(self, tmp_path: Path) -> None:
        class Watching(PoolingFamily):
            shapes: list[tuple[int, ...]] = []

            def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
                self.shapes.append(tuple(pixels.shape))
                return super().encode_images(parts, pixels)

        visits = visits_of(tmp_path / "a", 7, ((96, 64), (64, 64)))
        one, more, family = latents(tmp_path / "one"), latents(tmp_path / "more"), Watching()
        fill(one, visits, PoolingFamily())
        assert fill(more, visits, family, batch_size=3) == Filled(7, 0, 0)
        assert sorted(family.shapes) == [(1, 3, 64, 96), (3, 3, 64, 64), (3, 3, 64, 96)]
        for visit in visits:
            assert torch.allclose(one.read(visit).moments, more.read(visit).moments, atol=1e-6)

    def test_batches_for_the_device(self) -> None:
        gpu = torch.device("cuda")
        assert [encoder_batch(gpu, side * side) for side in (512, 1024, 1536, 2048, 4096)] == [16, 4, 1, 1, 1]
        assert encoder_batch(CPU, 64) == 1

    def test_a_gpu_too_small_for_a_batch_gets_smaller_ones(self, tmp_path: Path) -> None:
        class Small(PoolingFamily):
            def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
                if len(pixels) > 2:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return super().encode_images(parts, pixels)

        visits, cache = visits_of(tmp_path / "a", 7), latents(tmp_path / "c")
        assert fill(cache, visits, Small(), batch_size=5) == Filled(7, 0, 0)
        assert all(torch.allclose(cache.read(visit).moments, encoding(visit)) for visit in visits)

    def test_nan_names_the_picture_and_stores_nothing(self, tmp_path: Path) -> None:
        class Overflowing(PoolingFamily):
            def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
                moments = super().encode_images(parts, pixels)
                return moments * float("nan") if self.images == 2 else moments

        visits, cache = visits_of(tmp_path / "a", 3), latents(tmp_path / "c")
        with pytest.raises(NumericError) as caught:
            fill(cache, visits, Overflowing())
        assert caught.value.where == str(visits[1].row.place)
        assert caught.value.exit_code == 4
        with pytest.raises(UserError, match="missing"):
            cache.read(visits[1])
        with pytest.raises(UserError, match="missing"):
            cache.read(visits[2])

    def test_a_picture_that_changes_after_the_scan_is_refused(self, tmp_path: Path) -> None:
        visits = visits_of(tmp_path / "a", 2)
        solid(tmp_path / "a" / "001.png", (64, 64), "blue")
        with pytest.raises(UserError, match=r"001\.png: the file changed"):
            fill(latents(tmp_path / "c"), visits, PoolingFamily())

    def test_progress_ends_at_the_total(self, tmp_path: Path) -> None:
        visits, cache = visits_of(tmp_path / "a", 5), latents(tmp_path / "c")
        events: list[Event] = []
        fill(cache, visits, PoolingFamily(), emit=events.append)
        assert [(e.done, e.total) for e in events if isinstance(e, Progress)] == [(i, 5) for i in range(1, 6)]
        events.clear()
        fill(cache, visits, PoolingFamily(), emit=events.append)
        assert events == [Progress(0, "caching images", 5, 5)]


class TestMasks:
    def masked(self, folder: Path) -> Visit:
        """A picture whose mask is white on the left 20 of 64 columns."""
        path = solid(folder / "a.png", (64, 64))
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :20] = 255
        Image.fromarray(mask).save(folder / "a-masklabel.png")
        place = Place(str(folder / "a-masklabel.png"))
        return visit_of(path, mask=place, mask_hash=content_hash(place.read()))

    def test_a_mask_is_averaged_over_the_area_of_each_latent(self, tmp_path: Path) -> None:
        visit, cache = self.masked(tmp_path), latents(tmp_path / "c")
        assert fill(cache, [visit], PoolingFamily()) == Filled(1, 0, 0)
        mask = cache.read(visit).mask
        assert mask is not None
        assert mask.shape == (1, 8, 8)
        assert torch.allclose(mask[0], torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0]).expand(8, 8))
        flipped = replace(visit, fit=replace(visit.fit, flip=True))
        fill(cache, [flipped], PoolingFamily())
        other = cache.read(flipped).mask
        assert other is not None
        assert torch.allclose(other, mask.flip(-1))

    def test_an_edited_mask_is_another_entry(self, tmp_path: Path) -> None:
        visit, cache = self.masked(tmp_path), latents(tmp_path / "c")
        fill(cache, [visit], PoolingFamily())
        assert visit.row.mask is not None
        Image.new("L", (64, 64), 255).save(visit.row.mask.path)
        edited = replace(visit, row=replace(visit.row, mask_hash=content_hash(visit.row.mask.read())))
        assert fill(cache, [edited, visit], PoolingFamily()) == Filled(1, 1, 0)
        mask = cache.read(edited).mask
        assert mask is not None
        assert mask.min() == 1

    def test_transparency_as_a_mask_and_none_for_an_unmasked_row(self, tmp_path: Path) -> None:
        pixels = np.full((64, 64, 4), 255, np.uint8)
        pixels[32:, :, 3] = 0
        Image.fromarray(pixels).save(tmp_path / "a.png")
        visit = visit_of(tmp_path / "a.png")
        masked = replace(visit, row=replace(visit.row, mask_hash=ALPHA))
        cache = latents(tmp_path / "c")
        assert fill(cache, [visit, masked], PoolingFamily()) == Filled(2, 0, 0)
        assert cache.read(visit).mask is None
        mask = cache.read(masked).mask
        assert mask is not None
        assert mask[0, :, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


class TestLive:
    def test_latents_have_the_bits_of_cached_ones(self, tmp_path: Path) -> None:
        visits = visits_of(tmp_path / "a", 4, ((96, 64), (64, 64)))
        visits += [TestMasks().masked(tmp_path / "m")]
        cache = latents(tmp_path / "c")
        fill(cache, visits, PoolingFamily())
        live = LiveLatents(family=PoolingFamily(), parts=None, device=CPU, background="white")  # type: ignore[arg-type]
        for visit in visits:
            cached, fresh = cache.read(visit), live.read(visit)
            assert torch.equal(cached.moments, fresh.moments)
            assert (cached.mask is None) == (fresh.mask is None)
            assert cached.mask is None or fresh.mask is None or torch.equal(cached.mask, fresh.mask)
        assert len(list((tmp_path / "c").rglob("*.gesso"))) == 5

    def test_one_thread_at_a_time_is_in_the_encoder(self, tmp_path: Path) -> None:
        class Busy(PoolingFamily):
            inside, most = 0, 0

            def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
                self.inside += 1
                self.most = max(self.most, self.inside)
                time.sleep(0.01)
                self.inside -= 1
                return super().encode_images(parts, pixels)

        visits, family = visits_of(tmp_path / "a", 6), Busy()
        live = LiveLatents(family=family, parts=None, device=CPU, background="white")  # type: ignore[arg-type]
        threads = [threading.Thread(target=live.read, args=(visit,)) for visit in visits]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (family.images, family.most) == (6, 1)

    def test_what_is_not_finite_is_refused(self, tmp_path: Path) -> None:
        class Broken(PoolingFamily):
            def encode_images(self, parts: object, pixels: torch.Tensor) -> torch.Tensor:
                return super().encode_images(parts, pixels) / 0

        [visit] = visits_of(tmp_path / "a", 1)
        live = LiveLatents(family=Broken(), parts=None, device=CPU, background="white")  # type: ignore[arg-type]
        with pytest.raises(NumericError, match=r"000\.png"):
            live.read(visit)

    def test_text_has_the_bits_of_cached_text(self, tmp_path: Path) -> None:
        cache = TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.float32)
        fill_text(cache, ["a dog"], PoolingFamily())
        live = LiveText(family=PoolingFamily(), parts=None).read("a dog")  # type: ignore[arg-type]
        cached = cache.read("a dog")
        assert live.keys() == cached.keys()
        assert all(torch.equal(live[name], cached[name]) for name in live)


class TestDamage:
    @pytest.mark.parametrize("how", ["truncate", "flip", "empty", "swap"])
    def test_a_damaged_entry_is_never_read_and_made_again(self, tmp_path: Path, how: str) -> None:
        visits, store = visits_of(tmp_path / "a", 4), Store(tmp_path / "c")
        cache = latents(tmp_path / "c")
        fill(cache, visits, PoolingFamily())
        harm(store, cache.key(visits[0]), cache.key(visits[1]), how)
        count = 2 if how == "swap" else 1
        events: list[Event] = []
        family = PoolingFamily()
        filled = fill(cache, visits, family, emit=events.append)
        assert filled == Filled(count, 4 - count, count)
        assert family.images == count
        warned = [e.message for e in events if isinstance(e, Warned)]
        assert warned == [f"{count} damaged cache entries were made again"]
        assert all(torch.equal(cache.read(visit).moments, encoding(visit)) for visit in visits)
        assert fill(cache, visits, PoolingFamily()) == Filled(0, 4, 0)

    @pytest.mark.parametrize("how", ["truncate", "flip", "empty", "swap"])
    def test_reading_one_is_refused_or_mended(self, tmp_path: Path, how: str) -> None:
        visits, store = visits_of(tmp_path / "a", 2), Store(tmp_path / "c")
        cache = latents(tmp_path / "c")
        fill(cache, visits, PoolingFamily())
        harm(store, cache.key(visits[0]), cache.key(visits[1]), how)
        with pytest.raises(UserError, match="damaged"):
            cache.read(visits[0])
        live = LiveLatents(family=PoolingFamily(), parts=None, device=CPU, background="white")  # type: ignore[arg-type]
        mending = latents(tmp_path / "c", rebuild=live.read)
        assert torch.equal(mending.read(visits[0]).moments, encoding(visits[0]))
        assert torch.equal(cache.read(visits[0]).moments, encoding(visits[0]))
        store.path(cache.key(visits[0])).unlink()  # as somebody who makes room
        assert torch.equal(mending.read(visits[0]).moments, encoding(visits[0]))

    def test_a_copied_cache_is_checked_once_and_not_made_again(self, tmp_path: Path) -> None:
        visits = visits_of(tmp_path / "a", 6)
        cache = latents(tmp_path / "c")
        fill(cache, visits, PoolingFamily())
        shutil.copytree(tmp_path / "c", tmp_path / "d")
        copied, store = latents(tmp_path / "d"), Store(tmp_path / "d")
        harm(store, copied.key(visits[2]), copied.key(visits[3]), "flip")
        assert {store.glance(copied.key(visit)) for visit in visits} == {"unsure"}
        assert fill(copied, visits, PoolingFamily()) == Filled(1, 5, 1)
        assert {store.glance(copied.key(visit)) for visit in visits} == {"good"}


class TestText:
    def test_entries_are_each_captions_own(self, tmp_path: Path) -> None:
        cache = TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.float32)
        captions = ["a dog", "", "a café", "a dog"]
        assert fill_text(cache, captions, PoolingFamily(), batch_size=2) == Filled(3, 0, 0)
        for caption in captions:
            expected = PoolingFamily().encode_text(None, [caption])
            assert torch.equal(cache.read(caption)["embeddings"], expected["embeddings"][0])
        assert fill_text(cache, captions, PoolingFamily()) == Filled(0, 3, 0)
        other = TextCache(Store(tmp_path), fingerprint="clip, chunked", dtype=torch.float32)
        with pytest.raises(UserError, match="caption 'a dog': its cache entry is missing"):
            other.read("a dog")
        assert cache.key("a dog") != TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.bfloat16).key("a dog")

    def test_bfloat16_comes_back_as_it_was(self, tmp_path: Path) -> None:
        class Half(PoolingFamily):
            def encode_text(self, parts: object, captions: list[str]) -> dict[str, torch.Tensor]:
                text = super().encode_text(parts, captions)
                return {"embeddings": (text["embeddings"] / 7).bfloat16(), "length": torch.tensor([len(captions[0])])}

        cache = TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.bfloat16)
        fill_text(cache, ["a dog"], Half())
        found, expected = cache.read("a dog"), Half().encode_text(None, ["a dog"])
        assert found["embeddings"].dtype == torch.bfloat16
        assert torch.equal(found["embeddings"], expected["embeddings"][0])
        assert found["length"].shape == ()
        assert int(found["length"]) == 5

    def test_batches_where_there_is_a_gpu(self, tmp_path: Path) -> None:
        class Counting(PoolingFamily):
            calls: list[int] = []

            def encode_text(self, parts: object, captions: list[str]) -> dict[str, torch.Tensor]:
                self.calls.append(len(captions))
                return super().encode_text(parts, captions)

        captions, family = [f"caption {i}" for i in range(70)], Counting()
        cache = TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.float32)
        fill_text(cache, captions, family, device=torch.device("cuda"))
        assert family.calls == [32, 32, 6]
        for caption in captions:
            expected = PoolingFamily().encode_text(None, [caption])["embeddings"][0]
            assert torch.equal(cache.read(caption)["embeddings"], expected)

    def test_nan_names_the_caption_and_a_damaged_entry_is_made_again(self, tmp_path: Path) -> None:
        class Broken(PoolingFamily):
            def encode_text(self, _parts: object, captions: list[str]) -> dict[str, torch.Tensor]:
                return {"x": torch.full((len(captions), 2), float("inf"))}

        cache = TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.float32)
        with pytest.raises(NumericError, match="'a dog'"):
            fill_text(cache, ["a dog"], Broken())
        fill_text(cache, ["a dog", "a cat"], PoolingFamily())
        harm(Store(tmp_path), cache.key("a dog"), cache.key("a cat"), "flip")
        with pytest.raises(UserError, match="damaged"):
            cache.read("a dog")
        live = LiveText(family=PoolingFamily(), parts=None)  # type: ignore[arg-type]
        mending = TextCache(Store(tmp_path), fingerprint="clip", dtype=torch.float32, rebuild=live.read)
        assert torch.equal(mending.read("a dog")["pooled"], live.read("a dog")["pooled"])
        harm(Store(tmp_path), cache.key("a dog"), cache.key("a cat"), "truncate")
        assert fill_text(cache, ["a dog", "a cat"], PoolingFamily()) == Filled(1, 1, 1)


def test_editing_one_of_a_thousand_encodes_exactly_one(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(1000):
        Image.new("RGB", (16, 16), (i % 256, i // 256, 7)).save(folder / f"{i:03}.png", compress_level=0)
        (folder / f"{i:03}.txt").write_text(f"picture {i}")
    data = data_for(folder, cache=tmp_path / "c", resolution=16)
    cache, text = latents(tmp_path / "c"), TextCache(Store(tmp_path / "c"), fingerprint="clip", dtype=torch.float32)

    def prepare() -> tuple[Filled, Filled, list[Visit]]:
        plan = Plan(build(data).rows, data=data, batch_size=1)
        visits = plan.renditions(range(1000))
        captions = plan.captions(range(1000))
        return fill(cache, visits, PoolingFamily()), fill_text(text, captions, PoolingFamily()), visits

    images, captions, visits = prepare()
    assert (images, captions) == (Filled(1000, 0, 0), Filled(1000, 0, 0))
    old = {visit.row.place.name: cache.read(visit).moments for visit in visits}
    solid(folder / "007.png", (16, 16), (1, 2, 3))
    images, captions, visits = prepare()
    assert (images, captions) == (Filled(1, 999, 0), Filled(0, 1000, 0))
    new = {visit.row.place.name: cache.read(visit).moments for visit in visits}
    assert [name for name in sorted(new) if not torch.equal(new[name], old[name])] == ["007.png"]
    (folder / "500.txt").write_text("an edited caption")
    images, captions, _ = prepare()
    assert (images, captions) == (Filled(0, 1000, 0), Filled(1, 999, 0))
    assert "embeddings" in text.read("an edited caption")


# Several processes.


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
