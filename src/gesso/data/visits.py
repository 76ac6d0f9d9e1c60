"""One look at one picture: at which size, how it is cropped and what its caption says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gesso.core.batch import Geometry
from gesso.core.random import SampleKey, generator
from gesso.data import captions, settings
from gesso.data.buckets import Fit, Fits, fit_all, sizes_for, too_small
from gesso.data.captions import Draws
from gesso.data.rows import Role, Row, Rows
from gesso.errors import Problems, UserError

if TYPE_CHECKING:
    from gesso.config.run import Data, Source


@dataclass(frozen=True)
class Visit:
    """One look at one picture: which repeat in which epoch, how it is cropped, and what its caption says."""

    row: Row
    id: str
    """The row's id, with the resolution where the picture is seen at several."""
    epoch: int
    """Of a prior sample: how often all of them have come before."""
    repeat: int
    fit: Fit
    caption: str
    role: Role = "instance"

    @property
    def key(self) -> SampleKey:
        """The name under which this visit's random numbers are drawn."""
        return SampleKey(self.id, self.repeat)

    @property
    def geometry(self) -> Geometry:
        """The SDXL size and crop conditioning."""
        return self.fit.geometry(self.row.width, self.row.height)

    def under(self, caption: str) -> Visit:
        """The same look at the same picture as a prior sample with this caption, and with draws of its own."""
        return replace(self, id=f"{self.id}/prior", caption=caption, role="prior")


class Samples(NamedTuple):
    """Pictures at one resolution each, in columns: row, resolution, bucket and resized size."""

    rows: NDArray[np.int32]
    resolutions: NDArray[np.int32]
    buckets: NDArray[np.int32]
    resized: NDArray[np.int32]

    def fit(self, sample: int) -> Fit:
        """How one of them lies in its bucket, cropped in the middle."""
        return Fits(self.buckets, self.resized).one(sample)

    @property
    def crop_loss(self) -> NDArray[np.float64]:
        """The share of each that is cropped away."""
        areas = self.resized.astype(np.int64).prod(1)
        return 1 - self.buckets.astype(np.int64).prod(1) / areas


def samples_of(rows: Rows, sources: Sequence[Source], data: Data, *, multiple: int) -> Samples:
    """Every row at every resolution of its source; pictures that are too small are raised together as `Problems`."""
    of, widths, heights = (rows.numbers(name) for name in ("source", "width", "height"))
    parts = []
    for i, source in enumerate(sources):
        members = np.flatnonzero(of == i).astype(np.int32)
        for side in settings.resolutions(source, data):
            sizes, step = sizes_for(data, resolution=side, multiple=multiple)
            fits = fit_all(widths[members], heights[members], sizes=sizes, step=step, upscale=data.buckets.upscale)
            if small := [rows[int(members[j])] for j in np.flatnonzero(~fits.buckets.all(1))]:
                errors = [(row, too_small(row.width, row.height, step)) for row in small]
                raise Problems([UserError(e.what, where=str(row.place), fix=e.fix) for row, e in errors])
            parts.append(Samples(members, np.full(len(members), side, np.int32), *fits))
    joined = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    order = np.lexsort((joined[1], joined[0]))
    return Samples(*(column[order] for column in joined))


class Viewer:
    """Turns a sample and its turn into a visit; everything random is drawn by seed, epoch, sample and repeat.

    `sources` are those of the rows, one for each number in their column `source`.
    """

    def __init__(self, rows: Rows, samples: Samples, *, sources: Sequence[Source], data: Data, seed: int) -> None:
        self._rows, self._samples, self._sources, self._data, self._seed = rows, samples, sources, data, seed
        self._several = [len(settings.resolutions(source, data)) > 1 for source in sources]

    def fixed(self) -> Iterator[Visit]:
        """One unvarying visit of each sample: cropped in the middle, its caption as written."""
        for sample, number in enumerate(self._samples.rows.tolist()):
            row = self._rows[number]
            fit = self._samples.fit(sample)
            yield Visit(row, self._name(row, sample), 0, 0, fit, self.caption(row.caption, row.source), row.role)

    def visit(self, epoch: int, sample: int, repeat: int) -> Visit:
        """The given repeat of a sample in an epoch."""
        row = self._rows[int(self._samples.rows[sample])]
        id_ = self._name(row, sample)
        fit, data, source = self._samples.fit(sample), self._data, self._sources[row.source]

        def drawn(domain: str) -> np.random.Generator:
            return generator(self._seed, domain, epoch, id_, repeat)

        varied = drawn
        if data.variants:
            variant = int(drawn("variant").integers(data.variants))

            def varied(domain: str) -> np.random.Generator:
                return generator(self._seed, domain, "variant", variant, id_)

        if settings.crop(source, data) == "random":
            slack = [fit.resized[0] - fit.bucket[0] + 1, fit.resized[1] - fit.bucket[1] + 1]
            left, top = varied("crop").integers(0, slack)
            fit = replace(fit, crop=(int(left), int(top)))
        if data.rotation:
            fit = replace(fit, angle=float(varied("rotation").uniform(-data.rotation, data.rotation)))
        if data.colour:
            light, contrast, saturation = varied("colour").uniform(1 - data.colour, 1 + data.colour, 3).tolist()
            fit = replace(fit, colour=(light, contrast, saturation))
        if settings.flips(source, data) and drawn("flip").random() < 0.5:
            fit = replace(fit, flip=True)

        def words(domain: str) -> np.random.Generator:
            # An empty caption is no version of a caption: it comes at its own rate.
            return drawn(domain) if domain == "caption dropout" else varied(domain)

        return Visit(row, id_, epoch, repeat, fit, self.caption(row.caption, row.source, words), row.role)

    def caption(self, text: str, source: int, draws: Draws | None = None) -> str:
        """A caption as it is trained on; without `draws`, what is random in it is left out."""
        own = self._sources[source]
        return captions.render(text, settings.words(own, self._data), trigger=own.trigger, draws=draws)

    def _name(self, row: Row, sample: int) -> str:
        return f"{row.id}@{self._samples.resolutions[sample]}" if self._several[row.source] else row.id
