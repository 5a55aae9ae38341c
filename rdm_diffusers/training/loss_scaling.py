"""Loss scaling for float16, whose smallest number is 6e-8: without it, small gradients become 0 in a backward.

A role's direction is multiplied by a scale before the backward, and its gradients are divided by it afterwards
(arXiv 1710.03740). Where a scaled gradient leaves float16's range, the optimiser's step is left out, and the scale is
halved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizers import RoleOptimizer

UNSCALED = 1.0  # at this scale, a gradient that is not finite is a failure and no overflow


class LossScaler(torch.amp.GradScaler):
    """torch's scaler of one role, which counts the overflows.

    Args:
        device: that the role's gradients are on.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device.type)
        self.overflows = 0

    @property
    def may_overflow(self) -> bool:
        """Whether a lower scale can help."""
        return self.get_scale() > UNSCALED

    def end_step(self, overflowed: bool) -> None:
        """Counts an overflow, and sets the next step's scale."""
        self.overflows += overflowed
        self.update()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"overflows": self.overflows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.overflows = state_dict["overflows"]


def scaled(direction: Tensor, scaler: LossScaler | None) -> Tensor:
    """A direction times a role's scale, if it has one."""
    if scaler is None:
        return direction
    product: Tensor = scaler.scale(direction)
    return product


def scalers_of(optimizers: Mapping[str, RoleOptimizer]) -> dict[str, LossScaler]:
    """The scalers of the roles that have one."""
    return {role: each.scaler for role, each in optimizers.items() if each.scaler is not None}


def scaling_health(optimizers: Mapping[str, RoleOptimizer]) -> dict[str, float]:
    """The roles' scales, and how many steps overflowed so far; nothing without loss scaling."""
    scalers = scalers_of(optimizers)
    scales = {f"loss_scale/{role}": float(scaler.get_scale()) for role, scaler in scalers.items()}
    return scales | ({"overflows": float(sum(each.overflows for each in scalers.values()))} if scalers else {})
