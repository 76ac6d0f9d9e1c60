"""Wrong formulas of the model and its inputs: size conditioning, text, latents, adapters."""

from __future__ import annotations

from faults import Fault

ORACLES = "tests/oracles/test_oracle"
GEOMETRY = f"{ORACLES}_geometry.py"
CROPS = f"{GEOMETRY}::test_the_six_numbers_say_where_the_pixels_are_from"
RESIZE = f"{GEOMETRY}::test_the_resize_keeps_the_shape_and_covers_the_bucket_with_the_least"
SQUARES = f"{GEOMETRY}::test_a_centred_crop_of_a_square"
SDXL = f"{ORACLES}_sdxl.py"
TIME_IDS = f"{SDXL}::test_time_ids_are_in_diffusers_order"
PREDICT = f"{SDXL}::test_predict_is_the_unet_and_nothing_is_rounded_on_the_way"
TEXT = f"{SDXL}::test_text_equals_the_pipeline_bit_for_bit"
LAYERS = f"{SDXL}::test_text_is_penultimate_without_norm_and_pooled_at_the_end_mark"
MOMENTS = f"{SDXL}::test_moments_are_those_of_the_vae"
POSTERIOR = f"{SDXL}::test_posterior_sample_is_that_of_diffusers"
SCALE = f"{SDXL}::test_shift_and_scale_are_read_from_the_model"
LORA = f"{ORACLES}_lora.py"
ADAPTERS = f"{ORACLES}_adapters.py"
LONGEST = f"{ADAPTERS}::test_a_change_that_is_too_long_is_scaled_down_to_the_limit_and_no_other"
ONE_LAYER = f"{LORA}::test_one_layer_equals_the_merged_weight"
FUSED = f"{LORA}::test_fused_layer_against_the_formula_and_plain_autograd"
EPOCHS = "tests/unit/data/test_data_buckets.py::TestOrder::test_every_visit_once_an_epoch_in_batches_of_one_shape"

