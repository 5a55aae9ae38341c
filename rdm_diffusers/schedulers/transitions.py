"""One step of `RdmScheduler`: what it returns, and its log-density."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor

from ..hardware import to_float64


@dataclass
class RdmSchedulerOutput(BaseOutput):
    """One step of `RdmScheduler`.

    Args:
        prev_sample: the next sample `[B, ...]`, in the dtype of the model output.
        pred_original_sample: the x0 prediction `[B, ...]`, in the dtype of the model output.
        mean: the transition's mean `[B, ...]`, float32.
        std: the transition's standard deviation `[B, 1, ...]` or a scalar, float32; 0 at the last step and for eta 0.
        log_prob: the log-density of `prev_sample` in nats `[B]`, float64, on request; 0 at the last step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor | None = None


def gaussian_log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density in nats `[B]`, float64, of `sample [B, ...]` under N(mean, std^2); 0 where std is 0.

    Gradients flow to all three.
    """
    mean = to_float64(mean)
    std = to_float64(std).to(mean.device, non_blocking=True)
    deterministic = std == 0
    safe = std.masked_fill(deterministic, 1.0)
    density = -0.5 * ((to_float64(sample) - mean) / safe) ** 2 - safe.log() - 0.5 * math.log(2 * math.pi)
    return density.masked_fill(deterministic, 0.0).flatten(1).sum(1)
