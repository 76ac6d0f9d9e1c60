"""Losses, noise and timesteps of sd-scripts and ai-toolkit, as they are trained with here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kohya_helpers import load, notes, problems

from gesso.core.timesteps import Beta
from gesso.core.weighting import Debiased, EpsilonLike, MinSNR, Unweighted

BARE = 'pretrained_model_name_or_path = "a/b"\nresolution = "1024"\ntrain_data_dir = "/x"\nnetwork_dim = 4\n'


def objective(lines: str, folder: Path) -> Any:
    return load(BARE + lines, folder).run.objective


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ("", Unweighted()),
        ("min_snr_gamma = 3", MinSNR(gamma=3)),
        ("min_snr_gamma = 0", Unweighted()),
        ("debiased_estimation_loss = true", Debiased()),
        ("debiased_estimation_loss = true\nv_parameterization = true", Debiased(v_rule="kohya")),
        ("scale_v_pred_loss_like_noise_pred = true\nv_parameterization = true", EpsilonLike()),
        ("scale_v_pred_loss_like_noise_pred = true", Unweighted()),
        ("debiased_estimation_loss = false\nmin_snr_gamma = 5", MinSNR(gamma=5)),
    ],
)
def test_weightings(lines: str, rule: object, tmp_path: Path) -> None:
    assert objective(lines, tmp_path).rule == rule


@pytest.mark.parametrize(
    "lines",
    [
        "min_snr_gamma = 5\ndebiased_estimation_loss = true",
        "min_snr_gamma = 5\nscale_v_pred_loss_like_noise_pred = true\nv_parameterization = true",
        "debiased_estimation_loss = true\nscale_v_pred_loss_like_noise_pred = true\nv_parameterization = true",
    ],
)
def test_two_weightings_at_once_are_refused(lines: str, tmp_path: Path) -> None:
    (found,) = problems(BARE + lines, tmp_path)
    assert "sd-scripts multiplies its weightings" in found


@pytest.mark.parametrize(
    ("lines", "wanted"),
    [
        ('loss_type = "huber"', ("huber", "snr", 0.1)),
        ('loss_type = "huber"\nhuber_schedule = "constant"\nhuber_c = 0.2', ("huber", "constant", 0.2)),
        ('loss_type = "smooth_l1"\nhuber_schedule = "exponential"', ("smooth_l1", "exponential", 0.1)),
        ('loss_type = "l1"\nhuber_schedule = "snr"\nhuber_c = 0.3', ("l1", "constant", 0.1)),
    ],
)
def test_distances(lines: str, wanted: tuple[str, str, float], tmp_path: Path) -> None:
    made = objective(lines, tmp_path)
    assert (made.loss_type, made.huber_schedule, made.huber_delta) == wanted


def test_noise_schedule_and_range(tmp_path: Path) -> None:
    lines = (
        "multires_noise_iterations = 8\nmultires_noise_discount = 0.2\nnoise_offset = 0.05\nip_noise_gamma = 0.1\n"
        "min_timestep = 200\nmax_timestep = 800\nzero_terminal_snr = true\nv_parameterization = true\n"
    )
    loaded = load(BARE + lines, tmp_path)
    made = loaded.run.objective
    assert (made.pyramid_noise_iterations, made.pyramid_noise_discount) == (8, 0.2)
    assert (made.noise_offset, made.input_perturbation) == (0.05, 0.1)
    assert (made.timestep_low, made.timestep_high) == (0.2, 0.8)
    assert (loaded.run.model.zero_terminal_snr, loaded.run.model.prediction) == (True, "v_prediction")
    assert loaded.report is not None
    assert "rescaled schedule" in notes(loaded.report)["zero_terminal_snr"]
    off = load(BARE + "zero_terminal_snr = false\nmultires_noise_iterations = 0\n", tmp_path).run
    assert off.model.zero_terminal_snr is None
    assert off.objective.pyramid_noise_iterations == 0


JOB = """\
job: extension
config:
  name: n
  process:
  - type: sd_trainer
    datasets:
    - folder_path: /x
    model: {{name_or_path: a/b, arch: sdxl}}
    train: {{steps: 10, lr: 1e-4, content_or_style: {word}}}
"""


@pytest.mark.parametrize(("word", "alpha", "beta"), [("content", 1, 1 / 3), ("style", 1 / 3, 1)])
def test_content_and_style_of_ai_toolkit(word: str, alpha: float, beta: float, tmp_path: Path) -> None:
    """Place u^3 of a table that begins with the noisiest timestep is for content, 1 - u^3 for style."""
    made = load(JOB.format(word=word), tmp_path, name="job.yaml").run.objective
    assert made.timesteps == Beta(alpha=alpha, beta=beta)
    share = 0.3
    # P(t / T < 0.3): the place u^3 counted from the noisy end is above 0.7, or 1 - u^3 is.
    wanted = 1 - 0.7 ** (1 / 3) if word == "content" else share ** (1 / 3)
    assert made.timesteps.cdf(share) == pytest.approx(wanted, rel=1e-9)


def test_balanced_and_unknown_words_of_ai_toolkit(tmp_path: Path) -> None:
    assert load(JOB.format(word="balanced"), tmp_path, name="job.yaml").run.objective.timesteps.type == "uniform"
    (found,) = problems(JOB.format(word="both"), tmp_path, name="job.yaml")
    assert "must be balanced, content or style" in found


FLAT = "pretrained_model_name_or_path: a/b\ntrain_data_dir: /x\nmax_train_steps: 10\n"


@pytest.mark.parametrize(
    ("lines", "bias"),
    [
        ("timestep_bias_strategy: later\ntimestep_bias_multiplier: 3\n", (0.75, 1, 3)),
        ("timestep_bias_strategy: earlier\ntimestep_bias_portion: 0.4\ntimestep_bias_multiplier: 2\n", (0, 0.4, 2)),
        (
            "timestep_bias_strategy: range\ntimestep_bias_begin: 200\ntimestep_bias_end: 600\n"
            "timestep_bias_multiplier: 5\n",
            (0.2, 0.6, 5),
        ),
        ("timestep_bias_strategy: none\ntimestep_bias_multiplier: 3\ntimestep_bias_begin: 200\n", (0, 1, 1)),
    ],
)
def test_timestep_bias_of_the_diffusers_scripts(lines: str, bias: tuple[float, float, float], tmp_path: Path) -> None:
    loaded = load(FLAT + lines, tmp_path, name="train.yaml")
    found = loaded.run.objective.timestep_bias
    assert (found.begin, found.end, found.multiplier) == bias
    assert loaded.report is not None
    entries = (*loaded.report.mapped, *loaded.report.ignored)
    assert {entry.key for entry in entries} >= {line.split(":")[0] for line in lines.splitlines()}


def test_an_unknown_bias_is_named(tmp_path: Path) -> None:
    (found,) = problems(FLAT + "timestep_bias_strategy: sometimes\n", tmp_path, name="train.yaml")
    assert "must be none, earlier, later or range" in found
