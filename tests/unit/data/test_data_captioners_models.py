"""Captions by local models: BLIP, Florence-2 and the WD taggers, each on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from captioning_helpers import COLOURS, picture

from gesso.data.captioning.plugins import Settings, load
from gesso.errors import UserError


def tiny_blip(folder: Path) -> Path:
    """A random BLIP with the real processor's files."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "photo", "of", "cat", "dog", "red", "tree"]
    (folder / "words").mkdir(parents=True)
    (folder / "words" / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = BertTokenizer(str(folder / "words" / "vocab.txt"), bos_token="[DEC]")
    text = {
        "vocab_size": len(words),
        "hidden_size": 16,
        "encoder_hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 5,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    import torch

    torch.manual_seed(0)
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(std=1.0)  # so that it does not say the same about everything
    model.save_pretrained(folder / "blip")
    images = BlipImageProcessorPil(size={"height": 16, "width": 16})
    BlipProcessor(images, tokenizer).save_pretrained(folder / "blip")
    return folder / "blip"


def test_blip(tmp_path: Path) -> None:
    settings = Settings(model=str(tiny_blip(tmp_path)), device="cpu", max_tokens=8)
    captioner = load("blip", settings)
    pictures = [picture(colour, (20, 50)) for colour in COLOURS]
    texts = captioner.caption(pictures)
    assert len(texts) == len(pictures)
    known = {"a", "photo", "of", "cat", "dog", "red", "tree"}
    assert all(text and set(str(text).split(" ")) <= known for text in texts)
    assert len(set(map(str, texts))) > 1, "it did not look at the pictures"
    assert captioner.caption(pictures) == texts, "the same picture must get the same caption"
    assert [captioner.caption([one])[0] for one in pictures] == texts, "a batch must change no caption"
    begun = load("blip", Settings(model=settings.model, device="cpu", max_tokens=8, prompt="a photo of"))
    assert all(str(text).startswith("a photo of") for text in begun.caption(pictures))


def tiny_florence(folder: Path) -> Path:
    """A random Florence-2 that knows the letters of its tasks."""
    import torch
    from transformers import (
        BartTokenizer,
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    letters = sorted(set("What does the image describe? Describe with a paragraph in detail what is shown."))
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "Ġ"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})
    side = {"height": 64, "width": 64}
    images = CLIPImageProcessorPil(size=side, crop_size=side)
    images.image_seq_length = 5  # 2 x 2 patches and their mean
    fours = {"embed_dim": [8] * 4, "num_heads": [1] * 4, "num_groups": [1] * 4, "depths": [1] * 4}
    text = {
        "model_type": "bart",
        "vocab_size": len(tokenizer),
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
        "max_position_embeddings": 200,
    }
    config = Florence2Config(
        text_config=text,
        vision_config={**fours, "projection_dim": 16, "window_size": 2},
        image_token_id=tokenizer.image_token_id,
    )
    torch.manual_seed(0)
    model = Florence2ForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(std=1.0)
    model.save_pretrained(folder)
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return folder


def test_florence(tmp_path: Path) -> None:
    settings = Settings(model=str(tiny_florence(tmp_path / "florence")), device="cpu", max_tokens=8)
    captioner = load("florence", settings)
    pictures = [picture(colour, (20, 50)) for colour in COLOURS]
    texts = captioner.caption(pictures)
    assert len(set(map(str, texts))) > 1, "it did not look at the pictures"
    assert not any("<" in str(text) for text in texts)
    assert [captioner.caption([one])[0] for one in pictures] == texts
    assert load("florence", replace(settings, prompt="<MORE_DETAILED_CAPTION>")).caption(pictures) == texts
    assert load("florence", replace(settings, prompt="<CAPTION>")).caption(pictures) != texts


def test_a_model_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load("blip", Settings(model=str(tmp_path), device="cpu"))


TAGS = ["general", "red_thing", "green_thing", "blue_thing", "0_0", "some_one_(show)"]


def tiny_tagger(folder: Path, *, batch: int | str = "n", tags: Sequence[str] = tuple(TAGS)) -> Path:
    """A model whose scores are the mean red, green and blue of what it is given as BGR, and constants."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(exist_ok=True)
    # Scores: rating, red, green, blue, face, character.
    weights = np.zeros((3, 6), np.float32)
    weights[2, 1] = weights[1, 2] = weights[0, 3] = 1 / 255
    weights[2, 5] = 0.86 / 255
    bias = np.array([0.9, 0, 0, 0, 0.4, 0], np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["output"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 4, 4, 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, 6])],
        [
            numpy_helper.from_array(np.array([1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
            numpy_helper.from_array(bias, "bias"),
        ],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), folder / "model.onnx"
    )
    categories = {"general": 9, "some_one_(show)": 4}
    lines = [f"{i},{name},{categories.get(name, 0)},1\n" for i, name in enumerate(tags)]
    (folder / "selected_tags.csv").write_text("tag_id,name,category,count\n" + "".join(lines))
    return folder


@pytest.mark.parametrize("batch", ["n", 1])
def test_wd_tags(tmp_path: Path, batch: int | str) -> None:
    tagger = load("wd", Settings(model=str(tiny_tagger(tmp_path / "wd", batch=batch)), device="cpu"))
    squares = [picture(colour, (8, 8)) for colour in ("red", "blue", "black")]
    assert tagger.caption(squares) == ["some one (show), red thing, 0_0", "blue thing, 0_0", "0_0"]


def test_wd_pads_with_white_and_obeys_its_thresholds(tmp_path: Path) -> None:
    model = str(tiny_tagger(tmp_path / "wd"))
    tall = picture("black", (4, 8))
    assert load("wd", Settings(model=model, threshold=0.45)).caption([tall]) == ["red thing, green thing, blue thing"]
    (none,) = load("wd", Settings(model=model, threshold=0.6)).caption([tall])
    assert isinstance(none, UserError)
    low = Settings(model=model, threshold=0.95, character_threshold=0.4)
    assert load("wd", low).caption([tall]) == ["some one (show)"]


def test_wd_files_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny_tagger(tmp_path / "wd", tags=TAGS[:-1])
    with pytest.raises(UserError, match="6 scores, but there are 5 tags"):
        load("wd", Settings(model=str(model)))
    (model / "model.onnx").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot be loaded"):
        load("wd", Settings(model=str(model)))
    (model / "selected_tags.csv").unlink()
    with pytest.raises(UserError, match=r"no selected_tags\.csv"):
        load("wd", Settings(model=str(model)))
