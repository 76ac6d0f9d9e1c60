"""What options of sd-scripts say about losses, noise and timesteps."""

from __future__ import annotations

from gesso.config.dialects import rules
from gesso.config.dialects.draft import Draft, Item, number
from gesso.config.problems import show

_KINDS = ("l2", "l1", "smooth_l1", "huber")
_BOTH = "sd-scripts multiplies its weightings, and a run here has one"


def lay(draft: Draft, *, predicts_v: bool) -> None:
    """Read them from `draft`; `predicts_v` is whether v_parameterization is on."""
    _distance(draft)
    _weighting(draft, predicts_v)
    _pyramid(draft)
    for name in ("timestep_low", "timestep_high"):
        item = draft.take(name)
        if item is not None:
            value = number(item.value)
            draft.set(f"objective.{name}", value / 1000 if isinstance(value, int | float) else value, item)
    rescaled = draft.take("zero_terminal_snr")
    if rescaled is not None and draft.flag(rescaled):
        note = "weightings follow the rescaled schedule, which those of sd-scripts do not"
        draft.set("model.zero_terminal_snr", True, rescaled, note=note)
    elif rescaled is not None:
        draft.ignore(rescaled, "the schedule is the model's own")


def _distance(draft: Draft) -> None:
    kind, schedule, delta, scale = (draft.take(n) for n in ("loss_type", "huber_schedule", "huber_c", "huber_scale"))
    if kind is not None and kind.value in _KINDS:
        draft.set("objective.loss_type", kind.value, kind)
    elif kind is not None:
        draft.problem(kind, f"{kind.key} must be one of {', '.join(_KINDS)}, not {show(kind.value)}")
    curved = kind is not None and kind.value in ("huber", "smooth_l1")
    for item, native in ((schedule, "huber_schedule"), (delta, "huber_delta")):
        if item is not None and curved:
            draft.set(f"objective.{native}", number(item.value), item)
        elif item is not None:
            draft.ignore(item, "the loss is neither huber nor smooth_l1")
    if curved and schedule is None:
        draft.assume("objective.huber_schedule", "snr", "the default of sd-scripts")
    if scale is not None:
        rules.refused(draft, scale, "huber has no scale beside its delta", off=(1,))


def _weighting(draft: Draft, predicts_v: bool) -> None:
    gamma, debiased, like_noise = (
        draft.take(n) for n in ("min_snr_gamma", "debiased_estimation_loss", "scale_v_pred_loss_like_noise_pred")
    )
    chosen: Item | None = None
    if gamma is not None and number(gamma.value) == 0:
        draft.ignore(gamma, "off")
    elif gamma is not None:
        chosen = gamma
        draft.set("objective.min_snr_gamma", number(gamma.value), gamma)
    for item, kind in ((debiased, "debiased"), (like_noise, "epsilon")):
        if item is None:
            continue
        if not draft.flag(item):
            draft.ignore(item, "off")
        elif kind == "epsilon" and not predicts_v:
            draft.ignore(item, "it is for models that predict v (v_parameterization)")
        elif chosen is not None:
            draft.refuse(item, f"{_BOTH}: {chosen.key}", fix="take one of them out")
        else:
            chosen = item
            draft.set("objective.weighting.type", kind, item)
            if kind == "debiased" and predicts_v:
                why = "the rule of sd-scripts for v; same would weigh a guess of the picture as with epsilon"
                draft.assume("objective.weighting.v_rule", "kohya", why)


def _pyramid(draft: Draft) -> None:
    iterations, discount = draft.take("multires_noise_iterations"), draft.take("multires_noise_discount")
    on = iterations is not None and number(iterations.value) != 0
    if iterations is not None and on:
        note = "the noise is scaled to variance 1 by calculation, not by what a batch happened to draw"
        draft.set("objective.pyramid_noise_iterations", number(iterations.value), iterations, note=note)
    elif iterations is not None:
        draft.ignore(iterations, "off")
    if discount is not None and on:
        draft.set("objective.pyramid_noise_discount", number(discount.value), discount)
    elif discount is not None:
        draft.ignore(discount, "belongs to multires_noise_iterations")
