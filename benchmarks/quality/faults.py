"""The faults that `mutations.py` seeds, one at a time: exact replacements in the source, and tests to notice them."""

from __future__ import annotations

from dataclasses import dataclass

STEP = "tests/quality/test_quality_whole_step.py"
STEP_CAPTIONS = f"{STEP}::test_the_denoiser_reads_the_caption_of_the_picture_as_diffusers_encodes_it"
STEP_SIZES = f"{STEP}::test_the_denoiser_is_told_the_size_and_crop_that_diffusers_would_tell"
STEP_NOISE = f"{STEP}::test_the_denoiser_sees_the_picture_of_the_file_at_the_noise_level_of_diffusers"
STEP_FILES = f"{STEP}::test_every_file_of_a_run_carries_the_strength_that_was_trained"
STEP_LOSS = f"{STEP}::test_the_loss_is_the_weighted_error_in_the_noise"
LESSONS = "tests/quality/test_quality_lessons.py"
LAWS = "tests/laws"
ORACLES = "tests/oracles"
DATA = "tests/unit/data"
EXPORT = (
    "tests/unit/export/test_export_lora.py::test_a_user_of_diffusers_gets_the_trained_weights",
    "tests/unit/export/test_export_lora.py::test_a_comfyui_like_reader_finds_every_key_and_the_same_change",
)


