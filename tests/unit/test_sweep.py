"""Sweeps: what their options mean, which runs follow, what is refused, and going on where one stopped."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from gesso import stages
from gesso.cli.app import app
from gesso.core.events import Event, StepDone
from gesso.errors import Problems, UserError
from gesso.sweep import axes, results
from gesso.sweep.axes import Axis
from gesso.sweep.engine import Sweep
from run_helpers import settings


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("adapter.rank=8,16", Axis("adapter.rank", ("8", "16"))),
        ("a.b=[1e-4, 0],[0, 0]", Axis("a.b", ("[1e-4, 0]", "[0, 0]"))),
        ('name.x="a,b", c', Axis("name.x", ('"a,b"', "c"))),
        ("training.learning_rate=1e-5..1e-3", Axis("training.learning_rate", low=1e-5, high=1e-3)),
        ("adapter.rank=4..32", Axis("adapter.rank", low=4, high=32)),
    ],
)
def test_values_and_ranges_are_read(text: str, axis: Axis) -> None:
    assert axes.parse(text) == axis


@pytest.mark.parametrize("text", ["adapter.rank", "=1,2", "adapter.rank=", "a=1,,2", "a=1,1", "a=2..1"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        axes.parse(text)


def test_a_grid_is_every_combination_and_each_has_a_name_of_its_own() -> None:
    made = axes.grid([axes.parse("adapter.rank=8,16"), axes.parse("training.learning_rate=1e-4,5e-5")], {})
    assert [one.name for one in made] == [
        "rank-8_learning_rate-1e-4", "rank-8_learning_rate-5e-5", "rank-16_learning_rate-1e-4",
        "rank-16_learning_rate-5e-5",
    ]  # fmt: skip
    assert made[1].sets == ("adapter.rank=8", "training.learning_rate=5e-5")
    same = axes.grid([axes.parse("a.beta=1"), axes.parse("b.beta=[2, 3]")], {"ab": ["preset=style"]})
    assert [(one.name, one.sets) for one in same] == [
        ("ab_a.beta-1_b.beta-2-3", ("preset=style", "a.beta=1", "b.beta=[2, 3]"))
    ]


@pytest.mark.parametrize("over", [["a=1", "a=2"], ["output=x,y"], ["adapter.rank=4..32"]])
def test_keys_that_cannot_be_swept_are_refused(over: list[str]) -> None:
    with pytest.raises(UserError):
        axes.grid([axes.parse(text) for text in over], {})


def test_a_profile_is_a_preset_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test_a.yaml").write_text("training:\n  steps: 100\nadapter:\n  targets: [to_q]\n")
    assert axes.read_profile("style") == ["preset=style"]
    assert axes.read_profile("test_a") == ["training.steps=100", 'adapter.targets=["to_q"]']
    with pytest.raises(UserError, match="there is no preset 'tset_a'"):
        axes.read_profile("tset_a")


@pytest.fixture
def run_file(tiny_base: Path, pictures: Path, encodings: Path, tmp_path: Path) -> Path:
    more = {"data__validation": {"fraction": 0.2}, "validation__timesteps": 1, "training__steps": 2}
    values = settings("base", tiny_base, pictures, encodings, tmp_path, {**more, "training__ema": {"enabled": False}})
    values["data"]["sources"][0]["path"] = str(pictures)
    with (tmp_path / "run.yaml").open("w") as handle:
        YAML().dump(values, handle)
    return tmp_path / "run.yaml"


def invoke(*words: Any) -> Any:
    return CliRunner().invoke(app, ["sweep", *map(str, words)])


def read(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").open()))


def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every optimiser step that is made from now on, by its run."""
    made: list[tuple[str, int]] = []
    plain = stages.train

    def train(run: Any, *, resume: str | None, emit: Any) -> Path:
        def tell(event: Event) -> None:
            if isinstance(event, StepDone):
                made.append((run.name, event.step))
            emit(event)

        return plain(run, resume=resume, emit=tell)

    monkeypatch.setattr(stages, "train", train)
    return made


