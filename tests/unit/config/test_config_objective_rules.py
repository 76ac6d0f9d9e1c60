"""Settings of losses, noise and timesteps that clash, or that would do nothing, are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from gesso.config import advice, files
from gesso.config.run import RunConfig
from gesso.core.timesteps import Custom, LogitNormal
from gesso.core.weighting import Debiased, MinSNR, SoftMinSNR, Unweighted
from gesso.errors import Problems

RUN = "output: {folder}/out\ndata:\n  sources:\n    - path: {folder}/images\ntraining:\n  steps: 100\n"
V = "model.prediction=v_prediction"


def run(folder: Path, *sets: str) -> RunConfig:
    (folder / "images").mkdir(exist_ok=True)
    for i in range(4):
        (folder / "images" / f"{i}.png").write_bytes(b"")
        (folder / "images" / f"{i}.txt").write_text("a thing")
    return files.load_text(RUN.format(folder=folder), folder=folder, sets=sets).run


def found(folder: Path, *sets: str) -> dict[str, tuple[str, str]]:
    findings = advice.check(run(folder, *sets)).findings
    return {f.key: (f.level, f"{f.what} -> {f.fix}") for f in findings if f.key.startswith(("objective.", "model.z"))}


@pytest.mark.parametrize(
    ("sets", "key", "words"),
    [
        (["model.zero_terminal_snr=true", "model.prediction=epsilon"], "model.zero_terminal_snr", "learns nothing"),
        (["model.zero_terminal_snr=true", "model.base=micro:sdxl"], "model.zero_terminal_snr", "v_prediction"),
        (["objective.huber_delta=0.3"], "objective.huber_delta", "no effect on loss_type l2"),
        (["objective.huber_schedule=snr", "objective.loss_type=l1"], "objective.huber_schedule", "loss_type l1"),
        (
            ["objective.loss_type=huber", "objective.huber_schedule=snr", "objective.huber_delta=2"],
            "objective.huber_schedule",
            "which is 2 -> set objective.huber_delta below 1",
        ),
        (["objective.pyramid_noise_discount=0.8"], "objective.pyramid_noise_discount", "without pyramid noise"),
        (
            ["model.prediction=epsilon", "objective.weighting={type: debiased, v_rule: kohya}"],
            "objective.weighting.v_rule",
            "predicts the noise",
        ),
        (
            ["model.base=micro:sdxl", "objective.weighting.type=epsilon"],
            "objective.weighting.type",
            "predicts the noise",
        ),
    ],
)
def test_refused(tmp_path: Path, sets: list[str], key: str, words: str) -> None:
    ((name, (level, said)),) = found(tmp_path, *sets).items()
    assert (name, level) == (key, "error")
    assert words in said


@pytest.mark.parametrize(
    "sets",
    [
        [V, "model.zero_terminal_snr=true", "objective.min_snr_gamma=5"],
        ["model.zero_terminal_snr=false", "model.prediction=epsilon"],
        ["objective.loss_type=smooth_l1", "objective.huber_schedule=exponential", "objective.huber_delta=0.01"],
        ["objective.pyramid_noise_iterations=6", "objective.pyramid_noise_discount=0.8", "objective.noise_offset=0.1"],
        [V, "objective.weighting={type: debiased, v_rule: onetrainer}"],
        [V, "objective.weighting.type=epsilon"],
        ["objective.timesteps={type: beta, alpha: 2, beta: 1}", "objective.timestep_bias={begin: 0.5, multiplier: 2}"],
    ],
)
def test_accepted(tmp_path: Path, sets: list[str]) -> None:
    assert found(tmp_path, *sets) == {}


def test_warned_of(tmp_path: Path) -> None:
    assert "5 is usual" in found(tmp_path, "objective.min_snr_gamma=1e6")["objective.min_snr_gamma"][1]
    assert "garish" in found(tmp_path, "objective.noise_offset=0.5")["objective.noise_offset"][1]
    (both,) = found(tmp_path, V, "model.zero_terminal_snr=true", "objective.noise_offset=0.05").values()
    assert both[0] == "warning"
    assert "already teaches" in both[1]


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["objective.min_snr_gamma=5", "objective.weighting.type=p2"], "leave min_snr_gamma empty"),
        (["objective.weighting.type=min_sn"], "min_snr"),
        (["objective.weighting={type: p2, gamma: 0}"], "must be above 0"),
        (["objective.weighting={type: debiased, gamma: 5}"], "gamma"),
        (["objective.timesteps.type=logitnormal"], "logit_normal"),
        (["objective.timestep_bias.multiplier=2"], "say which part, with begin and end"),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, sets: list[str], words: str) -> None:
    with pytest.raises(Problems) as caught:
        run(tmp_path, *sets)
    assert words in "\n".join(str(problem) for problem in caught.value.problems)


def test_sections_are_chosen_by_type(tmp_path: Path) -> None:
    assert run(tmp_path).objective.weighting == Unweighted()
    made = run(
        tmp_path,
        "objective.weighting={type: soft_min_snr, gamma: 3}",
        "objective.timesteps={type: custom, weights: [1, 2]}",
    ).objective
    assert (made.weighting, made.timesteps) == (SoftMinSNR(gamma=3), Custom(weights=(1, 2)))
    made = run(tmp_path, "objective.weighting.type=debiased", "objective.timesteps.type=logit_normal").objective
    assert (made.weighting, made.timesteps) == (Debiased(), LogitNormal())
    assert run(tmp_path, "objective.min_snr_gamma=4").objective.rule == MinSNR(gamma=4)
    assert run(tmp_path, "objective.weighting={type: min_snr, gamma: 4}").objective.rule == MinSNR(gamma=4)
