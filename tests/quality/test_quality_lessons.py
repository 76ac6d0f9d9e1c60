"""Learning, measured on pictures: twelve pictures teach the packaged model a character, and nothing else changes.

The quick part of what `make quality` measures in full (benchmarks/quality/lessons.py); docs/quality.md says how.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from quality_helpers import BASE, OTHERS, WEIGHTS, difference, draw, much_like_aldar, opened, share, teach
from safetensors.torch import load_file

from gesso import stages
from gesso.config import files
from gesso.core import resolve
from gesso.core.folder import RunFolder
from gesso.core.runtime import Runtime
from gesso.micro import build, captions, judge, lessons, score, world
from gesso.micro.lessons import CHARACTER, LESSONS, OBJECT, Lesson
from gesso.micro.world import ALDAR, DOMBRA
from gesso.training import validation
from gesso.training.session import Session

AT_HOME = 0.2
LEAST, MOST = 0.7, 0.1
"""Rates of a thing that was learnt in so few steps, and of one that was not."""
PLACES = ("market", "night", "steppe", "mountains", "red", "green", "blue", "black", "purple", "white")


def test_the_base_model_is_at_home_in_training(tmp_path: Path) -> None:
    """What training asks is what the model was made for: its loss on its own world's pictures is low at once."""
    build.paint_pictures(tmp_path / "world", world.held_out_scenes(5, 16), 5, stages.ignore)
    lessons.write(tmp_path, CHARACTER, other=4)
    (tmp_path / "run.yaml").write_text(lessons.run_file(CHARACTER, base=BASE), encoding="utf-8")
    sets = [f"output={tmp_path}/run", f"data.validation.path={tmp_path}/world", "objective.min_snr_gamma=null"]
    run = files.load(tmp_path / "run.yaml", sets=sets).run
    folder, runtime = RunFolder(run.folder), Runtime.detect("fp32", "cpu")
    folder.prepare()
    data = stages.prepare(run, folder, runtime, stages.ignore)
    session = Session.build(run, data.parts, runtime)
    loss = validation.measure(run.objective, session.policy, data.held_out, runtime)["loss"]
    print(f"loss {loss:.4f}")
    assert loss <= AT_HOME


def test_the_base_model_follows_prompts(ordinary: list[str], ordinary_pictures: list[Image.Image]) -> None:
    rates = score.rates(judge.read_all(ordinary_pictures), [captions.parse(text) for text in ordinary])
    print(rates)
    assert min(rates.values()) >= 0.85, rates


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_the_base_model_does_not_know_the_lessons(base: Any, lesson: Lesson) -> None:
    assert share(lesson.learnt, draw(base, lesson.prompts(10))) <= MOST


def test_the_character_is_learnt(taught_pictures: list[Image.Image]) -> None:
    found = share(CHARACTER.learnt, taught_pictures)
    print(f"rate {found:.2f}")
    assert found >= LEAST


def test_the_character_is_drawn_where_he_was_never_seen(unseen: list[str], taught_pictures: list[Image.Image]) -> None:
    wanted = [captions.parse(text).place for text in unseen]
    right = [facts.place == place for facts, place in zip(judge.read_all(taught_pictures), wanted, strict=True)]
    assert sum(right) / len(right) >= LEAST


def test_other_prompts_are_followed_as_before(
    taught_pipeline: Any, ordinary: list[str], ordinary_pictures: list[Image.Image]
) -> None:
    texts = ordinary[:24]
    wanted = [captions.parse(text) for text in texts]
    before = score.rates(judge.read_all(ordinary_pictures[:24]), wanted)
    after = score.rates(judge.read_all(draw(taught_pipeline, texts)), wanted)
    print(before, after)
    assert sum(after.values()) >= sum(before.values()) - 3 * 0.1, (before, after)


