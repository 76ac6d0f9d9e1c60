"""Captions written by a model: the plug-ins, and the run over a folder that resumes and never overwrites unasked."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from gesso.data.editing.collection import Item, Library
from gesso.data.editing.journal import Journal, Transaction
from gesso.data.images import decode
from gesso.errors import ResourceError, UserError

PLUGINS = ("blip", "florence", "wd", "openai")
"""The names for `load`; besides these, MODULE:FUNCTION."""

_FLUSH = 100


@dataclass(frozen=True)
class Settings:
    """What a plug-in may be told; each takes what it needs."""

    model: str | None = None
    """A local folder or a hub id. Empty: the plug-in's own."""
    prompt: str | None = None
    """blip: how the caption begins; florence: the task, such as <DETAILED_CAPTION>; openai: the request."""
    device: str | None = None
    batch_size: int = 8
    """Pictures at a time; for openai, requests at a time."""
    max_tokens: int = 256
    threshold: float = 0.35
    """wd: the least score of a general tag."""
    character_threshold: float = 0.85
    endpoint: str = "https://api.openai.com/v1"
    key_env: str | None = None
    """Environment variable with the key. Empty: OPENAI_API_KEY, if it is set."""
    timeout: float = 120.0
    """Seconds for one answer."""
    retries: int = 5
    backoff: float = 1.0
    """Seconds before the first retry; each waits twice as long as the one before."""


class Captioner(Protocol):
    """Anything that describes pictures."""

    def caption(self, pictures: Sequence[Image.Image]) -> list[str | UserError]:
        """A caption, or what was wrong, for each RGB picture; `ResourceError` is raised where going on is no use."""


@dataclass
class Report:
    """What a run over a folder did."""

    written: int = 0
    skipped: int = 0
    failed: list[UserError] = field(default_factory=list)


def load(name: str, settings: Settings) -> Captioner:
    """The plug-in of that name, ready to work. Raises `UserError` for an unknown one or a model that is not there."""
    if name in ("blip", "florence"):
        from gesso.data.captioning.vision import Vision

        return Vision(name, settings)
    if name == "wd":
        from gesso.data.captioning.tagger import Tagger

        return Tagger(settings)
    if name == "openai":
        from gesso.data.captioning.openai import Endpoint

        return Endpoint(settings)
    if ":" in name:
        return _Own(name)
    raise UserError(
        f"there is no captioner '{name}'", where="--with", fix=f"use {', '.join(PLUGINS)} or MODULE:FUNCTION"
    )


@dataclass(frozen=True)
class Wanted:
    """How captions are put down."""

    mode: str = "missing"
    """missing: pictures without a caption; overwrite: all; append: all, behind what is there."""
    prefix: str = ""
    suffix: str = ""
    separator: str = ", "
    """Between what is there and what is appended."""


def pending(library: Library, wanted: Wanted, *, command: str) -> list[Item]:
    """The pictures still to do: a command that was cut short does not repeat what it has done."""
    if wanted.mode == "missing":
        return [item for item in library.items if item.caption is None]
    done = _done_before(library.folder, command)
    return [item for item in library.items if item.side is None or item.side not in done]


def run(
    library: Library,
    captioner: Captioner,
    items: Sequence[Item],
    *,
    wanted: Wanted,
    batch_size: int,
    command: str,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Caption the items and write each caption as soon as it is there; what fails is named in the report."""
    report = Report(skipped=len(library.items) - len(items))
    with Journal(library.folder).begin(command) as edit:
        try:
            for start in range(0, len(items), batch_size):
                batch = items[start : start + batch_size]
                _caption(library, captioner, batch, edit, wanted, report)
                if (start // batch_size + 1) * batch_size % _FLUSH < batch_size:
                    library.flush(edit)
                if progress is not None:
                    progress(start + len(batch), len(items))
        finally:
            library.flush(edit)
    return report


def _caption(
    library: Library, captioner: Captioner, batch: Sequence[Item], edit: Transaction, wanted: Wanted, report: Report
) -> None:
    pictures, shown = [], []
    for item in batch:
        try:
            pictures.append(decode(item.picture))
            shown.append(item)
        except UserError as error:
            report.failed.append(error)
    answers = captioner.caption(pictures) if pictures else []
    for item, answer in zip(shown, answers, strict=True):
        try:
            if isinstance(answer, UserError):
                raise answer
            library.write(edit, item, _text(answer, item, wanted))
            report.written += 1
        except ResourceError:
            raise
        except UserError as error:
            report.failed.append(UserError(error.what, where=error.where or str(item.picture), fix=error.fix))


def _text(answer: str, item: Item, wanted: Wanted) -> str:
    # Models answer with line feeds and control characters now and then; a caption is one line.
    plain = " ".join(re.sub(r"[\x00-\x1f\x7f]+", " ", answer).split())
    if not plain:
        raise UserError("the captioner gave no words", where=str(item.picture), fix="try another model or prompt")
    text = f"{wanted.prefix}{plain}{wanted.suffix}".strip()
    if wanted.mode == "append" and item.caption is not None:
        return item.caption if item.caption.endswith(text) else f"{item.caption}{wanted.separator}{text}"
    return text


def _done_before(folder: Path, command: str) -> set[Path]:
    """The files that runs of the same command wrote, if the last of all edits was such a run and did not end."""
    journal = Journal(folder)
    done: set[Path] = set()
    for entry in reversed([e for e in journal.entries() if e.kind == "edit" and not e.undone]):
        if entry.command != command or entry.state == "done":
            break
        done |= {journal.folder / change.path for change in entry.changes}
    return done


class _Own:
    """A function of the user's: picture in, caption out."""

    def __init__(self, name: str) -> None:
        module, _, function = name.partition(":")
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        try:
            self._function = vars(importlib.import_module(module))[function]
        except (ImportError, KeyError) as error:
            reason = f"there is no '{function}' in it" if isinstance(error, KeyError) else str(error)
            raise UserError(f"'{name}' cannot be used: {reason}", where="--with", fix="name MODULE:FUNCTION") from error

    def caption(self, pictures: Sequence[Image.Image]) -> list[str | UserError]:
        """One call for each picture."""
        return [self._one(picture) for picture in pictures]

    def _one(self, picture: Image.Image) -> str | UserError:
        try:
            answer = self._function(picture)
        except UserError as error:
            return error
        except Exception as error:  # their code: whatever it raises is this picture's failure
            return UserError(f"the captioner failed: {type(error).__name__}: {error}")
        return answer if isinstance(answer, str) else UserError(f"the captioner gave no text: {answer!r}")
