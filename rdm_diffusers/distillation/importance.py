"""Importance sampling: one rollout serves several updates, weighed by how likely the student still is to make it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..families import Conditioning
from ..schedulers import RdmScheduler
from ..schedulers.transitions import gaussian_log_prob
from .rollout import PredictX0, Trajectory, predict_in_parts

IMPORTANCE_WEIGHTINGS = ("none", "clipped", "self_normalized")
CLIP = 0.2


@torch.no_grad()
def revisit(
    predict: PredictX0,
    scheduler: RdmScheduler,
    trajectory: Trajectory,
    conditioning: Conditioning,
    micro_batch_size: int | None = None,
) -> Trajectory:
    """The same states as the student sees them now: its predictions and the transitions' means are computed anew.

    Args:
        predict: `predict(x_t, t, conditioning) -> x0`, the student.
        scheduler: as in `rollout`.
        trajectory: B old rollouts.
        conditioning: of length B.
        micro_batch_size: how many samples go through the student at once; all by default.
    """
    size, x0, means = micro_batch_size or trajectory.x_t.shape[1], [], []
    for state, t in zip(trajectory.x_t, trajectory.t, strict=True):
        x0.append(predict_in_parts(predict, state, t, conditioning, size))
        means.append(scheduler.transition(x0[-1], state, t, scheduler.previous_timestep(t).to(t.device))[0])
    return replace(trajectory, x0=torch.stack(x0), mean=torch.stack(means))


def log_ratios(now: Trajectory, then: Trajectory) -> Tensor:
    """log p_now - log p_then of reaching each state from the initial noise, `[K, B]`, float64, in nats.

    Exact: the transitions are Gaussian. The first state is 0, and deterministic transitions count nothing.
    """
    steps = [
        gaussian_log_prob(following, mean, std) - gaussian_log_prob(following, old, std)
        for following, mean, old, std in zip(then.next, now.mean, then.mean, then.std, strict=True)
    ]
    return torch.stack([torch.zeros_like(steps[0]), *steps[:-1]]).cumsum(0)


def importance_weights(log_ratio: Tensor, weighting: str) -> Tensor:
    """What each sample's direction is multiplied by `[M]`, float32.

    Args:
        log_ratio: `[M]`, in nats.
        weighting: `none`: 1; `clipped`: the ratio, within 1 +- `CLIP` (as PPO clips it, arXiv 1707.06347);
            `self_normalized`: the ratio over the mean ratio, so that the weights' mean is 1.

    Raises:
        ValueError: for an unknown weighting.
    """
    if weighting == "none":
        return torch.ones_like(log_ratio).float()
    if weighting == "clipped":
        return log_ratio.exp().clamp(1 - CLIP, 1 + CLIP).float()
    if weighting == "self_normalized":
        return (log_ratio.softmax(0) * len(log_ratio)).float()
    raise ValueError(f"Unknown importance weighting {weighting!r}; use one of {', '.join(IMPORTANCE_WEIGHTINGS)}.")


def importance_health(log_ratio: Tensor) -> dict[str, Tensor]:
    """Scalars for the log, of M samples.

    `effective_sample_size`: (sum w)^2 / sum w^2 over M, in (0, 1]; `clip_fraction`: the share of ratios beyond the
    clip; `drift`: the mean of -log ratio, an estimate of the KL divergence in nats.
    """
    weights = log_ratio.softmax(0)
    return {
        "effective_sample_size": 1 / weights.square().sum() / len(weights),
        "clip_fraction": ((log_ratio.exp() - 1).abs() > CLIP).double().mean(),
        "drift": -log_ratio.mean(),
    }
