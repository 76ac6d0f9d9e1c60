"""Wrong formulas of what is minimised: forward process, targets, weights, distances, priors, preferences."""

from __future__ import annotations

from faults import Fault

ORACLES = "tests/oracles/test_oracle"
DPO = f"{ORACLES}_dpo.py"
PAIRS = f"{DPO}::test_the_loss_of_each_pair"
ONE_NOISE = f"{DPO}::test_both_pictures_and_both_models_see_one_noise_one_timestep_and_one_caption"

PREFERENCE = (
    Fault(
        "beta instead of half of it",
        "objectives/dpo.py",
        "-self.beta / 2 *",
        "-self.beta *",
        (PAIRS, f"{DPO}::test_with_beta_of_the_paper_and_not_twice_or_half_of_it"),
        known=True,
    ),
    Fault(
        "the rejected picture preferred",
        "objectives/dpo.py",
        "-self.beta / 2 *",
        "self.beta / 2 *",
        (PAIRS,),
    ),
    Fault(
        "the error of a latent as a sum over its values",
        "objectives/dpo.py",
        ".square().flatten(1).mean(1)",
        ".square().flatten(1).sum(1)",
        (PAIRS, f"{DPO}::test_beta_does_not_depend_on_the_size_of_the_latent"),
        known=True,
    ),
    Fault(
        "no reference",
        "objectives/dpo.py",
        "((trained.chosen - before.chosen) - (trained.rejected - before.rejected))",
        "(trained.chosen - trained.rejected)",
        (PAIRS,),
    ),
    Fault(
        "the model in training as its own reference",
        "objectives/dpo.py",
        "with torch.no_grad(), policy.reference():",
        "with torch.no_grad():",
        (PAIRS,),
    ),
    Fault(
        "gradients through the reference",
        "objectives/dpo.py",
        "with torch.no_grad(), policy.reference():",
        "with policy.reference():",
        (f"{DPO}::test_the_gradient_of_a_trained_model",),
    ),
    Fault(
        "the reference after the model in training",
        "objectives/dpo.py",
        "        with torch.no_grad(), policy.reference():\n            before = errors()\n"
        "        return errors(), before",
        "        live = errors()\n        with torch.no_grad(), policy.reference():\n            return live, errors()",
        (f"{DPO}::test_the_reference_comes_before_the_live_model",),
        known=True,
    ),
    Fault(
        "noise of its own for the rejected picture",
        "objectives/dpo.py",
        "_twice(batch.noise), _twice(t)",
        "_twice(batch.noise, batch.noise.flip(0)), _twice(t)",
        (PAIRS, ONE_NOISE),
        known=True,
    ),
    Fault(
        "a timestep of its own for the rejected picture",
        "objectives/dpo.py",
        "_twice(batch.noise), _twice(t)",
        "_twice(batch.noise), _twice(t, t.flip(0))",
        (PAIRS, ONE_NOISE),
        known=True,
    ),
    Fault(
        "another caption for the rejected picture",
        "objectives/dpo.py",
        "cond = {name: _twice(value) for",
        "cond = {name: _twice(value, value.flip(0)) for",
        (ONE_NOISE,),
    ),
    Fault(
        "the sigmoid without its logarithm",
        "objectives/dpo.py",
        "return -(1 - wrong) * logsigmoid(u)",
        "return -(1 - wrong) * u.sigmoid()",
        (PAIRS,),
    ),
    Fault(
        "smoothed labels that count more than once",
        "objectives/dpo.py",
        "return -(1 - wrong) * logsigmoid(u)",
        "return -logsigmoid(u)",
        (PAIRS,),
    ),
    Fault(
        "IPO's margin divided by beta once more",
        "objectives/dpo.py",
        "return (u - 0.5).square()",
        "return (u - 0.5 / self.beta).square()",
        (PAIRS,),
    ),
    Fault(
        "the ordinary loss of the rejected picture",
        "objectives/dpo.py",
        "per_pair = per_pair + self.sft_weight * trained.chosen",
        "per_pair = per_pair + self.sft_weight * trained.rejected",
        (f"{DPO}::test_the_share_of_the_ordinary_loss",),
    ),
    Fault(
        "undecided pairs counted as right",
        "objectives/dpo.py",
        '"accuracy": (u.sign() + 1) / 2',
        '"accuracy": (u >= 0).float()',
        (f"{DPO}::test_before_the_first_step_the_loss_is_ln_2_and_the_margin_nothing",),
    ),
)

PROCESS = PREFERENCE
