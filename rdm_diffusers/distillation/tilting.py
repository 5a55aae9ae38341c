"""Rewards without gradients, as a tilt of the distribution that is matched. Ours, not the paper's.

R_dm is zero where teacher and fake score agree. Let the fake score learn the student's samples q with the weights
e^{-kappa r}: then they agree where q e^{-kappa r} is the teacher's p, that is, where

    q = p e^{kappa r} / Z,

the optimum of reinforcement learning under a KL penalty. It needs no gradient of the reward, one evaluation a sample,
and no extra network call; the constant Z of each prompt does not change a score.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .advantages import grouped
from .statistics import RunningMeans

STD_DECAY, MEAN_DECAY, LIMIT = 0.99, 0.95, 3.0


def standardised_advantage(name: str, values: Tensor, group_size: int, statistics: RunningMeans) -> Tensor:
    """Each sample's reward above the mean of the others of its group, in standard deviations within groups, `[M]`.

    The sample itself is not in that mean, so the baseline does not depend on it.

    Args:
        name: the reward's, for its running standard deviation.
        values: `[M]`; samples whose reward is not finite are left out and get 0, as do groups of 1.
        group_size: G.
        statistics: updated.
    """
    finite = grouped(values.isfinite(), group_size)
    numbers = torch.where(finite, grouped(values, group_size), 0)
    count = finite.sum(1, keepdim=True)
    others = (numbers.sum(1, keepdim=True) - numbers) / (count - 1).clamp(min=1)
    advantage = torch.where(finite & (count > 1), numbers - others, 0)
    # A difference from a mean of c - 1 others has c / (c - 1) times the variance of a value.
    power = (advantage.square().sum(1, keepdim=True) * (count - 1) / count.clamp(min=1)).sum()
    variance = statistics.update(f"variance/{name}", power, (count * (count > 1)).sum(), STD_DECAY)
    deviation = variance.sqrt()
    return torch.where(deviation > 0, advantage / deviation, 0).flatten()


def tilted_weight(tilt: Tensor, statistics: RunningMeans) -> Tensor:
    """e^{-tilt} over its running mean: each sample's weight for the fake score, `[M]`, about 1 on average.

    Tilts are bounded to +-3, so that no single sample dominates an update.
    """
    weight = torch.exp(-tilt.clamp(-LIMIT, LIMIT))
    count = weight.new_full((), len(weight))
    return weight / statistics.update("tilted_weight", weight.sum(), count, MEAN_DECAY)
