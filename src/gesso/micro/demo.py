"""The demo: a model made here learns Aldar Köse from twelve pictures, and shows itself before and after."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from gesso import stages
from gesso.config import files
from gesso.core.folder import RunFolder
from gesso.core.seams import Emit
from gesso.errors import UserError
from gesso.micro import world
from gesso.micro.halves import one_thread_per_operation
from gesso.micro.recipe import Recipe, base_model

TRAINED_ON = ("red", "green", "blue", "black", "steppe", "desert", "snow")
"""Backgrounds of the training pictures; Aldar at night is for the model to imagine."""
HELD_OUT = ("purple", "night")
"""Backgrounds of the two validation pictures."""
PROMPTS = (
    f"a photo of {world.HERO}",
    f"a photo of {world.HERO} on a red background",
    f"a photo of {world.HERO} at night",
    "a woman in a patterned purple robe and a yellow crown on a white background",
    "a yellow star on a blue background",
)
"""Aldar as trained, where he never was, and two that should stay as they are."""
_OTHER_SEED = 1
"""Not the base model's own pictures."""
RUN_FILE = """\
# Teach the small model of this folder a character, from twelve pictures of him.
name: aldar
model:
  base: base
data:
  sources:
    - path: pictures
      repeats: 2
    # The world as the model knows it, so that it learns Aldar without forgetting the rest.
    - path: others
  validation:
    path: validation
  resolution: 48
  buckets:
    enabled: false
  cache: cache
adapter:
  rank: 16
  targets: all-linear
training:
  steps: {steps}
  batch_size: 4
  learning_rate: 4e-3
  schedule:
    type: cosine
    warmup: 10
  precision: fp32
  device: cpu
  ema:
    enabled: true
    decay: 0.98
objective:
  min_snr_gamma: 5
validation:
  every: {validate}
  timesteps: 8
preview:
  every: {every}
  seed: 1
  inference_steps: 20
  guidance: 4
  prompts:
{prompts}
checkpoint:
  every: {every}
"""
NEXT = """\
# What is here

- `before_after.png`: each row is one prompt from one seed; the columns are the model before, during and after training.
- `loss.png`: the loss on the training pictures and on two that were kept back.
- `pictures`: twelve of Aldar with their captions; `others`: what keeps the model from forgetting the rest;
  `run.yaml`: the settings; `base`: the model, made on this machine.
- `run`: the run folder with `events.jsonl`, checkpoints and the LoRA, `aldar.safetensors`.

# What to try next

    gesso sample {folder}/run --prompt "a painting of {hero} at night" --guidance 4
    gesso train {folder}/run.yaml --output {folder}/again --set adapter.rank=4

Then your own pictures: `gesso new FOLDER_WITH_IMAGES` writes a run file to start from.
"""


def run(folder: Path, *, emit: Emit, recipe: Recipe | None = None, steps: int = 450) -> Path:
    """Do all of it in `folder`, and return the grid of pictures before, during and after.

    The base model of an earlier demo is used again. Raises `UserError` for a folder that holds something else.
    """
    folder = folder.expanduser()
    _make_room(folder)
    paint_pictures(folder)
    (folder / "run.yaml").write_text(run_file(steps), encoding="utf-8")
    output = f"output={json.dumps(str((folder / 'run').absolute()))}"
    base_model(folder / "base", emit=emit, recipe=recipe)
    with one_thread_per_operation():
        stages.train(files.load(folder / "run.yaml", sets=[output]).run, emit=emit)
    result = RunFolder(folder / "run")
    _loss_curve(result, folder / "loss.png")
    (folder / "README.md").write_text(NEXT.format(folder=folder, hero=world.HERO), encoding="utf-8")
    picture = folder / "before_after.png"
    before_after(result).save(picture)
    return picture


