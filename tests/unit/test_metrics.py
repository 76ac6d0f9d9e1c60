"""CLIP score and identity similarity with the models in the package."""

from __future__ import annotations

import pytest
import torch

from gesso.metrics import CLIPScore, Identity
from gesso.micro import captions, characters, painter, world


@pytest.fixture(scope="module")
def scenes() -> list[world.Scene]:
    return [scene for scene in world.held_out_scenes(5, 40) if scene.facts.style != "mosaic"][:32]


def test_a_picture_scores_higher_with_its_own_caption_than_with_others(scenes: list[world.Scene]) -> None:
    metric = CLIPScore()
    pictures = [painter.paint(scene) for scene in scenes]
    texts = [captions.caption(scene.facts) for scene in scenes]
    own = metric.scores(pictures, texts)
    other = metric.scores(pictures, [*texts[1:], texts[0]])
    assert sum(a > b for a, b in zip(own, other, strict=True)) >= 30
    assert sum(own) / len(own) > sum(other) / len(other) + 20
    assert all(0 <= score <= 100 for score in (*own, *other))


def test_the_score_is_the_cosine_of_transformers_own_embeddings(scenes: list[world.Scene]) -> None:
    metric = CLIPScore()
    pictures = [painter.paint(scene) for scene in scenes[:3]]
    texts = [captions.caption(scene.facts) for scene in scenes[:3]]
    network, prepare, tokenizer = metric._loaded
    with torch.no_grad():
        output = network(
            **tokenizer(texts, padding=True, return_tensors="pt"), **prepare(images=pictures, return_tensors="pt")
        )
    expected = output.logits_per_image / network.logit_scale.exp()
    torch.testing.assert_close(metric.cosines(pictures, texts), expected, atol=1e-5, rtol=0)


def test_a_score_does_not_depend_on_its_batch(scenes: list[world.Scene]) -> None:
    pictures = [painter.paint(scene) for scene in scenes[:4]]
    texts = [captions.caption(scene.facts) for scene in scenes[:4]]
    together, alone = CLIPScore().scores(pictures, texts), CLIPScore().scores(pictures[2:3], texts[2:3])
    assert alone[0] == pytest.approx(together[2], abs=1e-3)


def test_the_same_character_is_more_alike_than_another() -> None:
    named = characters.scenes(77, 12, each=3)
    pictures = {name: [painter.paint(s) for n, s in named if n == name] for name, _ in named}
    metric = Identity()
    for name, own in pictures.items():
        stranger = next(shown for other, shown in pictures.items() if other != name)
        same, different = metric.scores(own[:1], own[1:])[0], metric.scores(stranger[:1], own[1:])[0]
        assert same > different + 0.1, name
    norms = metric.embeddings(pictures["character 0"]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(3))
