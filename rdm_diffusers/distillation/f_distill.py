"""f-distill (arXiv 2502.15681): any f-divergence, by a weight of each sample's R_dm.

The gradient of D_f(p || q) at x_tau is that of the reverse KL times h(r) = r^2 f''(r), r = p / q (`divergences.py`).
The ratio is a discriminator's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..prediction import expand
from .distribution_matching import RewardEstimate
from .divergences import weights
from .matching import Pull


@dataclass(frozen=True)
class FDistill:
    """h(r) / h(1) * R_dm.

    The paper divides h by its mean over the mini-batch; h(1) is as good where r's mean is 1 already, and a sample does
    not depend on others.

    Args:
        f_divergence: one of `divergences.F_DIVERGENCES`.
    """

    f_divergence: str = "jensen_shannon"

    def pull(self, estimate: RewardEstimate) -> Pull:
        h, *_ = weights(self.f_divergence, estimate.density_ratio)
        return Pull(expand(h, estimate.reward) * estimate.reward)
