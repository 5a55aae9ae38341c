"""Importance sampling: one rollout serves several updates, weighted by how likely the student still is to take it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..families import Conditioning
from ..hardware import to_float64
from ..schedulers import RdmScheduler
from ..schedulers.transitions import gaussian_log_prob
from .rollout import PredictX0, Step, take_step

IMPORTANCE_WEIGHTINGS = ("none", "clipped", "self_normalized")
CLIP = 0.2


@torch.no_grad()
def revisit(
    predict: PredictX0,
    scheduler: RdmScheduler,
    rollout: Iterable[Step],
    conditioning: Conditioning,
    micro_batch_size: int | None = None,
) -> Iterator[Step]:
    """Yields a rollout's steps with the same states and what the student predicts there now. No gradients.

    The other arguments are as in `rollout`.

    Args:
        rollout: the steps of B samples, as the student took them.
    """
    for step in rollout:
        size = micro_batch_size or len(step.x_t)
        yield take_step(predict, scheduler, step.k, step.t, step.x_t, conditioning, size)


def log_ratios(now: Sequence[Step], then: Sequence[Step]) -> Tensor:
    """log p_now - log p_then of reaching each state from the initial noise, `[K, B]`, float64, in nats.

    Exact: the transitions are Gaussian. The first state is 0, and deterministic transitions count nothing.

    Args:
        now: the K steps of B samples, as `revisit` gives them.
        then: the same as the student took them.
    """
    ratios = [to_float64(then[0].x_t.new_zeros(len(then[0].x_t), dtype=torch.float32))]
    for new, old, following in zip(now, then, then[1:], strict=False):
        log_now, log_then = (gaussian_log_prob(following.x_t, step.mean, old.std) for step in (new, old))
        ratios.append(ratios[-1] + (log_now - log_then))
    return torch.stack(ratios)


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
        "clip_fraction": to_float64((log_ratio.exp() - 1).abs() > CLIP).mean(),
        "drift": -log_ratio.mean(),
    }
