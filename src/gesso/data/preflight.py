"""Everything that a run will do with its images, found out before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gesso.adapters import Embedding
from gesso.config import class_images
from gesso.config.class_images import ClassFolder
from gesso.config.forecast import Counted, live_text
from gesso.config.run import RunConfig
from gesso.core.random import permutation
from gesso.data import new_words, pairs, tokens
from gesso.data.buckets import BucketRow
from gesso.data.index import build
from gesso.data.plan import Plan, Visit
from gesso.data.sources import some
from gesso.data.tokens import Counter


@dataclass(frozen=True)
class Preflight:
    """What was found in the images of a run, and what it will do with them."""

    counted: Counted
    buckets: tuple[BucketRow, ...]
    """Training images of each bucket and the mean share of them that is cropped away."""
    concepts: tuple[tuple[str, int, int], ...]
    """Name, training images and samples an epoch of each concept."""
    notices: tuple[str, ...]
    samples: tuple[Visit, ...]
    """Some of the first epoch's samples, picked at random, as the model will see them."""
    counter: Counter
    """Counts the tokens of captions as this run's model does."""
    pairs: int = 0
    """How many of the images are pairs, a preferred one and its rival."""


def preflight(
    run: RunConfig, *, multiple: int = 8, samples: int = 0, progress: Callable[[int, int], None] | None = None
) -> Preflight:
    """Read and decode every image as the run will, and make its plan; all problems at once as `Problems`.

    `multiple` is what the family needs of every side, `samples` how many samples to show.
    """
    asked, waiting = run, class_images.empty(run)
    run = class_images.without(run, waiting)
    index = build(run.data, progress=progress)
    pairs.require(run, index.rows)
    training = run.training
    plan = Plan.of(run, index.rows, multiple=multiple)
    if run.data.encoding == "cached":
        steps = range(training.total_steps(plan.steps_per_epoch))
        plan.refuse_unrepeated(steps, captions=not live_text(run))  # as the run would, later
    own = len(run.data.sources)
    there = iter(np.bincount(index.rows.numbers("source"), minlength=own)[:own].tolist())
    # With the class images that are yet to be drawn.
    missing = {folder: folder.missing for folder in class_images.folders(asked)}
    drawn = {folder.source: count for folder, count in missing.items()}
    images = tuple((0 if i in waiting else next(there)) + drawn.get(i, 0) for i in range(len(asked.data.sources)))
    held_out = int((index.validation.numbers("source") < own).sum())
    counted = Counted(images, held_out, plan.visits_per_epoch, plan.steps_per_epoch)
    counter, most = tokens.counter_for(run)
    new_words.require(plan, run.tokens)
    words = new_words.notices(plan, run.tokens, counter.count, alone=isinstance(run.adapter, Embedding))
    return Preflight(
        counted,
        tuple(plan.describe()),
        tuple(plan.concepts()),
        (*index.notices, *plan.notices, *words, *_overlong(plan, counter, most), *_to_draw(missing)),
        tuple(_some(plan, samples, run.seed)),
        counter,
        int(index.rows.pairs.sum()),
    )


def _to_draw(missing: Mapping[ClassFolder, int]) -> Iterator[str]:
    for folder, count in missing.items():
        if count:
            how = f"they are drawn from '{folder.prompt}' before training starts"
            yield f"{count} class images are missing in {folder.path}: {how}"


def _overlong(plan: Plan, counter: Counter, most: int) -> Iterator[str]:
    texts = plan.texts()
    long = [(count, row) for count, row in zip(counter.count(list(texts)), texts.values(), strict=True) if count > most]
    if long:
        listed = some(f"{row.place} ({count})" for count, row in long)
        yield f"{len(long)} captions have more than the {most} tokens that are read ({counter.method}): {listed}"


def _some(plan: Plan, count: int, seed: int) -> Iterator[Visit]:
    chosen = permutation(plan.visits_per_epoch, seed, "samples to show")[:count]
    for place in sorted(int(i) for i in chosen):
        step, position = divmod(place, plan.step_size)
        yield plan.window(step)[position]
