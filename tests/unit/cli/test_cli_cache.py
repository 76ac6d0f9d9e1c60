"""gesso cache: what it shows, what it removes, and that it asks first."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from gesso.cli import cache as commands
from gesso.data.store import Array, Store
from gesso.errors import UserError

DAY = 86400

app = typer.Typer()
app.command()(commands.stats)
app.command()(commands.verify)
app.command()(commands.prune)


def call(*arguments: str, answer: str | None = None) -> Result:
    result = CliRunner().invoke(app, arguments, input=answer)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def answer(*arguments: str) -> Any:
    return json.loads(call(*arguments, "--json").stdout)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Three pictures used 1, 40 and 90 days ago, and a caption used now."""
    store = Store(tmp_path / "cache" / commands.ENCODINGS)
    values = {"x": Array("float32", (256,), np.zeros(1024, np.uint8))}
    for i, days in enumerate([1, 40, 90]):
        store.put(f"{i:064x}", values, kind="latents", encoder="vae-fingerprint", of=f"picture [{i}].png")
        then = time.time() - days * DAY - 60
        os.utime(store.path(f"{i:064x}"), (then, then))
    store.put(f"{9:064x}", values, kind="text", encoder="clip", of="caption 'a dog'")
    return tmp_path / "cache"


def entries(cache: Path) -> list[int]:
    return sorted(int(path.parent.name + path.stem, 16) for path in cache.glob("*/*/*.gesso"))


def harm(cache: Path, number: int) -> None:
    path = Store(cache / commands.ENCODINGS).path(f"{number:064x}")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


class TestStats:
    def test_table(self, cache: Path) -> None:
        shown = call("stats", "--cache", str(cache)).stdout
        assert "4 entries" in shown
        [line] = [line for line in shown.splitlines() if "latents" in line]
        assert line.split()[:3] == ["latents", "vae-fingerprint", "3"]
        assert "90 days ago" in line
        assert "1 day ago" in line

    def test_json(self, cache: Path) -> None:
        found = answer("stats", "--cache", str(cache))
        assert found["entries"] == 4
        assert [(part["kind"], part["encoder"], part["entries"]) for part in found["parts"]] == [
            ("latents", "vae-fingerprint", 3),
            ("text", "clip", 1),
        ]
        assert found["bytes"] == sum(part["bytes"] for part in found["parts"])

    def test_the_default_folder_is_that_of_runs(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("GESSO_CACHE", str(cache))
        assert answer("stats")["entries"] == 4
        monkeypatch.setenv("GESSO_CACHE", str(cache / "none"))
        assert "nothing is cached" in call("stats").stdout

    def test_a_wrong_folder_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such folder") as caught:
            call("stats", "--cache", str(tmp_path / "cahce"))
        assert caught.value.where == str(tmp_path / "cahce")


class TestVerify:
    def test_all_good(self, cache: Path) -> None:
        result = call("verify", "--cache", str(cache))
        assert result.exit_code == 0
        assert "4 entries" in result.stdout
        assert "0 damaged" in result.stdout

    def test_damaged_ones_are_named_and_removed_on_demand(self, cache: Path) -> None:
        harm(cache, 1)
        result = call("verify", "--cache", str(cache))
        assert result.exit_code == 3
        assert "picture [1].png" in result.stdout
        assert entries(cache) == [0, 1, 2, 9]
        found = call("verify", "--cache", str(cache), "--json")
        assert found.exit_code == 3
        document = json.loads(found.stdout)
        assert (document["ok"], document["good"]) == (False, 3)
        assert [(one["of"], one["deleted"]) for one in document["damaged"]] == [("picture [1].png", False)]
        result = call("verify", "--cache", str(cache), "--delete")
        assert result.exit_code == 0
        assert "removed" in result.stdout
        assert entries(cache) == [0, 2, 9]


class TestPrune:
    def test_by_age(self, cache: Path) -> None:
        shown = call("prune", "--cache", str(cache), "--unused-for", "60d", "--yes").stdout
        assert entries(cache) == [0, 1, 9]
        assert "removed: 1 entries" in shown
        call("prune", "--cache", str(cache), "--unused-for", "5w", "--yes")
        assert entries(cache) == [0, 9]

    def test_by_size(self, cache: Path) -> None:
        size = answer("stats", "--cache", str(cache))["bytes"] // 4
        found = answer("prune", "--cache", str(cache), "--larger-than", f"{2.5 * size / 1000}kB", "--yes")
        assert (found["entries"], found["kept_entries"], found["dry_run"]) == (2, 2, False)
        assert entries(cache) == [0, 9]

    def test_a_dry_run_removes_nothing(self, cache: Path) -> None:
        shown = call("prune", "--cache", str(cache), "--unused-for", "12h", "--dry-run").stdout
        assert "would go: 3 entries" in shown
        assert answer("prune", "--cache", str(cache), "--unused-for", "12h", "--dry-run")["entries"] == 3
        assert entries(cache) == [0, 1, 2, 9]

    def test_it_asks(self, cache: Path) -> None:
        refused = call("prune", "--cache", str(cache), "--unused-for", "12h", answer="n\n")
        assert refused.exit_code != 0
        assert "to remove: 3 entries" in refused.stdout
        assert entries(cache) == [0, 1, 2, 9]
        assert call("prune", "--cache", str(cache), "--unused-for", "12h", answer="y\n").exit_code == 0
        assert entries(cache) == [9]

    def test_with_nothing_to_remove_it_does_not_ask(self, cache: Path) -> None:
        shown = call("prune", "--cache", str(cache), "--unused-for", "52w").stdout
        assert "to remove: 0 entries" in shown
        assert "Remove them?" not in shown

    def test_json_cannot_ask(self, cache: Path) -> None:
        with pytest.raises(UserError, match="nobody can be asked"):
            call("prune", "--cache", str(cache), "--unused-for", "12h", "--json")
        assert entries(cache) == [0, 1, 2, 9]

    @pytest.mark.parametrize(
        ("option", "text"), [("--unused-for", "30"), ("--unused-for", "d"), ("--larger-than", "x")]
    )
    def test_what_cannot_be_read_is_refused(self, cache: Path, option: str, text: str) -> None:
        with pytest.raises(UserError) as caught:
            call("prune", "--cache", str(cache), option, text, "--yes")
        assert caught.value.where == option
        assert entries(cache) == [0, 1, 2, 9]

    @pytest.mark.parametrize(
        ("text", "size"),
        [("20GB", 20 * 10**9), ("500mb", 5 * 10**8), ("1.5TiB", 3 * 2**39), ("2GiB", 2**31), ("100", 100), ("7B", 7)],
    )
    def test_sizes(self, text: str, size: int) -> None:
        assert commands._size(text) == size
