"""How good the micro models are, measured on what they never saw: `gesso micro score`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gesso.core.events import Progress
from gesso.core.runtime import Runtime
from gesso.core.seams import Emit
from gesso.evaluation.sample import open_pipeline
from gesso.metrics import CLIPScore, Identity
from gesso.micro import captions, characters, judge, painter, pretraining, world
from gesso.micro.world import Facts

SEED = 1
"""Of the held-out scenes and the draws; the models were made with 0."""
STEPS, GUIDANCE = 20, 4.0
"""How the model's pictures are drawn."""
_BATCH = 32
_TOLD = ("subject", "colour", "place")

Rates = dict[str, float]


def score(*, model: str = "micro:sdxl", prompts: int = 512, emit: Emit, pictures: Path | None = None) -> dict[str, Any]:
    """All figures of the micro models as a JSON-ready mapping; rates in [0, 1].

    `model` may be another SDXL folder for the painted world. With `pictures`, what was drawn is kept there.
    """
    pipeline = open_model(model)
    wanted = [scene.facts for scene in world.held_out_scenes(SEED, prompts)]
    texts = [captions.caption(facts) for facts in wanted]
    drawn = draw(pipeline, texts, seed=SEED, emit=emit)
    if pictures is not None:
        keep(pictures, drawn, texts)
    shown = judge.read_all(drawn)
    return {
        "model": model,
        "prompts": prompts,
        "drawn": {"steps": STEPS, "guidance": GUIDANCE, "seed": SEED},
        **rates(shown, [captions.parse(text) for text in texts]),
        "by_style": {
            style: rates(*_where(shown, texts, [facts.style == style for facts in wanted])) for style in world.STYLES
        },
        "by_group": {
            name: rates(*_where(shown, texts, [facts.subject in group for facts in wanted]))
            for name, group in (
                ("people", world.PEOPLE),
                ("animals", world.ANIMALS),
                ("objects", world.OBJECTS),
                ("shapes", world.SHAPES),
            )
        },
        "clip_score": float(np.mean(CLIPScore().scores(drawn, texts))),
        "vae_psnr_db": vae_psnr(pipeline.vae),
        "clip": clip_figures(),
        "identity": identity_figures(),
    }


def open_model(model: str) -> Any:
    """A float32 pipeline on the CPU for whatever `gesso sample` takes: a name, a folder, a run, a checkpoint."""
    return open_pipeline(model, runtime=Runtime.for_inference("fp32", "cpu"))[0]


def draw(pipeline: Any, prompts: Sequence[str], *, seed: int, emit: Emit) -> list[Image.Image]:
    """A picture of each prompt, 64 x 64; picture i is of seed + i, and hardly depends on its batch (to rounding)."""
    found: list[Image.Image] = []
    for start in range(0, len(prompts), _BATCH):
        rows = list(prompts[start : start + _BATCH])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(rows))]
        with one_thread():
            found += pipeline(
                rows,
                height=world.SIDE,
                width=world.SIDE,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=generators,
            ).images
        emit(Progress(0, "drawing", len(found), len(prompts)))
    return found


def rates(shown: Sequence[Facts], wanted: Sequence[Facts]) -> Rates:
    """The share of pictures whose subject, colour and place are as asked for, of those that ask for one."""
    verdicts = [dataclasses.asdict(judge.compare(s, w)) for s, w in zip(shown, wanted, strict=True)]
    found: Rates = {}
    for name in _TOLD:
        asked = [verdict[name] for verdict in verdicts if verdict[name] is not None]
        if asked:
            found[name] = sum(asked) / len(asked)
    return found


def keep(folder: Path, drawn: Sequence[Image.Image], texts: Sequence[str]) -> None:
    """Write pictures and their prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(drawn):
        picture.save(folder / f"{i:04d}.png")
    (folder / "prompts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


@torch.no_grad()
def vae_psnr(vae: Any, *, count: int = 256) -> float:
    """Mean peak signal-to-noise ratio of reconstructed held-out pictures, dB."""
    scenes = world.held_out_scenes(SEED, count)
    found = []
    for rows in pretraining.pixels([painter.paint(scene) for scene in scenes]).split(_BATCH):
        original = pretraining.scaled(rows)
        again = vae.decode(vae.encode(original).latent_dist.mean).sample.clamp(-1, 1)
        found.append(-10 * ((again - original) / 2).square().mean((1, 2, 3)).log10())
    return float(torch.cat(found).mean())


def clip_figures(*, count: int = 256) -> Rates:
    """The micro CLIP on held-out pictures: how often the right caption of all is the nearest, and its scores."""
    metric = CLIPScore()
    scenes = world.held_out_scenes(SEED, count)
    texts = [captions.caption(scene.facts) for scene in scenes]
    painted = [painter.paint(scene) for scene in scenes]
    cosines = metric.cosines(painted, texts)
    return {
        "retrieval_top1": float((cosines.argmax(1) == torch.arange(count)).float().mean()),
        "score_of_own_caption": 100 * float(cosines.diagonal().mean()),
        "score_of_another_caption": 100 * float((cosines.sum() - cosines.trace()) / (count * (count - 1))),
    }


def identity_figures(*, people: int = 64, each: int = 4) -> Rates:
    """How the identity encoder does on characters it never saw, in other places, poses and moods."""
    scenes = characters.scenes(SEED + 1000, people, each=each)
    embeddings = Identity().embeddings([painter.paint(scene) for _, scene in scenes])
    cosines = embeddings @ embeddings.T
    who = torch.tensor([int(name.split()[1]) for name, _ in scenes])
    alike, itself = who[:, None] == who[None], torch.eye(len(who), dtype=torch.bool)
    own, other = cosines[alike & ~itself], cosines[~alike]
    nearest = cosines.masked_fill(itself, -2).argmax(1)
    # The share of (same, different) pairs in the right order is the area under the ROC curve.
    below = torch.searchsorted(other.sort().values, own).double().mean() / len(other)
    return {
        "nearest_is_the_same": float((who[nearest] == who).float().mean()),
        "auc": float(below),
        "similarity_same": float(own.mean()),
        "similarity_different": float(other.mean()),
    }


def table(figures: Mapping[str, Any]) -> list[str]:
    """The figures as lines for people."""
    rows = [("all", figures), *figures["by_group"].items(), *figures["by_style"].items()]
    lines = [f"{figures['prompts']} held-out prompts, right by the judge", f"{'':10}subject  colour   place"]
    lines += [f"{name:10}" + "".join(_percent(row.get(key)) for key in _TOLD) for name, row in rows]
    clip, identity = figures["clip"], figures["identity"]
    return [
        *lines,
        f"CLIP score of the drawn pictures  {figures['clip_score']:.1f}",
        f"VAE, held-out pictures            {figures['vae_psnr_db']:.1f} dB",
        f"CLIP: own caption nearest of 256  {100 * clip['retrieval_top1']:.1f} %",
        f"identity: nearest is the same     {100 * identity['nearest_is_the_same']:.1f} % (AUC {identity['auc']:.3f})",
    ]


def _percent(share: float | None) -> str:
    return f"{'-':>8}" if share is None else f"{100 * share:6.1f} %"


def _where(shown: Sequence[Facts], texts: Sequence[str], chosen: Sequence[bool]) -> tuple[list[Facts], list[Facts]]:
    rows = [i for i, one in enumerate(chosen) if one]
    return [shown[i] for i in rows], [captions.parse(texts[i]) for i in rows]


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch does not split its operations: fastest for networks this small, and the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
