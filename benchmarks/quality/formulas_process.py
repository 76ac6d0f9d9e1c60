"""Wrong formulas of the forward process: tables, levels, targets, noise, timesteps."""

from __future__ import annotations

from faults import Fault

ORACLES = "tests/oracles/test_oracle"
NOISE = f"{ORACLES}_noise.py"
COEFFICIENTS = f"{NOISE}::test_coefficients_at_every_timestep"
TABLE = f"{NOISE}::test_table_of_sdxl"
ZERO_TABLE = f"{NOISE}::test_zero_terminal_table"
DENOISE = f"{ORACLES}_denoise.py"
OFFSET = f"{DENOISE}::test_noise_offset_variance"
OFFSET_EVERYWHERE = f"{DENOISE}::test_noise_offset_is_in_the_input_and_in_the_target"
LOSSES = f"{ORACLES}_losses.py"
WEIGHTS = f"{LOSSES}::test_the_weight_of_each_timestep"
LEVELS = f"{LOSSES}::test_noise_levels_follow_their_distribution"
LAYERED = f"{LOSSES}::test_pyramid_noise_has_variance_one_and_reaches_far"
LINE = f"{LOSSES}::test_the_line_its_direction_and_both_ends"
SHIFT = f"{LOSSES}::test_the_shift"

FORWARD = (
    Fault(
        "the signal and noise levels rounded to the latents' type",
        "core/noise.py",
        "return self._look_up(signal, t).view(shape), self._look_up(sigma, t).view(shape)",
        "return tuple(self._look_up(level, t).view(shape).to(like.dtype) for level in (signal, sigma))",
        (COEFFICIENTS,),
        known=True,
    ),
    Fault(
        "the table rounded to the latents' type before its roots are taken",
        "core/noise.py",
        "        signal, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()",
        "        table = self.alphas_cumprod.to(like.dtype)\n        signal, sigma = table.sqrt(), (1 - table).sqrt()",
        (COEFFICIENTS,),
        known=True,
    ),
    Fault(
        "a table of float32",
        "core/noise.py",
        "alphas_cumprod = torch.cumprod(1 - betas, dim=0)",
        "alphas_cumprod = torch.cumprod((1 - betas).float(), dim=0).double()",
        (TABLE,),
        known=True,
    ),
    Fault(
        "picture and noise exchanged",
        "core/noise.py",
        "return signal * latents.float() + sigma * noise.float()",
        "return sigma * latents.float() + signal * noise.float()",
        (COEFFICIENTS,),
    ),
    Fault(
        "the variance of the noise instead of its deviation",
        "core/noise.py",
        "self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()",
        "self.alphas_cumprod.sqrt(), 1 - self.alphas_cumprod",
        (COEFFICIENTS,),
    ),
    Fault(
        "the signal's power instead of its level",
        "core/noise.py",
        "self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()",
        "self.alphas_cumprod, (1 - self.alphas_cumprod).sqrt()",
        (COEFFICIENTS,),
    ),
    Fault(
        "v with the sum of its terms",
        "core/noise.py",
        "return signal * noise.float() - sigma * latents.float()",
        "return signal * noise.float() + sigma * latents.float()",
        (COEFFICIENTS,),
    ),
    Fault(
        "the table one timestep late",
        "core/noise.py",
        "alphas_cumprod = torch.cumprod(1 - betas, dim=0)",
        "alphas_cumprod = torch.cumprod(torch.cat([torch.ones(1, dtype=torch.float64), 1 - betas[:-1]]), dim=0)",
        (TABLE,),
    ),
    Fault(
        "betas that grow evenly, where their roots should",
        "core/noise.py",
        "torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2",
        "torch.linspace(start, end, steps, dtype=torch.float64)",
        (TABLE,),
    ),
    Fault(
        "zero terminal SNR without the scale",
        "core/noise.py",
        "((root - last) * (first / (first - last))) ** 2",
        "(root - last) ** 2",
        (ZERO_TABLE,),
    ),
    Fault(
        "zero terminal SNR that begins without noise",
        "core/noise.py",
        "(first / (first - last))",
        "(1 / (first - last))",
        (ZERO_TABLE,),
    ),
    Fault(
        "zero terminal SNR with a model of noise let through",
        "core/noise.py",
        '        if kind == "epsilon" and alphas_cumprod[-1] == 0:',
        "        if False:",
        (f"{NOISE}::test_zero_terminal_with_noise_prediction_is_refused",),
        known=True,
    ),
    Fault(
        "weights of the table before it is rescaled",
        "core/noise.py",
        "        return self.alphas_cumprod / (1 - self.alphas_cumprod)",
        "        betas = torch.linspace(0.00085**0.5, 0.012**0.5, self.steps, dtype=torch.float64) ** 2\n"
        "        before = torch.cumprod(1 - betas, dim=0) if self.alphas_cumprod[-1] == 0 else self.alphas_cumprod\n"
        "        return before / (1 - before)",
        (f"{LOSSES}::test_weights_of_the_rescaled_table_and_not_of_the_one_before", WEIGHTS),
        known=True,
    ),
    Fault(
        "the noisiest timestep never trained on",
        "core/noise.py",
        "torch.floor(u * (last - first)).long()",
        "torch.floor(u * (last - 1 - first)).long()",
        (LEVELS,),
    ),
    Fault(
        "timesteps rounded to the nearest",
        "core/noise.py",
        "torch.floor(u * (last - first)).long()",
        "torch.round(u * (last - first)).long()",
        (LEVELS,),
    ),
)

