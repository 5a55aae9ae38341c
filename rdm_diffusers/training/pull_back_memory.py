"""The memory of an update's forwards and backwards, with those through which some algorithms have gradients."""

from __future__ import annotations

from typing import Any

import torch

from ..distillation import THROUGH_NETWORKS
from ..networks import FAKE_SCORE, Networks
from .memory_model import LivePeak, fused_attention, meta_autocast, update_peak


def peaks(
    networks: Networks, inputs: tuple[Any, ...], algorithm: str, has_gradients: bool, dtype: torch.dtype | None,
    device_type: str,
) -> tuple[int, int]:  # fmt: skip
    """Bytes that the student's forward saves for the backward, and the most at any time of all that have gradients.

    Args:
        networks, inputs, has_gradients, dtype, device_type: as `update_peak` takes them.
        algorithm: the run's; those of `THROUGH_NETWORKS` have gradients through the teacher and the fake score, too.
    """
    saved, peak = update_peak(networks, inputs, has_gradients, dtype, device_type)
    if algorithm in THROUGH_NETWORKS:
        roles = networks.real_score, FAKE_SCORE
        peak = max(peak, *(_pull_back(networks, role, inputs, dtype, device_type) for role in roles))
    return saved, peak


def _pull_back(
    networks: Networks, role: str, inputs: tuple[Any, ...], dtype: torch.dtype | None, device_type: str
) -> int:
    autocast = meta_autocast(dtype if role == FAKE_SCORE else None, device_type)
    x_t, t, conditioning = inputs
    with fused_attention(), LivePeak(*networks.modules) as live, autocast:
        networks.pull_back(role, x_t, t, conditioning, torch.empty_like(x_t))
    return int(live.peak)
