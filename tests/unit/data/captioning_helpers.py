"""Pictures of one colour for the captioners."""

from __future__ import annotations

from PIL import Image

COLOURS = ("red", "lime", "blue", "white", "black")


def picture(colour: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)
