"""Noise schedules, and the conversions between a denoiser's output and x0. All other code uses x0.

A noisy sample is `x_t = alpha(t) x0 + sigma(t) eps`. Times are in the units of the teacher's timesteps, that is in
`[0, num_train_timesteps)`: whole numbers for a variance-preserving schedule, any for a flow schedule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Per-sample values `[B]` (or a scalar) as `[B, 1, ...]`, ready to multiply `like` of shape `[B, ...]`."""
    return values.reshape(-1, *(1,) * (like.ndim - 1)) if values.ndim else values


@dataclass(frozen=True)
class NoiseSchedule:
    """alpha(t) and sigma(t), variance preserving where `alphas_cumprod` is given, flow matching otherwise.

    Args:
        alphas_cumprod: `[num_train_timesteps]`, the squared alphas of a variance-preserving schedule; None for flow.
        num_train_timesteps: the range of the times.
    """

    alphas_cumprod: Tensor | None
    num_train_timesteps: int = 1000

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule behind any diffusers scheduler: its `alphas_cumprod` if it has them, else flow."""
        alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
        return cls(alphas_cumprod, scheduler.config.num_train_timesteps)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule, ready for times on a device; elsewhere it works, with a copy at each use."""
        return self if self.alphas_cumprod is None else replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    @property
    def is_flow(self) -> bool:
        """True for flow matching, where `sigma = t / num_train_timesteps` and `alpha = 1 - sigma`."""
        return self.alphas_cumprod is None

    def lie_between(self, t: Tensor, low: float, high: float) -> Tensor:
        """Whether times lie between two shares of the timesteps in [0, 1], both included; of the shape of `t`."""
        return (low * self.num_train_timesteps <= t) & (t <= high * self.num_train_timesteps)

    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at times `t`, float32, of the shape of `t`."""
        return 1 - self.sigma(t) if self.is_flow else self._alphas_cumprod(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at times `t`, float32, of the shape of `t`."""
        return t.float() / self.num_train_timesteps if self.is_flow else (1 - self._alphas_cumprod(t)).sqrt()

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`(alpha(t), sigma(t))`, expanded so that they multiply `like` of shape `[B, ...]`."""
        return expand(self.alpha(t), like), expand(self.sigma(t), like)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """`alpha(t) x0 + sigma(t) noise` in float32. Gradients flow to `x0` and `noise`."""
        alpha, sigma = self.scales(t, x0)
        return alpha * x0.float() + sigma * noise.float()

    def _alphas_cumprod(self, t: Tensor) -> Tensor:
        assert self.alphas_cumprod is not None
        return self.alphas_cumprod.to(device=t.device, dtype=torch.float32)[t.long()]


def to_x0(prediction_type: str, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """A denoiser's output as x0, in float32. Gradients flow to `output` and `x_t`.

    Args:
        prediction_type: one of `PREDICTION_TYPES`. `v_prediction` is alpha eps - sigma x0 (Salimans and Ho 2022);
            `flow_prediction` is eps - x0 (rectified flow). The two are not the same thing.
        output: the denoiser's output, `[B, ...]`.
        x_t: the noisy sample, `[B, ...]`.
        alpha, sigma: the scales at x_t's times, broadcastable to x_t.

    Raises:
        ValueError: for an unknown prediction type.
    """
    output, x_t = output.float(), x_t.float()
    if prediction_type == "epsilon":
        return (x_t - sigma * output) / alpha
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * output
    if prediction_type == "flow_prediction":
        return x_t - sigma * output
    if prediction_type == "sample":
        return output
    raise ValueError(f"Unknown prediction type {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}.")


def from_x0(prediction_type: str, x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`x0` as a denoiser's output: the inverse of `to_x0`, with the same arguments and errors.

    At sigma = 0 only `sample` is defined.
    """
    x0, x_t = x0.float(), x_t.float()
    if prediction_type == "epsilon":
        return (x_t - alpha * x0) / sigma
    if prediction_type == "v_prediction":
        return (alpha * x_t - x0) / sigma
    if prediction_type == "flow_prediction":
        return (x_t - x0) / sigma
    if prediction_type == "sample":
        return x0
    raise ValueError(f"Unknown prediction type {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}.")


def denoising_weight(sigma: Tensor) -> Tensor:
    """The weight of a squared error of x0 in a denoising loss, 1 / sigma^2, shaped as `sigma`.

    That is the loss of v-prediction and of flow matching, whatever the teacher predicts: epsilon-prediction's own,
    alpha^2 / sigma^2, hardly sees high noise levels, at which R_dm asks as often as at low ones.
    """
    return 1 / sigma**2