@dataclass(frozen=True)
class Fault:
    """One exact replacement in one file, and the tests that are run against it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    known: bool = False
    """Whether a trainer in wide use computes it so, or did."""


ASKED = (
    Fault(
        "text-encoder LoRA silently not trained",
        "training/policy.py",
        "        return self.family.condition(text, batch.geometry)",
        "        text = {name: tensor.detach() for name, tensor in text.items()}\n"
        "        return self.family.condition(text, batch.geometry)",
        (
            f"{LAWS}/test_law_parts.py::test_trained_parts[True-None-parts1-1]",
            f"{LESSONS}::test_text_encoders_learn_too",
        ),
    ),
    Fault(
        "captions shuffled between images, in each batch",
        "data/loader.py",
        "captions = tuple(v.caption for v in visits)",
        "captions = tuple(v.caption for v in reversed(visits))",
        (STEP_CAPTIONS, f"{LESSONS}::test_captions_decide_what_is_learnt", f"{DATA}/test_data_loader.py::TestPairing"),
    ),
    Fault(
        "captions shuffled between images, when they are read",
        "data/sources/folder.py",
        "captions = dict(zip(files, tree.texts(files), strict=True))",
        "captions = dict(zip(files, reversed(tree.texts(files)), strict=True))",
        (STEP_CAPTIONS, f"{LESSONS}::test_captions_decide_what_is_learnt"),
    ),
    Fault(
        "alpha ignored at export, kohya's format",
        "export/lora.py",
        'tensors[f"{names[layer]}.alpha"] = _alpha(alpha, dtype)',
        'tensors[f"{names[layer]}.alpha"] = _alpha(float(matrices["lora_down.weight"].shape[0]), dtype)',
        (STEP_FILES, *EXPORT),
    ),
    Fault(
        "alpha ignored at export, diffusers' format",
        "export/lora.py",
        "if fold_alpha else settings\n",
        "\n",
        (STEP_FILES, *EXPORT),
    ),
    Fault(
        "alpha ignored in checkpoints",
        "adapters/attached.py",
        'del config["auto_mapping"]',
        'del config["auto_mapping"]\n    config["lora_alpha"] = config["r"]',
        (
            STEP_FILES,
            f"{ORACLES}/test_oracle_lora.py::test_diffusers_loads_the_same_model",
        ),
    ),
    Fault(
        "wrong time ids: all zero",
        "families/sdxl.py",
        "time_ids = torch.tensor(geometry, dtype=torch.float32,",
        "time_ids = torch.zeros(len(geometry), 6, dtype=torch.float32,",
        (STEP_SIZES, f"{ORACLES}/test_oracle_sdxl.py::test_time_ids_are_in_diffusers_order"),
    ),
    Fault(
        "wrong time ids: every picture uncropped and of the bucket's size",
        "data/buckets.py",
        "return Geometry(height, width, top, left, self.bucket[1], self.bucket[0])",
        "return Geometry(self.bucket[1], self.bucket[0], 0, 0, self.bucket[1], self.bucket[0])",
        (STEP_SIZES, f"{DATA}/test_data_buckets.py::TestVisits"),
    ),
    Fault(
        "wrong time ids: crop corner swapped",
        "data/buckets.py",
        "return Geometry(height, width, top, left, self.bucket[1], self.bucket[0])",
        "return Geometry(height, width, left, top, self.bucket[1], self.bucket[0])",
        (STEP_SIZES, f"{DATA}/test_data_buckets.py::TestVisits"),
    ),
    Fault(
        "wrong time ids: width before height",
        "data/buckets.py",
        "return Geometry(height, width, top, left, self.bucket[1], self.bucket[0])",
        "return Geometry(width, height, top, left, self.bucket[0], self.bucket[1])",
        (STEP_SIZES, f"{DATA}/test_data_buckets.py::TestVisits"),
    ),
    Fault(
        "sign of the target flipped",
        "core/noise.py",
        "            return noise.float()\n",
        "            return -noise.float()\n",
        (
            STEP_LOSS,
            f"{LESSONS}::test_the_base_model_is_at_home_in_training",
            f"{LESSONS}::test_the_character_is_learnt",
        ),
    ),
    Fault(
        "EMA never stepped",
        "training/loop.py",
        "            learner.average.update(learner.step)",
        "            pass",
        (
            f"{STEP}::test_the_average_is_that_of_the_weights_that_were_saved",
            f"{LESSONS}::test_the_average_is_what_pictures_show",
            f"{LESSONS}::test_the_character_is_learnt",
        ),
    ),
)
"""The faults that this check was asked for, each against tests of quality and laws."""

MORE = (
    Fault(
        "sign of the target flipped, v-prediction",
        "core/noise.py",
        "return signal * noise.float() - sigma * latents.float()",
        "return sigma * latents.float() - signal * noise.float()",
        (f"{ORACLES}/test_oracle_diffusers.py::test_add_noise_and_velocity",),
    ),
    Fault(
        "v-prediction trained towards the noise",
        "core/noise.py",
        "return signal * noise.float() - sigma * latents.float()",
        "return noise.float()",
        (f"{ORACLES}/test_oracle_noise.py",),
    ),
    Fault(
        "min-SNR inverted",
        "core/weighting.py",
        "return snr.clamp(max=self.gamma)",
        "return snr.clamp(min=self.gamma)",
        (STEP_LOSS, f"{ORACLES}/test_oracle_noise.py::test_min_snr_weights"),
    ),
    Fault(
        "min-SNR of v-prediction divided by SNR, not SNR + 1",
        "core/weighting.py",
        "return snr + 1",
        "return snr",
        (f"{ORACLES}/test_oracle_noise.py",),
    ),
    Fault(
        "timesteps shifted by one",
        "core/noise.py",
        "return (first + torch.floor(u * (last - first)).long()).clamp_(max=last - 1)",
        "return (first + 1 + torch.floor(u * (last - first)).long()).clamp_(max=last - 1)",
        (STEP_NOISE, f"{ORACLES}/test_oracle_denoise.py::test_timestep_range_is_kept_and_its_ends_are_reached"),
    ),
    Fault(
        "pooled text embedding zeroed",
        "families/sdxl.py",
        'added = {"text_embeds": cond["pooled"].to(dtype),',
        'added = {"text_embeds": 0 * cond["pooled"].to(dtype),',
        (STEP_CAPTIONS,),
    ),
    Fault(
        "last hidden state of the text encoders instead of the last but one",
        "families/sdxl.py",
        "output.hidden_states[-2]",
        "output.hidden_states[-1]",
        (STEP_CAPTIONS,),
    ),
    Fault(
        "VAE's scaling factor forgotten",
        "families/sdxl.py",
        '(config.get("shift_factor") or 0.0)) * config["scaling_factor"]',
        '(config.get("shift_factor") or 0.0))',
        (STEP_NOISE, f"{LESSONS}::test_the_base_model_is_at_home_in_training"),
    ),
    Fault(
        "LoRA scale applied twice",
        "adapters/modules.py",
        "base.bias, a, b, scale)",
        "base.bias, a, b, scale**2)",
        (f"{ORACLES}/test_oracle_lora.py::test_one_layer_equals_the_merged_weight",),
    ),
    Fault(
        "LoRA scale left out of the gradient",
        "core/fused.py",
        "if ctx.scale != 1:",
        "if False:",
        (f"{ORACLES}/test_oracle_lora.py::test_fused_layer_against_the_formula_and_plain_autograd",),
    ),
    Fault(
        "LoRA dropout on in evaluation",
        "adapters/attached.py",
        "        one.network.train(training)  # peft's",
        "        # peft's",
        (f"{ORACLES}/test_oracle_lora.py::test_dropout_is_on_only_where_the_network_trains",),
    ),
    Fault(
        "caption dropout always on",
        "data/captions.py",
        'if draws is not None and options.dropout and draws("caption dropout").random() < options.dropout:',
        "if draws is not None and options.dropout:",
        (f"{DATA}/test_data_buckets.py::TestVisits",),
    ),
    Fault(
        "crop of a flipped picture told as if it were not",
        "data/buckets.py",
        "        if self.flip:\n            left = ",
        "        if False:\n            left = ",
        (f"{DATA}/test_data_buckets.py::TestVisits",),
    ),
    Fault(
        "the same noise in every epoch",
        "core/random.py",
        "return generator(self.seed, domain, self.epoch, sample.id, sample.repeat)",
        "return generator(self.seed, domain, 0, sample.id, sample.repeat)",
        (f"{ORACLES}/test_oracle_draws.py::test_no_draw_repeats_over_seed_epoch_image_repeat_and_domain",),
    ),
    Fault(
        "one noise for the whole batch",
        "core/random.py",
        "rows = [self._generator(domain, s).standard_normal(tuple(shape), np.float32) for s in self.samples]",
        "rows = [self._generator(domain, self.samples[0]).standard_normal(tuple(shape), np.float32)\n"
        "                for s in self.samples]",
        (f"{ORACLES}/test_oracle_draws.py::test_a_row_depends_on_its_own_sample_alone",),
    ),
    Fault(
        "loss divided by the batch, not by the samples of the step",
        "training/loop.py",
        "share = loss(batch.to(runtime.device)).sum() / samples",
        "share = loss(batch.to(runtime.device)).mean()",
        (f"{LAWS}/test_law_invariance.py::test_splits_of_a_step_give_one_gradient[0-lora-False]",),
    ),
    Fault(
        "gradients not zeroed between steps",
        "training/loop.py",
        "        group.clear()",
        "        pass",
        (f"{LAWS}/test_law_resume.py::test_resumed_equals_uninterrupted[plain]",),
    ),
    Fault(
        "gradient clipping skipped",
        "training/optim.py",
        "    if norm > limit:\n",
        "    if False:\n",
        (f"{ORACLES}/test_oracle_optim.py::test_clipping_against_float64",),
    ),
    Fault(
        "optimiser state forgotten on resume",
        "training/session.py",
        "optim.restore(learner.optimizer, saved.optimizer)",
        "pass",
        (f"{LAWS}/test_law_resume.py::test_resumed_equals_uninterrupted[plain]",),
    ),
    Fault(
        "averaged weights left in the model after a preview",
        "training/ema.py",
        "            self._load(trained)",
        "            pass",
        (
            f"{LAWS}/test_law_invariance.py"
            "::test_settings_without_effect_leave_the_weights_alone[previews every step-lora]",
            f"{ORACLES}/test_oracle_optim.py::test_average_in_place_and_back_bit_for_bit",
        ),
    ),
    Fault(
        "pictures and files from the last weights, not from the average",
        "evaluation/models.py",
        "    if wanted and average.is_dir():",
        "    if use_ema and average.is_dir():",
        (
            f"{LESSONS}::test_the_average_is_what_pictures_show",
            "tests/unit/evaluation/test_open_pipeline.py"
            "::test_averaged_weights_are_used_where_the_run_samples_with_them",
        ),
    ),
    Fault(
        "warm-up ends one step late",
        "core/schedule.py",
        "        if step < warmup:\n            return (step + 1) / (warmup + 1)",
        "        if step <= warmup:\n            return step / (warmup + 1)",
        (f"{ORACLES}/test_oracle_schedule.py",),
    ),
    Fault(
        "validation at random timesteps",
        "data/loader.py",
        "u=torch.full((len(visits),), (k + 0.5) / timesteps),",
        "u=None,",
        (f"{DATA}/test_data_loader.py::TestValidation",),
    ),
    Fault(
        "repeats of a source ignored",
        "data/shares.py",
        "self._whole = np.floor(repeats + _ROUNDING).astype(np.int32)",
        "self._whole = np.ones(len(repeats), np.int32)",
        (f"{DATA}/test_data_buckets.py::TestOrder",),
    ),
    Fault(
        "a picture's mask ignored in the loss",
        "objectives/denoise.py",
        "self._mean(apart, batch.mask)",
        "self._mean(apart, None)",
        ("tests/unit/test_masked_loss.py",),
    ),
    Fault(
        "a mask that is not flipped with its picture",
        "data/images.py",
        "_crop(mask, plan, Image.Resampling.BILINEAR)",
        "ImageOps.mirror(_crop(mask, plan, Image.Resampling.BILINEAR)) if plan.flip else\n"
        "        _crop(mask, plan, Image.Resampling.BILINEAR)",
        (f"{DATA}/test_data_augment.py::TestMasks",),
    ),
    Fault(
        "an edited picture's old encoding used",
        "data/cache.py",
        '_key("latents", row.image, ',
        '_key("latents", str(row.place), ',
        (f"{DATA}/test_data_cache.py",),
    ),
    Fault(
        "the encodings of another VAE used",
        "data/cache.py",
        "visit.fit.facts, self._background, mask, self._fingerprint, self._dtype)",
        "visit.fit.facts, self._background, mask, self._dtype)",
        (f"{DATA}/test_data_cache.py",),
    ),
    Fault(
        "each process sees the whole window",
        "data/plan.py",
        "return list(window[len(window) * rank // self.world_size : len(window) * (rank + 1) // self.world_size])",
        "return list(window)",
        (f"{DATA}/test_data_plan.py::TestProcesses",),
    ),
    Fault(
        "orientation of photographs ignored",
        "data/images.py",
        "upright = ImageOps.exif_transpose(opened)",
        "upright = opened",
        (f"{DATA}/test_data_images.py",),
    ),
    Fault(
        "pictures of the rest of a bucket dropped",
        "data/order.py",
        "rests.append(shuffled[cut:])",
        "rests.append(shuffled[:0])",
        (f"{DATA}/test_data_buckets.py::TestOrder",),
    ),
)
"""Faults of the same kind that trainers are known to have had."""
