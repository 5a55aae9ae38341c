"""GNDMR: R_dm and external rewards as one direction, with one knob. Ours, not the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..prediction import expand
from .advantages import grouped
from .reward_gradients import RewardGradient
from .statistics import RunningMeans

COMBINATIONS = ("share", "sum")
RMS_DECAY, SLOW_DECAY, STD_DECAY = 0.95, 0.999, 0.99
EPS = 1e-30
TINY = 1e-18  # the squares of smaller gradients are 0 in float32; they add nothing


@dataclass(frozen=True, kw_only=True)
class GNDMR:
    """R_dm joined by external rewards.

        share: d + rho * rms|d| * sum_m w_m g_m / rms|g_m|,   sum_m |w_m| = 1
        sum:   d + sum_m w_m g_m                              (DMDR, the baseline: the losses are added up)

    with d = R' / n, g_m reward m's gradient, and rms running averages over all batches and student steps (for the
    rewards the greater of a quick and a slow one). In `share`, rho is the size of the rewards' part beside d;
    multiplying a reward by a number changes nothing.

    Args:
        group_size: G.
        weights: each reward's weight by name; in `share` only their proportions and signs count.
        reward_share: rho in [0, 1], the strength of the rewards in `share`.
        reward_combination: one of `COMBINATIONS`.
        projection_guard: take from the rewards' part of each sample what opposes d.
    """

    group_size: int
    weights: Mapping[str, float] = field(default_factory=dict)
    reward_share: float = 0.2
    reward_combination: str = "share"
    projection_guard: bool = False

    def combine(
        self,
        advantage: Tensor,
        gradients: Mapping[str, RewardGradient],
        statistics: RunningMeans,
        strength: float = 1.0,
    ) -> Tensor:
        """d `[M, C, H, W]` and the rewards' gradients as one ascent direction, same shape, detached.

        The rewards' part is multiplied by `strength`, in [0, 1].

        Invalid gradients count in no statistic and push nowhere; where all are invalid the result is d and the
        statistics stay as they were. Updates `statistics`.
        """
        for name, reward in gradients.items():  # the running within-group variance of each reward, for the log
            groups = grouped(torch.where(reward.valid, reward.values, torch.nan), self.group_size)
            variance = (groups - groups.nanmean(1, keepdim=True)).square().nanmean(1)
            finite = variance.isfinite()
            statistics.update(f"reward_variance/{name}", variance.where(finite, 0).sum(), finite.sum(), STD_DECAY)
        if self.reward_combination == "sum":
            size = advantage[0].numel()  # a mean over samples beside a mean over elements
            pushes = (self.weights[name] * size * reward.gradient for name, reward in gradients.items())
            part = sum(pushes, torch.zeros_like(advantage))
        else:
            part = self._share(advantage, gradients, statistics)
        part = strength * part
        return advantage + (guarded(part, advantage) if self.projection_guard else part)

    def _share(self, advantage: Tensor, gradients: Mapping[str, RewardGradient], statistics: RunningMeans) -> Tensor:
        part = torch.zeros_like(advantage)
        if not gradients:
            return part
        rewarded = torch.stack([gradient.valid for gradient in gradients.values()]).any(0)
        size = running_rms("R_dm", advantage, rewarded, statistics)
        for name, reward in gradients.items():
            # The slower mean remembers a reward's strength, so that a satisfied reward fades.
            quick, slow = (
                running_rms(f"reward/{name}", reward.gradient, reward.valid, statistics, decay)
                for decay in (RMS_DECAY, SLOW_DECAY)
            )
            scale = torch.maximum(quick, slow).clamp(min=TINY)
            part += self.reward_share * size * self.proportion(name) / scale * reward.gradient
        return part

    def proportion(self, name: str) -> float:
        """A reward's weight, so that the sizes of all add up to 1."""
        return self.weights[name] / sum(abs(weight) for weight in self.weights.values())


def running_rms(name: str, values: Tensor, valid: Tensor, statistics: RunningMeans, decay: float = RMS_DECAY) -> Tensor:
    """The running root mean square per element over the valid samples of `values [M, ...]`, a scalar."""
    power = values.square().flatten(1).mean(1)
    return statistics.update(f"power_{decay}/{name}", power.where(valid, 0).sum(), valid.sum(), decay).sqrt()


def guarded(part: Tensor, advantage: Tensor) -> Tensor:
    """`part` without its component against `advantage`, sample by sample (both `[M, ...]`)."""
    overlap = (part * advantage).flatten(1).sum(1)
    power = advantage.square().flatten(1).sum(1).clamp(min=EPS)
    return part - expand(overlap.clamp(max=0) / power, part) * advantage
