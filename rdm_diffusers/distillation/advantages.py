"""Group statistics: the leave-one-out mean that GNDM centres with, and the normalisers. Ours, not the paper's.

A group's G members lie side by side along the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..prediction import expand

NORMALIZATIONS = ("sample", "group", "batch", "none")


def leave_one_out_mean(values: Tensor, group_size: int) -> Tensor:
    """The mean of the *other* members of each sample's group, shaped as `values [M, ...]`; 0 for groups of 1."""
    if group_size == 1:
        return torch.zeros_like(values)
    groups = values.unflatten(0, (-1, group_size))
    others = groups.sum(1, keepdim=True) - groups
    return (others / (group_size - 1)).flatten(0, 1)


def fake_score_bias(residual: Tensor, sigma: Tensor, group_size: int) -> Tensor:
    """b = s_tau times the leave-one-out group mean of the fake score's residual `[M, C, H, W]`.

    A perfect fake score is the posterior mean of the student's own samples, so its residuals average to zero over a
    group; what is left is its bias for this prompt, measured at no extra network call.
    """
    return expand(sigma, residual) * leave_one_out_mean(residual, group_size)


def normalizer(distance: Tensor, normalization: str, group_size: int) -> Tensor:
    """What R_dm is divided by, one number a sample `[M]`.

    Args:
        distance: n = mean |x̂ - teacher x0| of each sample `[M]`.
        normalization: `sample` (DMD2's), `group` or `batch` mean of it, or `none`.
        group_size: G.

    Raises:
        ValueError: for an unknown normalization.
    """
    if normalization == "sample":
        return distance
    if normalization == "group":
        return distance.unflatten(0, (-1, group_size)).mean(1).repeat_interleave(group_size)
    if normalization == "batch":
        return distance.mean().expand_as(distance)
    if normalization == "none":
        return torch.ones_like(distance)
    raise ValueError(f"Unknown advantage normalization {normalization!r}; use one of {', '.join(NORMALIZATIONS)}.")
