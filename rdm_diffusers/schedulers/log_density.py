"""The log-density of a Gaussian transition."""

from __future__ import annotations

import math

from torch import Tensor


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density in nats `[B]`, float64, of `sample [B, ...]` under N(mean, std^2); 0 where std is 0.

    Gradients flow to all three.
    """
    mean, std = mean.double(), std.double()
    deterministic = std == 0
    safe = std.masked_fill(deterministic, 1.0)
    density = -0.5 * ((sample.double() - mean) / safe) ** 2 - safe.log() - 0.5 * math.log(2 * math.pi)
    return density.masked_fill(deterministic, 0.0).flatten(1).sum(1)
