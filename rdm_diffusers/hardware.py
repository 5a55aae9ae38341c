"""The device that a process computes on, and what Apple's GPUs (MPS) cannot do."""

from __future__ import annotations

import os

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor

NO_FLOAT64 = ("mps",)  # kinds of devices


def uses_cpu() -> bool:
    """Whether accelerate is to use the CPU: it is asked for, or there is no GPU but Apple's for several processes."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return True
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    return not (torch.cuda.is_available() or (alone and torch.backends.mps.is_available()))


def to_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on its device if that has float64, otherwise on the CPU."""
    return (tensor.cpu() if tensor.device.type in NO_FLOAT64 else tensor).double()
