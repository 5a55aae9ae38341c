"""The student's few-step sampler: one Gaussian transition for every prediction type and stochasticity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..prediction import NoiseSchedule, expand, to_x0
from .configurations import check_settings, translate_config
from .grids import check_grid, check_request, make_grid
from .transitions import RdmSchedulerOutput, gaussian_log_prob

FINAL = -1  # the time after the last step, where no noise is left


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
        student_timesteps: the student's own grid, descending; used whenever its number of steps is requested.
        student_sigmas: the same for flow, descending from at most 1; final values, never shifted again.
        timestep_spacing: of other grids; only `trailing` starts at pure noise, so only it is supported.
        shift, use_dynamic_shifting, time_shift_type, shift_terminal: of other flow grids, as in
            `FlowMatchEulerDiscreteScheduler`.
        steps_offset: kept for the teacher's configuration; trailing grids do not use it.

    Raises:
        ValueError: for an unknown prediction type or spacing, an eta outside [0, 1], a grid that does not descend, or
            epsilon prediction at a time without any signal.
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
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
    ):
        check_settings(prediction_type, eta, timestep_spacing, time_shift_type)
        self.betas = self.alphas_cumprod = None
        if prediction_type != "flow_prediction":
            noise = DDIMScheduler(
                num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas,
                rescale_betas_zero_snr=rescale_betas_zero_snr,
            )  # fmt: skip
            self.betas, self.alphas_cumprod = noise.betas, noise.alphas_cumprod
        if prediction_type == "epsilon" and self.alphas_cumprod is not None and not self.alphas_cumprod[-1]:
            raise ValueError(
                "Epsilon prediction with zero terminal SNR does not determine x0 at the noisiest time; set "
                "rescale_betas_zero_snr to false, or prediction_type to the network's own."
            )
        self.schedule = NoiseSchedule(self.alphas_cumprod, num_train_timesteps)
        self.init_noise_sigma = 1.0
        self.step_index: int | None = None  # the number of steps taken, counted by `step` with a scalar time
        self.begin_index: int | None = None
        self._train_steps = num_train_timesteps if self.alphas_cumprod is None else len(self.alphas_cumprod)
        unshifted = 0.0 if time_shift_type == "exponential" else 1.0
        self._set_grid(self.student_grid or self._make_grid(min(50, self._train_steps), [], unshifted))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from its own configuration, or from that of a stock scheduler, whose noise schedule it takes."""
        config = translate_config(config, cls) if isinstance(config, dict) else config
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def student_grid(self) -> list | None:
        """The student's own times, from `student_timesteps` or `student_sigmas`; None if neither is configured."""
        if self.config.student_sigmas is not None:
            return [sigma * self.config.num_train_timesteps for sigma in self.config.student_sigmas]
        return self.config.student_timesteps

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Records the first index, as pipelines that start midway do."""
        self.begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Sets the grid for sampling.

        With another number of steps than it was trained with, a student is sampled on the grid of its exported stock
        scheduler, if that has one: for flow even from its first sigma to its last, for other stochastic students
        fewer of its own steps. (Students of an explicit grid are exported with a scheduler that expects to be told it.)

        Args:
            num_inference_steps: the number of steps; the trained number gives the student's own grid.
            device: of the times.
            timesteps: an explicit descending grid.
            sigmas: the same for flow; a student's are final, others are shifted as stock schedulers shift them. Even
                ones, 1 to 1/K, count as a number of steps, because stock flow pipelines always pass them.
            mu: the resolution-dependent flow shift, under `use_dynamic_shifting` only, and never of a student's grid.

        Raises:
            ValueError: if no number and no grid is given or they contradict each other, the number is not in
                [1, num_train_timesteps], the grid does not descend within the range, or a needed `mu` is missing.
        """
        check_request(num_inference_steps, timesteps, sigmas, self.schedule.is_flow)
        given = next((list(grid) for grid in (timesteps, sigmas) if grid is not None), [])
        count = len(given) if num_inference_steps is None else num_inference_steps
        if not 1 <= count <= self._train_steps:
            raise ValueError(f"num_inference_steps is {count}; it must lie between 1 and {self._train_steps}.")
        self._set_grid(given if timesteps is not None else self._make_grid(count, given, mu), device)

    def _make_grid(self, count: int, sigmas: Sequence[float], mu: float | None) -> list:
        return make_grid(self.config, self.student_grid, self._train_steps, count, sigmas, mu)

    def _set_grid(self, grid: list, device: str | torch.device | None = None) -> None:
        is_flow = self.schedule.is_flow
        check_grid(grid, self._train_steps - (not is_flow), whole=not is_flow)
        self.timesteps = torch.tensor(grid, dtype=torch.float32 if is_flow else torch.int64, device=device)
        self.sigmas = torch.cat([self.schedule.sigma(self.timesteps), torch.zeros(1, device=device)])
        self.num_inference_steps = len(grid)
        self.step_index = self.begin_index = None

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """The sample unchanged; pipelines call it on every scheduler."""
        return sample

    def index_for_timestep(self, timestep: Tensor | float) -> Tensor:
        """The grid's index of each time, shaped as `timestep`. Raises ValueError if a time is not on the grid."""
        times = torch.as_tensor(timestep, device=self.timesteps.device)
        on_grid = self.timesteps == times[..., None]
        if not on_grid.any(-1).all():
            raise ValueError(f"The time {timestep} is not on the grid {self.timesteps.tolist()}; call set_timesteps.")
        return on_grid.int().argmax(-1)

    def previous_timestep(self, timestep: Tensor | float) -> Tensor:
        """The grid's next lower time for each `timestep`, of the same shape; `FINAL` (-1) below the last."""
        following = torch.cat([self.timesteps, self.timesteps.new_full((1,), FINAL)])
        times = torch.as_tensor(timestep, device=self.timesteps.device)
        return following[(self.timesteps >= times[..., None]).sum(-1)]

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
        sigma = sigma.clamp(min=torch.finfo(sigma.dtype).tiny)  # at sigma 0, sample - alpha x0 is 0 too: 0 / tiny is 0
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
            generator: of the noise; a list with one for each sample makes samples independent of their batch.
            stochasticity: replaces the configured `eta`. It is not named `eta`, because stock pipelines pass an `eta`
                of 0 to every scheduler that takes one.
            return_log_prob: whether to return the log-density of the draw.
            return_dict: False gives the tuple `(prev_sample, pred_original_sample)`.

        Raises:
            ValueError: if a time is not on the grid.
        """
        times = torch.as_tensor(timestep, device=sample.device)
        x0, mean, std = self._next_step(model_output, times, sample, stochasticity)
        prev_sample = mean
        if (std > 0).any():
            noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=model_output.dtype)
            prev_sample = mean + std * noise.float()
        if times.ndim == 0:
            self.step_index = int(self.index_for_timestep(times)) + 1
        prev_sample, x0 = prev_sample.to(model_output.dtype), x0.to(model_output.dtype)
        if not return_dict:
            return prev_sample, x0
        log_prob = gaussian_log_prob(prev_sample, mean, std) if return_log_prob else None
        return RdmSchedulerOutput(prev_sample, x0, mean, std, log_prob)

    def _next_step(self, model_output: Tensor, times: Tensor, sample: Tensor, eta: float | None) -> tuple[Tensor, ...]:
        """The x0 prediction, and the mean and the standard deviation of the step to the grid's next time."""
        self.index_for_timestep(times)  # raises for times that are not on the grid
        x0 = self.pred_original_sample(model_output, times, sample)
        return x0, *self.transition(x0, sample, times, self.previous_timestep(times).to(sample.device), eta)

    def pred_original_sample(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> Tensor:
        """The x0 that `model_output` predicts at `timestep`, float32 `[B, ...]`. Gradients flow to both tensors."""
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
        """Log-density of a stored transition from `sample` to `prev_sample` under a network with this output.

        Returns:
            `[B]` in nats, float64, summed over all dimensions; 0 for the deterministic last step. Gradients flow to
            `model_output`.

        Raises:
            ValueError: if a time is not on the grid.
        """
        times = torch.as_tensor(timestep, device=sample.device)
        _, mean, std = self._next_step(model_output, times, sample, stochasticity)
        return gaussian_log_prob(prev_sample, mean, std)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`alpha x0 + sigma noise` at times `[B]` or a scalar, in the samples' dtype and on their device."""
        times = torch.as_tensor(timesteps, device=original_samples.device)
        return self.schedule.add_noise(original_samples, noise, times).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise` with the argument order of the flow schedulers."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v-prediction target `alpha noise - sigma x0` at times `[B]`; for flow `noise - x0`."""
        if self.schedule.is_flow:
            return noise - sample
        alpha, sigma = self.schedule.scales(torch.as_tensor(timesteps, device=sample.device), sample)
        return (alpha * noise - sigma * sample).to(sample.dtype)
