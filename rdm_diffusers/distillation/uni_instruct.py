"""Uni-Instruct (arXiv 2505.20755): an f-divergence of clean samples, as an integral over all noise levels.

Along the diffusion D_f(p || q) falls at the rate g^2 / 2 * E_q[h(r) |s_p - s_q|^2], with the scores s, r = p / q and
h(r) = r^2 f''(r); so the sum of these rates is the divergence of the clean samples. The paper shows that the gradient
of a rate is a weighted sum of Diff-Instruct's, along s_p - s_q, and of SIM's, through the scores. Which weights is
derived here anew: with R = f_phi - f_psi, e = f_psi - x̂, both scores' parameters held still, and each rate in the unit
of R_dm (times s^4 / 2a^2), it is the gradient of

    L = (h - r h') / 2 * |R|^2 + h * R . e

where r depends on x_tau, too, by d log r / d x_tau = s_p - s_q = a / s^2 R. This last part is along R, as
Diff-Instruct's is. For the reverse KL (h = 1) L is SiD's loss with its alpha at 1/2; for the forward KL (h = r) it is
SIM's loss with the weight r.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..prediction import expand
from .distribution_matching import RewardEstimate
from .divergences import weights
from .matching import Pull


@dataclass(frozen=True)
class UniInstruct:
    """The gradient of E_q[h(r) |s_p - s_q|^2] at each noise level, h over h(1).

    Args:
        f_divergence: one of `divergences.F_DIVERGENCES`.
    """

    f_divergence: str = "reverse_kl"

    def pull(self, estimate: RewardEstimate) -> Pull:
        reward, residual = estimate.reward, estimate.fake_x0 - estimate.x0
        h, slope, curvature = (expand(each, reward) for each in weights(self.f_divergence, estimate.density_ratio))
        along = 0.5 * curvature * _dot(reward, reward) - slope * _dot(reward, residual)  # -dL / dlog r
        by_ratio = along * expand((estimate.alpha / estimate.sigma) ** 2, reward) * reward
        through_teacher = -((h - slope) * reward + h * residual)
        return Pull(h * reward + by_ratio, through_teacher, -through_teacher - h * reward)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample, `[M, 1, 1, 1]`."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))
