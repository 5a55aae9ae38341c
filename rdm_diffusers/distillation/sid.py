"""SiD: Score identity Distillation (arXiv 2404.04057). On a student of several steps it is SiD's few-step form."""

from __future__ import annotations

from dataclasses import dataclass

from .distribution_matching import RewardEstimate
from .matching import Pull


@dataclass(frozen=True, kw_only=True)
class ScoreIdentity:
    """SiD's loss of a sample, with the teacher's x0 f and the fake score's x0 g at the re-noised x̂:

        L = (f - g) . (f - x̂) - alpha |f - g|^2

    Gradients flow to x̂, and through x_tau in both networks. At alpha 1 the loss is (f - g) . (g - x̂), and its gradient
    is on average that of |f - g|^2 / 2 with respect to the student's distribution, if the fake score is perfect; at
    another alpha (1 - alpha) |f - g|^2 is added. The paper divides L by mean |x̂ - f|, which is
    `--advantage_normalization sample`.

    Args:
        sid_alpha: alpha. The authors' code has 1.2 and 1 for small pictures, and 1 for text to image.
    """

    sid_alpha: float = 1.0

    def pull(self, estimate: RewardEstimate) -> Pull:
        """-dL/dx̂, which is R_dm, -dL/df and -dL/dg."""
        difference, error = estimate.reward, estimate.teacher_x0 - estimate.x0
        return Pull(
            x0=difference,
            teacher_x0=(2 * self.sid_alpha - 1) * difference - error,
            fake_x0=error - 2 * self.sid_alpha * difference,
        )
