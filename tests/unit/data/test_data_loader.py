"""The loader: right picture, right caption, right numbers, whatever the threads do."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import CPU, PoolingFamily, caption_of, captioned, coordinates, data_for, folder_of

from gesso.config.run import Buckets, Captions, Data, Holdout
from gesso.core.batch import Batch
from gesso.core.random import Draws, SampleKey
from gesso.data import store
from gesso.data.cache import LatentCache, Store, TextCache
from gesso.data.index import build
from gesso.data.loader import Loader
from gesso.data.plan import Plan
from gesso.errors import ResourceError, UserError


def loader_for(
    data: Data,
    folder: Path,
    *,
    steps: int = 40,
    batch_size: int = 1,
    accumulation: int = 1,
    workers: int = 0,
    live_text: bool = False,
    patience: float = 60.0,
    family: PoolingFamily | None = None,
) -> Loader:
    plan = Plan(build(data).rows, data=data, batch_size=batch_size, accumulation=accumulation, seed=7)
    family = family or PoolingFamily()
    latents = LatentCache(Store(folder), fingerprint="vae", dtype=torch.float32, background=data.background)
    latents.fill(plan.renditions(range(steps)), family=family, parts=None, device=CPU, emit=lambda _e: None)  # type: ignore[arg-type]
    text = TextCache(Store(folder), fingerprint="clip", dtype=torch.float32)
    text.fill(plan.captions(range(steps)), family=family, parts=None, emit=lambda _e: None)  # type: ignore[arg-type]
    return Loader(
        plan,
        latents=latents,
        text=None if live_text else text,
        family=family,  # type: ignore[arg-type]
        workers=workers,
        stop=steps,
        patience=patience,
    )


def same(one: Batch, other: Batch) -> bool:
    tensors = all(torch.equal(vars(one)[k], vars(other)[k]) for k in ("latents", "noise", "u", "weights"))
    text = one.text is not None and other.text is not None
    text = text and all(torch.equal(one.text[k], other.text[k]) for k in one.text)  # type: ignore[index]
    plain = all(vars(one)[k] == vars(other)[k] for k in ("geometry", "captions", "files", "draws"))
    return tensors and text and plain


def mixed(tmp_path: Path, **changes: object) -> Data:
    folder = folder_of(tmp_path / "pictures", 11, ((64, 64), (96, 48), (50, 100)))
    options: dict[str, object] = {"flip": True, "captions": {"dropout": 0.3}, "crop": "random"}
    return data_for(folder, cache=tmp_path / "cache", **(options | changes))


class TestBatches:
    def test_shapes_and_types(self, tmp_path: Path) -> None:
        loader = loader_for(mixed(tmp_path), tmp_path / "cache", batch_size=4)
        for step in range(loader.steps_per_epoch):
            batches = list(loader.window(step))
            assert sum(map(len, batches)) == loader.window_size(step)
            for batch in batches:
                assert batch.latents.shape == batch.noise.shape
                assert batch.latents.shape[:2] == (len(batch), 3)
                assert batch.latents.dtype == batch.noise.dtype == batch.weights.dtype == torch.float32
                assert batch.u.dtype == torch.float32
                assert batch.latents.shape[2] * 8 == batch.geometry[0].target_height
                assert batch.latents.shape[3] * 8 == batch.geometry[0].target_width
                assert len(batch.files) == len(batch.geometry) == len(batch.draws.samples) == len(batch)

    def test_every_number_is_keyed_by_its_sample(self, tmp_path: Path) -> None:
        loader = loader_for(mixed(tmp_path), tmp_path / "cache", batch_size=3)
        for step in (0, loader.steps_per_epoch + 1):
            epoch = step // loader.steps_per_epoch
            for batch in loader.window(step):
                for i, sample in enumerate(batch.draws.samples):
                    alone = Draws(7, epoch, (sample,))
                    assert np.array_equal(batch.noise[i], alone.normal("noise", batch.noise.shape[1:])[0])
                    assert batch.u[i].item() == pytest.approx(alone.uniform("timestep")[0], abs=1e-7)
                    eps = torch.from_numpy(alone.normal("vae posterior", batch.noise.shape[1:])[0])
                    mean = batch.latents[i] - 1e-3 * eps
                    assert mean.flatten(1).std(dim=1).max() < 1e-6, "the pictures are of one colour"

    def test_splitting_a_step_otherwise_changes_no_sample(self, tmp_path: Path) -> None:
        data = mixed(tmp_path)

        def samples(batch_size: int, accumulation: int) -> dict[tuple[int, SampleKey], tuple[torch.Tensor, ...]]:
            loader = loader_for(data, tmp_path / "cache", batch_size=batch_size, accumulation=accumulation, steps=6)
            return {
                (step, sample): (batch.latents[i], batch.noise[i], batch.u[i], batch.text["embeddings"][i])
                for step in range(6)
                for batch in loader.window(step)
                for i, sample in enumerate(batch.draws.samples)
                if batch.text is not None
            }

        one, two, three = samples(1, 4), samples(4, 1), samples(2, 2)
        assert one.keys() == two.keys() == three.keys()
        for key, values in one.items():
            for other in (two, three):
                assert all(torch.equal(a, b) for a, b in zip(values, other[key], strict=True))

    def test_weights_come_from_the_source(self, tmp_path: Path) -> None:
        data = data_for(folder_of(tmp_path / "a", 2), folder_of(tmp_path / "b", 5), cache=tmp_path / "c")
        sources = (data.sources[0].model_copy(update={"weight": 0.25}), data.sources[1])
        loader = loader_for(data.model_copy(update={"sources": sources}), tmp_path / "c")
        seen = [(b.files[0], b.weights.item()) for s in range(loader.steps_per_epoch) for b in loader.window(s)]
        assert len(seen) == 7
        assert all(weight == (0.25 if f"{tmp_path}/a/" in file else 1.0) for file, weight in seen)

    def test_live_text_encoders_get_captions_only(self, tmp_path: Path) -> None:
        [batch, *_] = loader_for(mixed(tmp_path), tmp_path / "cache", live_text=True).window(0)
        assert batch.text is None
        assert len(batch.captions) == 1

    def test_a_missing_entry_names_the_picture(self, tmp_path: Path) -> None:
        loader = loader_for(mixed(tmp_path, crop="center"), tmp_path / "cache", workers=2)
        list(loader.window(0))
        for entry in [path for path in (tmp_path / "cache").rglob("*") if path.suffix == store.SUFFIX]:
            entry.unlink()
        with pytest.raises(UserError, match="its cache entry is missing"):
            loader.window(20)
        loader.close()


class TestPairing:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_colours_keep_their_captions_over_three_epochs(self, tmp_path: Path, workers: int) -> None:
        colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
        for i, (name, colour) in enumerate((n, c) for n, c in colours.items() for _ in range(3)):
            captioned(tmp_path / "a", f"{i}.png", name, (64 + 16 * (i % 3), 64), colour)
        data = data_for(tmp_path / "a", cache=tmp_path / "c", crop="random", flip=True)
        loader = loader_for(data, tmp_path / "c", batch_size=2, accumulation=2, workers=workers)
        seen = 0
        for step in range(3 * loader.steps_per_epoch):
            for batch in loader.window(step):
                assert batch.text is not None
                for i, caption in enumerate(batch.captions):
                    mean = (batch.latents[i].mean(dim=(1, 2)) + 1) * 127.5
                    assert (mean - torch.tensor(colours[caption], dtype=torch.float32)).abs().max() < 1
                    assert caption_of(batch.text["embeddings"][i]) == caption
                    seen += 1
        loader.close()
        assert seen == 3 * 12

    def test_dropped_captions_come_with_the_empty_embedding(self, tmp_path: Path) -> None:
        loader = loader_for(mixed(tmp_path), tmp_path / "cache")
        pairs = [
            (batch.captions[0], caption_of(batch.text["embeddings"][0]))
            for step in range(40)
            for batch in loader.window(step)
            if batch.text is not None
        ]
        assert len(pairs) == 40
        assert all(said == meant for said, meant in pairs)
        assert 3 <= sum(said == "" for said, _ in pairs) <= 25


def test_the_geometry_of_a_cached_batch_is_what_its_pixels_show(tmp_path: Path) -> None:
    """Coordinate-coded pictures: the mean colour of a latent cell says where in the picture it was."""
    (tmp_path / "a").mkdir()
    for i, size in enumerate(((120, 64), (64, 120), (101, 77), (64, 64), (90, 70))):
        coordinates(*size).save(tmp_path / "a" / f"{i}.png")
        (tmp_path / "a" / f"{i}.txt").write_text(str(size))
    data = data_for(tmp_path / "a", cache=tmp_path / "c", crop="random", flip=True, buckets=Buckets(enabled=False))
    loader = loader_for(data, tmp_path / "c", steps=40)
    flips = 0
    for step in range(40):
        [batch] = loader.window(step)
        geometry, latents = batch.geometry[0], batch.latents[0]
        width, height = geometry.original_width, geometry.original_height
        scale = max(64 / width, 64 / height)
        centre = np.arange(8) * 8 + 3.5
        columns, lines = (((latents[c] + 1) * 127.5).numpy() for c in (0, 1))
        flipped = bool(columns[0, 0] > columns[0, -1])
        flips += flipped
        across = (geometry.crop_left + centre + 0.5) / scale - 0.5
        if flipped:
            across = width - 1 - across
        down = (geometry.crop_top + centre + 0.5) / scale - 0.5
        assert np.abs(columns[4] - across).max() < 1.2
        assert np.abs(lines[:, 4] - down).max() < 1.2
    assert 5 < flips < 35


class TestWorkers:
    def test_any_number_gives_the_same_bits(self, tmp_path: Path) -> None:
        data = mixed(tmp_path)
        inline = loader_for(data, tmp_path / "cache", batch_size=2, accumulation=2)
        with loader_for(data, tmp_path / "cache", batch_size=2, accumulation=2, workers=3) as threaded:
            for step in [*range(3 * inline.steps_per_epoch), 2, 0, 5, 6, 1]:
                pairs = list(zip(inline.window(step), threaded.window(step), strict=True))
                assert pairs
                assert all(same(a, b) for a, b in pairs)

    def test_windows_are_prepared_ahead_but_not_without_bound(self, tmp_path: Path) -> None:
        loader = loader_for(mixed(tmp_path), tmp_path / "cache", workers=2, steps=30)
        prepared = _record_steps(loader)
        list(loader.window(0))
        _eventually(lambda: set(prepared) == {0, 1, 2, 3})
        time.sleep(0.1)
        assert set(prepared) == {0, 1, 2, 3}
        list(loader.window(28))
        _eventually(lambda: {28, 29} <= set(prepared))
        time.sleep(0.1)
        assert max(prepared) == 29, "nothing is prepared past the end of the run"
        loader.close()

    def test_an_error_keeps_its_type_and_message(self, tmp_path: Path) -> None:
        class Boom(RuntimeError):
            pass

        class Failing(PoolingFamily):
            def latents(self, _moments: torch.Tensor, _noise: torch.Tensor) -> torch.Tensor:
                raise Boom("disk on fire")

        loader = loader_for(mixed(tmp_path), tmp_path / "cache", workers=2, family=Failing())
        with pytest.raises(Boom, match="disk on fire"):
            loader.window(0)
        loader.close()

    def test_closing_ends_the_threads(self, tmp_path: Path) -> None:
        before = threading.active_count()
        loader = loader_for(mixed(tmp_path), tmp_path / "cache", workers=3)
        list(loader.window(0))
        assert threading.active_count() == before + 3
        loader.close()
        assert threading.active_count() == before

    def test_a_dead_thread_is_an_error(self, tmp_path: Path) -> None:
        loader = loader_for(mixed(tmp_path), tmp_path / "cache", workers=1)
        list(loader.window(0))
        loader.close()
        with pytest.raises(ResourceError, match="has died"):
            loader.window(10)

    def test_a_stuck_thread_is_an_error(self, tmp_path: Path) -> None:
        release = threading.Event()

        class Stuck(PoolingFamily):
            def latents(self, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
                release.wait(30)
                return super().latents(moments, noise)

        loader = loader_for(mixed(tmp_path), tmp_path / "cache", workers=1, patience=0.2, family=Stuck())
        with pytest.raises(ResourceError, match="gave nothing"):
            loader.window(0)
        release.set()
        loader.close()


def _record_steps(loader: Loader) -> list[int]:
    prepared: list[int] = []
    assert loader._ahead is not None
    original = loader._ahead._prepare

    def spy(step: int) -> list[Batch]:
        prepared.append(step)
        return original(step)

    loader._ahead._prepare = spy
    return prepared


def _eventually(condition: object) -> None:
    for _ in range(200):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.02)
    raise AssertionError("it never came true")


class TestValidation:
    def test_fixed_and_evenly_spread(self, tmp_path: Path) -> None:
        data = mixed(tmp_path, validation=Holdout(fraction=0.4))
        loader = loader_for(data, tmp_path / "cache", batch_size=2)
        first, second = loader.validation_batches(4), loader.validation_batches(4)
        assert all(same(a, b) for a, b in zip(first, second, strict=True))
        by_file: dict[str, list[float]] = {}
        noises = []
        for batch in first:
            assert batch.weights.tolist() == [1.0] * len(batch)
            assert all(batch.captions)
            noises += list(batch.noise)
            for file, u in zip(batch.files, batch.u.tolist(), strict=True):
                by_file.setdefault(file, []).append(u)
        assert {tuple(sorted(u)) for u in by_file.values()} == {(0.125, 0.375, 0.625, 0.875)}
        assert len(by_file) == len(build(data).validation)
        assert len({n.numpy().tobytes() for n in noises}) == len(noises)

    def test_training_settings_do_not_touch_it(self, tmp_path: Path) -> None:
        plain = mixed(tmp_path, validation=Holdout(fraction=0.4))
        other = plain.model_copy(update={"flip": False, "captions": Captions(), "crop": "center"})
        one = loader_for(plain, tmp_path / "cache", batch_size=2).validation_batches(3)
        two = loader_for(other, tmp_path / "cache", batch_size=2, accumulation=2).validation_batches(3)
        assert all(same(a, b) for a, b in zip(one, two, strict=True))
