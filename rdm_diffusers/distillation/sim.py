"""SIM: Score Implicit Matching (arXiv 2410.16794) with the pseudo-Huber distance."""

from __future__ import annotations

from dataclasses import dataclass

from ..prediction import expand
from .distribution_matching import RewardEstimate
from .matching import Pull


@dataclass(frozen=True, kw_only=True)
class ScoreImplicit:
    """SIM's loss of a sample, with the teacher's x0 f and the fake score's x0 g at the re-noised x̂:

        L = (f - g) . (g - x̂) / h,    h = sqrt(|f - g|^2 / D + c^2)

    with D elements. Gradients flow to x̂, and through x_tau in both networks, in h, too. If the fake score is perfect,
    they are on average the gradient of D h with respect to the student's distribution. The paper has the loss for
    scores, with y = s_fake - s_teacher: -w(t) y / sqrt(|y|^2 + c_t^2) . (s_fake - grad log q(x_tau | x̂)). A difference
    of scores is a / s^2 times that of the x0, so that this is the paper's loss with w(t) = sqrt(D) s^2 / a and
    c_t = sqrt(D) c a / s^2. That w, and one c for the x0 of all times, are ours.

    Args:
        sim_c: c > 0, the root mean square of f - g above which h grows like a norm, not like a square.
    """

    sim_c: float = 0.1

    def pull(self, estimate: RewardEstimate) -> Pull:
        """-dL/dx̂, -dL/df and -dL/dg."""
        difference, residual = estimate.reward, estimate.fake_x0 - estimate.x0
        h_squared = expand(difference.square().flatten(1).mean(1) + self.sim_c**2, difference)
        product = expand((difference * residual).flatten(1).mean(1), difference)
        h = h_squared.sqrt()
        along = (residual - product / h_squared * difference) / h  # dL/d(f - g) where g - x̂ stays
        return Pull(x0=difference / h, teacher_x0=-along, fake_x0=along - difference / h)
