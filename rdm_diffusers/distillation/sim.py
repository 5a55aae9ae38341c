"""SIM: Score Implicit Matching (Luo et al., arXiv 2410.16794) with the pseudo-Huber distance."""

from __future__ import annotations

from dataclasses import dataclass

from ..prediction import expand
from .distribution_matching import RewardEstimate
from .matching import Pull


@dataclass(frozen=True, kw_only=True)
class ScoreImplicit:
    """SIM's loss of one sample, with the teacher's x0 f and the fake score's g, both at the re-noised x̂:

        L = (f - g) . (g - x̂) / h,    h = sqrt(mean (f - g)^2 + c^2)

    The paper writes it for scores: -[y / sqrt(|y|^2 + c^2)] . (s_fake - grad log q(x_tau | x̂)) with
    y = s_fake - s_teacher, of which the expectation has the gradient of the distance d(y) = sqrt(|y|^2 + c^2) - c. A
    score is a / s^2 times the x0 that it stands for, but for terms that cancel; the weight w(t) = s^2 / a takes that
    factor out. Gradients also flow through x_tau in both networks, and through h.

    Args:
        c: where the distance turns from a square into a norm, as a root mean square of x0; above 0. Ours: one c for
            x0 at all times, which for scores is c a / s^2, times the root of the number of elements. A large c makes
            this SiD with alpha 1, times 1 / c.
    """

    c: float = 0.01

    def pull(self, estimate: RewardEstimate) -> Pull:
        """-dL/dx̂, -dL/df and -dL/dg, each `[M, C, H, W]`, detached."""
        difference, residual = estimate.reward, estimate.fake_x0 - estimate.x0
        height = (difference.square().flatten(1).mean(1) + self.c**2).sqrt()
        likeness = (difference * residual).flatten(1).mean(1)
        height, likeness = expand(height, difference), expand(likeness, difference)
        x0 = difference / height
        through_difference = residual / height - likeness / height**2 * x0
        return Pull(x0=x0, teacher_x0=-through_difference, fake_x0=through_difference - x0)
