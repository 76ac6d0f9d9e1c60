"""The recipe of the base model, in miniature, and its optimiser."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from gesso.core.events import Event, Progress
from gesso.micro import recipe, world
from gesso.micro.halves import two_threads
from gesso.micro.muon import Optimizer, orthogonal
from gesso.micro.recipe import BASE, Recipe, base_model

SMALL = Recipe(
    size=replace(BASE, unet_channels=(8, 16), unet_heads=(1, 2), vae_channels=(4, 8, 8), text_widths=(8, 8)),
    pictures=12,
    vae_steps=4,
    vae_batch=2,
    steps=2,
    batch=4,
)


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    told: list[Event] = []
    return base_model(tmp_path_factory.mktemp("recipe") / "base", emit=told.append, recipe=SMALL), told


def test_the_same_recipe_gives_the_same_weights(built: tuple[Path, list[Event]], tmp_path: Path) -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = base_model(tmp_path / "base", emit=lambda event: None, recipe=SMALL)
    assert weights(again) == weights(built[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_progress_is_told_to_the_end(built: tuple[Path, list[Event]]) -> None:
    told = [event for event in built[1] if isinstance(event, Progress)]
    assert [(e.task, e.done, e.total) for e in told] == [
        ("training the VAE", 4, 4),
        ("training the base model", 2, 2),
    ]


def test_a_finished_model_is_used_again_until_the_recipe_changes(tmp_path: Path) -> None:
    folder, told = tmp_path / "base", list[Event]()
    base_model(folder, emit=told.append, recipe=SMALL)
    first, count = weights(folder), len(told)
    (folder / "unet" / "note").touch()
    base_model(folder, emit=told.append, recipe=SMALL)
    assert len(told) == count
    assert (folder / "unet" / "note").exists()
    base_model(folder, emit=told.append, recipe=replace(SMALL, steps=3))
    assert len(told) > count
    assert weights(folder) != first
    assert not (folder / "unet" / "note").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_build_that_was_cut_off_is_not_taken_for_a_model(tmp_path: Path) -> None:
    def cut_off(event: Event) -> None:
        if isinstance(event, Progress) and event.task == "training the base model":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base_model(tmp_path / "base", emit=cut_off, recipe=SMALL)
    assert not (tmp_path / "base").exists()


def test_each_setting_changes_the_fingerprint() -> None:
    changed = {"seed": 1, "pictures": 13, "vae_steps": 5, "vae_batch": 4, "vae_rate": 1e-3, "steps": 3, "batch": 8}
    changed |= {"rate": 1e-3, "unconditional": 0.2, "size": BASE}
    assert set(changed) == set(vars(SMALL))
    prints = {replace(SMALL, **{key: value}).fingerprint for key, value in changed.items()}
    assert len(prints | {SMALL.fingerprint}) == len(changed) + 1


def test_training_reaches_every_weight_that_matters(built: tuple[Path, list[Event]], tmp_path: Path) -> None:
    """Against a recipe without rates: the four networks all move, and latents come out with unit deviation."""
    still = base_model(tmp_path / "still", emit=lambda event: None, recipe=replace(SMALL, rate=0.0, vae_rate=0.0))
    moved = {name for name, content in weights(built[0]).items() if weights(still)[name] != content}
    assert {Path(name).parts[0] for name in moved} == {"unet", "vae", "text_encoder", "text_encoder_2"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(built[0])
    pictures = recipe.pixels([world.paint(scene) for scene, _ in world.scenes(SMALL.seed, SMALL.pictures)])
    latents = pipeline.vae.encode(pictures / 127.5 - 1).latent_dist.mean * pipeline.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    assert latents.shape == (12, 4, 12, 12)
    assert json.loads((built[0] / "recipe.json").read_text())["fingerprint"] == SMALL.fingerprint


def test_the_recipe_conditions_as_the_pipeline_does(built: tuple[Path, list[Event]]) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(built[0])
    caption = "a man in a green robe in the steppe"
    expected, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
    parts = recipe.Networks(pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    with torch.no_grad():
        ours, ours_pooled = recipe.embed(parts, recipe.tokenize([caption]))
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(ours_pooled, pooled)


@pytest.mark.parametrize("shape", [(6, 6), (4, 30), (30, 4)])
def test_orthogonal_updates_have_even_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.max() < 1.3
    assert torch.linalg.svdvals(orthogonal(matrix, iterations=10)).min() > 0.6
    same_spaces = orthogonal(matrix, iterations=10) @ matrix.T
    assert torch.linalg.eigvals(same_spaces).real.min() > -1e-3


def test_the_optimizer_fits_and_averages() -> None:
    generator = torch.Generator().manual_seed(0)
    goal, inputs = torch.randn(4, 6, generator=generator), torch.randn(64, 6, generator=generator)
    weight, bias = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.ones(4))
    optimizer = Optimizer([weight], [bias], rate=0.02, steps=200)
    losses = []
    for _ in range(200):
        loss = (inputs @ (weight - goal).T + bias).square().mean()
        losses.append(loss.item())
        optimizer.step(torch.autograd.grad(loss, optimizer.parameters))
    last = weight.detach().clone()
    optimizer.finish()
    assert losses[-1] < 0.01 * losses[0]
    assert not torch.equal(weight, last)
    torch.testing.assert_close(weight, goal, atol=0.1, rtol=0)


def test_halves_give_the_gradients_of_the_whole_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(7, 5, generator=generator)
    used, unused = nn.Parameter(torch.randn(5, generator=generator)), nn.Parameter(torch.ones(2))

    def loss_of(rows: slice) -> torch.Tensor:
        return (inputs[rows] @ used).square().mean()

    with two_threads() as halves:
        found = halves.gradients(loss_of, rows=7, parameters=[used, unused])
        mapped = halves.mapped(lambda rows: rows * 2, inputs)
    torch.testing.assert_close(found[0], torch.autograd.grad(loss_of(slice(0, 7)), used)[0])
    assert torch.equal(found[1], torch.zeros(2))
    assert torch.equal(mapped, inputs * 2)


def test_an_error_in_a_half_comes_out_and_the_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(ZeroDivisionError), two_threads() as halves:
            assert torch.get_num_threads() == 1
            halves.mapped(lambda rows: rows / (1 // 0), torch.ones(4))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_number_of_cores_does_not_change_the_weights(built: tuple[Path, list[Event]], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3 if before == 1 else 1)
    try:
        again = base_model(tmp_path / "base", emit=lambda event: None, recipe=SMALL)
    finally:
        torch.set_num_threads(before)
    assert weights(again) == weights(built[0])
