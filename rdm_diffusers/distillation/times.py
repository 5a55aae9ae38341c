"""Which noise levels are drawn how often, for re-noising and for the fake score's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..prediction import NoiseSchedule
from ..schedulers import shifted

TIME_DISTRIBUTIONS = ("uniform", "logit_normal", "shifted")
TAU_RANGE = (0.02, 0.98)  # of the training timesteps, as in DMD2
BELOW_ONE = 1 - 2**-24  # the highest float32 below 1


@dataclass(frozen=True)
class TimeDistribution:
    """How noise levels u in [0, 1), as shares of the range of times, are distributed; 1 is noise.

    Args:
        name: `uniform`; `logit_normal`: sigmoid(N(mean, std^2)), as in Stable Diffusion 3 (arXiv 2403.03206);
            `shifted`: shift v / (1 + (shift - 1) v) of uniform v, as flow teachers are sampled.
        mean, std: of `logit_normal`.
        shift: of `shifted`.
    """

    name: str = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def shares(self, uniform: Tensor) -> Tensor:
        """Numbers of this distribution, in [0, 1), from as many uniform ones in [0, 1), whose order they keep."""
        if self.name == "uniform":
            return uniform
        if self.name == "logit_normal":
            shares: Tensor = (self.mean + self.std * torch.special.ndtri(uniform)).sigmoid()
        elif self.name == "shifted":
            shares = shifted(uniform, self.shift)
        else:
            raise ValueError(f"Unknown distribution {self.name!r}; use one of {', '.join(TIME_DISTRIBUTIONS)}.")
        return shares.clamp(max=BELOW_ONE)

    def below(self, shares: Tensor) -> Tensor:
        """How much of this distribution is below each of `shares`, in [0, 1]: the inverse of `shares`."""
        if self.name == "uniform":
            return shares
        if self.name == "logit_normal":
            below: Tensor = torch.special.ndtr((shares.logit() - self.mean) / self.std)
            return below
        return shifted(shares, 1 / self.shift)


UNIFORM = TimeDistribution()


def renoising_times(uniform: Tensor, schedule: NoiseSchedule, distribution: TimeDistribution = UNIFORM) -> Tensor:
    """tau from uniform numbers in [0, 1): distributed over `TAU_RANGE`, whole numbers unless the schedule is flow."""
    low, high = (bound * schedule.num_train_timesteps for bound in TAU_RANGE)
    tau = low + distribution.shares(uniform) * (high - low)
    return tau if schedule.is_flow else tau.long()


def denoising_times(uniform: Tensor, schedule: NoiseSchedule, distribution: TimeDistribution = UNIFORM) -> Tensor:
    """Times of a denoising loss `[B]`, from uniform numbers in [0, 1): distributed over all training timesteps.

    For flow matching they are never quite 0, where the output is undefined.
    """
    t = distribution.shares(uniform) * schedule.num_train_timesteps
    return t.clamp(min=1e-3 * schedule.num_train_timesteps) if schedule.is_flow else t.long()


def times_between(
    uniform: Tensor, low: Tensor, high: Tensor, schedule: NoiseSchedule, distribution: TimeDistribution = UNIFORM
) -> Tensor:
    """Times in [low, high) `[M]`, from uniform numbers in [0, 1): of the distribution over all times, cut off there.

    Args:
        uniform: `[M]`.
        low, high: times `[M]`; where they are equal, that is the time. They are whole numbers unless the schedule is
            flow, or what is below the first whole number in between is cut off, too.
        schedule: the teacher's.
        distribution: of the noise levels over all training timesteps.
    """
    first, last = (distribution.below(bound / schedule.num_train_timesteps) for bound in (low, high))
    times = distribution.shares(first + uniform * (last - first)) * schedule.num_train_timesteps
    if schedule.is_flow:
        return torch.minimum(torch.maximum(times, low), high)
    return torch.minimum(torch.maximum(times.floor(), low.ceil()), (high.ceil() - 1).clamp(min=low.ceil())).long()


def guidance_times(uniform: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Times of the guidance's own part, from uniform numbers in [0, 1): uniform below the student's times `t [M]`.

    They stay in `TAU_RANGE`, and are whole numbers unless the schedule is flow.
    """
    low, high = (bound * schedule.num_train_timesteps for bound in TAU_RANGE)
    tau = low + uniform * (t.clamp(low, high) - low)
    return tau if schedule.is_flow else tau.long()
