"""Forward processes. Schedules live in float64, what reaches the network in float32, whatever the model's dtype is.

DDPM: Ho et al. 2020 (arXiv:2006.11239); v-prediction: Salimans & Ho 2022 (2202.00512); min-SNR: Hang et al. 2023
(2303.09556); zero terminal SNR: Lin et al. 2024 (2305.08891).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

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

    def sample_t(self, u: Tensor, *, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Integer timesteps [B] from uniforms u [B] in [0, 1): even over [low T, high T), at least one timestep."""
        first = min(round(low * self.steps), self.steps - 1)
        last = max(round(high * self.steps), first + 1)
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

    def snr(self, t: Tensor) -> Tensor:
        """a^2 / s^2, [B] float64 on the CPU; 0 at a zero-terminal last step."""
        a2 = self.alphas_cumprod[t.cpu()]
        return a2 / (1 - a2)

    def weight(self, t: Tensor, *, min_snr_gamma: float | None = None) -> Tensor:
        """Loss weight [B] float32: 1, or the min-SNR weight of this prediction type.

        min-SNR weighs the error in x_0 by min(SNR, gamma). Expressed on the error in noise that is
        min(SNR, gamma) / SNR, and on the error in v min(SNR, gamma) / (SNR + 1).
        """
        if min_snr_gamma is None:
            return torch.ones(t.shape, dtype=torch.float32, device=t.device)
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        clipped = snr.clamp(max=min_snr_gamma)
        return self._look_up(clipped / (snr if self.prediction == "epsilon" else snr + 1), t)

    def _coefficients(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (like.ndim - 1))
        signal, sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        return self._look_up(signal, t).view(shape), self._look_up(sigma, t).view(shape)

    def _look_up(self, table: Tensor, t: Tensor) -> Tensor:
        """Entries of a float64 table as float32 on t's device, which may not know float64."""
        return table.float().to(t.device)[t]


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(a^2) so that the last step holds no signal and the first is unchanged."""
    root = alphas_cumprod.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2
