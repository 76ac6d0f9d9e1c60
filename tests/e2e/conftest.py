"""A user's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_helpers import Desk


@pytest.fixture
def desk(
    tiny_base: Path,
    pictures: Path,
    encodings: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Desk:
    """An empty folder, entered, with a quick run file that is fine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GESSO_CACHE", str(encodings))
    desk = Desk(tmp_path, tiny_base, pictures, encodings, capsys)
    desk.write()
    return desk
