"""Random guidance (PG-SB of SNOOPI, arXiv 2412.02687): the teacher's scale is another one for every sample."""

from __future__ import annotations

from torch import Tensor

NEAR, FAR = 0.5, 1.5  # of w - 1


def guidance_scales(uniform: Tensor, low: float, high: float) -> Tensor:
    """w in u + w (c - u) `[M]`, uniform between two scales, from uniform numbers in [0, 1) `[M]`."""
    return low + uniform * (high - low)


def range_around(guidance_scale: float) -> tuple[float, float]:
    """The range whose mean is a scale w: what guidance adds is multiplied by .5 to 1.5. Ours, not the paper's."""
    return 1 + NEAR * (guidance_scale - 1), 1 + FAR * (guidance_scale - 1)
