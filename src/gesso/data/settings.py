"""What holds for a source: its own setting, or that of the whole run."""

from __future__ import annotations

from gesso.config.run import Captions, Data, Source


def leading(data: Data) -> Source:
    """The source that pictures without one of their own follow: the first of instances."""
    return next((source for source in data.sources if source.role == "instance"), data.sources[0])


def resolutions(source: Source, data: Data) -> tuple[int, ...]:
    """The sides of the squares whose areas its buckets have."""
    sides = source.resolution or data.resolution
    return sides if isinstance(sides, tuple) else (sides,)


def crop(source: Source, data: Data) -> str:
    """Where its pictures are cropped."""
    return source.crop or data.crop


def flips(source: Source, data: Data) -> bool:
    """Whether its pictures are mirrored."""
    return data.flip if source.flip is None else source.flip


def words(source: Source, data: Data) -> Captions:
    """How its captions are varied."""
    return source.captions or data.captions
