"""The student's few-step sampler: one linear-Gaussian kernel for every prediction type and stochasticity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..prediction import PREDICTION_TYPES, NoiseSchedule, expand, to_x0

FINAL = -1  # the time after the last step: no noise is left


@dataclass
class RdmSchedulerOutput(BaseOutput):
    """One step of `RdmScheduler`.

    Args:
        prev_sample: the next sample `[B, ...]`, in the dtype of the model output.
        pred_original_sample: the x0 prediction `[B, ...]`, in the dtype of the model output.
        mean: the transition's mean `[B, ...]`, float32.
        std: the transition's standard deviation `[B, 1, ...]` or a scalar, float32; 0 at the last step and for eta 0.
        log_prob: the log-density of `prev_sample` in nats `[B]`, float64, if it was asked for; 0 at the last step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor | None = None


class RdmScheduler(SchedulerMixin, ConfigMixin):
    """Few-step sampling with x0 predictions, from re-noising (eta 1) to deterministic (eta 0).

    With x_t = a x0 + s eps, the step from t to the next time t' is Gaussian:

        std  = eta s'
        mean = a' x0 + sqrt(s'^2 - std^2) (x_t - a x0) / s

    eta = 1 is the re-noising of DMD2 (arXiv 2405.14867) and of `LCMScheduler`; eta = 0 is DDIM for a
    variance-preserving schedule and Euler for flow matching.

    Args:
        num_train_timesteps: the teacher's number of timesteps.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the teacher's variance-preserving
            schedule, as in `DDIMScheduler`; unused for flow.
        prediction_type: `epsilon`, `v_prediction`, `sample` or `flow_prediction`; the last makes the schedule flow.
        eta: stochasticity in [0, 1].
        student_timesteps: the student's own grid, descending; used whenever as many steps are asked for.
        student_sigmas: the same for flow, descending from at most 1; final values, never shifted again.
        timestep_spacing: how other grids are laid; only `trailing` starts at pure noise, so only it is known.
        shift: the flow shift of other grids.
        steps_offset: kept for the teacher's configuration; trailing grids do not use it.

    Raises:
        ValueError: for an unknown prediction type or spacing, an eta outside [0, 1], or a grid that does not descend.
    """

    _compatibles = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler",
                    "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]  # fmt: skip
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        eta: float = 1.0,
        student_timesteps: list[int] | None = None,
        student_sigmas: list[float] | None = None,
        timestep_spacing: str = "trailing",
        shift: float = 1.0,
        steps_offset: int = 0,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; use one of {', '.join(PREDICTION_TYPES)}.")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must lie in [0, 1], from deterministic to full re-noising.")
        self.betas = self.alphas_cumprod = None
        if prediction_type != "flow_prediction":
            noise = DDIMScheduler(
                num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
            )  # fmt: skip
            self.betas, self.alphas_cumprod = noise.betas, noise.alphas_cumprod
        self.schedule = NoiseSchedule(self.alphas_cumprod, num_train_timesteps)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._train_steps = num_train_timesteps if self.alphas_cumprod is None else len(self.alphas_cumprod)
        self.set_timesteps(len(self.student_grid or []) or min(50, self._train_steps))

    @property
    def student_grid(self) -> list | None:
        """The student's own times, from `student_timesteps` or `student_sigmas`; None if neither is configured."""
        if self.config.student_sigmas is not None:
            return [sigma * self.config.num_train_timesteps for sigma in self.config.student_sigmas]
        return self.config.student_timesteps

    @property
    def step_index(self) -> int | None:
        """How many steps lie behind, counted by `step` with a scalar time; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first index, as pipelines that start midway set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Starts the count of `step_index` at `begin_index`."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lays the grid for sampling.

        Args:
            num_inference_steps: as many steps as the student was trained with give the student's grid.
            device: where the times are put.
            timesteps: an explicit descending grid.
            sigmas: the same for flow. Where they are as many as the student's, the student's grid is used instead,
                because stock flow pipelines always pass sigmas of their own.
            mu: the resolution-dependent flow shift of other grids; `log(shift)` by default.

        Raises:
            ValueError: if no number and no grid is given, the number is not in [1, num_train_timesteps], or the grid
                does not descend within the range.
        """
        given = next((list(grid) for grid in (timesteps, sigmas) if grid is not None), [])
        count = num_inference_steps or len(given)
        if not 1 <= count <= self._train_steps:
            raise ValueError(f"num_inference_steps is {count}; it must lie between 1 and {self._train_steps}.")
        if timesteps is not None:
            grid = given
        elif self.student_grid is not None and count == len(self.student_grid):
            grid = self.student_grid
        else:
            grid = self._trailing_grid(count, given, mu)
        self._check_grid(grid)
        dtype = torch.float32 if self.schedule.is_flow else torch.int64
        self.timesteps = torch.tensor(grid, dtype=dtype, device=device)
        self.sigmas = torch.cat([self.schedule.sigma(self.timesteps), torch.zeros(1, device=device)])
        self.num_inference_steps = len(grid)
        self._step_index = self._begin_index = None

    def _trailing_grid(self, count: int, sigmas: list[float], mu: float | None) -> list:
        train_steps = self._train_steps
        if not self.schedule.is_flow:
            return [round(train_steps * (count - i) / count) - 1 for i in range(count)]
        shift = self.config.shift if mu is None else math.exp(mu)
        even = sigmas or [(count - i) / count for i in range(count)]
        return [shift * s / (1 + (shift - 1) * s) * train_steps for s in even]

    def _check_grid(self, grid: list) -> None:
        if self.config.timestep_spacing != "trailing":
            raise ValueError(f"timestep_spacing is {self.config.timestep_spacing!r}; RdmScheduler knows 'trailing'.")
        top = self._train_steps - (0 if self.schedule.is_flow else 1)
        descends = all(earlier > later for earlier, later in pairwise(grid))
        if not descends or grid[0] > top or grid[-1] < 0:
            raise ValueError(f"The grid {grid} must descend strictly and lie between 0 and {top}.")

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The sample unchanged; here for interchangeability with other schedulers."""
        return sample

    def index_for_timestep(self, timestep: Tensor | float) -> Tensor:
        """The grid's index of each time, shaped as `timestep`.

        Raises:
            ValueError: if a time is not on the grid.
        """
        times = torch.as_tensor(timestep, device=self.timesteps.device)
        on_grid = self.timesteps == times[..., None]
        if not on_grid.any(-1).all():
            raise ValueError(f"The time {timestep} is not on the grid {self.timesteps.tolist()}; call set_timesteps.")
        return on_grid.int().argmax(-1)

    def previous_timestep(self, timestep: Tensor | float) -> Tensor:
        """The next lower time of the grid for each `timestep`, shaped as it; `FINAL` (-1) below the last."""
        following = torch.cat([self.timesteps, self.timesteps.new_full((1,), FINAL)])
        return following[self._steps_behind(timestep)]

    def _steps_behind(self, timestep: Tensor | float) -> Tensor:
        times = torch.as_tensor(timestep, device=self.timesteps.device)
        return (self.timesteps >= times[..., None]).sum(-1)

    def transition(
        self, x0: Tensor, sample: Tensor, timestep: Tensor, next_timestep: Tensor, eta: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the next sample.

        Args:
            x0: the prediction `[B, ...]`.
            sample: the noisy sample `[B, ...]` at `timestep`.
            timestep, next_timestep: scalars or `[B]`; a negative next time means that no noise is left.
            eta: stochasticity in [0, 1]; the configured one by default.

        Returns:
            `(mean [B, ...], std)` in float32; std is a scalar or `[B, 1, ...]`. Gradients flow to x0 and sample.
        """
        eta = self.config.eta if eta is None else eta
        x0, sample = x0.float(), sample.float()
        alpha, sigma = self.schedule.scales(timestep, sample)
        last = expand(next_timestep < 0, sample)
        next_alpha, next_sigma = self.schedule.scales(next_timestep.clamp(min=0), sample)
        next_alpha, next_sigma = next_alpha.masked_fill(last, 1.0), next_sigma.masked_fill(last, 0.0)
        std = eta * next_sigma
        direction = (next_sigma**2 - std**2).sqrt() * (sample - alpha * x0) / sigma
        return next_alpha * x0 + direction, std

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        stochasticity: float | None = None,
        return_log_prob: bool = False,
        return_dict: bool = True,
    ) -> RdmSchedulerOutput | tuple:
        """Draws the next sample.

        Args:
            model_output: the denoiser's output `[B, ...]`, of the configured prediction type.
            timestep: its time, a scalar or one per sample `[B]`; on the grid.
            sample: the noisy sample `[B, ...]`.
            generator: draws the noise; a list of one per sample makes each sample independent of its batch.
            stochasticity: overrides the configured `eta`; not called so, because stock pipelines pass an `eta` of 0 to
                every scheduler that takes one.
            return_log_prob: whether to state the log-density of the draw.
            return_dict: False gives the tuple `(prev_sample, pred_original_sample)`.
        """
        times = torch.as_tensor(timestep, device=sample.device)
        x0 = self.pred_original_sample(model_output, times, sample)
        mean, std = self.transition(x0, sample, times, self.previous_timestep(times).to(sample.device), stochasticity)
        prev_sample = mean
        if (std > 0).any():
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=model_output.dtype)
            prev_sample = mean + std * noise.float()
        if times.ndim == 0:
            self._step_index = int(self._steps_behind(times))
        prev_sample, x0 = prev_sample.to(model_output.dtype), x0.to(model_output.dtype)
        if not return_dict:
            return prev_sample, x0
        log_prob = gaussian_log_prob(prev_sample, mean, std) if return_log_prob else None
        return RdmSchedulerOutput(prev_sample, x0, mean, std, log_prob)

    def pred_original_sample(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
        """The x0 that `model_output` means at `timestep`, float32 `[B, ...]`. Gradients flow to both tensors."""
        alpha, sigma = self.schedule.scales(timestep, sample)
        return to_x0(self.config.prediction_type, model_output, sample, alpha, sigma)

    def log_prob(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        prev_sample: Tensor,
        stochasticity: float | None = None,
    ) -> Tensor:
        """Log-density that a network with this output would give a stored transition from `sample` to `prev_sample`.

        Returns:
            `[B]` in nats, float64, summed over all dimensions; 0 for the deterministic last step. Gradients flow to
            `model_output`.
        """
        times = torch.as_tensor(timestep, device=sample.device)
        x0 = self.pred_original_sample(model_output, times, sample)
        mean, std = self.transition(x0, sample, times, self.previous_timestep(times).to(sample.device), stochasticity)
        return gaussian_log_prob(prev_sample, mean, std)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x0 + sigma noise` at times `[B]`, in the dtype of the samples."""
        return self.schedule.add_noise(original_samples, noise, timesteps).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the argument order of the flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v-prediction target `alpha noise - sigma x0` at times `[B]`; for flow `noise - x0`."""
        if self.schedule.is_flow:
            return noise - sample
        alpha, sigma = self.schedule.scales(timesteps, sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density in nats `[B]`, float64, of `sample [B, ...]` under N(mean, std^2); 0 where std is 0.

    Gradients flow to all three.
    """
    mean, std = mean.double(), std.double()
    deterministic = std == 0
    safe = std.masked_fill(deterministic, 1.0)
    density = -0.5 * ((sample.double() - mean) / safe) ** 2 - safe.log() - 0.5 * math.log(2 * math.pi)
    return density.masked_fill(deterministic, 0.0).flatten(1).sum(1)
