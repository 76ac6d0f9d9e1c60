"""What the commands print about files and advice, for people and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from gesso.errors import UserError

if TYPE_CHECKING:
    from gesso.config.advice import Advice, Finding, Forecast
    from gesso.config.dialects import DialectReport
    from gesso.config.files import Loaded
    from gesso.data.preflight import Preflight


def report(dialect: DialectReport | None) -> None:
    """How another tool's file was read; nothing for our own."""
    if dialect is None:
        return
    typer.echo(f"read as {dialect.tool}:")
    lines = [(entry, f"{entry.key} -> {entry.note}") for entry in dialect.mapped]
    lines += [(entry, f"{entry.key}: no effect: {entry.note}") for entry in dialect.ignored]
    # Keys of a second file that the first one names begin with that file's name.
    for entry, text in sorted(lines, key=lambda line: (line[0].key.rpartition(": ")[0], line[0].line or 0)):
        typer.echo(f"  line {entry.line}: {text}" if entry.line else f"  {text}")
    for entry in dialect.assumed:
        typer.echo(f"  filled in: {entry.key} = {entry.note}")


def advice(found: Advice, origins: Mapping[str, str]) -> None:
    """Warnings, hints and the forecast; errors are raised elsewhere."""
    if found.forecast is not None:
        for line in forecast_lines(found.forecast):
            typer.echo(line)
    for level, colour, findings in (("warning", "yellow", found.warnings), ("hint", None, found.hints)):
        for finding in findings:
            where = _where(finding, origins)
            typer.secho(f"{level}: {where}: {finding.what}" + (f" -> {finding.fix}" if finding.fix else ""), fg=colour)


def forecast_lines(numbers: Forecast) -> list[str]:
    """The forecast for people."""
    about = "" if numbers.exact else "about "
    held = f", and {about}{numbers.held_out} held out" if numbers.held_out else ""
    folders = f" ({' + '.join(map(str, numbers.images))})" if len(numbers.images) > 1 else ""
    lines = [
        f"images      {sum(numbers.images)}{folders}{held}; {numbers.samples_per_epoch} samples an epoch",
        f"length      {numbers.steps} steps = {numbers.epochs:.1f} epochs of {numbers.steps_per_epoch}",
    ]
    saves = f"checkpoints {numbers.checkpoints}, {numbers.checkpoints_kept} kept"
    if numbers.checkpoint_bytes is not None and numbers.parameters is not None:
        saves += f", {size(numbers.checkpoint_bytes)} each ({numbers.parameters / 1e6:.1f} M trained parameters)"
    lines += [saves, f"disk        {size(numbers.disk_bytes)}, of which cache {size(numbers.cache_bytes)}"]
    if numbers.memory_bytes is not None:
        lines.append(f"memory      about {size(numbers.memory_bytes)} on the GPU")
    return lines


_FIT = ("resized", "bucket", "crop", "flip", "angle", "colour")


def images(seen: Preflight | None) -> None:
    """The buckets and concepts of a run's images, and what is worth knowing about them."""
    if seen is None:
        return
    if seen.pairs:
        typer.echo(f"pairs       {seen.pairs} of a preferred picture and another; buckets and sizes are of the first")
    typer.echo("bucket        images  cropped away")
    for (width, height), count, loss in seen.buckets:
        typer.echo(f"{f'{width} x {height}':13} {count:6} {loss:8.1%}")
    if len(seen.concepts) > 1:
        typer.echo("concept                          images  samples an epoch")
        for name, count, samples in seen.concepts:
            typer.echo(f"{name or '(none)':32} {count:6} {samples:10}")
    for notice in seen.notices:
        typer.echo(f"note: {notice}")


def samples(seen: Preflight | None) -> None:
    """Some samples as the model will see them: picture, bucket, crop, caption and its tokens."""
    if seen is None or not seen.samples:
        return
    captions, counter = [visit.caption for visit in seen.samples], seen.counter
    tokens = counter.ids(captions) if counter.ids is not None else None
    typer.echo(f"{len(captions)} samples of the first epoch; tokens {counter.method}")
    for i, (visit, count) in enumerate(zip(seen.samples, counter.count(captions), strict=True)):
        fit, (left, top) = visit.fit, visit.fit.crop
        drawn = f", turned {fit.angle:.1f} degrees" if fit.angle else ""
        drawn += ", mirrored" if fit.flip else ""
        width, height = fit.bucket
        rival = f" rather than {visit.row.rejected}" if visit.row.rejected is not None else ""
        typer.echo(f"{visit.row.place}{rival}: {width} x {height} from ({left}, {top}){drawn}")
        typer.echo(f"  {visit.caption!r}")
        typer.echo(f"  {count} tokens" + (f": {' '.join(map(str, tokens[i]))}" if tokens else ""))


def images_json(seen: Preflight | None) -> dict[str, Any] | None:
    """The same as JSON."""
    if seen is None:
        return None
    return {
        "buckets": [row._asdict() for row in seen.buckets],
        "concepts": [{"name": n, "images": count, "samples": samples} for n, count, samples in seen.concepts],
        "pairs": seen.pairs,
        "notices": list(seen.notices),
        "samples": [
            {"image": str(v.row.place), "caption": v.caption, "tokens": n, **dict(zip(_FIT, v.fit.facts, strict=True))}
            for v, n in zip(seen.samples, seen.counter.count([v.caption for v in seen.samples]), strict=True)
        ],
    }


def values(dump: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Every value with its origin, one a line."""
    from gesso.config.document import flow

    rows = []
    for key, origin in origins.items():
        value: Any = dump
        for part in key.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        rows.append((f"{key}: {flow(value)}", origin))
    width = min(max(len(left) for left, _ in rows), 72)
    for left, origin in rows:
        typer.echo(f"{left:{width}}  # {origin}")


def error_json(error: UserError) -> dict[str, str]:
    """An error as JSON."""
    return {"where": error.where, "what": error.what, "fix": error.fix}


def advice_json(found: Advice, loaded: Loaded) -> dict[str, Any]:
    """Everything `check` finds as JSON; sizes in bytes."""

    def listed(findings: tuple[Finding, ...]) -> list[dict[str, str]]:
        return [{"key": f.key, "where": _where(f, loaded.origins), "what": f.what, "fix": f.fix} for f in findings]

    forecast = None if found.forecast is None else dataclasses.asdict(found.forecast)
    return {
        "ok": not found.errors,
        "errors": listed(found.errors),
        "warnings": listed(found.warnings),
        "hints": listed(found.hints),
        "forecast": forecast,
        "dialect": None if loaded.report is None else dataclasses.asdict(loaded.report),
    }


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _where(finding: Finding, origins: Mapping[str, str]) -> str:
    return finding.as_error(origins).where
