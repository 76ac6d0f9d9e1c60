"""The cache of text: each caption has its own entry, and a damaged one is made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_helpers import fill_text, harm
from data_helpers import PoolingFamily

from gesso.data.cache import LiveText, TextCache
from gesso.data.filling import Filled
from gesso.data.store import Store
from gesso.errors import NumericError, UserError


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
