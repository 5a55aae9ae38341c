"""Trajectory distribution matching (TDM, arXiv 2503.06674): each step's next state is matched in its own interval."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prediction import NoiseSchedule, expand
from ..schedulers import RdmScheduler
from .distribution_matching import RewardEstimate
from .draws import sent
from .matching import Pull
from .renoising import FreshNoise, Renoised, Renoising
from .rollout import Samples
from .times import TAU_RANGE, TimeDistribution, times_between

RENOISINGS = ("x0", "interval", "above")
PSEUDO_HUBER = 0.00054  # c over the root of the number of dimensions


@dataclass(frozen=True)
class NextState:
    """The student's next state, diffused further, at the noise levels of its own step.

    With ê = (x_t - a_t x̂) / s_t, the noise that the student sees in its state, and t' the grid's next time, the next
    state is x' = a' x̂ + s' (sqrt(1 - eta^2) ê + eta eps'). Diffused to tau >= t', with fresh noise eps, it is

        x_tau = a x̂ + s (k ê + sqrt(1 - k^2) eps),     k = sqrt(1 - eta^2) (s'/a') / (s/a)

    So a share of the noise is the student's own: all of it at tau = t', none after the last step or for eta = 1, where
    x_tau is as `FreshNoise` has it. The noise level is that of tau, whatever k. Through ê, x_tau moves by
    `a (1 - k (a_t/s_t) (s/a))` where x̂ moves by 1; over a that is the same at every tau.

    tau is in [t', t), or in [t', 1) if `above`, both within `TAU_RANGE`. The intervals [t', t) do not overlap, so that
    one fake score learns the K distributions apart. It predicts x̂ from x_tau. That is right where k ê + ... is unit
    noise of its own, so its samples have the importance weight of such noise against what was drawn,
    N(k ê + sqrt(1 - k^2) eps) / N(eps), to the power of one over the number of dimensions, as in the authors' code.

    Args:
        schedule: the teacher's.
        scheduler: the student's sampler, for its grid and its eta.
        above: whether tau is in [t', 1).
    """

    schedule: NoiseSchedule
    scheduler: RdmScheduler
    above: bool = False

    def times(self, uniform: Tensor, samples: Samples, distribution: TimeDistribution) -> Tensor:
        low, high = (bound * self.schedule.num_train_timesteps for bound in TAU_RANGE)
        first = self._next_times(samples).clamp(min=low)
        last = torch.full_like(first, high) if self.above else samples.t.to(first.dtype).clamp(max=high)
        # A step below the range keeps to its own time, and one above it to its next time.
        first = torch.minimum(first, samples.t.to(first.dtype))
        return times_between(uniform, first, torch.maximum(first, last), self.schedule, distribution)

    learning_times = times

    def renoise(self, samples: Samples, time: Tensor, noise: Tensor) -> Renoised:
        x0, (alpha, sigma) = samples.x0.float(), self.schedule.scales(time, samples.x0)
        own, kept = self._own_noise(samples), expand(self._kept(samples, time), x0)
        mixed = kept * own + (1 - kept.square()).sqrt() * noise
        log_weight = (noise.square() - mixed.square()).flatten(1).mean(1) / 2
        return Renoised(alpha * x0 + sigma * mixed, self.reach(samples), log_weight.exp())

    def reach(self, samples: Samples) -> Tensor:
        """dx_tau/dx̂ over a `[M]`: 1 - sqrt(1 - eta^2) (s'/a') / (s_t/a_t), in (0, 1]."""
        alpha, sigma = self.schedule.alpha(samples.t), self.schedule.sigma(samples.t)
        return 1 - self._next_level(samples) * alpha / sigma

    def _kept(self, samples: Samples, time: Tensor) -> Tensor:
        """k `[M]`."""
        level = self.schedule.sigma(time) / self.schedule.alpha(time)
        return (self._next_level(samples) / level).clamp(max=1)

    def _own_noise(self, samples: Samples) -> Tensor:
        """ê `[M, C, H, W]`."""
        alpha, sigma = self.schedule.scales(samples.t, samples.x0)
        return (samples.x_t.float() - alpha * samples.x0.float()) / sigma

    def _next_level(self, samples: Samples) -> Tensor:
        """sqrt(1 - eta^2) s'/a' `[M]`; 0 after the last step."""
        following = self._next_times(samples)
        level = self.schedule.sigma(following) / self.schedule.alpha(following)
        eta = float(self.scheduler.config.eta)
        return math.sqrt(1 - eta**2) * level.masked_fill(self._is_last(samples), 0)

    def _next_times(self, samples: Samples) -> Tensor:
        """t' `[M]` on the samples' device; 0 after the last step."""
        grid = self.scheduler.timesteps.cpu().float()
        following = torch.cat([grid[1:], grid.new_zeros(1)])
        return sent(following[samples.step], samples.x0.device)

    def _is_last(self, samples: Samples) -> Tensor:
        last = len(self.scheduler.timesteps) - 1
        return sent(samples.step == last, samples.x0.device)


def make_renoising(name: str, schedule: NoiseSchedule, scheduler: RdmScheduler) -> Renoising:
    """The re-noising of that name, one of `RENOISINGS`, for a teacher's schedule and the student's sampler."""
    return FreshNoise(schedule) if name == "x0" else NextState(schedule, scheduler, above=name == "above")


@dataclass(frozen=True)
class TrajectoryKL:
    """KL(student's diffused next state || teacher's distribution there), as a pseudo-Huber distance.

        loss = sqrt(d) (sqrt(|y - sg(y + R)|^2 + c^2) - c),     y = x' / a',   c = 0.00054 sqrt(d)

    with d the number of a sample's elements, x' the next state as `NextState` has it and R the teacher's x0 minus the
    fake score's at x_tau, which is (s^2/a) times the difference of the scores. Far above c the pull on y has the
    direction of R and a root mean square of 1.
    """

    def pull(self, estimate: RewardEstimate) -> Pull:
        """`reach` R / sqrt(mean R^2 + PSEUDO_HUBER^2) `[M, C, H, W]`: the pull on y times dy/dx̂."""
        reward = estimate.reward
        size = (reward.square().flatten(1).mean(1) + PSEUDO_HUBER**2).sqrt()
        reach = 1 if estimate.reach is None else estimate.reach
        return Pull(expand(reach / size, reward) * reward)
