"""Which files of a folder are images, by their names alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
HOLDERS = (".zip", ".tar", ".parquet", ".jsonl", ".csv")
"""Endings of files that hold or list images."""


def images_in(folder: Path) -> Iterator[Path]:
    """Image files in a folder and its sub-folders, by their ending; hidden files and folders are passed over."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_ENDINGS:
                yield Path(root, name)
