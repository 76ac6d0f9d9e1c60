"""What `gesso micro build` leaves: the weights as the package ships them, with their card and how they were made."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from gesso.core.provenance import provenance
from gesso.core.resolve import file_sha256
from gesso.micro import words

LIMIT = 24_000_000
"""Bytes that all packaged weights may have."""
_CURVE_POINTS = 40
CARD = """\
# The micro models

Small models of a painted world of 64-pixel pictures, made by `gesso micro build` and shipped with Gesso, so that
training can be seen and measured in minutes on any machine, without a download. They are for tests, demonstrations and
learning, and of no use on photographs.

| name | what it is | parameters |
|---|---|---|
{rows}

- **Data**: {pictures} pictures drawn by `gesso.micro.painter`, with captions of a small grammar
  (`gesso.micro.captions`): people, animals, things and shapes, in seven colours, four places and four styles. No
  photograph, no picture and no text of anybody else is in it.
- **Never shown to them**: a tenth of the combinations of subject, colour and place (for honest scores); and the
  character Aldar Köse, the dombra and the neon style (so that there is something to teach).
- **Made by** Gesso itself: `micro:sdxl` is an ordinary full fine-tune from random weights through the run file and
  loop that everybody uses. `recipe.json` holds every setting, the curves, the times and the hashes.
- **Licence**: that of Gesso.
"""


def pack(folder: Path, made: Mapping[str, Path], *, recipe: dict[str, Any]) -> Path:
    """Write `folder/weights` from what each stage made: fp16 weights, card and record; returns it."""
    target, fresh = folder / "weights", folder / f".weights-{time.time_ns()}"
    for name in ("sdxl", "clip", "identity"):
        shutil.copytree(made[name], fresh / name, ignore=shutil.ignore_patterns("run", "README.md"))
    for name, pad in (("tokenizer", words.END), ("tokenizer_2", "!")):
        # As every release of transformers reads them; newer ones write a file that older ones do not know.
        shutil.rmtree(fresh / "sdxl" / name)
        words.write(fresh / "sdxl" / name, pad=pad)
    weights = sorted(fresh.rglob("*.safetensors"))
    for file in weights:
        _halve(file)
    size = sum(file.stat().st_size for file in weights)
    if size > LIMIT:
        raise ValueError(f"the weights have {size} bytes, more than the {LIMIT} that are shipped")
    record = {
        "recipe": recipe,
        "provenance": provenance(),
        "stages": {name: _stage(path) for name, path in made.items()},
        "bytes": size,
        "sha256": {str(file.relative_to(fresh)): file_sha256(file) for file in weights},
    }
    (fresh / "recipe.json").write_text(json.dumps(record, indent=1) + "\n")
    (fresh / "README.md").write_text(_card(fresh, recipe), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return target


def _halve(file: Path) -> None:
    """Store float tensors as fp16."""
    tensors = {k: t.half() if t.is_floating_point() else t for k, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _stage(result: Path) -> dict[str, Any]:
    """Steps, seconds, and losses of a stage, from the events of its run."""
    run = next(path for path in (result / "run", result.parent) if (path / "events.jsonl").is_file())
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = {e["step"]: e for e in events if e["event"] == "StepDone"}
    width = max(len(steps) // _CURVE_POINTS, 1)
    losses = [steps[i]["loss"] for i in sorted(steps)]
    return {
        "steps": len(steps),
        "samples": sum(e["samples"] for e in steps.values()),
        "seconds": round(sum(e["seconds"] for e in steps.values()), 1),
        "loss": [[min(i + width, len(losses)), _mean(losses[i : i + width])] for i in range(0, len(losses), width)],
        "validation_loss": [[e["step"], round(e["loss"], 5)] for e in events if e["event"] == "Validated"],
    }


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 5)


def _card(folder: Path, recipe: dict[str, Any]) -> str:
    about = {
        "sdxl": "Stable Diffusion XL in miniature: denoiser, VAE and two text encoders in a diffusers folder",
        "clip": "a `CLIPModel` for pictures and captions of the world: the default of the CLIP score",
        "identity": "a `CLIPVisionModelWithProjection` that tells characters apart: the default of identity similarity",
    }
    rows = []
    for name, text in about.items():
        count = sum(t.numel() for file in (folder / name).rglob("*.safetensors") for t in load_file(file).values())
        rows.append(f"| `micro:{name}` | {text} | {count / 1e6:.1f} M |")
    return CARD.format(rows="\n".join(rows), pictures=f"{recipe['pictures']:,}")
