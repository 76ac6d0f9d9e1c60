"""Files of new words: a plain diffusers pipeline with them reads prompts and draws like the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gesso import stages
from gesso.errors import UserError
from gesso.evaluation import sample as sampling
from gesso.evaluation.sample import Shot
from gesso.export import embedding
from gesso.families import lora_file
from run_helpers import MakeRun

TOKENS = [{"token": "<it>", "initial": "man", "vectors": 3}, {"token": "<hat>", "initial": "hat"}]
PROMPTS = ["a photo of <it>, red", "<hat> on <it>", "a plain photo"]
KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"adapter": {"type": "embedding", "tokens": TOKENS}},
    "pivotal": {"adapter": {"rank": 4, "alpha": 6, "tokens": TOKENS}},
    "pivotal, text encoders": {"adapter": {"rank": 4, "alpha": 6, "train_text_encoders": True, "tokens": TOKENS}},
}


@pytest.fixture
def train(make_run: MakeRun, pictures: Path, tmp_path: Path) -> Any:
    folder = tmp_path / "worded"
    folder.mkdir()
    for file in pictures.glob("*.png"):
        (folder / file.name).hardlink_to(file)
        (folder / f"{file.stem}.txt").write_text(f"a photo of <it> in <hat>, number {file.stem}")

    def make(kind: str, **changes: Any) -> Path:
        run = make_run(
            "run",
            **KINDS[kind],
            data__sources=[{"path": str(folder)}],
            training__steps=2,
            training__token_learning_rate=0.05,
            training__schedule={"type": "constant"},
            **changes,
        )
        return stages.train(run)

    return make


def as_a_user(base: Path, folder: Path, matrices: Path | None) -> StableDiffusionXLPipeline:
    """The calls that the guide tells users of diffusers."""
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    if matrices is not None:
        pipe.load_lora_weights(matrices)
    for token in ("<it>", "<hat>"):
        state = load_file(folder / f"{token.strip('<>')}.safetensors")
        pipe.load_textual_inversion(
            state["clip_l"], token=token, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer
        )
        pipe.load_textual_inversion(
            state["clip_g"], token=token, text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2
        )
    return pipe


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_plain_diffusers_reads_prompts_and_draws_like_the_run(
    train: Any, tiny_base: Path, tmp_path: Path, kind: str
) -> None:
    folder = train(kind)
    words, matrices = folder / "embeddings", None
    if kind != "embedding":
        matrices = stages.export(str(folder), precision="fp32", output=tmp_path / "exported.safetensors")
        words = tmp_path / "exported-embeddings"
    pipe, (ours, _) = as_a_user(tiny_base, words, matrices), sampling.open_pipeline(str(folder), runtime=runtime())
    with torch.no_grad():
        theirs, found = (p.encode_prompt(PROMPTS, do_classifier_free_guidance=False) for p in (pipe, ours))
    assert difference(theirs[0], found[0]) <= 1e-5
    assert difference(theirs[2], found[2]) <= 1e-5
    with torch.no_grad():
        base = StableDiffusionXLPipeline.from_pretrained(tiny_base)
        untrained = base.encode_prompt(["a photo of man man man, red"], do_classifier_free_guidance=False)
    assert difference(untrained[0], found[0][:1]) > 1e-3, "so little was trained that the comparison proves nothing"
    shots = [Shot(prompt, seed=5, steps=2, width=64, height=64) for prompt in PROMPTS]
    for one, other in zip(sampling.draw(pipe, shots), sampling.draw(ours, shots), strict=True):
        assert np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def runtime() -> Any:
    from gesso.core.runtime import Runtime

    return Runtime.for_inference("fp32", "cpu")


def test_a_run_leaves_the_averaged_vectors_in_their_layout(train: Any) -> None:
    folder = train("embedding")
    for token, count in (("it", 3), ("hat", 1)):
        file = folder / "embeddings" / f"{token}.safetensors"
        written = load_file(file)
        averaged = load_file(folder / "checkpoint-2" / "ema" / "embeddings" / token / "learned_embeds.safetensors")
        assert {key: tuple(t.shape) for key, t in written.items()} == {"clip_l": (count, 16), "clip_g": (count, 24)}
        assert all(torch.equal(written[key], averaged[key]) for key in written)
        with safe_open(file, framework="pt") as handle:
            header = dict(handle.metadata())
        assert header["token"] == f"<{token}>"
        assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/textual-inversion"
    assert sorted(p.name for p in (folder / "embeddings").iterdir()) == ["hat.safetensors", "it.safetensors"]
    assert not (folder / "checkpoint-2" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("fp16", torch.float16)])
def test_export_of_words_alone(train: Any, precision: Any, dtype: torch.dtype) -> None:
    folder = train("embedding")
    path = stages.export(str(folder), precision=precision, use_ema=False)
    assert path == folder / "run-checkpoint-2-embeddings"
    trained = load_file(folder / "checkpoint-2" / "embeddings" / "it" / "learned_embeds.safetensors")
    written = load_file(path / "it.safetensors")
    assert all(torch.equal(written[key], tensor.to(dtype)) for key, tensor in trained.items())
    with pytest.raises(UserError, match="trained new words alone"):
        stages.export(str(folder), format="kohya")


def test_a_lora_is_left_with_its_words_beside_and_bundled(train: Any, tiny_base: Path, tmp_path: Path) -> None:
    folder = train("pivotal")
    single, both = (lora_file.read(folder / name) for name in ("run.safetensors", "run-bundled.safetensors"))
    assert not single.words
    assert {t: sorted(v) for t, v in both.words.items()} == {
        "<it>": ["clip_g", "clip_l"],
        "<hat>": ["clip_g", "clip_l"],
    }
    assert both.layers.keys() == single.layers.keys()
    assert all(torch.equal(both.layers[name].up, single.layers[name].up) for name in single.layers)
    keys = load_file(folder / "run-bundled.safetensors")
    beside = load_file(folder / "embeddings" / "it.safetensors")
    assert all(torch.equal(keys[f"bundle_emb.<it>.{key}"], tensor) for key, tensor in beside.items())
    assert lora_file.is_lora(folder / "run-bundled.safetensors")
    matrices = load_file(folder / "checkpoint-2" / "pytorch_lora_weights.safetensors")
    assert not [name for name in matrices if "embed" in name]
    StableDiffusionXLPipeline.from_pretrained(tiny_base).load_lora_weights(folder / "checkpoint-2")
    with pytest.raises(UserError, match="new words"):
        stages.export(str(folder), hub_repo="me/it")


def test_bundled_words_are_read_with_their_lora(train: Any, tiny_base: Path) -> None:
    folder = train("pivotal")
    bundle = str(folder / "run-bundled.safetensors")
    (ours, _) = sampling.open_pipeline(str(folder), runtime=runtime())
    (theirs, _) = sampling.open_pipeline(str(tiny_base), loras=[(bundle, 1.0)], runtime=runtime())
    with torch.no_grad():
        one, other = (p.encode_prompt(PROMPTS, do_classifier_free_guidance=False) for p in (ours, theirs))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[2], other[2])
    with pytest.raises(UserError, match="the word <hat> is there twice"):
        sampling.open_pipeline(str(folder), loras=[(bundle, 1.0)], runtime=runtime())


@pytest.mark.parametrize(
    ("name", "width", "told"), [("<it>", 17, "of another kind of model"), ("<IT>", 16, "lower case only")]
)
def test_bundled_words_that_do_not_fit_are_told(train: Any, tiny_base: Path, name: str, width: int, told: str) -> None:
    folder = train("pivotal")
    tensors = load_file(folder / "run.safetensors")
    tensors |= {f"bundle_emb.{name}.clip_l": torch.ones(1, width), f"bundle_emb.{name}.clip_g": torch.ones(1, 24)}
    save_file(tensors, folder / "strange.safetensors")
    with pytest.raises(UserError, match=told) as refused:
        sampling.open_pipeline(str(tiny_base), loras=[(str(folder / "strange.safetensors"), 1.0)], runtime=runtime())
    assert "strange.safetensors" in refused.value.where


def test_a_file_that_reads_otherwise_is_not_kept(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the two encoders' vectors of one width, a mix-up would load: a wrong value must be seen."""
    folder = train("embedding")
    real = embedding.Trained._file

    def altered(self: Any, token: Any, dtype: Any) -> bytes:
        vectors = {t: {k: v + 1e-3 * (k == "clip_g") for k, v in one.items()} for t, one in self.vectors.items()}
        return real(embedding.Trained(self.run, vectors, self.expected), token, dtype)

    monkeypatch.setattr(embedding.Trained, "_file", altered)
    with pytest.raises(UserError, match="does not reload as the trained one"):
        stages.export(str(folder), output=folder / "out")
    assert not (folder / "out").exists()
    assert not list(folder.glob(".partial-*"))


def test_previews_and_samples_know_the_words(train: Any, tmp_path: Path) -> None:
    """A preview of the last step is what `sample` draws from the checkpoint with the same seed."""
    shown = {"preview": {"prompts": ["a photo of <it>"], "inference_steps": 2, "seed": 7}}
    folder = train("pivotal", **shown)
    (drawn,) = stages.sample(
        str(folder), prompts=["a photo of <it>"], seed=7, steps=2, output=tmp_path / "a.png", width=64, height=64,
        precision="fp32", device="cpu",
    )  # fmt: skip
    preview = Image.open(folder / "samples" / "step-00000002" / "00.png")
    gap = np.abs(np.asarray(Image.open(drawn), np.int16) - np.asarray(preview, np.int16))
    assert gap.max() <= 1
    plain = Image.open(folder / "samples" / "step-00000000" / "00.png")
    assert np.abs(np.asarray(plain, np.int16) - np.asarray(preview, np.int16)).max() > 2
