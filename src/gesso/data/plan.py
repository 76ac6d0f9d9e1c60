"""The plan: which picture is seen when, how it is cropped and what its caption says. Pure numbers, no torch.

The order depends only on the samples per optimiser step, never on how these are split into batches, accumulation and
processes; every number is keyed by (seed, epoch, sample), so position is one integer. A million rows cost some tens of
bytes each beside their table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gesso.config import class_images
from gesso.data import captions, settings
from gesso.data.buckets import BucketRow, Fit, Size
from gesso.data.order import Order, codes
from gesso.data.pairs import sides
from gesso.data.places import Place
from gesso.data.rows import Role, Row, Rows
from gesso.data.shares import repeats_of
from gesso.data.visits import Samples, Viewer, Visit, samples_of
from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.config.run import Data, RunConfig, Source

__all__ = ["Plan", "Visit"]

MOST_UNREPEATED = 20_000
"""Encodings that a run may need for visits that never come back (random crops or words without `data.variants`)."""


class Plan:
    """Which samples each optimiser step sees, as a pure function of (seed, step).

    Every visit (picture x resolution x repeat) comes exactly once an epoch and none is dropped. A step takes a window
    of G = batch_size * accumulation * world_size visits; only the last window of an epoch may be shorter. Within a
    bucket visits are shuffled and cut into windows; the rest of all buckets share mixed windows.

    All this is about the instance pictures, and stays as it is when there are prior samples: each step then has as many
    of these on top. They come from the pictures with `role: prior`, of all sources together, pass after pass without
    end, each once (or as often as its repeats say) a pass; or with `class_prompts` they are the step's own pictures
    under the prompt of their source.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        data: Data,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        seed: int = 0,
        multiple: int = 8,
        class_prompts: Sequence[str] = (),
    ) -> None:
        """`class_prompts` are those of each source where the model itself is the prior, else none."""
        self.seed, self.batch_size, self.world_size = seed, batch_size, world_size
        self.step_size = batch_size * accumulation * world_size
        self._data, self._class_prompts = data, class_prompts
        ordered = Rows.of(rows).sorted()
        self._train, self._held = ordered.where(split="train"), ordered.where(split="validation")
        # Validation pictures follow the first source of instances where they have a folder of their own.
        self._sources = [*data.sources, settings.leading(data)]
        self._samples = samples_of(self._train, self._sources, data, multiple=multiple)
        self._held_samples = samples_of(self._held, self._sources, data, multiple=multiple)
        self._viewer = self._viewer_of(self._train, self._samples)
        self._order, self._prior = self._order_of("instance"), self._order_of("prior")
        if not len(self._order):
            raise UserError("there is no picture to train on", where="data.sources", fix="add pictures")
        if len(self._order) < self.step_size:
            raise UserError(
                f"an epoch has {len(self._order)} samples ({len(self._train)} pictures x repeats), but one step "
                f"takes {self.step_size} = batch_size {batch_size} x accumulation {accumulation} x "
                f"{world_size} process(es)",
                where="data.sources",
                fix="lower training.batch_size or training.accumulation, or raise repeats",
            )

    @classmethod
    def of(cls, run: RunConfig, rows: Iterable[Row], *, multiple: int = 8) -> Plan:
        """The plan of a run; `multiple` is what the family needs of every side, in pixels."""
        return cls(
            rows,
            data=run.data,
            batch_size=run.training.batch_size,
            accumulation=run.training.accumulation,
            seed=run.seed,
            multiple=multiple,
            class_prompts=class_images.prompts(run),
        )

    @property
    def visits_per_epoch(self) -> int:
        """Samples in one epoch, without prior samples."""
        return len(self._order)

    @property
    def has_prior(self) -> bool:
        """Whether each step has prior samples."""
        return bool(len(self._prior)) or bool(self._class_prompts)

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one epoch: ceil(visits / samples per step)."""
        return -(-len(self._order) // self.step_size)

    @property
    def validation(self) -> list[Visit]:
        """One unvarying visit of each held-out picture and resolution: cropped in the middle, captioned."""
        return list(self._viewer_of(self._held, self._held_samples).fixed())

    def texts(self) -> dict[str, Row]:
        """Every caption without what is random, and the first row that has it."""
        found: dict[str, Row] = {}
        for rows in (self._train, self._held):
            seen: set[tuple[str, int]] = set()
            for i, pair in enumerate(self._pairs(rows)):
                if pair not in seen:
                    seen.add(pair)
                    row = rows[i]
                    found.setdefault(self._viewer.caption(row.caption, row.source), row)
        for prompt in self._prompts():
            found.setdefault(prompt, replace(self._train[0], role="prior"))
        return found

    def captions(self, steps: range) -> list[str]:
        """Every caption that a visit in these steps or a held-out picture can have, sorted.

        Where words are random without `data.variants`, more than `MOST_UNREPEATED` captions are a `UserError`.
        """
        dropped = any(settings.words(source, self._data).dropout for source in self._sources)
        wordy, unrepeated = self._wordy(), 0
        found = {visit.caption for visit in self.validation} | ({""} if dropped else set())
        found |= self._prompts()
        found |= {self._viewer.caption(text, source) for text, source in set(self._pairs(self._train)) - wordy}
        for visit in self._visits(steps) if wordy else ():
            varies = not self._data.variants and (visit.row.caption, visit.row.source) in wordy
            unrepeated += varies and visit.caption not in found
            found.add(visit.caption)
            self._refuse_more(unrepeated, steps, "captions", "captions.shuffle, tag_dropout, wildcards or lines")
        return sorted(found)

    def window_size(self, step: int) -> int:
        """Samples in optimiser step `step`, prior samples included."""
        return self._instances(step) * (2 if self.has_prior else 1)

    def window(self, step: int) -> list[Visit]:
        """The samples of optimiser step `step` (0-based), the prior samples last."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start, count = epoch * len(self._order) + position * self.step_size, self._instances(step)
        visits = [self._viewer.visit(*turn) for turn in self._order.stretch(start, count)]
        if self._class_prompts:
            return visits + [visit.under(self._class_prompts[visit.row.source]) for visit in visits]
        # As many as there are instances, of which as many came before.
        return visits + [self._viewer.visit(*turn) for turn in self._prior.stretch(start, count)]

    def share(self, window: Sequence[Visit], rank: int) -> list[Visit]:
        """The part of a window that one of `world_size` processes takes; the parts differ by at most one sample."""
        return list(window[len(window) * rank // self.world_size : len(window) * (rank + 1) // self.world_size])

    def microbatches(self, window: Sequence[Visit]) -> list[list[Visit]]:
        """A window as batches of one shape and one role and at most `batch_size` samples."""
        groups: dict[tuple[Role, int, Size], list[Visit]] = {}
        for visit in window:
            groups.setdefault((visit.role, visit.epoch, visit.fit.bucket), []).append(visit)
        size = self.batch_size
        return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]

    def renditions(self, steps: range) -> list[Visit]:
        """One visit for each distinct version of a picture in these steps, the held-out ones included.

        These are what a cache must hold. Where pictures vary without `data.variants`, nearly every visit is a new
        version: more than `MOST_UNREPEATED` are a `UserError`, because the disk would fill silently.
        """
        varies = [self._random(source) and not self._data.variants for source in self._sources]
        most, seen, unrepeated = int(self._versions().sum()), set(), 0
        found: dict[tuple[str, str, Fit], Visit] = {}
        for visit in self._visits(steps):
            for side in sides(visit):
                key = (side.row.image, side.row.mask_hash, side.fit)
                unrepeated += varies[side.row.source] and key not in found
                found.setdefault(key, side)
            self._refuse_more(unrepeated, steps, "images", "data.crop, rotation or colour")
            seen.add((visit.row.id, visit.fit))
            # Random crops can coincide, and then this is never reached, which only costs time.
            if not any(varies) and len(seen) == most:
                break
        for side in itertools.chain.from_iterable(map(sides, self.validation)):
            found.setdefault((side.row.image, side.row.mask_hash, side.fit), side)
        return list(found.values())

    def refuse_unrepeated(self, steps: range, *, captions: bool) -> None:
        """Raise what `renditions`, and if they count `captions`, would raise for these steps."""
        if self._data.variants:
            return
        if any(self._random(source) for source in self._sources):
            self.renditions(steps)
        if captions:
            self.captions(steps)

    def describe(self) -> list[BucketRow]:
        """Training pictures and mean crop loss of each bucket, the fullest bucket first."""
        numbers, sizes = codes(self._samples.buckets)
        counts = np.bincount(numbers, minlength=len(sizes))
        losses = np.bincount(numbers, weights=self._samples.crop_loss, minlength=len(sizes))
        rows = [
            BucketRow(size, int(count), float(loss / count))
            for size, count, loss in zip(sizes, counts, losses, strict=True)
        ]
        return sorted(rows, key=lambda row: (-row.images, row.bucket))

    def concepts(self) -> list[tuple[str, int, int]]:
        """Name, training pictures and samples of the first epoch of each concept, by name."""
        concepts, names = self._train.words("concept")
        pictures = np.bincount(concepts, minlength=len(names))
        turns = [turn for order in (self._order, self._prior) for turn in order.stretch(0, len(self._order))]
        rows = self._samples.rows[[sample for _, sample, _ in turns]]
        samples = np.bincount(concepts[rows], minlength=len(names))
        return sorted((n, int(p), int(s)) for n, p, s in zip(names, pictures, samples, strict=True) if p)

    @property
    def notices(self) -> list[str]:
        """Pictures that are much enlarged or much cropped, in words."""
        notices = []
        kinds: list[tuple[str, Callable[[Rows, Samples], NDArray[np.bool_]]]] = [
            ("enlarged more than 1.5 times (blurred)", lambda r, s: s.resized[:, 0] > 1.5 * r.numbers("width")[s.rows]),
            ("more than 30 % cropped away", lambda _, s: s.crop_loss > 0.3),
        ]
        for what, test in kinds:
            names = []
            for rows, samples in ((self._train, self._samples), (self._held, self._held_samples)):
                names += [(rows, int(i)) for i in dict.fromkeys(samples.rows[test(rows, samples)].tolist())]
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                notices.append(f"{what}: {', '.join(_named(rows[i].place) for rows, i in names[:_NAMED])}{more}")
        return notices

    def _viewer_of(self, rows: Rows, samples: Samples) -> Viewer:
        return Viewer(rows, samples, sources=self._sources, data=self._data, seed=self.seed)

    def _order_of(self, role: Role) -> Order:
        """The order of the training samples with this role, whatever others there are."""
        roles, words = self._train.words("role")
        wanted = np.array([word == role for word in words], bool)[roles[self._samples.rows]]
        members = np.flatnonzero(wanted).astype(np.int32)
        return Order(
            members,
            repeats=repeats_of(self._train, self._samples.rows[members], self._data, role=role, seed=self.seed),
            buckets=self._samples.buckets[members],
            step_size=self.step_size,
            seed=self.seed,
            stream="" if role == "instance" else f"{role} ",
        )

    def _prompts(self) -> set[str]:
        """The class prompts of the sources that are trained on."""
        sources = np.unique(self._train.numbers("source")).tolist() if self._class_prompts else []
        return {self._class_prompts[i] for i in sources}

    def _instances(self, step: int) -> int:
        """Instance samples of a step."""
        return min(self.step_size, len(self._order) - step % self.steps_per_epoch * self.step_size)

    def _visits(self, steps: range) -> Iterator[Visit]:
        return (visit for step in steps for visit in self.window(step))

    def _random(self, source: Source) -> bool:
        """Whether the pictures of a source are seen in ever new versions."""
        data = self._data
        return settings.crop(source, data) == "random" or bool(data.rotation or data.colour)

    def _versions(self) -> NDArray[np.int64]:
        """How many versions there are of each sample, where pictures have `data.variants` or do not vary."""
        data = self._data
        each = [
            (max(data.variants, 1) if self._random(source) else 1) * (1 + settings.flips(source, data))
            for source in self._sources
        ]
        return np.array(each)[self._train.numbers("source")[self._samples.rows]]

    def _wordy(self) -> set[tuple[str, int]]:
        """The captions, with their sources, that are rendered in ever new words."""
        found = set()
        for text, source in set(self._pairs(self._train)):
            own = self._sources[source]
            options = settings.words(own, self._data).model_copy(update={"dropout": 0.0})
            if captions.varies(text, options, trigger=own.trigger):
                found.add((text, source))
        return found

    def _pairs(self, rows: Rows) -> Iterator[tuple[str, int]]:
        return zip(rows.table.column("caption").to_pylist(), rows.numbers("source").tolist(), strict=True)

    def _refuse_more(self, count: int, steps: range, what: str, key: str) -> None:
        if count > MOST_UNREPEATED:
            raise UserError(
                f"random {what} need a cached encoding for nearly every visit, and this run has over "
                f"{MOST_UNREPEATED} ({len(steps)} steps x {self.step_size} samples)",
                where=key,
                fix="set data.variants to the number of versions to keep of each, such as 8",
            )


_NAMED = 5


def _named(place: Place) -> str:
    """A file's name; of a member or a row, where it is."""
    return place.name if place.kind == "file" else str(place)
