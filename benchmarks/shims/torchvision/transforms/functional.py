"""The one function that the diffusers scripts import from here."""

from __future__ import annotations

from PIL import Image


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """Cut a box out of a picture."""
    return image.crop((left, top, left + width, top + height))
