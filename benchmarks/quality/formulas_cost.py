"""Wrong formulas of what is minimised: weights, distances, masks, prior preservation, preferences."""

from __future__ import annotations

from faults import Fault

ORACLES = "tests/oracles/test_oracle"
DENOISE = f"{ORACLES}_denoise.py"
LOSS_VALUE = f"{DENOISE}::test_loss_value"
LOSSES = f"{ORACLES}_losses.py"
WEIGHTS = f"{LOSSES}::test_the_weight_of_each_timestep"
RULES = f"{LOSSES}::test_the_rule_itself_in_float64"
DISTANCES = f"{LOSSES}::test_distances"
MASKS = f"{LOSSES}::test_masks"
DPO = f"{ORACLES}_dpo.py"
PAIRS = f"{DPO}::test_the_loss_of_each_pair"
ONE_NOISE = f"{DPO}::test_both_pictures_and_both_models_see_one_noise_one_timestep_and_one_caption"
PAIR_SOURCES = "tests/unit/data/test_data_pairs_sources.py"
PAIR_BATCHES = "tests/unit/data/test_data_pairs.py"
DREAMBOOTH = f"{ORACLES}_dreambooth.py"
STEP_LOSS = f"{DREAMBOOTH}::test_the_loss_of_a_step"
MODEL_PRIOR = f"{DREAMBOOTH}::test_the_model_before_training_as_the_prior"

WEIGHTING = (
    Fault(
        "min-SNR of v as that of noise plus one",
        "core/weighting.py",
        "return self.on_x0(snr) / error_ratio(snr, answer)",
        'return self.on_x0(snr) / snr + (answer == "v_prediction")',
        (WEIGHTS, RULES),
        known=True,
    ),
    Fault(
        "debiased v as 1 / (SNR + 1)",
        "core/weighting.py",
        "            return super().on_answer(snr, answer)",
        '            return super().on_answer(snr, answer) if answer == "epsilon" else 1 / (snr + 1)',
        (WEIGHTS, RULES),
        known=True,
    ),
    Fault(
        "debiased v as 1 / sqrt(SNR + 1)",
        "core/weighting.py",
        "            return super().on_answer(snr, answer)",
        '            return super().on_answer(snr, answer) if answer == "epsilon" else 1 / (snr + 1).sqrt()',
        (WEIGHTS, RULES),
        known=True,
    ),
    Fault(
        "debiased by 1 / SNR",
        "core/weighting.py",
        "return snr.sqrt() * (snr / _DEBIASED_CAP)",
        "return (snr / _DEBIASED_CAP)",
        (WEIGHTS, RULES),
    ),
    Fault(
        "debiased without its cap",
        "core/weighting.py",
        "_DEBIASED_CAP = 1000.0",
        "_DEBIASED_CAP = 1e9",
        (WEIGHTS, RULES),
    ),
    Fault(
        "soft min-SNR that levels out at 1",
        "core/weighting.py",
        "return snr * (self.gamma / (snr + self.gamma))",
        "return snr / (snr + self.gamma)",
        (WEIGHTS, RULES),
    ),
    Fault(
        "P2 with its k left out",
        "core/weighting.py",
        "(self.k + snr).pow(self.gamma)",
        "(1 + snr).pow(self.gamma)",
        (WEIGHTS, RULES),
    ),
    Fault(
        "a flow weighed like v",
        "core/weighting.py",
        "return (1 + snr.sqrt()).square()",
        "return 1 + snr",
        (WEIGHTS, RULES),
    ),
    Fault(
        "the ratio of levels as the ratio of powers, for a flow",
        "core/noise.py",
        "return ((1 - s) / s.clamp(min=1e-6)).square()",
        "return (1 - s) / s.clamp(min=1e-6)",
        (WEIGHTS,),
    ),
    Fault(
        "the squared error summed over the latent",
        "objectives/denoise.py",
        "return distance.flatten(1).mean(1)",
        "return distance.flatten(1).sum(1)",
        (LOSS_VALUE,),
    ),
    Fault(
        "the loss in the precision of the model",
        "objectives/denoise.py",
        "prediction.float() - target",
        "prediction - target.to(prediction.dtype)",
        (f"{DENOISE}::test_low_precision_answers_cost_float32_losses",),
        known=True,
    ),
    Fault(
        "a picture's own weight ignored",
        "objectives/denoise.py",
        " * batch.weights",
        "",
        (LOSS_VALUE, f"{DENOISE}::test_weights_scale_each_sample_alone"),
    ),
    Fault(
        "the plain mean under a mask",
        "objectives/denoise.py",
        "return (distance * weights).flatten(1).mean(1) / area",
        "return (distance * weights).flatten(1).mean(1)",
        (MASKS,),
        known=True,
    ),
    Fault(
        "the unmasked weight added on top of the mask",
        "objectives/denoise.py",
        "weights = self.unmasked_weight + (1 - self.unmasked_weight) * mask",
        "weights = self.unmasked_weight + mask",
        (MASKS,),
    ),
    Fault(
        "half of Huber's distance",
        "objectives/distance.py",
        'return 2 * bowl * c if kind == "huber" else 2 * bowl',
        'return bowl * c if kind == "huber" else 2 * bowl',
        (DISTANCES,),
    ),
    Fault(
        "huber and smooth_l1 exchanged",
        "objectives/distance.py",
        'if kind == "huber" else',
        'if kind != "huber" else',
        (DISTANCES,),
    ),
    Fault(
        "Huber's delta that grows with the noise",
        "objectives/distance.py",
        "(math.log(delta) * noise.level(t)).exp()",
        "(math.log(delta) * (1 - noise.level(t))).exp()",
        (DISTANCES,),
    ),
    Fault(
        "Huber's delta by the level instead of the power",
        "objectives/distance.py",
        "(snr.sqrt() / (1 + snr.sqrt())).square() + delta",
        "(snr.sqrt() / (1 + snr.sqrt())) + delta",
        (DISTANCES,),
    ),
    Fault(
        "log cosh of large errors without its constant",
        "objectives/distance.py",
        "torch.log1p(torch.exp(-2 * size)) - math.log(2))",
        "torch.log1p(torch.exp(-2 * size)))",
        (DISTANCES,),
    ),
)