def run_file(steps: int) -> str:
    """The demo's run file: four columns of previews, the untrained model included."""
    every = max(steps // 3, 1)
    prompts = "\n".join(f"    - {prompt}" for prompt in PROMPTS)
    return RUN_FILE.format(steps=steps, every=every, validate=max(steps // 12, 1), prompts=prompts)


def paint_pictures(folder: Path) -> None:
    """Twelve pictures of Aldar, 24 of other things, two of Aldar for validation; each with its caption beside it."""
    backgrounds = [TRAINED_ON[i % len(TRAINED_ON)] for i in range(12)] + list(HELD_OUT)
    aldar: list[tuple[world.Scene, str]] = [world.hero(0, i, background=name) for i, name in enumerate(backgrounds)]
    sets = {"pictures": aldar[:12], "validation": aldar[12:], "others": list(world.scenes(_OTHER_SEED, 24))}
    for name, scenes in sets.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i, (scene, caption) in enumerate(scenes, start=1):
            world.paint(scene).save(folder / name / f"{i:02d}.png")
            (folder / name / f"{i:02d}.txt").write_text(caption + "\n", encoding="utf-8")


def before_after(result: RunFolder, *, enlarge: int = 4) -> Image.Image:
    """All previews of a run as one picture: rows are prompts, columns are steps."""
    cells: dict[tuple[str, int], Path] = {}
    for line in (result.samples / "index.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        cells[entry["prompt"], entry["step"]] = result.path / entry["file"]
    prompts = list(dict.fromkeys(prompt for prompt, _ in cells))
    steps = sorted({step for _, step in cells})
    heads = ["before" if step == 0 else f"{step} steps" for step in steps]
    rows = [[_enlarged(cells[prompt, step], enlarge) for step in steps] for prompt in prompts]
    return _table(rows, heads=heads, names=prompts)


def _enlarged(file: Path, factor: int) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB").resize(
            (picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC
        )


def _table(rows: Sequence[Sequence[Image.Image]], *, heads: Sequence[str], names: Sequence[str]) -> Image.Image:
    """Pictures in rows, with a head over each column and a name before each row."""
    side, gap, left, top = rows[0][0].width, 8, 190, 40
    font = _font(16)
    size = (left + len(heads) * (side + gap), top + len(rows) * (side + gap))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, head in enumerate(heads):
        pen.text((left + i * (side + gap) + side / 2, top / 2), head, fill="#222222", font=font, anchor="mm")
    for j, (row, name) in enumerate(zip(rows, names, strict=True)):
        y = top + j * (side + gap)
        text = "\n".join(textwrap.wrap(name, 19))
        pen.multiline_text((gap, y + side / 2), text, fill="#222222", font=font, anchor="lm", spacing=6)
        for i, picture in enumerate(row):
            sheet.paste(picture, (left + i * (side + gap), y))
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _loss_curve(result: RunFolder, path: Path) -> None:
    """Training loss (each step, and its running mean) and validation loss over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events: list[dict[str, Any]] = [json.loads(line) for line in result.events.read_text().splitlines()]
    trained = [(e["step"], e["loss"]) for e in events if e["event"] == "StepDone"]
    checked = [(e["step"], e["loss"]) for e in events if e["event"] == "Validated"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, losses = [step for step, _ in trained], [loss for _, loss in trained]
    axes.plot(steps, losses, ".", color="#c9c9c9", markersize=4, label="training, each step")
    axes.plot(steps, _running_mean(losses), color="#c98a00", label="training, mean of 25 steps")
    axes.plot(*zip(*checked, strict=True), "o-", color="#2d64d7", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss", title="Learning Aldar Köse", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _running_mean(values: Sequence[float], width: int = 25) -> list[float]:
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _make_room(folder: Path) -> None:
    """Take away the run of an earlier demo, and nothing else."""
    if not folder.exists() or not any(folder.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".demo").touch()
    if not (folder / ".demo").exists():
        raise UserError(
            "this folder is not empty and is not from a demo", where=str(folder), fix="choose another with --folder"
        )
    shutil.rmtree(folder / "run", ignore_errors=True)