DRAWN = (
    Fault(
        "input perturbation in the target as well",
        "objectives/noising.py",
        '        return asked, asked + self.input_perturbation * _normal(batch, "input perturbation", asked.shape[1:])',
        '        both = asked + self.input_perturbation * _normal(batch, "input perturbation", asked.shape[1:])\n'
        "        return both, both",
        (f"{DENOISE}::test_input_perturbation_is_in_the_input_only",),
        known=True,
    ),
    Fault(
        "offset noise in the input alone",
        "objectives/noising.py",
        "            return asked, asked\n",
        "            return batch.noise, asked\n",
        (OFFSET_EVERYWHERE,),
    ),
    Fault(
        "one offset for the whole batch",
        "objectives/noising.py",
        '_normal(batch, "noise offset", (asked.shape[1], 1, 1))',
        '_normal(batch, "noise offset", (asked.shape[1], 1, 1))[:1]',
        (OFFSET, OFFSET_EVERYWHERE),
        known=True,
    ),
    Fault(
        "one offset for all channels",
        "objectives/noising.py",
        '_normal(batch, "noise offset", (asked.shape[1], 1, 1))',
        '_normal(batch, "noise offset", (1, 1, 1))',
        (OFFSET,),
    ),
    Fault(
        "an offset for each cell",
        "objectives/noising.py",
        '_normal(batch, "noise offset", (asked.shape[1], 1, 1))',
        '_normal(batch, "noise offset", asked.shape[1:])',
        (OFFSET, OFFSET_EVERYWHERE),
    ),
    Fault(
        "offset and perturbation by the same numbers",
        "objectives/noising.py",
        '_normal(batch, "input perturbation", asked.shape[1:])',
        '_normal(batch, "noise offset", asked.shape[1:])',
        (f"{DENOISE}::test_offset_and_perturbation_are_different_numbers",),
    ),
    Fault(
        "pyramid noise louder than the noise it stands for",
        "objectives/noising.py",
        "return (batch.noise + extra) * scale",
        "return batch.noise + extra",
        (LAYERED,),
    ),
    Fault(
        "pyramid noise scaled by the deviation of the whole batch",
        "objectives/noising.py",
        "return (batch.noise + extra) * scale",
        "return (batch.noise + extra) / (batch.noise + extra).std()",
        (f"{LOSSES}::test_pyramid_noise_is_of_its_own_sample_and_channel",),
        known=True,
    ),
    Fault(
        "a logit-normal distribution looked up from the other end",
        "core/timesteps.py",
        "torch.sigmoid(self.mean + self.std * torch.special.ndtri(p))",
        "torch.sigmoid(-self.mean - self.std * torch.special.ndtri(p))",
        (f"{LOSSES}::test_a_mean_above_0_is_more_noise", LEVELS),
        known=True,
    ),
    Fault(
        "a logit-normal distribution with its variance for a deviation",
        "core/timesteps.py",
        "self.mean + self.std * torch.special.ndtri(p)",
        "self.mean + self.std**2 * torch.special.ndtri(p)",
        (LEVELS,),
    ),
    Fault(
        "the mode distribution inside out",
        "core/timesteps.py",
        "return (1 + self.scale) * p - self.scale *",
        "return (1 - self.scale) * p + self.scale *",
        (f"{LOSSES}::test_the_mode_distribution_is_that_of_the_paper",),
    ),
    Fault(
        "alpha and beta of the beta distribution exchanged",
        "core/timesteps.py",
        "_beta_knots(self.alpha, self.beta)",
        "_beta_knots(self.beta, self.alpha)",
        (LEVELS,),
    ),
    Fault(
        "a bias that moves draws without keeping their spread",
        "core/timesteps.py",
        "(drawn - before).clamp(0, inside) / bias.multiplier",
        "(drawn - before).clamp(0, inside)",
        (f"{LOSSES}::test_a_bias_multiplies_how_often_its_part_is_drawn",),
    ),
)