PRIOR = (
    Fault(
        "one mean over instances and class images",
        "objectives/dreambooth.py",
        "sum(batch.counts.values()) / count for",
        "1.0 for",
        (STEP_LOSS,),
        known=True,
    ),
    Fault(
        "the prior's weight on the instances as well",
        "objectives/dreambooth.py",
        '            per_role["prior"] *= self.prior_weight',
        "            per_role = {role: factor * self.prior_weight for role, factor in per_role.items()}",
        (STEP_LOSS,),
    ),
    Fault(
        "means of the roles in each batch, not in the step",
        "objectives/dreambooth.py",
        "per_role = {role: sum(batch.counts.values()) / count for role, count in batch.counts.items() if count}",
        "per_role = {role: len(batch.roles) / batch.roles.count(role) for role in batch.roles}",
        (STEP_LOSS,),
    ),
    Fault(
        "class images told the size of an instance",
        "data/plan.py",
        "return visits + [self._viewer.visit(*turn) for turn in self._prior.stretch(start, count)]",
        "from dataclasses import replace\n"
        "        prior = [self._viewer.visit(*turn) for turn in self._prior.stretch(start, count)]\n"
        "        return visits + [replace(v, row=replace(v.row, width=i.row.width, height=i.row.height))\n"
        "                         for v, i in zip(prior, visits)]",
        (f"{DREAMBOOTH}::test_class_images_have_sizes_and_crops_of_their_own",),
        known=True,
    ),
    Fault(
        "the same class images in every step",
        "data/plan.py",
        "for turn in self._prior.stretch(start, count)]",
        "for turn in self._prior.stretch(0, count)]",
        (f"{DREAMBOOTH}::test_class_images_have_sizes_and_crops_of_their_own",),
    ),
    Fault(
        "gradients through the model that is the prior",
        "objectives/dreambooth.py",
        "with torch.no_grad(), policy.reference():",
        "with policy.reference():",
        (MODEL_PRIOR,),
    ),
    Fault(
        "the model in training as its own prior",
        "objectives/dreambooth.py",
        "with torch.no_grad(), policy.reference():",
        "with torch.no_grad():",
        (MODEL_PRIOR,),
    ),
    Fault(
        "the model's own answer as the target of the instances too",
        "objectives/dreambooth.py",
        "return torch.where(prior.view(-1, 1, 1, 1), before, usual)",
        "return before",
        (MODEL_PRIOR,),
    ),
)

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
        "_twice(asked), _twice(mixed), _twice(t)",
        "_twice(asked, asked.flip(0)), _twice(mixed, mixed.flip(0)), _twice(t)",
        (PAIRS, ONE_NOISE),
        known=True,
    ),
    Fault(
        "a timestep of its own for the rejected picture",
        "objectives/dpo.py",
        "_twice(asked), _twice(mixed), _twice(t)",
        "_twice(asked), _twice(mixed), _twice(t, t.flip(0))",
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

PAIRED = (
    Fault(
        "ties trained on as if one side had won",
        "data/sources/pairs.py",
        "    if value is None or value == 0.5:",
        "    if value is None:",
        (f"{PAIR_SOURCES}::TestColumns::test_the_label_decides_and_ties_are_never_trained_on",),
        known=True,
    ),
    Fault(
        "the label of the other side",
        "data/sources/pairs.py",
        "return (first, second) if value == 1 else (second, first)",
        "return (first, second) if value == 0 else (second, first)",
        (f"{PAIR_SOURCES}::TestColumns::test_the_label_decides_and_ties_are_never_trained_on",),
    ),
    Fault(
        "a rejected picture of another shape cropped or stretched to the preferred one's",
        "data/pairs.py",
        "elif not same_shape(pair.size, pair.rejected_size):",
        "elif False:",
        (f"{PAIR_BATCHES}::TestWhatTeachesNothing::test_another_shape_is_left_out_and_never_stretched",),
        known=True,
    ),
    Fault(
        "a VAE draw of its own for the rejected picture",
        "data/loader.py",
        "self._family.latents(torch.stack(rivals), posterior)",
        'self._family.latents(torch.stack(rivals), torch.from_numpy(draws.normal("rivals", shape)))',
        (f"{PAIR_BATCHES}::TestBatches::test_one_picture_in_two_files_has_the_same_latents_on_both_sides",),
        known=True,
    ),
)

COST = (*WEIGHTING, *PRIOR, *PREFERENCE, *PAIRED)
