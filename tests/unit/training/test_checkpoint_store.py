"""Saves that fail at any point leave the older checkpoint whole; damage of any kind is seen before it is used."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gesso.config.run import Checkpoint
from gesso.core import checkpoints
from gesso.core.seams import Layout
from gesso.errors import ResourceError, UserError
from gesso.training import checkpoint
from gesso.training.checkpoint import Snapshot, Store

LORA = Layout({"pytorch_lora_weights.safetensors": {"lora_adapter_metadata": "{}"}})
FULL = Layout(
    {"unet/diffusion_pytorch_model.safetensors": {"format": "pt"}, "text_encoder/model.safetensors": {"format": "pt"}},
    {"unet/config.json": '{"_class_name": "A"}\n', "text_encoder/config.json": "{}\n"},
)


def snapshot(step: int, *, average: bool = True, layout: Layout = LORA) -> Snapshot:
    weights = {"unet.a.lora_A.weight": torch.full((2, 3), float(step)), "unet.a.lora_B.weight": torch.ones(3, 2)}
    if layout is FULL:
        weights |= {"text_encoder.b": torch.full((4,), -float(step)), "unet.count": torch.tensor([step])}
    return Snapshot(
        step=step,
        weights=weights,
        layout=layout,
        optimizer={"unet.exp_avg": torch.arange(12.0) + step, "unet.step": torch.tensor(float(step))},
        average={k: v.double() / 3 for k, v in weights.items() if v.is_floating_point()} if average else None,
        position={"identity": {"seed": 0}, "scaler": {}},
    )


layouts = pytest.mark.parametrize("layout", [LORA, FULL], ids=["lora", "full"])


def store(folder: Path, *, warnings: list[str] | None = None, **policy: int) -> Store:
    told = [] if warnings is None else warnings
    return Store(folder, Checkpoint(**policy), warn=told.append, tries=1, wait=0.0)


@layouts
@pytest.mark.parametrize("average", [True, False])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, average: bool, layout: Layout) -> None:
    saved = snapshot(5, average=average, layout=layout)
    path = store(tmp_path).save(saved)
    assert path == tmp_path / "checkpoint-5"
    back = checkpoint.load(path)
    assert (back.step, back.layout, back.position) == (5, saved.layout, saved.position)
    for name in ("weights", "optimizer", "average"):
        ours, theirs = vars(saved)[name], vars(back)[name]
        if ours is None:
            assert theirs is None
        else:
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert not any(p.suffix in {".pt", ".bin", ".pkl"} for p in path.rglob("*"))


def test_a_full_model_lies_in_a_folder_a_network_and_its_average_beside_it(tmp_path: Path) -> None:
    saved = snapshot(5, layout=FULL)
    assert saved.average is not None
    path = store(tmp_path).save(saved)
    unet = load_file(path / "unet" / "diffusion_pytorch_model.safetensors")
    assert sorted(unet) == ["a.lora_A.weight", "a.lora_B.weight", "count"]
    averaged = load_file(path / "ema" / "unet" / "diffusion_pytorch_model.safetensors")
    assert averaged.keys() == unet.keys(), "buffers, which have no average, are there too"
    assert torch.equal(averaged["a.lora_A.weight"], saved.average["unet.a.lora_A.weight"].float())
    assert averaged["count"].dtype == torch.int64
    assert (path / "ema" / "text_encoder" / "config.json").read_text() == "{}\n"
    files = [content for name, content in saved.files() if name.endswith("safetensors")]
    numbers = sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in files)
    assert saved.size == numbers - 8, "all but the second copy of the buffer"
    assert all((path / name).is_file() for name, _ in saved.files())


@layouts
def test_every_folder_of_a_checkpoint_is_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoint, "sync_folder", synced.append)
    path = store(tmp_path).save(snapshot(5, layout=layout))
    names = {p.relative_to(path) for p in (path, *path.rglob("*")) if p.is_dir()}
    inside = [p for p in synced if p.name.startswith(".partial") or p.parent != tmp_path]
    partial = next(p for p in inside if p.name.startswith(".partial"))
    assert {p.relative_to(partial) for p in inside if p.is_relative_to(partial)} == names
    assert tmp_path in synced


@layouts
def test_a_manifest_without_weights_is_a_fault(tmp_path: Path, layout: Layout) -> None:
    path = store(tmp_path).save(snapshot(5, layout=layout))
    manifest = json.loads((path / "manifest.json").read_text())
    kept = {k: v for k, v in manifest.items() if k.split("/")[0] in ("state", "ema")}
    (path / "manifest.json").write_text(json.dumps(kept))
    assert checkpoints.faults(path) == ["no trained weights are listed"]


def test_retention_keeps_the_newest_and_the_multiples(tmp_path: Path) -> None:
    kept = store(tmp_path, keep_last=2, keep_every=4)
    for step in range(1, 11):
        kept.save(snapshot(step))
    assert list(checkpoints.listed(tmp_path)) == [4, 8, 9, 10]


def test_an_older_save_prunes_nothing_newer(tmp_path: Path) -> None:
    """Going on from an earlier checkpoint must not delete the later ones that are already there."""
    kept = store(tmp_path, keep_last=1)
    kept.save(snapshot(8))
    kept.save(snapshot(3))
    assert list(checkpoints.listed(tmp_path)) == [3, 8]


class Crash(BaseException):
    """The process dies here: nothing that would clean up runs."""


class Faults:
    """Makes the n-th file operation of a save fail, one way or another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        self.count, self._at, self._error = 0, at, error
        for module, name in [(os, "fsync"), (Path, "open"), (Path, "rename"), (Path, "mkdir")]:
            monkeypatch.setattr(module, name, self._wrap(vars(module)[name]))

    def _wrap(self, real: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self._at:
                raise self._error
            return real(*args, **kwargs)

        return wrapped


def operations_of_a_save(folder: Path, layout: Layout) -> int:
    with pytest.MonkeyPatch.context() as patch:
        counter = Faults(patch, at=-1, error=Crash())
        store(folder, keep_last=1).save(snapshot(2, layout=layout))
    return counter.count


@layouts
@pytest.mark.parametrize("kind", ["crash", "ENOSPC", "EIO"])
def test_a_failure_at_every_file_operation_keeps_the_older_checkpoint(
    tmp_path: Path, kind: str, layout: Layout
) -> None:
    (tmp_path / "count").mkdir()
    store(tmp_path / "count").save(snapshot(1, layout=layout))
    total = operations_of_a_save(tmp_path / "count", layout)
    assert total >= 15
    survived = 0
    for at in range(1, total + 1):
        folder = tmp_path / f"{kind}-{at}"
        folder.mkdir()
        store(folder, keep_last=1).save(snapshot(1, layout=layout))
        error: BaseException = Crash() if kind == "crash" else OSError(vars(errno)[kind], kind)
        with pytest.MonkeyPatch.context() as patch:
            Faults(patch, at=at, error=error)
            try:
                store(folder, keep_last=1).save(snapshot(2, layout=layout))
                survived += 1
            except (Crash, ResourceError, OSError):
                pass
        newest, refused = checkpoints.newest(folder)
        assert newest is not None, f"nothing whole is left after a failure at operation {at}"
        assert not refused, f"a torn checkpoint is visible after a failure at operation {at}: {refused}"
        assert checkpoint.load(newest).step in {1, 2}
        store(folder).sweep()
        assert not [p.name for p in folder.iterdir() if p.name.startswith(".")]
    assert survived <= 2, "the faults did not reach the save"


def test_a_full_disk_is_a_clear_error_and_a_retry_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    kept = Store(tmp_path, Checkpoint(), warn=told.append, tries=2, wait=0.0)
    kept.save(snapshot(1))
    usage = namedtuple("usage", "total used free")
    answers = [usage(10, 10, 0), usage(10**9, 0, 10**9)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: answers.pop(0))
    kept.save(snapshot(2))
    assert "trying again" in told[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    with pytest.raises(ResourceError, match=r"(?s)free.*checkpoint-2 is kept") as full:
        kept.save(snapshot(3))
    assert full.value.exit_code == 3
    assert list(checkpoints.listed(tmp_path)) == [1, 2]


def mutate(path: Path, rng: random.Random) -> str:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    kind = rng.choice(["flip", "truncate", "empty", "delete", "swap", "append"])
    match kind:
        case "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "truncate":
            content = content[: rng.randrange(len(content))]
        case "empty":
            content = bytearray()
        case "append":
            content += b"\0"
        case "swap":
            other = rng.choice([p for p in files if p.read_bytes() != file.read_bytes()])
            content = bytearray(other.read_bytes())
    if kind == "delete":
        file.unlink()
    else:
        file.write_bytes(content)
    return f"{kind} {file.relative_to(path)}"


@layouts
def test_five_hundred_kinds_of_damage_are_all_seen(tmp_path: Path, layout: Layout) -> None:
    kept = store(tmp_path)
    whole = kept.save(snapshot(1, layout=layout))
    original = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    rng = random.Random(0)
    meant_the_same = 0
    for _ in range(500):
        damage = mutate(whole, rng)
        if not checkpoints.faults(whole):
            # Only JSON that still says the same can pass: a changed blank in the manifest.
            assert "manifest" in damage, damage
            meant_the_same += 1
        else:
            with pytest.raises(UserError, match="damaged"):
                checkpoint.load(whole)
        for name, content in original.items():
            (whole / name).write_bytes(content)
    assert meant_the_same <= 10
    assert not checkpoints.faults(whole)


def test_the_newest_whole_one_is_taken_and_strays_are_ignored(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for step in (1, 2, 10):
        kept.save(snapshot(step))
    for stray in ("checkpoint-best", "checkpoint-", "checkpoint-7.tmp"):
        (tmp_path / stray).mkdir()
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-10" / "state" / "optimizer.safetensors").unlink()
    newest, refused = checkpoints.newest(tmp_path)
    assert newest == tmp_path / "checkpoint-2"
    assert {p.name for p in refused} == {"checkpoint-10", "checkpoint-11"}
    assert refused[tmp_path / "checkpoint-10"] == ["state/optimizer.safetensors is missing"]