MODEL = (
    # Size conditioning
    Fault(
        "time ids rounded to bf16 where they are made",
        "families/sdxl.py",
        "torch.tensor(geometry, dtype=torch.float32,",
        "torch.tensor(geometry, dtype=torch.bfloat16,",
        (TIME_IDS, PREDICT),
        known=True,
    ),
    Fault(
        "time ids rounded to the model's type on the way to it",
        "families/sdxl.py",
        '"time_ids": cond["time_ids"]}',
        '"time_ids": cond["time_ids"].to(dtype)}',
        (PREDICT,),
        known=True,
    ),
    Fault(
        "timesteps rounded to the model's type on the way to it",
        "families/sdxl.py",
        "return denoiser(noisy.to(dtype), t, hidden,",
        "return denoiser(noisy.to(dtype), t.to(dtype), hidden,",
        (PREDICT,),
        known=True,
    ),
    Fault(
        "the resized picture's size told as the original one",
        "data/buckets.py",
        "return Geometry(height, width, top, left,",
        "return Geometry(self.resized[1], self.resized[0], top, left,",
        (CROPS, SQUARES),
        known=True,
    ),
    Fault(
        "a random crop told as one in the middle",
        "data/buckets.py",
        "        left, top = self.crop\n        if self.flip:",
        "        left, top = ((r - b) // 2 for r, b in zip(self.resized, self.bucket, strict=True))\n"
        "        if self.flip:",
        (CROPS,),
        known=True,
    ),
    Fault(
        "the crop on the axis that was not cropped",
        "data/buckets.py",
        "        left, top = self.crop\n        if self.flip:",
        "        left, top = self.crop[::-1]\n        if self.flip:",
        (CROPS, SQUARES),
        known=True,
    ),
    Fault(
        "the crop in pixels of the original",
        "data/buckets.py",
        "return Geometry(height, width, top, left,",
        "return Geometry(height, width, top * height // self.resized[1], left * width // self.resized[0],",
        (CROPS, SQUARES),
    ),
    Fault(
        "the resized size told as the target",
        "data/buckets.py",
        "top, left, self.bucket[1], self.bucket[0])",
        "top, left, self.resized[1], self.resized[0])",
        (CROPS, SQUARES),
    ),
    Fault(
        "the crop of a flipped picture one pixel off",
        "data/buckets.py",
        "left = self.resized[0] - left - self.bucket[0]",
        "left = self.resized[0] - left - self.bucket[0] - 1",
        (CROPS,),
    ),
    # Buckets
    Fault(
        "the corner of a picture instead of its middle",
        "data/buckets.py",
        "((resized[0] - wide) // 2, (resized[1] - high) // 2))",
        "(0, 0))",
        (SQUARES, RESIZE),
    ),
    Fault(
        "a picture put inside its bucket instead of over it",
        "data/buckets.py",
        "by_width = wide * height >= high * width",
        "by_width = wide * height <= high * width",
        (RESIZE, CROPS),
    ),
    Fault(
        "a picture stretched to its bucket",
        "data/buckets.py",
        "resized[inverse].astype(np.int32))",
        "buckets[inverse].astype(np.int32))",
        (RESIZE, SQUARES),
        known=True,
    ),
    Fault(
        "the last, short step of an epoch left out",
        "data/plan.py",
        "return -(-len(self._order) // self.step_size)",
        "return len(self._order) // self.step_size",
        (EPOCHS,),
        known=True,
    ),
    Fault(
        "pixels from 0 to 1",
        "data/images.py",
        "/ np.float32(127.5) - np.float32(1)",
        "/ np.float32(255)",
        (CROPS,),
    ),
    # Latents
    Fault(
        "latents that are not finite turned into zeros",
        "families/sdxl.py",
        "return torch.cat([posterior.mean, posterior.std], dim=1).float()",
        "return torch.cat([posterior.mean, posterior.std], dim=1).float().nan_to_num()",
        (f"{ORACLES}_latents.py::test_what_is_not_finite_is_not_hidden",),
        known=True,
    ),
    Fault(
        "the VAE in the precision of the rest",
        "families/sdxl.py",
        'self._network("vae", torch.float32)',
        'self._network("vae", dtype)',
        (f"{SDXL}::test_the_vae_is_float32_whatever_the_rest_is",),
        known=True,
    ),
    Fault(
        "the logarithm of the variance as the deviation",
        "families/sdxl.py",
        "torch.cat([posterior.mean, posterior.std], dim=1)",
        "torch.cat([posterior.mean, posterior.logvar], dim=1)",
        (MOMENTS, POSTERIOR),
    ),
    Fault(
        "the variance as the deviation",
        "families/sdxl.py",
        "torch.cat([posterior.mean, posterior.std], dim=1)",
        "torch.cat([posterior.mean, posterior.var], dim=1)",
        (MOMENTS, POSTERIOR),
    ),
    Fault(
        "the posterior's mean instead of a sample of it",
        "families/sdxl.py",
        "raw, config = mean + std * noise,",
        "raw, config = mean,",
        (POSTERIOR, SCALE),
    ),
    Fault(
        "latents divided by the scaling factor",
        "families/sdxl.py",
        '(config.get("shift_factor") or 0.0)) * config["scaling_factor"]',
        '(config.get("shift_factor") or 0.0)) / config["scaling_factor"]',
        (POSTERIOR, SCALE),
    ),
    Fault(
        "the shift after the scale",
        "families/sdxl.py",
        'return (raw - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]',
        'return raw * config["scaling_factor"] - (config.get("shift_factor") or 0.0)',
        (SCALE,),
    ),
    # Text
    Fault(
        "hidden states after the final norm",
        "families/sdxl.py",
        "states = emphasise(output.hidden_states[-2],",
        "norm = next(m for n, m in encoder.named_modules() if n.endswith('final_layer_norm'))\n"
        "            states = emphasise(norm(output.hidden_states[-2]),",
        (TEXT, LAYERS),
    ),
    Fault(
        "the encoders in the wrong order",
        "families/sdxl.py",
        "torch.cat(hidden, dim=-1)",
        "torch.cat(hidden[::-1], dim=-1)",
        (TEXT, LAYERS),
    ),
    Fault(
        "the pooled embedding of the last token, not of the end mark",
        "families/sdxl.py",
        "pooled = output[0].view(batch, chunks, -1)[:, 0]",
        "pooled = encoder.text_projection(output.last_hidden_state[:, -1]).view(batch, chunks, -1)[:, 0]",
        (TEXT, LAYERS),
    ),
    Fault(
        "an empty caption as zeros",
        "families/sdxl.py",
        '"prompt_embeds": torch.cat(hidden, dim=-1),',
        '"prompt_embeds": torch.cat(hidden, dim=-1) * torch.tensor([float(bool(c)) for c in captions])[:, None, None],',
        (TEXT,),
        known=True,
    ),
    Fault(
        "captions padded with one token for both encoders",
        "families/sdxl.py",
        "(tokenizer.pad_token_id, 1.0)",
        "(tokenizer.eos_token_id, 1.0)",
        (f"{ORACLES}_latents.py::test_each_encoder_has_the_padding_of_its_own_tokenizer", TEXT),
    ),
    # LoRA
    Fault(
        "LoRA's strength alpha / sqrt(rank)",
        "adapters/modules.py",
        "base.bias, a, b, scale)",
        "base.bias, a, b, scale * self.r[NAME] ** 0.5)",
        (ONE_LAYER,),
    ),
    Fault(
        "LoRA's matrices in the precision of the base",
        "adapters/attached.py",
        "parameter.data = values.to(parameter.device, torch.float32)",
        "parameter.data = values.to(parameter.device, layer.base_layer.weight.dtype)",
        (f"{LORA}::test_trained_matrices_are_float32_and_the_base_is_frozen",),
        known=True,
    ),
    Fault(
        "LoRA that changes the model before it is trained",
        "adapters/attached.py",
        "zeros = torch.zeros(parameter.shape)",
        "zeros = torch.full(parameter.shape, 1e-3)",
        (f"{LORA}::test_at_the_start_the_model_is_the_base_bit_for_bit",),
    ),
    Fault(
        "LoRA's start scaled by the rank instead of the width",
        "adapters/lora.py",
        "bound = 1 / math.sqrt(math.prod(shape[1:]))",
        "bound = 1 / math.sqrt(shape[0])",
        (f"{LORA}::test_at_the_start_the_model_is_the_base_bit_for_bit",),
    ),
    Fault(
        "the same start for every layer of LoRA",
        "adapters/attached.py",
        "key = (stream, path) if",
        "key = (stream,) if",
        (f"{LORA}::test_at_the_start_the_model_is_the_base_bit_for_bit",),
    ),
    Fault(
        "LoRA's strength left out of the fused layer",
        "core/fused.py",
        "alpha=scale)",
        "alpha=1)",
        (FUSED,),
    ),
    Fault(
        "LoRA's path left out of the gradient of the input",
        "core/fused.py",
        "(grad_rows @ weight).addmm_(grad_inner, a.to(grad.dtype)).view(ctx.shape)",
        "(grad_rows @ weight).view(ctx.shape)",
        (FUSED,),
    ),
    Fault(
        "the reference keeps the adapters of the text encoders",
        "adapters/attached.py",
        "found = [layer for one in self._placed for",
        "found = [layer for one in self._placed[:1] for",
        (f"{LORA}::test_reference_is_the_base_bit_for_bit",),
    ),
    Fault(
        "adapters stay off after an error in the reference",
        "adapters/attached.py",
        "        try:\n            yield\n        finally:\n            for layer in found:\n"
        "                layer.enable_adapters(True)",
        "        if True:\n            yield\n        if True:\n            for layer in found:\n"
        "                layer.enable_adapters(True)",
        (f"{LORA}::test_reference_ends_after_an_error_and_leaves_the_matrices_trainable",),
        known=True,
    ),
    Fault(
        "alpha left out of the model's own file",
        "adapters/lora.py",
        '"lora_adapter_metadata": attached.to_json(flat)',
        '"no_adapter_metadata": attached.to_json(flat)',
        (f"{LORA}::test_diffusers_loads_the_same_model",),
        known=True,
    ),
    # Other adapters
    Fault(
        "rsLoRA's strength alpha / rank",
        "adapters/lora.py",
        "use_rslora=self.rslora,",
        "use_rslora=False,",
        (f"{ADAPTERS}::test_a_linear_layer",),
    ),
    Fault(
        "LoRA+'s faster rate on A",
        "adapters/lora.py",
        'name.endswith(".lora_B.weight") else None',
        'name.endswith(".lora_A.weight") else None',
        (f"{ADAPTERS}::test_the_rate_of_b_over_that_of_a",),
    ),
    Fault(
        "the longest change of a layer without its strength",
        "adapters/lora.py",
        "norm = layer.scaling[NAME] * square.sqrt()",
        "norm = square.sqrt()",
        (LONGEST,),
    ),
    Fault(
        "both matrices scaled down by what their product is too long",
        "adapters/lora.py",
        ".clamp(max=1).sqrt()",
        ".clamp(max=1)",
        (LONGEST,),
    ),
    Fault(
        "short changes scaled up to the longest",
        "adapters/lora.py",
        ".clamp(max=1).sqrt()",
        ".sqrt()",
        (LONGEST,),
    ),
    Fault(
        "an adapted convolution without its strength",
        "adapters/modules.py",
        "return base(x) + self.scaling[NAME] * functional.conv2d(",
        "return base(x) + functional.conv2d(",
        (f"{ADAPTERS}::test_a_convolution",),
    ),
    Fault(
        "dropped ranks that the others do not make up for",
        "adapters/modules.py",
        "inner * (kept / (1 - self.rank_dropout)).to(inner.dtype)",
        "inner * kept.to(inner.dtype)",
        (f"{ADAPTERS}::test_dropped_ranks_leave_the_answer_right_on_average",),
    ),
    Fault(
        "the same ranks dropped for the whole batch",
        "adapters/modules.py",
        "shape[0], shape[dim] = inner.shape[0], inner.shape[dim]",
        "shape[dim] = inner.shape[dim]",
        (f"{ADAPTERS}::test_dropped_ranks_leave_the_answer_right_on_average",),
    ),
)
