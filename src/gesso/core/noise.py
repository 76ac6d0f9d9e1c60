"""Forward processes. Schedules live in float64, what reaches the network in float32, whatever the model's dtype is.

DDPM: Ho et al. 2020 (arXiv:2006.11239); v-prediction: Salimans & Ho 2022 (2202.00512); zero terminal SNR: Lin et al.
2024 (2305.08891); rectified flow: Liu et al. 2023 (2209.03003), Esser et al. 2024 (2403.03206).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from gesso.core.seams import Place
from gesso.core.weighting import Unweighted, Weighting
from gesso.errors import UserError

Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class DDPM:
    """Variance-preserving diffusion: x_t = a x_0 + s n, with a^2 + s^2 = 1.

    `alphas_cumprod` is a^2 for each timestep, [T] float64.
    """

    alphas_cumprod: Tensor
    prediction: Prediction = "epsilon"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, prediction: Prediction | None = None) -> DDPM:
        """Build from a diffusers scheduler config; `prediction` overrules the config's own.

        Raises `UserError` for a schedule this class does not know, and for zero terminal SNR with epsilon
        prediction (the last timestep would hold no signal to predict noise from).
        """
        steps = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        name = str(config.get("beta_schedule", "linear"))
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif name == "linear":
            betas = torch.linspace(start, end, steps, dtype=torch.float64)
        elif name == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        else:
            raise UserError(
                f"the model's noise schedule '{name}' is not one of linear, scaled_linear",
                where="scheduler_config.json",
                fix="use a base model with one of these schedules",
            )
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = zero_terminal_snr(alphas_cumprod)
        kind = prediction or str(config.get("prediction_type", "epsilon"))
        if kind not in get_args(Prediction):
            raise UserError(
                f"prediction type '{kind}' is not one of {', '.join(get_args(Prediction))}",
                where="scheduler_config.json",
                fix="set model.prediction in the run file",
            )
        if kind == "epsilon" and alphas_cumprod[-1] == 0:
            raise UserError(
                "a zero-terminal-SNR schedule cannot be trained with epsilon prediction",
                where="scheduler_config.json",
                fix="set model.prediction to v_prediction if the model was trained so",
            )
        return cls(alphas_cumprod, kind)  # type: ignore[arg-type]

    @property
    def steps(self) -> int:
        """Number of timesteps, T."""
        return len(self.alphas_cumprod)

    def sample_t(
        self,
        u: Tensor,
        *,
        low: float = 0.0,
        high: float = 1.0,
        place: Place | None = None,
        cells: int | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Integer timesteps [B] from uniforms u [B] in [0, 1): over [low T, high T), at least one timestep.

        They are even, or as `place` has them; the size of the picture makes no difference.
        """
        first = min(round(low * self.steps), self.steps - 1)
        last = max(round(high * self.steps), first + 1)
        if place is not None:
            u = place(u, first / self.steps, last / self.steps)
        return (first + torch.floor(u * (last - first)).long()).clamp_(max=last - 1)

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t, [B, ...] float32."""
        signal, sigma = self._coefficients(t, latents)
        return signal * latents.float() + sigma * noise.float()

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should answer: the noise, or v = a n - s x_0."""
        if self.prediction == "epsilon":
            return noise.float()
        signal, sigma = self._coefficients(t, latents)
        return signal * noise.float() - sigma * latents.float()

    def clean(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The x_0 that an answer says, [B, ...] float32: (x_t - s n) / a, or a x_t - s v."""
        signal, sigma = self._coefficients(t, noisy)
        if self.prediction == "epsilon":
            return (noisy.float() - sigma * prediction.float()) / signal
        return signal * noisy.float() - sigma * prediction.float()

    def level(self, t: Tensor) -> Tensor:
        """t as a fraction of the range, [B] float32."""
        return t.float() / self.steps

    def snr(self, t: Tensor) -> Tensor:
        """a^2 / s^2, [B] float64 on the CPU; 0 at a zero-terminal last step."""
        return self._snr[t.cpu()]

    def by_snr(self, t: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of the signal-to-noise ratio, reckoned in float64: [B] float32."""
        return self._look_up(rule(self._snr), t)

    def weight(self, t: Tensor, rule: Weighting | None = None) -> Tensor:
        """Loss weight [B] float32 of a rule, for what this model predicts; none: 1."""
        rule = rule or Unweighted()
        return self.by_snr(t, lambda snr: rule.on_answer(snr, self.prediction))

    @property
    def _snr(self) -> Tensor:
        return self.alphas_cumprod / (1 - self.alphas_cumprod)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        signal, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        return self._look_up(signal, t).view(shape), self._look_up(sigma, t).view(shape)

    def _look_up(self, table: Tensor, t: Tensor) -> Tensor:
        """Entries of a float64 table as float32 on t's device, which may not know float64."""
        return table.float().to(t.device, non_blocking=t.device.type == "cuda")[t]


@dataclass(frozen=True)
class RectifiedFlow:
    """A straight line from picture to noise: x_s = (1 - s) x_0 + s n; the answer is its direction, n - x_0.

    A timestep is 1000 s, a float, and any s that is used is the one that the model is told. `shift` moves draws (and
    never the process itself) towards more noise, s' = k s / (1 + (k - 1) s), and is "flux" where it depends on size.
    """

    shift: float | Literal["flux"] = 1.0
    prediction: Literal["flow"] = "flow"

    def sample_t(
        self,
        u: Tensor,
        *,
        low: float = 0.0,
        high: float = 1.0,
        place: Place | None = None,
        cells: int | None = None,
    ) -> Tensor:
        """Timesteps [B] float32 from uniforms u [B], shifted, with low <= t / 1000 <= high.

        `place` is how they are spread before the shift. `cells` is the number of latent cells of the picture, h w,
        which a shift of "flux" needs.
        """
        k = self._shift(cells)
        first, last = shifted(low, 1 / k), shifted(high, 1 / k)
        share = u if place is None else place(u, first, last)
        return (1000 * shifted(first + share * (last - first), k)).float()

    def corrupt(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_s, [B, ...] float32."""
        s = self._level(t, latents)
        return (1 - s) * latents.float() + s * noise.float()

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        """n - x_0, the same at all timesteps."""
        return noise.float() - latents.float()

    def clean(self, noisy: Tensor, prediction: Tensor, t: Tensor) -> Tensor:
        """The x_0 that an answer says, [B, ...] float32: x_s - s (n - x_0)."""
        return noisy.float() - self._level(t, noisy) * prediction.float()

    def level(self, t: Tensor) -> Tensor:
        """s, [B] float32."""
        return t.float() / 1000

    def snr(self, t: Tensor) -> Tensor:
        """((1 - s) / s)^2, [B] float64 where t's device knows that; below s = 1e-6 it is what it is there."""
        s = (t if t.device.type == "mps" else t.double()) / 1000
        return ((1 - s) / s.clamp(min=1e-6)).square()

    def by_snr(self, t: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """A function of the signal-to-noise ratio, [B] float32."""
        return rule(self.snr(t)).float()

    def weight(self, t: Tensor, rule: Weighting | None = None) -> Tensor:
        """Loss weight [B] float32 of a rule; none: 1."""
        rule = rule or Unweighted()
        return self.by_snr(t, lambda snr: rule.on_answer(snr, "flow"))

    def _shift(self, cells: int | None) -> float:
        if self.shift != "flux":
            return self.shift
        assert cells is not None, "a shift that depends on the size is asked for without one"
        return flux_shift(cells // 4)

    def _level(self, t: Tensor, like: Tensor) -> Tensor:
        return self.level(t).view(-1, *[1] * (like.ndim - 1))


Number = TypeVar("Number", float, Tensor)


def shifted(s: Number, k: float) -> Number:
    """Noise levels moved towards more noise for k > 1; a shift by 1 / k undoes it (Esser et al. 2024, equation 23)."""
    return k * s / (1 + (k - 1) * s)


def flux_shift(tokens: int) -> float:
    """FLUX's shift for a picture of so many packed tokens: e^mu, with mu linear from 0.5 at 256 to 1.15 at 4096."""
    return math.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256))


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(a^2) so that the last step holds no signal and the first is unchanged."""
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2