FLOW = (
    Fault(
        "a flow from noise to the picture",
        "core/noise.py",
        "return noise.float() - latents.float()",
        "return latents.float() - noise.float()",
        (LINE,),
    ),
    Fault(
        "the two ends of a flow exchanged",
        "core/noise.py",
        "return (1 - s) * latents.float() + s * noise.float()",
        "return s * latents.float() + (1 - s) * noise.float()",
        (LINE,),
    ),
    Fault(
        "a noise level that is not the one the model is told",
        "core/noise.py",
        "        return t.float() / 1000",
        "        return (t.float() + 1) / 1000",
        (LINE,),
        known=True,
    ),
    Fault(
        "a flow's timesteps rounded to bf16",
        "core/noise.py",
        "return (1000 * shifted(first + share * (last - first), k)).float()",
        "return (1000 * shifted(first + share * (last - first), k)).bfloat16().float()",
        (f"{LOSSES}::test_a_thousand_noise_levels_stay_a_thousand", LINE),
        known=True,
    ),
    Fault(
        "a flow's noise level rounded to the latents' type",
        "core/noise.py",
        "return self.level(t).view(-1, *[1] * (like.ndim - 1))",
        "return self.level(t).to(like.dtype).view(-1, *[1] * (like.ndim - 1))",
        (f"{LOSSES}::test_a_thousand_noise_levels_stay_a_thousand",),
        known=True,
    ),
    Fault(
        "a shift towards less noise",
        "core/noise.py",
        "return k * s / (1 + (k - 1) * s)",
        "return s / (k - (k - 1) * s)",
        (SHIFT,),
    ),
    Fault(
        "a shift that is applied twice",
        "core/noise.py",
        "return (1000 * shifted(first + share * (last - first), k)).float()",
        "return (1000 * shifted(shifted(first + share * (last - first), k), k)).float()",
        (SHIFT,),
        known=True,
    ),
    Fault(
        "FLUX's shift by latent cells instead of packed tokens",
        "core/noise.py",
        "return flux_shift(cells // 4)",
        "return flux_shift(cells)",
        (f"{LOSSES}::test_the_shift_of_flux_is_that_of_its_sampler",),
    ),
    Fault(
        "FLUX's mu as the shift itself",
        "core/noise.py",
        "return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))",
        "return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)",
        (f"{LOSSES}::test_the_shift_of_flux_is_that_of_its_sampler",),
    ),
)

PROCESS = (*FORWARD, *DRAWN, *FLOW)
