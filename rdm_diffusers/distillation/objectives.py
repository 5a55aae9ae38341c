"""The objectives, each a recipe from R_dm to one direction for the student's prediction, and the fake score's loss."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..prediction import expand
from .advantages import fake_score_bias, normalizer
from .distribution_matching import RewardEstimate

EPS = 1e-8


@dataclass(frozen=True)
class GNDM:
    """Group-normalised distribution matching, our reading of arXiv 2603.28460.

        R' = R + gndm_lambda * b,    loss = 1/2 MSE(x̂, stopgrad(x̂ + R' / n))

    with b the fake score's bias over the group and n the normaliser (`advantages.py`).

    Args:
        group_size: G; 1 leaves nothing to correct with.
        gndm_lambda: the strength of the correction, 0 to 1.
        normalization: one of `advantages.NORMALIZATIONS`.
    """

    group_size: int = 4
    gndm_lambda: float = 0.5
    normalization: str = "group"

    def corrected_reward(self, estimate: RewardEstimate) -> Tensor:
        """R' `[M, C, H, W]`, detached."""
        if self.gndm_lambda == 0:
            return estimate.reward
        bias = fake_score_bias(estimate.residual, estimate.sigma, self.group_size)
        return estimate.reward + self.gndm_lambda * bias

    def direction(self, estimate: RewardEstimate) -> Tensor:
        """The loss's gradient with respect to x̂ `[M, C, H, W]`, detached, with the mean over all elements inside."""
        n = normalizer(estimate.distance, self.normalization, self.group_size).clamp(min=EPS)
        reward = self.corrected_reward(estimate)
        return -reward / expand(n, reward) / reward.numel()


def DMD(group_size: int = 1) -> GNDM:  # noqa: N802 - an objective's name
    """DMD2's objective (arXiv 2405.14867): R_dm as it is, each sample divided by its own n."""
    return GNDM(group_size, gndm_lambda=0.0, normalization="sample")


def fake_score_direction(prediction: Tensor, x0: Tensor, weight: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The gradient and the value of the fake score's denoising loss on the student's samples.

    Args:
        prediction: the fake score's x0 `[B, C, H, W]`.
        x0: the student's, same shape.
        weight: per-sample weight `[B]`; see `prediction.output_weight`.
        batch: how many samples the loss is a mean over, of which these are some.

    Returns:
        The gradient with respect to `prediction`, detached, and the weighted squared error of each sample `[B]`.
    """
    error = prediction.detach() - x0
    weighted = expand(weight, error) * error
    return 2 * weighted / (batch * error[0].numel()), (weighted * error).flatten(1).mean(1)
