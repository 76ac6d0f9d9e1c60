"""Loss weightings at every timestep, for every answer, against their papers; one guess of x0 costs the same."""

from __future__ import annotations

from typing import Any

import formulas
import loss_formulas
import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from rig import PREDICTIONS, FunctionPolicy, ddpm, make_batch, normal

from gesso.core.noise import RectifiedFlow
from gesso.core.weighting import AnyWeighting, Debiased, MinSNR, Weighting
from gesso.errors import UserError
from gesso.objectives import Denoise

T = torch.arange(1000)
ABAR = formulas.SDXL_ALPHA_BAR
SNR = formulas.snr(ABAR)
ABAR_ZERO = formulas.zero_terminal(ABAR)
LEVELS = np.linspace(0.001, 0.999, 999)
RULES: list[dict[str, Any]] = [
    {"type": "none"},
    {"type": "min_snr", "gamma": 5.0},
    {"type": "min_snr", "gamma": 0.7},
    {"type": "soft_min_snr", "gamma": 5.0},
    {"type": "soft_min_snr", "gamma": 0.7},
    {"type": "debiased"},
    {"type": "p2", "gamma": 1.0, "k": 1.0},
    {"type": "p2", "gamma": 0.5, "k": 2.0},
    {"type": "epsilon"},
]
NAMES = ["-".join(str(v) for v in rule.values()) for rule in RULES]


def made(rule: dict[str, Any]) -> Weighting:
    return TypeAdapter(AnyWeighting).validate_python(rule)


def wanted(answer: str, rule: dict[str, Any], snr: np.ndarray) -> np.ndarray:
    rest = {key: value for key, value in rule.items() if key != "type"}
    return loss_formulas.weight_on(answer, rule["type"], snr, **rest)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
@pytest.mark.parametrize("answer", PREDICTIONS)
def test_weights_of_the_rules(answer: str, rule: dict[str, Any]) -> None:
    exact = made(rule).on_answer(torch.from_numpy(SNR.copy()), answer)  # type: ignore[arg-type]
    assert exact.dtype == torch.float64
    assert formulas.relative(exact.numpy(), wanted(answer, rule, SNR)) < 1e-12
    found = ddpm(answer).weight(T, made(rule))
    assert found.dtype == torch.float32
    assert formulas.relative(found.double().numpy(), wanted(answer, rule, SNR)) < 1e-6


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_weights_of_the_rules_for_a_flow(rule: dict[str, Any]) -> None:
    t = torch.from_numpy(LEVELS * 1000)
    found = RectifiedFlow().weight(t.float(), made(rule)).double().numpy()
    exact = made(rule).on_answer(RectifiedFlow().snr(t), "flow").numpy()
    snr = loss_formulas.flow_snr(LEVELS)
    assert formulas.relative(exact, wanted("flow", rule, snr)) < 1e-11
    # What float32 keeps of 1 - s, where s is 0.999, is the last digit or two.
    assert (
        formulas.relative(found, wanted("flow", rule, loss_formulas.flow_snr(t.float().double().numpy() / 1000))) < 1e-6
    )


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_weights_are_finite_at_both_ends_of_a_flow(rule: dict[str, Any]) -> None:
    found = RectifiedFlow().weight(torch.tensor([0.0, 1e-30, 1000.0]), made(rule))
    assert torch.isfinite(found).all()
    assert (found >= 0).all()


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_weights_of_a_zero_terminal_schedule_are_finite_and_of_the_rescaled_table(rule: dict[str, Any]) -> None:
    found = ddpm("v_prediction", zero_snr=True).weight(T, made(rule)).double().numpy()
    assert np.isfinite(found).all()
    assert found[-1] == (1.0 if rule["type"] == "none" else 0.0)
    assert formulas.relative(found[:-1], wanted("v_prediction", rule, formulas.snr(ABAR_ZERO[:-1]))) < 1e-6


@pytest.mark.parametrize("tool", ["kohya", "onetrainer"])
def test_debiased_v_of_other_tools(tool: Any) -> None:
    rule = Debiased(v_rule=tool)
    found = ddpm("v_prediction").weight(T, rule).double().numpy()
    assert formulas.relative(found, loss_formulas.tool_debiased_v(tool, SNR)) < 1e-6
    assert not np.allclose(found, ddpm("v_prediction").weight(T, Debiased()).numpy(), rtol=0.1), "it is another rule"
    assert torch.equal(ddpm().weight(T, rule), ddpm().weight(T, Debiased())), "epsilon is as in the paper"
    with pytest.raises(UserError, match="predicts a flow"):
        RectifiedFlow().weight(torch.tensor([500.0]), rule)


def test_no_rule_is_a_weight_of_one() -> None:
    assert torch.equal(ddpm("v_prediction").weight(T), torch.ones(1000))
    assert torch.equal(RectifiedFlow().weight(torch.tensor([3.5])), torch.ones(1))


@pytest.mark.parametrize("rule", [r for r in RULES if r["type"] != "none"], ids=NAMES[1:])
def test_a_guess_of_the_picture_costs_the_same_as_noise_as_v_and_as_flow(rule: dict[str, Any]) -> None:
    """Draw x0, n and a guess; noise all of them to the same SNR, say the guess in three ways: one loss."""
    latents, draws, guess = (normal(seed, 1000, 4, 2, 2) for seed in (10, 11, 12))
    t = np.arange(1000)
    x_t = formulas.corrupt(ABAR, latents, draws, t)
    s = 1.0 / (1.0 + np.sqrt(SNR))
    flow_t = torch.from_numpy(1000 * s)
    x_s = RectifiedFlow().corrupt(torch.from_numpy(latents), torch.from_numpy(draws), flow_t).double().numpy()
    answers = {p: formulas.prediction_from_x0(ABAR, guess.astype(np.float64), x_t, t, p) for p in PREDICTIONS}
    answers["flow"] = (x_s - guess) / (flow_t.float().double().numpy() / 1000)[:, None, None, None]
    batch = make_batch(latents, draws, (t + 0.5) / 1000)
    objective = Denoise.model_validate({"weighting": rule})
    costs = {}
    for name, answer in answers.items():
        noise = RectifiedFlow() if name == "flow" else ddpm(name)
        times = flow_t.float() if name == "flow" else T
        target = noise.target(batch.latents, batch.noise, times)
        policy = FunctionPolicy(noise, lambda noisy, _t: noisy)  # type: ignore[arg-type]
        costs[name] = objective.cost(policy, batch, torch.from_numpy(answer).float(), target, times).double().numpy()
    on_x0 = (
        loss_formulas.weight_on_epsilon(rule["type"], SNR, **{k: v for k, v in rule.items() if k != "type"})
        * SNR
        * formulas.per_sample("l2", guess, latents)
    )
    # The float32 difference of two numbers near 1 keeps about five digits where SNR is 0.005.
    for name, found in costs.items():
        assert formulas.relative(found, on_x0) < 3e-5, name


def test_the_short_form_of_min_snr() -> None:
    assert Denoise(min_snr_gamma=3).rule == MinSNR(gamma=3)
    assert Denoise(weighting=MinSNR(gamma=3)).rule == MinSNR(gamma=3)
    with pytest.raises(ValueError, match="min_snr_gamma and weighting"):
        Denoise.model_validate({"min_snr_gamma": 5, "weighting": {"type": "p2"}})
