"""Rules of losses, noise and timesteps: what clashes, and what has no effect beside something else."""

from __future__ import annotations

from collections.abc import Iterator

from gesso.config.findings import Finding, error, warning
from gesso.config.run import RunConfig
from gesso.core import recognition
from gesso.core.weighting import Debiased, EpsilonLike
from gesso.objectives import DPO, Denoise
from gesso.objectives.noising import Noising


def findings(run: RunConfig, *, predicts: str | None) -> Iterator[Finding]:
    """All of them; `predicts` is what the model answers, None where its files are not on this machine."""
    yield from _schedule(run, predicts)
    if isinstance(run.objective, Noising):
        if isinstance(run.objective, DPO):
            what = f"{run.objective.beta:g} counts as in Diffusion-DPO: mean error over the latent, beta / 2"
            yield Finding(
                "hint", "objective.beta", what, "numbers of other scripts: see the guide, preference training"
            )
        yield from _noise(run.objective, zero_terminal=bool(run.model.zero_terminal_snr))
    if isinstance(run.objective, Denoise):
        yield from _distance(run.objective)
        if run.objective.unmasked_weight and all(source.mask == "none" for source in run.data.sources):
            what = "no source has a mask, so it has no effect"
            yield error("objective.unmasked_weight", what, "set data.sources[].mask, or take it out")
        yield from _weighting(run.objective, predicts)
        if run.objective.identity is not None and (found := recognition.problem(run.objective.identity.model)):
            yield error(str(found.where), found.what, str(found.fix))


def _schedule(run: RunConfig, predicts: str | None) -> Iterator[Finding]:
    if run.model.zero_terminal_snr and predicts == "epsilon":
        what = "the last timestep would hold no picture, and a model that predicts the noise learns nothing from it"
        fix = "take it out, or set model.prediction: v_prediction for a model that was trained so"
        yield error("model.zero_terminal_snr", what, fix)


def _noise(objective: Noising, *, zero_terminal: bool) -> Iterator[Finding]:
    default = Noising.model_fields["pyramid_noise_discount"].default
    if not objective.pyramid_noise_iterations and objective.pyramid_noise_discount != default:
        what = "it has no effect without pyramid noise"
        yield error("objective.pyramid_noise_discount", what, "set objective.pyramid_noise_iterations, 6 is usual")
    if objective.noise_offset > 0.2:
        what = f"{objective.noise_offset:g} is so much that pictures come out flat or garish"
        yield warning("objective.noise_offset", what, "0.03 to 0.1 is usual")
    elif objective.noise_offset and zero_terminal:
        what = "a zero-terminal schedule already teaches very dark and bright pictures"
        yield warning("objective.noise_offset", what, "set it to 0")


def _distance(objective: Denoise) -> Iterator[Finding]:
    if objective.loss_type in ("huber", "smooth_l1"):
        if objective.huber_schedule != "constant" and objective.huber_delta >= 1:
            what = f"it falls from 1 to huber_delta, which is {objective.huber_delta:g}"
            yield error("objective.huber_schedule", what, "set objective.huber_delta below 1, 0.1 is usual")
        return
    for name in ("huber_delta", "huber_schedule"):
        given, default = objective.model_dump()[name], Denoise.model_fields[name].default
        if given != default:
            what = f"it has no effect on loss_type {objective.loss_type}"
            yield error(f"objective.{name}", what, "set objective.loss_type: huber, or take it out")


def _weighting(objective: Denoise, predicts: str | None) -> Iterator[Finding]:
    gamma, rule = objective.min_snr_gamma, objective.weighting
    if gamma is not None and gamma > 100:
        yield warning("objective.min_snr_gamma", f"{gamma:g} clips nothing worth clipping", "5 is usual")
    if predicts == "epsilon" and isinstance(rule, Debiased) and rule.v_rule != "same":
        what = "it is for models that predict v, and this one predicts the noise"
        yield error("objective.weighting.v_rule", what, "take it out")
    if predicts == "epsilon" and isinstance(rule, EpsilonLike):
        what = "this model predicts the noise, so epsilon is what it has without a weighting"
        yield error("objective.weighting.type", what, "take it out")
