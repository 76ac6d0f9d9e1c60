"""What is found in a data set: pictures as a run would see them, and findings about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from gesso.config.run import Captions, Data, Source
from gesso.data.buckets import Fit, Size
from gesso.data.inspection.look import Look
from gesso.data.inspection.wording import Wording
from gesso.data.rows import Split
from gesso.data.sources import Record
from gesso.data.sources.found import Dropped
from gesso.errors import UserError

Severity = Literal["error", "warning", "hint"]
Progress = Callable[[str, int, int], None]
"""What is being done, how many are done, and how many there are."""


class Item(NamedTuple):
    """One file that a finding is about, what is said of it, and its position among the pictures if it is one."""

    name: str
    note: str = ""
    picture: int | None = None


@dataclass(frozen=True)
class Finding:
    """One thing to know. An error would stop a run, a warning would hurt it, a hint is worth a thought."""

    severity: Severity
    rule: str
    what: str
    fix: str
    items: tuple[Item, ...] = ()
    groups: tuple[tuple[Item, ...], ...] = ()
    """Files that belong together, such as duplicates; then `items` is empty."""

    @property
    def files(self) -> list[Item]:
        """Every file it is about."""
        return [*self.items, *(item for group in self.groups for item in group)]


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that can be read, as a run would see it."""

    name: str
    record: Record
    look: Look
    caption: str
    """What is trained on, without anything random."""
    has_caption: bool
    """Whether there is one of its own."""
    tokens: int
    split: Split
    fits: tuple[Fit, ...]
    """One for each resolution; none where the picture is too small for any bucket."""
    too_small: bool
    rejected: Look | None = None
    """What the other picture of a pair is, which was not preferred."""

    @property
    def crop_loss(self) -> float:
        """Share of its area that is cropped away, at the resolution where that is most."""
        return max((fit.crop_loss for fit in self.fits), default=0.0)

    @property
    def enlarged(self) -> float:
        """How many times as wide it is made; 1 or less where it is not enlarged."""
        return max((fit.resized[0] / self.look.width for fit in self.fits), default=1.0)


class Bucket(NamedTuple):
    """One bucket: its size, its training pictures, and the mean share of them that is cropped away."""

    size: Size
    images: int
    crop_loss: float


@dataclass(frozen=True)
class Inspection:
    """What was found in a data set."""

    data: Data
    pictures: tuple[Picture, ...]
    unreadable: tuple[Item, ...]
    left_out: tuple[Item, ...]
    """Pictures that a run would not use, and why."""
    wording: Wording
    most_tokens: int
    """Tokens of a caption that the model reads."""
    buckets: tuple[Bucket, ...]
    findings: tuple[Finding, ...]

    @property
    def pairs(self) -> int:
        """How many pictures are the preferred one of a pair."""
        return sum(picture.rejected is not None for picture in self.pictures)

    def count(self, severity: Severity) -> int:
        """How many findings are that severe."""
        return sum(finding.severity == severity for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """All of it, JSON-ready; sides in pixels, shares from 0 to 1."""
        splits = [picture.split for picture in self.pictures]
        return {
            "ok": not self.count("error"),
            "sources": [source.path for source in self.data.sources],
            "summary": {
                "pictures": len(self.pictures),
                "unreadable": len(self.unreadable),
                "left_out": len(self.left_out),
                "pairs": self.pairs,
                "training": splits.count("train"),
                "validation": splits.count("validation"),
                "errors": self.count("error"),
                "warnings": self.count("warning"),
                "hints": self.count("hint"),
            },
            "findings": [_finding_json(finding) for finding in self.findings],
            "left_out": [{"file": item.name, "why": item.note} for item in self.left_out],
            "captions": self.wording.as_json() | {"most_tokens": self.most_tokens},
            "buckets": [
                {"width": b.size[0], "height": b.size[1], "images": b.images, "crop_loss": round(b.crop_loss, 4)}
                for b in self.buckets
            ],
            "pictures": [_picture_json(picture) for picture in self.pictures],
        }


@dataclass
class Gathered:
    """What one pass over the files gave, before it is judged."""

    data: Data
    sources: list[Source]
    """Those of the run, and the validation folder."""
    pictures: list[Picture] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    unreadable: list[Item] = field(default_factory=list)
    uncaptioned: list[tuple[Source, Item]] = field(default_factory=list)
    left_out: list[Item] = field(default_factory=list)
    malformed: list[Item] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    """Pairs that a run would leave out."""
    step: int = 0

    def options(self, picture: Picture) -> Captions:
        """How the picture's caption is read."""
        return self.sources[picture.record.source].captions or self.data.captions


def _finding_json(finding: Finding) -> dict[str, Any]:
    def listed(items: Sequence[Item]) -> list[dict[str, str]]:
        return [{"file": item.name, "note": item.note} for item in items]

    facts = {"severity": finding.severity, "rule": finding.rule, "what": finding.what, "fix": finding.fix}
    groups = [listed(group) for group in finding.groups]
    return {**facts, "files": listed(finding.items), **({"groups": groups} if groups else {})}


def _picture_json(picture: Picture) -> dict[str, Any]:
    seen, rival = picture.look, picture.record.rejected
    return {
        "file": picture.name,
        **({} if rival is None else {"rejected": str(rival)}),
        "width": seen.width,
        "height": seen.height,
        "format": seen.format,
        "caption": picture.caption,
        "tokens": picture.tokens,
        "concept": picture.record.concept,
        "split": picture.split,
        "sharpness": round(seen.sharpness, 4),
        "buckets": [list(fit.bucket) for fit in picture.fits],
        "crop_loss": round(picture.crop_loss, 4),
        "enlarged": round(picture.enlarged, 3),
    }
