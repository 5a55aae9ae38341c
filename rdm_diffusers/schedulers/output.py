"""What a step of `RdmScheduler` gives."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class RdmSchedulerOutput(BaseOutput):
    """One step of `RdmScheduler`.

    Args:
        prev_sample: the next sample `[B, ...]`, in the dtype of the model output.
        pred_original_sample: the x0 prediction `[B, ...]`, in the dtype of the model output.
        mean: the transition's mean `[B, ...]`, float32.
        std: the transition's standard deviation `[B, 1, ...]` or a scalar, float32; 0 at the last step and for eta 0.
        log_prob: the log-density of `prev_sample` in nats `[B]`, float64, if it was asked for; 0 at the last step.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor
    mean: Tensor
    std: Tensor
    log_prob: Tensor | None = None
