"""The objectives, which turn R_dm into one direction for the student's prediction, and the fake score's loss."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ..prediction import expand
from .advantages import fake_score_bias, normalizer, variance_within_groups
from .distribution_matching import RewardEstimate
from .matching import Matching, Pull, ReverseKL
from .statistics import RunningMeans

EPS = 1e-8


@dataclass(frozen=True)
class Advantage:
    """A normalised R_dm; everything float32 and detached.

    Args:
        pull: the member's, over n; for DMD's it is R' / n alone.
        reward: R as it was estimated, same shape.
        correction: lambda b, same shape; R' = R + lambda b.
        normalizer: n `[M]`.
    """

    pull: Pull
    reward: Tensor
    correction: Tensor
    normalizer: Tensor


@dataclass(frozen=True, kw_only=True)
class GNDM:
    """Group-normalised distribution matching, our reading of arXiv 2603.28460.

        R' = R + gndm_lambda * b,    loss = 1/2 MSE(x̂, stopgrad(x̂ + R' / n))

    with b the fake score's bias over the group and n the normaliser (`advantages.py`). Taking gndm_lambda * b from the
    fake score's x0 is the same for R_dm, and corrects every other member of the family, too.

    Args:
        matching: the member of the family; R_dm as DMD has it by default.
        group_size: G; 1 leaves nothing to correct with.
        gndm_lambda: the strength of the correction, 0 to 1.
        advantage_normalization: one of `advantages.NORMALIZATIONS`.
        bias_estimator: one of `advantages.BIAS_ESTIMATORS`.
        steps_per_rollout: how many states of each rollout are trained on, in groups that follow each other.
        pool_steps: the share of b that is measured over all those states, 0 to 1; the rest is measured at the sample's
            own step. The fake score learns from all states, so both average to zero once it is perfect. All states
            together have less noise; the sample's own step is closer to its bias.
    """

    matching: Matching = field(default_factory=ReverseKL)
    group_size: int = 4
    gndm_lambda: float = 1.0
    advantage_normalization: str = "group"
    bias_estimator: str = "shift"
    steps_per_rollout: int = 1
    pool_steps: float = 0.5

    def advantage(self, estimate: RewardEstimate, statistics: RunningMeans) -> Advantage:
        """The member's pull over n, and its parts. Updates `statistics`."""
        correction = self._correction(estimate, statistics)
        n = normalizer(estimate, self.advantage_normalization, self.group_size).clamp(min=EPS)
        corrected = replace(estimate, fake_x0=estimate.fake_x0 - correction)
        return Advantage(self.matching.pull(corrected) / n, estimate.reward, correction, n)

    def direction(self, estimate: RewardEstimate, statistics: RunningMeans | None = None) -> Tensor:
        """The loss's gradient with respect to x̂ `[M, C, H, W]`, detached, with the mean over all elements inside.

        Without what a member pulls through the networks (`matching.ascent`); R_dm pulls nothing through them.
        """
        value = self.advantage(estimate, RunningMeans() if statistics is None else statistics).pull.x0
        return -value / value.numel()

    def _correction(self, estimate: RewardEstimate, statistics: RunningMeans) -> Tensor:
        if self.gndm_lambda == 0 or self.group_size == 1:
            return torch.zeros_like(estimate.reward)
        variance = variance_within_groups(estimate, self.group_size, statistics)
        bias_over = partial(fake_score_bias, estimate, self.group_size, self.bias_estimator, variance)
        if self.steps_per_rollout == 1 or self.pool_steps == 0:
            return self.gndm_lambda * bias_over()
        return self.gndm_lambda * torch.lerp(bias_over(), bias_over(self.steps_per_rollout), self.pool_steps)


def DMD(*, group_size: int = 1) -> GNDM:  # noqa: N802 - an objective's name
    """DMD2's objective (arXiv 2405.14867): R_dm as it is, each sample divided by its own n."""
    return GNDM(group_size=group_size, gndm_lambda=0.0, advantage_normalization="sample")


def fake_score_direction(prediction: Tensor, x0: Tensor, weight: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The gradient and the value of the fake score's denoising loss on the student's samples.

    Args:
        prediction: the fake score's x0 `[B, C, H, W]`.
        x0: the student's, same shape.
        weight: per-sample weight `[B]`; see `prediction.denoising_weight`.
        batch: how many samples the loss is a mean over, of which these are some.

    Returns:
        The gradient with respect to `prediction`, detached, and the weighted squared error of each sample `[B]`.
    """
    error = prediction.detach() - x0
    weighted = expand(weight, error) * error
    return 2 * weighted / (batch * error[0].numel()), (weighted * error).flatten(1).mean(1)
