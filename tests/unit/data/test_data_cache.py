"""The cache of latents: never stale, never read when damaged, and the same bits as without it."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import encoding, fill, fill_text, harm, latents, visit_of, visits_of
from data_helpers import CPU, PoolingFamily, data_for, folder_of, solid
from PIL import Image

from gesso.core.events import Event, Progress, Warned
from gesso.data.buckets import Fit
from gesso.data.cache import LiveLatents, LiveText, TextCache, encoder_batch
from gesso.data.filling import Filled
from gesso.data.images import content_hash
from gesso.data.index import build
from gesso.data.places import Place
from gesso.data.plan import Plan, Visit
from gesso.data.rows import ALPHA
from gesso.data.store import Store
from gesso.errors import NumericError, UserError


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
