"""What the demo shows, all of it made from the files of its folder: the grid, the curves, and a page with both."""

from __future__ import annotations

import base64
import html
import json
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from gesso.core.curves import draw
from gesso.core.folder import RunFolder
from gesso.micro import captions, world

FIGURES, GRID, CURVES, PAGE, NOTES = "figures.json", "before_after.png", "curves.png", "report.html", "README.md"
_NAME = captions.NAMES[world.ALDAR]


@dataclass(frozen=True)
class Row:
    """One measured thing: its key in the figures, its name, how to write it, and what it says."""

    key: str
    name: str
    form: str
    says: str

    def value(self, figures: Mapping[str, float]) -> str:
        """The figure as text."""
        return self.form.format(figures[self.key])


LEARNT = (
    Row(
        "identity_rate",
        "It is Aldar",
        "{:.0%}",
        "of $unseen pictures of him where he was not in training: an independent judge, which is no network, finds "
        "robe, pattern, hat, hat colour and moustache, all five",
    ),
    Row(
        "identity_similarity",
        "Like the pictures",
        "{:.2f}",
        "mean cosine between those pictures and the twelve, as the identity encoder micro:identity sees them",
    ),
)
"""What was to be learnt."""
KEPT = (
    Row("subject", "Right subject", "{:.0%}", "of $ordinary prompts about other things, in combinations never seen"),
    Row("colour", "Right colour", "{:.0%}", "of the same, where a colour was asked for"),
    Row("place", "Right place", "{:.0%}", "of the same, where a place was asked for"),
    Row("clip_score", "CLIP score", "{:.1f}", "how well these pictures fit their prompts, by micro:clip; above 0"),
)
"""What was not to be forgotten."""


