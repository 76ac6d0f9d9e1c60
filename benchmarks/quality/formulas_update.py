"""Wrong formulas of the update: accumulation, clipping, rates, optimiser, average, random numbers."""

from __future__ import annotations

from faults import Fault

ORACLES = "tests/oracles/test_oracle"
STEP = f"{ORACLES}_step.py"
WHOLE_RUN = f"{STEP}::test_a_run_of_forty_steps_is_the_arithmetic_of_its_formulas"
RATES = f"{STEP}::test_the_rate_is_that_of_the_optimiser_step_however_the_step_is_split"
OPTIM = f"{ORACLES}_optim.py"
SCHEDULE = f"{ORACLES}_schedule.py"
DRAWS = f"{ORACLES}_draws.py"
LONG_NORM = f"{ORACLES}_rounding.py::test_the_norm_of_millions_of_gradients_is_that_of_float64"
ROUNDING = f"{ORACLES}_rounding.py::test_each_neighbour_as_often_as_the_value_is_near_to_it"
AVERAGE = "tests/quality/test_quality_whole_step.py::test_the_average_is_that_of_the_weights_that_were_saved"

UPDATE = (
    # Accumulation
    Fault(
        "a short step divided by the samples of a full one",
        "training/loop.py",
        "samples = stream.window_size(step)",
        "samples = max(stream.window_size(s) for s in range(stream.steps_per_epoch))",
        (WHOLE_RUN,),
        known=True,
    ),
    Fault(
        "the mean of the batches' means, however many samples each has",
        "training/loop.py",
        ".sum() / samples",
        ".mean() / sum(1 for _ in stream.window(step))",
        (WHOLE_RUN,),
        known=True,
    ),
    Fault(
        "the gradient summed over the batches, not averaged",
        "training/loop.py",
        ".sum() / samples",
        ".mean()",
        (WHOLE_RUN,),
        known=True,
    ),
    # Rates
    Fault(
        "warm-up and decay counted in batches",
        "training/loop.py",
        "training.schedule.factor(step, total)",
        "training.schedule.factor(step * training.accumulation, total)",
        (RATES,),
        known=True,
    ),
    Fault(
        "warm-up and decay stretched by the accumulation",
        "training/loop.py",
        "training.schedule.factor(step, total)",
        "training.schedule.factor(step, total * training.accumulation)",
        (RATES,),
        known=True,
    ),
    Fault(
        "the rate of the next step",
        "training/loop.py",
        "training.schedule.factor(step, total)",
        "training.schedule.factor(step + 1, total)",
        (RATES,),
    ),
    Fault(
        "the rate climbs again past the end",
        "core/schedule.py",
        "progress = min((step - warmup) / span, 1.0)",
        "progress = (step - warmup) / span",
        (f"{SCHEDULE}::test_past_the_end_it_stays_at_the_floor",),
        known=True,
    ),
    Fault(
        "the curve ends one step after the run",
        "core/schedule.py",
        "span = max(total - 1 - warmup, 1)",
        "span = max(total - warmup, 1)",
        (SCHEDULE,),
        known=True,
    ),
    Fault(
        "the curve begins with the run, not after the warm-up",
        "core/schedule.py",
        "progress = min((step - warmup) / span, 1.0)",
        "progress = min(step / max(total - 1, 1), 1.0)",
        (SCHEDULE,),
    ),
    Fault(
        "the floor as a bound, not as the end of the curve",
        "core/schedule.py",
        "return self.floor + (1 - self.floor) * self._curve(progress)",
        "return max(self.floor, self._curve(progress))",
        (SCHEDULE,),
    ),
    Fault(
        "cosine over half its length",
        "core/schedule.py",
        "return 0.5 * (1 + math.cos(math.pi * progress))",
        "return 0.5 * (1 + math.cos(2 * math.pi * progress))",
        (SCHEDULE,),
    ),
    Fault(
        "every part at the rate of the first",
        "training/optim.py",
        'rates[settings["part"]] * factor',
        "groups[0].learning_rate * factor",
        (WHOLE_RUN, f"{OPTIM}::test_a_rate_of_zero_moves_nothing"),
    ),
    # Clipping and the optimiser
    Fault(
        "each part clipped by its own norm",
        "training/optim.py",
        "group.gradient.mul_(limit / norm)",
        "group.gradient.mul_(limit / group.gradient.norm())",
        (f"{OPTIM}::test_clipping_against_float64", WHOLE_RUN),
    ),
    Fault(
        "small gradients scaled up to the limit",
        "training/optim.py",
        "    if norm > limit:",
        "    if norm > 0:",
        (f"{OPTIM}::test_clipping_against_float64", WHOLE_RUN),
    ),
    Fault(
        "the norms of the parts added, not their squares",
        "training/optim.py",
        "torch.stack(norms).norm().float()",
        "torch.stack(norms).sum().float()",
        (f"{OPTIM}::test_clipping_against_float64", WHOLE_RUN),
    ),
    Fault(
        "a norm of long gradients added up in float32",
        "training/optim.py",
        "torch.float64 if device.type",
        "torch.float32 if device.type",
        (LONG_NORM,),
    ),
    Fault(
        "bf16 weights rounded to the nearest",
        "training/rounding.py",
        "torch.empty_like(bits).random_(0, 1 << 16, generator=generator)",
        "torch.full_like(bits, 1 << 15)",
        (ROUNDING,),
        known=True,
    ),
    Fault(
        "bf16 weights rounded up and down alike, however near",
        "training/rounding.py",
        "torch.empty_like(bits).random_(0, 1 << 16, generator=generator)",
        "torch.empty_like(bits).random_(0, 2, generator=generator) * 0xFFFF",
        (ROUNDING,),
    ),
    Fault(
        "weight decay in the gradient, as L2",
        "config/optimizer.py",
        'Kind("torch.optim.AdamW"',
        'Kind("torch.optim.Adam"',
        (f"{OPTIM}::test_adamw_against_float64", WHOLE_RUN),
    ),
    Fault(
        "no weight decay",
        "config/optimizer.py",
        '"weight_decay": self.decay}',
        '"weight_decay": 0.0}',
        (f"{OPTIM}::test_adamw_against_float64", WHOLE_RUN),
    ),
    Fault(
        "the two betas swapped",
        "config/optimizer.py",
        '"betas": self.betas,',
        '"betas": self.betas[::-1],',
        (f"{OPTIM}::test_adamw_against_float64", WHOLE_RUN),
    ),
    # The average
    Fault(
        "an average kept in bf16",
        "training/ema.py",
        "torch.float64)",
        "torch.bfloat16)",
        (f"{OPTIM}::test_average_after_10_000_updates",),
        known=True,
    ),
    Fault(
        "an average kept in float32",
        "training/ema.py",
        "torch.float64)",
        "torch.float32)",
        (f"{OPTIM}::test_average_of_weights_that_hardly_move",),
        known=True,
    ),
    Fault(
        "the decay given to the new weights",
        "training/ema.py",
        "1 - decay)",
        "decay)",
        (f"{OPTIM}::test_average_of_a_random_walk", WHOLE_RUN),
    ),
    Fault(
        "the decay of the next update",
        "training/ema.py",
        "self._spec.decay_at(finished_steps)",
        "self._spec.decay_at(finished_steps + 1)",
        (f"{OPTIM}::test_average_of_a_random_walk", WHOLE_RUN),
    ),
    Fault(
        "an average that begins with the weights before training",
        "config/run.py",
        "        if k <= 0:\n            return 0.0\n        return min(self.decay",
        "        return min(self.decay",
        (f"{SCHEDULE}::test_ema_decay_at_every_update", WHOLE_RUN),
    ),
    Fault(
        "the average's warm-up as k / (10 + k)",
        "config/run.py",
        "min(self.decay, (1 + k) / (10 + k))",
        "min(self.decay, k / (10 + k))",
        (f"{SCHEDULE}::test_ema_decay_at_every_update", f"{ORACLES}_diffusers.py::test_ema_decay"),
    ),
    Fault(
        "the trained weights that are set aside for a preview are the same memory",
        "training/ema.py",
        "trained = [group.flat.detach().clone() for group in self._groups]",
        "trained = [group.flat.detach() for group in self._groups]",
        (f"{OPTIM}::test_average_in_place_and_back_bit_for_bit",),
        known=True,
    ),
    Fault(
        "the average saved as the trained weights",
        "training/session.py",
        "            weights=weights,\n",
        "            weights=learner.average.state() if learner.average else weights,\n",
        (AVERAGE,),
        known=True,
    ),
    # Random numbers
    Fault(
        "the same noise whatever the seed is",
        "core/random.py",
        "[str(seed), domain, *",
        "[domain, *",
        (DRAWS,),
        known=True,
    ),
    Fault(
        "the same noise for every picture, and so in every process",
        "core/random.py",
        "self.epoch, sample.id, sample.repeat)",
        "self.epoch, sample.repeat)",
        (DRAWS,),
        known=True,
    ),
    Fault(
        "the same noise for every repeat of a picture",
        "core/random.py",
        "self.epoch, sample.id, sample.repeat)",
        "self.epoch, sample.id)",
        (DRAWS,),
    ),
    Fault(
        "one stream for all that is drawn",
        "core/random.py",
        "[str(seed), domain, *",
        "[str(seed), *",
        (DRAWS,),
    ),
    Fault(
        "a seed of 32 bits",
        "core/random.py",
        'digest_size=16).digest(), "little")',
        'digest_size=4).digest(), "little")',
        (f"{DRAWS}::test_100_000_keys_are_distinct",),
        known=True,
    ),
    Fault(
        "noise that follows the place in the batch, not the sample",
        "core/random.py",
        "rows = [self._generator(domain, s).standard_normal(tuple(shape), np.float32) for s in self.samples]",
        "rows = [generator(self.seed, domain, self.epoch, i).standard_normal(tuple(shape), np.float32)\n"
        "                for i, _ in enumerate(self.samples)]",
        (f"{DRAWS}::test_a_row_depends_on_its_own_sample_alone",),
        known=True,
    ),
)