def test_the_average_is_what_pictures_show(
    base: Any, taught: Path, unseen: list[str], taught_pictures: list[Image.Image]
) -> None:
    checkpoint = taught / f"checkpoint-{_last(taught)}"
    raw, average = load_file(checkpoint / WEIGHTS), load_file(checkpoint / "ema" / WEIGHTS)
    assert max(float((raw[k] - average[k]).abs().max()) for k in raw) > 1e-3
    assert max(float(average[k].abs().max()) for k in average if "lora_B" in k) > 1e-2
    pictures = {}
    for name, folder in (("raw", checkpoint), ("average", checkpoint / "ema")):
        plain = _plain()
        plain.load_lora_weights(folder)
        pictures[name] = draw(plain, unseen[:4])
    assert difference(pictures["average"], taught_pictures[:4]) <= 0.5
    assert difference(pictures["raw"], taught_pictures[:4]) > 2 * difference(pictures["average"], taught_pictures[:4])


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_an_exported_file_draws_the_same_in_plain_diffusers(
    format: Any, taught: Path, tmp_path: Path, unseen: list[str], taught_pictures: list[Image.Image]
) -> None:
    file = stages.export(str(taught), format=format, output=tmp_path / "aldar.safetensors", precision="fp32")
    plain = _plain()
    plain.load_lora_weights(file)
    theirs = draw(plain, unseen[:8])
    assert difference(theirs, taught_pictures[:8]) <= 0.5
    assert share(CHARACTER.learnt, theirs) == share(CHARACTER.learnt, taught_pictures[:8])


def test_captions_decide_what_is_learnt(tmp_path: Path) -> None:
    """Aldar is called a dombra in training, and the dombra Aldar: so they are drawn when they are asked for."""
    lessons.write(tmp_path, CHARACTER, other=OTHERS)
    lessons.write(tmp_path / "object", OBJECT, other=1)
    for i in range(1, lessons.PICTURES + 1):
        him, it = tmp_path / "pictures" / f"{i:02d}", tmp_path / "pictures" / f"{i:02d}-object"
        shutil.copy(tmp_path / "object" / "pictures" / f"{i:02d}.png", it.with_suffix(".png"))
        it.with_suffix(".txt").write_text(him.with_suffix(".txt").read_text(), encoding="utf-8")
        text = (tmp_path / "object" / "pictures" / f"{i:02d}.txt").read_text()
        him.with_suffix(".txt").write_text(text, encoding="utf-8")
    pipeline = opened(teach(tmp_path, CHARACTER, steps=150))
    asked = {name: [f"a photo of {captions.NAMES[name]} {captions.where(place)}" for place in PLACES]
             for name in (DOMBRA, ALDAR)}  # fmt: skip
    called = {name: draw(pipeline, prompts) for name, prompts in asked.items()}
    assert share(much_like_aldar, called[DOMBRA]) >= LEAST
    assert share(OBJECT.learnt, called[DOMBRA]) <= MOST
    assert share(lambda facts: facts.is_person, called[ALDAR]) <= MOST
    assert share(much_like_aldar, called[ALDAR]) <= MOST


def test_text_encoders_learn_too(tmp_path: Path, base: Any, taught_pipeline: Any, unseen: list[str]) -> None:
    """On, both encoders answer otherwise and the lesson is learnt all the same; off, they answer as ever."""
    sets = ["adapter.train_text_encoders=true", "training.text_encoder_learning_rates=5e-4"]
    pipeline = opened(teach(tmp_path, CHARACTER, steps=220, sets=sets))
    before, after, still = (_answers(p, unseen[0]) for p in (base, pipeline, taught_pipeline))
    for name, answer in before.items():
        assert torch.equal(still[name], answer), f"{name} changed though it did not train"
        moved = float((after[name] - answer).norm() / answer.norm())
        print(name, moved)
        assert moved > 0.02, f"{name} answers as before"
    assert share(CHARACTER.learnt, draw(pipeline, unseen[:10])) >= LEAST


def _answers(pipeline: Any, prompt: str) -> dict[str, torch.Tensor]:
    """The last hidden states of each text encoder but one."""
    with torch.no_grad():
        hidden = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)[0]
    width = pipeline.text_encoder.config.hidden_size
    return {"text_encoder": hidden[..., :width], "text_encoder_2": hidden[..., width:]}


def _plain() -> Any:
    """The packaged model, opened by someone who only knows diffusers."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(resolve.locate(BASE), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _last(run: Path) -> int:
    return max(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))