def write(folder: Path, figures: Mapping[str, Any]) -> Path:
    """Write figures, grid, curves, page and notes into a demo's folder; returns the page."""
    (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    grid(folder).save(folder / GRID)
    (folder / CURVES).write_bytes(curves(folder, dark=False))
    (folder / NOTES).write_text(_notes(folder, figures), encoding="utf-8")
    (folder / PAGE).write_text(page(folder, figures), encoding="utf-8")
    return folder / PAGE


def plain(figures: Mapping[str, Any]) -> list[str]:
    """The figures as lines for people."""
    base, trained, counts = figures["base"], figures["trained"], figures["counts"]
    lines = []
    for title, rows in (("learnt", LEARNT), ("kept", KEPT)):
        for row in rows:
            change = f"{row.value(base):>5} -> {row.value(trained):<5}"
            lines.append(f"{title:7} {row.name:18} {change}")
            title = ""
    return [
        f"before -> after, on {counts['unseen']} pictures of Aldar and {counts['ordinary']} of other things",
        *lines,
        f"{figures['steps']} steps; {_minutes(figures['seconds']['all'])} in all",
    ]


# The grid.


@dataclass(frozen=True)
class Previews:
    """The pictures of a run by prompt and step."""

    prompts: list[str]
    steps: list[int]
    files: dict[tuple[str, int], Path]

    @classmethod
    def of(cls, run: RunFolder) -> Previews:
        """Those that a run's index lists."""
        lines = (run.samples / "index.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        files = {(row["prompt"], row["step"]): run.path / row["file"] for row in rows}
        return cls(list(dict.fromkeys(row["prompt"] for row in rows)), sorted({row["step"] for row in rows}), files)

    @property
    def heads(self) -> list[str]:
        """A name for each step: before, 100 steps, ..."""
        return ["before" if step == 0 else f"{step} steps" for step in self.steps]


def grid(folder: Path, *, enlarge: int = 3) -> Image.Image:
    """The training pictures in a strip, and below the previews: rows are prompts, columns are steps."""
    shown, taught = Previews.of(RunFolder(folder / "run")), _training(folder)
    side, gap, left = world.SIDE * enlarge, 8, 210
    width = left + len(shown.steps) * (side + gap)
    small = (width - gap) // len(taught) - gap
    top = gap + 36 + small + 2 * gap
    sheet = Image.new("RGB", (width, top + 32 + len(shown.prompts) * (side + gap)), "white")
    pen, font, bold = ImageDraw.Draw(sheet), _font(15), _font(15, bold=True)
    said = f"Taught with these {len(taught)} pictures, with captions such as “{_text(taught[0])}”"
    pen.text((gap, gap + 18), said, fill="#222222", font=bold, anchor="lm")
    for i, file in enumerate(taught):
        sheet.paste(_enlarged(file, small), (gap + i * (small + gap), gap + 36))
    for i, head in enumerate(shown.heads):
        pen.text((left + i * (side + gap) + side / 2, top + 16), head, fill="#222222", font=bold, anchor="mm")
    for j, prompt in enumerate(shown.prompts):
        y = top + 32 + j * (side + gap)
        text = "\n".join(textwrap.wrap(prompt, 23))
        pen.multiline_text((gap, y + side / 2), text, fill="#222222", font=font, anchor="lm", spacing=6)
        for i, step in enumerate(shown.steps):
            sheet.paste(_enlarged(shown.files[prompt, step], side), (left + i * (side + gap), y))
    return sheet


def _training(folder: Path) -> list[Path]:
    return sorted((folder / "pictures").glob("*.png"))


def _text(picture: Path) -> str:
    """The caption beside a picture."""
    return picture.with_suffix(".txt").read_text(encoding="utf-8").strip()


def _enlarged(file: Path, side: int) -> Image.Image:
    with Image.open(file) as picture:
        return picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Pillow's own font has no accents."""
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


# The curves.


def curves(folder: Path, *, dark: bool) -> bytes:
    """A PNG with the losses of a demo's run."""
    metrics = json.loads(RunFolder(folder / "run").metrics.read_text(encoding="utf-8"))
    return draw(metrics, dark=dark, held_out="validation: four pictures kept back")


# The page and the notes.


CONTENTS = (
    (PAGE, "pictures and figures on one page, which needs no other file"),
    (GRID, "the grid as one picture"),
    (CURVES, "the losses and the learning rate"),
    (FIGURES, "every figure of the table, and the seconds that each part took"),
    ("pictures", "the twelve pictures, each with its caption in a text file beside it"),
    ("others", "pictures of the world as the model knows it, trained beside them so that it forgets nothing"),
    ("validation", "four pictures of Aldar that were not trained on"),
    ("run.yaml", "every setting: an ordinary run file, made to be changed"),
    ("run", "the run folder: checkpoints, previews, events.jsonl, TensorBoard logs and the LoRA, aldar.safetensors"),
)
"""What a demo's folder holds."""


def commands(folder: Path) -> list[tuple[str, str]]:
    """What to try next, each with its exact command."""
    here = shlex.quote(str(folder))
    out, run, file = shlex.quote(str(folder / "out.png")), shlex.quote(str(folder / "run")), f"{here}/run.yaml"
    again, style = shlex.quote(str(folder / "smaller")), f"a mosaic of {_NAME} in the mountains"
    return [
        ("Ask for something else:", f'gesso sample {run} --prompt "{style}" --guidance 4 --output {out}'),
        ("Change one setting, and compare:", f"gesso train {file} --output {again} --set adapter.rank=2"),
        ("See what a run file means before it runs:", f"gesso check {file}"),
        ("How good the small model is:", "gesso micro score"),
        ("Your own pictures, on SDXL itself:", "gesso new FOLDER_WITH_PICTURES --trigger sks"),
    ]


def page(folder: Path, figures: Mapping[str, Any]) -> str:
    """One HTML file with everything in it, for light and dark screens."""
    taught, shown = _training(folder), Previews.of(RunFolder(folder / "run"))
    heads = "".join(f"<th scope=col>{html.escape(head)}</th>" for head in shown.heads)
    rows = [
        f"<tr><th scope=row>{html.escape(prompt)}</th>"
        + "".join(
            f"<td>{_inline(shown.files[prompt, step].read_bytes(), f'{prompt}, {head}', side=148)}</td>"
            for step, head in zip(shown.steps, shown.heads, strict=True)
        )
        + "</tr>"
        for prompt in shown.prompts
    ]
    dark = base64.b64encode(curves(folder, dark=True)).decode()
    return Template(_PAGE).substitute(
        story=html.escape(_story(figures, _text(taught[0]))),
        taught="".join(_inline(file.read_bytes(), _text(file), side=world.SIDE) for file in taught),
        grid=f"<table class=grid><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>",
        figures=_table(figures),
        dark=f"data:image/png;base64,{dark}",
        curves=_inline(curves(folder, dark=False), "loss and learning rate over the steps"),
        contents="".join(f"<dt><code>{name}</code></dt><dd>{html.escape(text)}</dd>" for name, text in CONTENTS),
        next="".join(f"<p>{html.escape(why)}</p><pre>{html.escape(line)}</pre>" for why, line in commands(folder)),
        time=_minutes(figures["seconds"]["all"]),
    )


def _story(figures: Mapping[str, Any], caption: str) -> str:
    before, after = (LEARNT[0].value(figures[name]) for name in ("base", "trained"))
    return (
        "A miniature of SDXL comes with Gesso. It draws a small painted world, in which it never met Aldar Köse: the "
        "trickster of Kazakh tales in his yellow patterned chapan and tall white kalpak, with a moustache. Here it "
        f"was shown {figures['pictures']} pictures of him, with captions such as “{caption}”, in {figures['steps']} "
        f"steps on the CPU. Asked for him in places and poses that were not among them, it drew him {before} of the "
        f"times before and {after} after."
    )


def _table(figures: Mapping[str, Any]) -> str:
    lines = []
    for title, rows in (("Was he learnt?", LEARNT), ("Was anything forgotten?", KEPT)):
        lines.append(f"<tr class=part><th colspan=4 scope=colgroup>{title}</th></tr>")
        for row in rows:
            cells = [row.value(figures[name]) for name in ("base", "trained", "painted")]
            says = Template(row.says).substitute(figures["counts"])
            lines.append(
                f"<tr><th scope=row>{row.name}<small>{html.escape(says)}</small></th><td>{cells[0]}</td>"
                f"<td><b>{cells[1]}</b></td><td class=faint>{cells[2]}</td></tr>"
            )
    heads = "".join(f"<th scope=col>{head}</th>" for head in ("before", "after", "painted"))
    return f"<table class=figures><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _inline(png: bytes, text: str, *, side: int | None = None) -> str:
    size = f" width={side} height={side}" if side is not None else ""
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}"{size} alt="{html.escape(text)}">'


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _notes(folder: Path, figures: Mapping[str, Any]) -> str:
    files = "\n".join(f"- `{name}`: {text}." for name, text in CONTENTS)
    lines = "\n".join(f"- {why}\n\n      {line}\n" for why, line in commands(folder))
    table = "\n".join(f"    {line}" for line in plain(figures))
    start = f"# The demo of Gesso\n\nOpen `{PAGE}`.\n\n{table}"
    return f"{start}\n\n## What is here\n\n{files}\n\n## What to try next\n\n{lines}"


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Gesso: a model learns Aldar Köse</title>
<style>
:root { --paper: #fbfaf7; --card: #ffffff; --ink: #26262b; --faint: #6d6d76; --line: #e2dfd8; --warm: #9a6b00; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17171b; --card: #1f1f25; --ink: #e4e2dd; --faint: #9b9aa3; --line: #34343c; --warm: #e8b440; }
}
body { margin: 0 auto; max-width: 54rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; }
h1 em { font-style: normal; color: var(--warm); }
small, .faint { color: var(--faint); }
small { display: block; font-weight: 400; font-size: .85rem; line-height: 1.4; }
.wide { overflow-x: auto; margin-bottom: .75rem; }
.strip { display: flex; flex-wrap: wrap; gap: .4rem; }
.strip img { width: calc((100% - 11 * .4rem) / 12); min-width: 3rem; height: auto; }
img { border-radius: .4rem; vertical-align: top; }
.grid img { width: 100%; height: auto; min-width: 8rem; }
table { border-collapse: collapse; }
.grid th { font-weight: 500; font-size: .9rem; line-height: 1.35; }
.grid tbody th { text-align: left; width: 9rem; min-width: 8rem; padding-right: .75rem; }
.grid td, .grid thead th { padding: .25rem; }
.figures { width: 100%; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  border-collapse: separate; border-spacing: 0; }
.figures th, .figures td { padding: .6rem .9rem; border-top: 1px solid var(--line); }
.figures thead th, .figures thead td { border: 0; font-weight: 500; color: var(--faint); }
.figures td, .figures thead th { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.figures tbody th { text-align: left; font-weight: 500; }
.figures .part th { color: var(--warm); font-size: .9rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .75rem; }
figure img { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; } dd { margin: 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem; padding: .6rem .9rem;
  overflow-x: auto; margin: .2rem 0 1rem; } p { margin: 0 0 .5rem; }
code, pre { font: .875rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
</style>
</head>
<body>
<h1>A model learns <em>Aldar Köse</em></h1>
<p>$story</p>
<h2>What it was shown</h2>
<div class="strip">$taught</div>
<h2>Before, on the way, after</h2>
<p class="faint">Each row is one prompt with one seed. Those without his name must stay as they were.</p>
<div class="wide">$grid</div>
<h2>In figures</h2>
<div class="wide">$figures</div>
<p class="faint"><small>“painted” is what the same measures say of pictures by the painter of this world: as good as it
can get. All of it took $time.</small></p>
<h2>How it went</h2>
<figure><picture><source srcset="$dark" media="(prefers-color-scheme: dark)">$curves</picture></figure>
<h2>What is in this folder</h2>
<dl>$contents</dl>
<h2>What to try next</h2>
$next
<p>Then read <code>docs/guide.md</code>: from a folder of your own pictures to a LoRA that loads everywhere.</p>
</body>
</html>
"""
