"""SiD: Score identity Distillation (Zhou et al., arXiv 2404.04057), and with several steps its few-step form.

The few-step form (arXiv 2505.12674) matches the mixture of what all steps predict: one loss at a random step of the
student's own rollout, which `rollout.py` does for every method.
"""

from __future__ import annotations

from dataclasses import dataclass

from .distribution_matching import RewardEstimate
from .matching import Pull


@dataclass(frozen=True, kw_only=True)
class ScoreIdentity:
    """SiD's loss of one sample, with the teacher's x0 f and the fake score's g, both at the re-noised x̂:

        L = (f - g) . (f - x̂) - alpha |f - g|^2

    It estimates (1 - alpha) |f - g|^2, the squared difference of the scores, in the form whose gradient misses least
    because the fake score lags; at alpha 1 it is (f - g) . (g - x̂). Gradients also flow through x_tau in *both*
    networks. The paper divides L by mean |x̂ - f|, which is `--advantage_normalization sample`.

    Args:
        alpha: how much of |f - g|^2 is taken off; the paper's 1.2 or 1 for pixels, 1 for text to image.
    """

    alpha: float = 1.0

    def pull(self, estimate: RewardEstimate) -> Pull:
        """-dL/dx̂ = f - g, which is R_dm, -dL/df and -dL/dg, each `[M, C, H, W]`, detached."""
        difference, error = estimate.reward, estimate.teacher_x0 - estimate.x0
        return Pull(
            x0=difference,
            teacher_x0=(2 * self.alpha - 1) * difference - error,
            fake_x0=error - 2 * self.alpha * difference,
        )
