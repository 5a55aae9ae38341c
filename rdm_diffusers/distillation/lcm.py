"""Consistency distillation of latent diffusion models (LCM, arXiv 2310.04378; as LoRAs arXiv 2311.05556).

The teacher's ODE leads from every noisy sample to an image. A consistency function names that image at once, from
wherever on the way. The student learns to be one: what it predicts at a noisy image shall be what it predicts a step of
the teacher's solver later, where less is left to predict. Fake score and rollouts are not needed; images are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..prediction import NoiseSchedule
from ..schedulers import shifted

NO_NOISE = -1  # the time after the solver's last step, as `RdmScheduler.transition` takes it


@dataclass(frozen=True, kw_only=True)
class LCM:
    """The consistency loss between neighbours on the teacher's way from noise to an image.

        x_u    = the deterministic step (DDIM; Euler for flow) from x_t at time t to the earlier u, by the teacher
        target = f(x_u, u), without gradients; x_u itself where no noise is left, because there f is the identity
        loss   = mean over elements of sqrt((f(x_t, t) - target)^2 + huber_c^2) - huber_c

    with f(x, t) the student's x0. The target is the student itself and not its moving average, as in LCM-LoRA's
    published training and in arXiv 2310.14189. Times are drawn from all that the teacher knows, and u is the N-th part
    of them below t, so that the student may be sampled on any grid.

    Args:
        num_ddim_timesteps: N, the solver's steps from noise to an image.
        huber_c: below this difference an element's loss is a square, and far above it the difference; as x0.
    """

    num_ddim_timesteps: int = 50
    huber_c: float = 0.001

    def times(self, uniform: Tensor, schedule: NoiseSchedule, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """t and the earlier u `[B]`; u is `NO_NOISE` where the solver arrives.

        Args:
            uniform: numbers in [0, 1) `[B]`.
            schedule: the teacher's. Times are whole numbers unless it is flow.
            shift: of a flow teacher's noise levels, which are evenly spaced before it, as its own sampler's are
                (PCM, arXiv 2405.18407, steps so through Stable Diffusion 3).
        """
        count = schedule.num_train_timesteps
        if not schedule.is_flow:
            t = (uniform * count).long()
            return t, (t - count // self.num_ddim_timesteps).clamp(min=NO_NOISE)
        level = 1 - uniform
        t, u = (count * shifted(each, shift) for each in (level, level - 1 / self.num_ddim_timesteps))
        return t, torch.where(level > 1 / self.num_ddim_timesteps, u, NO_NOISE)

    def losses(self, x0: Tensor, target: Tensor) -> Tensor:
        """The loss of each sample `[M]`, of the student's x0 and its target `[M, C, H, W]`."""
        return (((x0 - target).square() + self.huber_c**2).sqrt() - self.huber_c).flatten(1).mean(1)

    def pull(self, x0: Tensor, target: Tensor) -> Tensor:
        """Where x0 should go: minus the loss's derivative, times an update's number of elements; as `losses`."""
        apart = target - x0
        return apart / (apart.square() + self.huber_c**2).sqrt()