def test_a_sweep_compares_its_runs_and_makes_none_of_them_twice(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = steps(monkeypatch), tmp_path / "ab"
    words = (run_file, "--over", "adapter.rank=2,4", "--name", "ab")
    dry = invoke(*words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert [line.split()[0] for line in dry.output.splitlines()] == ["new", "new"]
    assert not folder.exists()
    assert not made
    answer = invoke(*words)
    assert answer.exit_code == 0, answer.output
    assert made == [("rank-2", 1), ("rank-2", 2), ("rank-4", 1), ("rank-4", 2)]
    rows = read(folder)
    for row in rows:
        metrics = json.loads((folder / row["run"] / "metrics.json").read_text())
        assert float(row["best loss"]) == pytest.approx(min(metrics["validation_loss"][1:]), rel=1e-4)
        assert float(row["last loss"]) == pytest.approx(metrics["validation_loss"][-1], rel=1e-4)
        assert row["state"] == "finished"
    assert [row["adapter.rank"] for row in rows] in (["2", "4"], ["4", "2"])
    assert float(rows[0]["best loss"]) <= float(rows[1]["best loss"])
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {rows[0]['run']} |" in (folder / "results.md").read_text()
    made.clear()
    again = invoke(*words)
    assert again.exit_code == 0
    assert not made
    assert "rank-2: finished before" in again.output
    more = invoke(run_file, "--over", "adapter.rank=2,4", "--name", "ab", "--set", "training.steps=3")
    assert more.exit_code == 0, more.output
    assert made == [("rank-2", 3), ("rank-4", 3)], "a longer sweep goes on from the shorter one"


def test_a_sweep_that_broke_off_goes_on(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (run_file, "--over", "adapter.rank=2,4", "--name", "cut", "--set", "checkpoint.every=1")
    plain = stages.train

    def cut(run: Any, *, resume: str | None, emit: Any) -> Path:
        def tell(event: Event) -> None:
            emit(event)
            if run.name == "rank-4" and isinstance(event, StepDone) and event.step == 2:
                raise ZeroDivisionError

        return plain(run, resume=resume, emit=tell)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", cut)
        assert invoke(*words).exit_code != 0
    made = steps(monkeypatch)
    assert invoke(*words).exit_code == 0
    assert made == [("rank-4", 2)]
    assert [row["state"] for row in read(tmp_path / "cut")] == ["finished", "finished"]


def test_wrong_keys_and_values_are_refused_before_anything_starts(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = steps(monkeypatch)
    for over in ("adapter.rnak=2,4", "adapter.rank=2,0", "adapter.rank=2,x", "training.learning_rate=1e-3,0"):
        answer = invoke(run_file, "--over", over, "--name", "wrong")
        assert answer.exit_code != 0, over
        assert isinstance(answer.exception, UserError | SystemExit)
    assert invoke(run_file, "--name", "wrong").exit_code != 0
    assert invoke(run_file, "--over", "adapter.rank=2,4", "--search", "optuna", "--name", "wrong").exit_code != 0
    assert not made
    assert not (tmp_path / "wrong").exists()


def test_a_measure_that_no_run_has_is_refused_before_anything_starts(run_file: Path, tmp_path: Path) -> None:
    done = invoke(run_file, "--over", "adapter.rank=2,4", "--by", "accuracy", "--name", "by")
    assert isinstance(done.exception, UserError)
    assert "objective denoise does not measure accuracy" in str(done.exception)
    assert not (tmp_path / "by").exists()


def test_one_profile_on_one_set_of_images_is_the_smallest_sweep(
    run_file: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dataset my_dataset --profile test_a --name test_a`, then the same with test_b: A/B in two commands, or one."""
    monkeypatch.chdir(tmp_path)
    values = YAML(typ="safe").load(run_file.read_text())
    for profile, rank in (("test_a", 2), ("test_b", 4)):
        own = {k: values[k] for k in ("model", "training", "trackers")} | {"adapter": {"rank": rank}}
        own["data"] = {k: v for k, v in values["data"].items() if k != "sources"}
        with (tmp_path / f"{profile}.yaml").open("w") as handle:
            YAML().dump(own, handle)
    for words in (
        ["--profile", "test_a", "--name", "test_a"],
        ["--profile", "test_a", "--profile", "test_b", "--name", "ab"],
    ):
        answer = invoke("--dataset", pictures, *words)
        assert answer.exit_code == 0, answer.output
    assert [row["run"] for row in read(tmp_path / "runs" / "test_a")] == ["test_a"]
    assert {row["profile"] for row in read(tmp_path / "runs" / "ab")} == {"test_a", "test_b"}


def fake_training(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Runs that take no time, whose loss is lowest at a rate of 1e-3; returns the rates that were tried."""
    from gesso.config import files
    from gesso.core.folder import RunFolder, write_json

    tried: list[float] = []

    def train(run: Any, *, resume: str | None, emit: Any) -> Path:
        place = RunFolder(run.folder)
        place.prepare()
        rate = run.training.learning_rate
        tried.append(rate)
        loss = abs(rate / 1e-3 - 1)
        write_json(
            place.metrics, {"validation_step": [0, 1], "validation_loss": [9.0, loss], "step": [1], "loss": [1.0]}
        )
        write_json(place.status, {"state": "finished"})
        place.config.write_text(files.dump(run))
        return run.folder

    monkeypatch.setattr(stages, "train", train)
    return tried


def search(run_file: Path, folder: Path, trials: int) -> Sweep:
    from gesso.config import files

    over = (axes.parse("training.learning_rate=1e-5..1e-2"), axes.parse("adapter.rank=2,4"))
    return Sweep(lambda sets: files.load(run_file, sets=sets), folder, over, search="optuna", trials=trials)


def test_a_search_checks_every_profile_before_it_starts(run_file: Path, tmp_path: Path) -> None:
    made = search(run_file, tmp_path / "profiles", 3)
    sound = replace(made, profiles={"one": ["training.steps=2"], "two": ["training.steps=3"]})
    sound.check()
    wrong = replace(sound, profiles=dict(sound.profiles) | {"two": ["training.text_encoder_stop=5"]})
    with pytest.raises(Problems, match="two"):
        wrong.check()


def test_a_search_goes_on_exactly_and_comes_closer(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = fake_training(monkeypatch)
    whole = search(run_file, tmp_path / "whole", 25)
    whole.check()
    outcomes = whole.carry_out(lambda _: None, tell=lambda _: None)
    assert len(outcomes) == 25
    assert all(1e-5 <= rate <= 1e-2 for rate in tried)
    at_once, _ = list(tried), tried.clear()
    search(run_file, tmp_path / "cut", 10).carry_out(lambda _: None, tell=lambda _: None)
    search(run_file, tmp_path / "cut", 25).carry_out(lambda _: None, tell=lambda _: None)
    assert tried == at_once, "the first ten are not made again, and the others are the same"
    best = results.ranked(outcomes, "loss")[0]
    assert abs(float(best.trial.values["training.learning_rate"]) / 1e-3 - 1) < 0.5
    first = min(abs(rate / 1e-3 - 1) for rate in at_once[:8])
    assert min(abs(rate / 1e-3 - 1) for rate in at_once) <= first


def test_a_failed_run_is_noted_and_the_next_one_starts(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = stages.train

    def failing(run: Any, *, resume: str | None, emit: Any) -> Path:
        if run.name == "rank-2":
            raise UserError("the loss of step 1 is not finite")
        return plain(run, resume=resume, emit=emit)

    monkeypatch.setattr(stages, "train", failing)
    answer = invoke(run_file, "--over", "adapter.rank=2,4", "--name", "half")
    assert answer.exit_code == UserError.exit_code
    assert {row["run"]: row["state"] for row in read(tmp_path / "half")} == {"rank-2": "failed", "rank-4": "finished"}
    assert "rank-2: the loss of step 1 is not finite" in (tmp_path / "half" / "results.md").read_text()
