"""Group statistics: the fake score's bias, and what GNDM divides by. Ours, not the paper's.

A group's G members lie side by side along the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..prediction import expand
from .distribution_matching import RewardEstimate
from .statistics import RunningMeans

NORMALIZATIONS = ("sample", "group", "batch", "rms", "std", "none")
BIAS_ESTIMATORS = ("shift", "noise")
VARIANCE_DECAY = 0.95


def grouped(values: Tensor, group_size: int) -> Tensor:
    """`[M, ...]` as `[M / G, G, ...]`."""
    return values.reshape(-1, group_size, *values.shape[1:])


def rows(values: Tensor, chosen: Tensor) -> Tensor:
    """The rows of `values [N, ...]` that a mask `[N]` on the CPU chooses, at least one; no device is waited for."""
    return torch.stack([values[i] for i in chosen.nonzero().flatten().tolist()])


def leave_one_out_mean(values: Tensor, group_size: int, states: int = 1) -> Tensor:
    """The mean over the *other* rollouts of each sample's group, shaped as `values [M, ...]`; 0 for groups of 1.

    Args:
        values: of the samples, the G members of a group side by side.
        group_size: G.
        states: how many groups that follow each other are states of the same G rollouts; all of them count.
    """
    if group_size == 1:
        return torch.zeros_like(values)
    rollouts = values.reshape(-1, states, group_size, *values.shape[1:])
    others = rollouts.sum((1, 2), keepdim=True) - rollouts.sum(1, keepdim=True)
    return (others / (states * (group_size - 1))).expand_as(rollouts).flatten(0, 2)


def variance_within_groups(estimate: RewardEstimate, group_size: int, statistics: RunningMeans) -> Tensor:
    """v, the variance of the student's samples of one prompt and step: unbiased, over the last updates, a scalar."""
    deviations = (estimate.x0 - leave_one_out_mean(estimate.x0, group_size)).square().flatten(1).mean(1)
    count = deviations.new_full((), len(deviations))
    mean = statistics.update("variance_within_groups", deviations.sum(), count, VARIANCE_DECAY)
    return mean * (group_size - 1) / group_size


def bias_unit(estimate: RewardEstimate, estimator: str, variance: float | Tensor = 1.0) -> Tensor:
    """The share of one unit of bias that is seen at each sample's tau `[M]`; see `fake_score_bias`.

    `shift` takes the bias for a shift of the student's mean that the fake score has not learned yet. Of such a shift a
    denoiser of data of variance v misses the share s^2 / (a^2 v + s^2), which x_tau does not show (a, s: the scales at
    tau). Where x_tau moves by less than a times the shift (`reach` below 1), it misses what does not arrive, too.
    `noise` takes it for an error in noise units, s.
    """
    if estimator == "shift":
        signal, noise = estimate.alpha**2 * variance, estimate.sigma**2
        missed = noise if estimate.reach is None else noise + (1 - estimate.reach) * signal
        return missed / (signal + noise)
    if estimator == "noise":
        return estimate.sigma
    raise ValueError(f"Unknown bias estimator {estimator!r}; use one of {', '.join(BIAS_ESTIMATORS)}.")


def fake_score_bias(
    estimate: RewardEstimate, group_size: int, estimator: str = "shift", variance: float | Tensor = 1.0, states: int = 1
) -> Tensor:
    """b, the bias of each sample's fake x0, measured on the *other* rollouts of its group: `[M, C, H, W]`.

    A perfect fake score is the posterior mean of the student's own samples, so its residuals average to zero over a
    group. Their mean is its bias for this prompt, at no extra network call. It is 0 for groups of 1. With u
    the `bias_unit`,

        shift: b_i = u_i * sum_j (fake_j - x̂_j) / sum_j u_j      (the least-squares weights for a shift)
        noise: b_i = u_i * mean_j (fake_j - x̂_j) / u_j

    Where samples have weights, the fake score is the posterior mean of the weighted ones, and it is the residuals times
    these weights that average to zero.

    Args:
        estimate: R_dm of M samples.
        group_size: G.
        estimator: one of `BIAS_ESTIMATORS`.
        variance: v of the `bias_unit`.
        states: over how many states of the rollouts the bias is measured, as in `leave_one_out_mean`.

    Raises:
        ValueError: for an unknown estimator.
    """
    residual, unit = estimate.fake_x0 - estimate.x0, bias_unit(estimate, estimator, variance)
    if estimate.weight is not None:
        residual = expand(estimate.weight, residual) * residual
    if group_size == 1:
        return torch.zeros_like(residual)
    if estimator == "shift":
        total, share = (leave_one_out_mean(values, group_size, states) for values in (residual, unit))
        mean = total / expand(share, residual)
    else:
        mean = leave_one_out_mean(residual / expand(unit, residual), group_size, states)
    return expand(unit, residual) * mean


def normalizer(estimate: RewardEstimate, normalization: str, group_size: int) -> Tensor:
    """n, which R_dm is divided by, one number a sample `[M]`.

    Args:
        estimate: R_dm of M samples.
        normalization: `sample`: n = mean |x̂ - teacher x0| of the sample, DMD2's; `group` or `batch`: the mean of n
            there; `rms`: the root mean square of R over the group; `std`: R's standard deviation around the group's
            mean, the literal analogue of GRPO's; `none`: 1.
        group_size: G.

    Raises:
        ValueError: for an unknown normalization.
    """
    distance, reward = estimate.distance, grouped(estimate.reward, group_size).flatten(2)
    if normalization == "sample":
        return distance
    if normalization == "group":
        return grouped(distance, group_size).mean(1).repeat_interleave(group_size)
    if normalization == "batch":
        return distance.mean().expand_as(distance)
    if normalization == "rms":
        return reward.square().mean((1, 2)).sqrt().repeat_interleave(group_size)
    if normalization == "std":
        return (reward - reward.mean(1, keepdim=True)).square().mean((1, 2)).sqrt().repeat_interleave(group_size)
    if normalization == "none":
        return torch.ones_like(distance)
    raise ValueError(f"Unknown advantage normalization {normalization!r}; use one of {', '.join(NORMALIZATIONS)}.")
