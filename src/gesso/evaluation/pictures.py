"""Picture files that say how they were made, and contact sheets."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo

import gesso
from gesso.core.folder import write_atomic
from gesso.errors import ResourceError, UserError

_BACKGROUND, _INK = "white", "#222222"


def save_png(image: Image.Image, path: Path, settings: Mapping[str, Any]) -> Path:
    """Write a PNG with `settings` in it: JSON under `gesso`, and under `parameters` the text that web UIs read.

    Known settings are prompt, negative, seed, steps, guidance, width, height, sampler and model; others go to the
    JSON alone. Raises `ResourceError` if the file cannot be written.
    """
    info = PngInfo()
    info.add_text("parameters", _parameters(settings))
    info.add_text("gesso", json.dumps({"version": gesso.__version__, **settings}, ensure_ascii=False, default=str))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, buffer.getvalue(), durable=False)
    except OSError as error:
        raise ResourceError(
            f"the picture cannot be written ({error.strerror})",
            where=str(path),
            fix="free space or choose another place",
        ) from error
    return path


def read_settings(path: Path) -> dict[str, Any]:
    """What `save_png` put into a picture; raises `UserError` for a file without it."""
    try:
        with Image.open(path) as image:
            text = image.text if isinstance(image, PngImageFile) else {}
    except (OSError, UnidentifiedImageError) as error:
        raise UserError("not a readable picture", where=str(path), fix="check the path") from error
    if "gesso" not in text:
        raise UserError("this picture does not say how it was made", where=str(path), fix="use one drawn by gesso")
    found: dict[str, Any] = json.loads(text["gesso"])
    return found


def grid(
    images: Sequence[Image.Image],
    *,
    columns: int,
    labels: Sequence[str] | None = None,
    gap: int = 8,
    font_size: int = 16,
) -> Image.Image:
    """A contact sheet, row by row; each cell is as large as the largest picture, with its label under it."""
    width, height = max(i.width for i in images), max(i.height for i in images)
    font = _font(font_size)
    strip = 0 if labels is None else round(1.6 * font_size)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    size = (gap + columns * (width + gap), gap + rows * (height + strip + gap))
    sheet = Image.new("RGB", size, _BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        left, top = gap + (i % columns) * (width + gap), gap + (i // columns) * (height + strip + gap)
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        if labels is not None:
            text = _fit(labels[i], width, pen, font)
            pen.text((left + width / 2, top + height + strip / 2), text, fill=_INK, font=font, anchor="mm")
    return sheet


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings: Pillow's own font has no accents and no Cyrillic."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _fit(text: str, width: int, pen: ImageDraw.ImageDraw, font: Any) -> str:
    """The text on one line, cut to `width` pixels."""
    text = " ".join(text.split())
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "..." if text else ""


def _parameters(settings: Mapping[str, Any]) -> str:
    """Prompt, negative prompt and one line of settings, each on its own line."""
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative"):
        lines.append(f"Negative prompt: {settings['negative']}")
    names = {"steps": "Steps", "sampler": "Sampler", "guidance": "CFG scale", "seed": "Seed"}
    pairs = [f"{label}: {settings[key]}" for key, label in names.items() if key in settings]
    if "width" in settings and "height" in settings:
        pairs.append(f"Size: {settings['width']}x{settings['height']}")
    if "model" in settings:
        # A comma would end the value for the readers of this line.
        pairs.append(f"Model: {str(settings['model']).replace(',', ';')}")
    return "\n".join([*lines, ", ".join([*pairs, f"Version: gesso {gesso.__version__}"])])


def unused(output: Path, count: int) -> list[Path]:
    """The files of `count` pictures, of several with a grid last, none of which is there yet: `output`, or `-2`, ..."""
    for number in itertools.count(1):
        last = output if number == 1 else output.with_stem(f"{output.stem}-{number}")
        files = [last.with_stem(f"{last.stem}-{i:02d}") for i in range(count)] if count > 1 else []
        if not any(file.exists() for file in (*files, last)):
            break
    return [*files, last]
