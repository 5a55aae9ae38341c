"""How the student's prediction is re-noised: at which times, and from which state, R_dm is estimated and learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..prediction import NoiseSchedule
from .rollout import Samples
from .times import TimeDistribution, denoising_times, renoising_times


@dataclass(frozen=True)
class Renoised:
    """M noisy samples of scales a and s; everything float32 and detached.

    Args:
        x_tau: the samples `[M, C, H, W]`.
        reach: dx_tau/dx̂ over a `[M]`; None where it is 1.
        weight: of each for the fake score `[M]`; None where all count alike.
    """

    x_tau: Tensor
    reach: Tensor | None = None
    weight: Tensor | None = None

    def with_weight(self, weight: Tensor | None) -> Tensor | None:
        """The samples' own weights `[M]` times these; None if there are neither."""
        if self.weight is None or weight is None:
            return weight if self.weight is None else self.weight
        return weight * self.weight


class Renoising(Protocol):
    """Where R_dm is estimated, and where the fake score learns; both from uniform numbers in [0, 1) `[M]`."""

    def times(self, uniform: Tensor, samples: Samples, distribution: TimeDistribution) -> Tensor:
        """The times of R_dm `[M]`, in the units of the schedule's timesteps."""

    def learning_times(self, uniform: Tensor, samples: Samples, distribution: TimeDistribution) -> Tensor:
        """The same for the fake score's loss."""

    def renoise(self, samples: Samples, time: Tensor, noise: Tensor) -> Renoised:
        """The samples at such times `[M]`, by noises `[M, C, H, W]`. No gradients."""


@dataclass(frozen=True)
class FreshNoise:
    """x_tau = a x̂ + s eps at any noise level (DMD)."""

    schedule: NoiseSchedule

    def times(self, uniform: Tensor, samples: Samples, distribution: TimeDistribution) -> Tensor:
        return renoising_times(uniform, self.schedule, distribution)

    def learning_times(self, uniform: Tensor, samples: Samples, distribution: TimeDistribution) -> Tensor:
        return denoising_times(uniform, self.schedule, distribution)

    def renoise(self, samples: Samples, time: Tensor, noise: Tensor) -> Renoised:
        return Renoised(self.schedule.add_noise(samples.x0, noise, time))
