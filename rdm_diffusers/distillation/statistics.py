"""Running means, the only state of the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..hardware import to_float64


@dataclass
class RunningMeans:
    """Exponential moving averages of sums and of counts by name; a mean is their quotient.

    So the first update counts in full, a bin without samples keeps its mean, and every process has the same numbers.

    Args:
        reduce: adds a tensor up over all processes; one process alone by default.
        state: name -> `[2, *shape]`, sum and count, float64. Checkpoints hold it.
    """

    reduce: Callable[[Tensor], Tensor] = field(default=lambda total: total)
    state: dict[str, Tensor] = field(default_factory=dict)

    def update(self, name: str, total: Tensor, count: Tensor, decay: float) -> Tensor:
        """Adds an update's sums and counts (of one shape) and returns the means, float32; 0 where nothing counted.

        An update that counts nothing at all leaves the state untouched.
        """
        new = self.reduce(torch.stack([to_float64(total), to_float64(count).expand_as(total)]))
        old = self.state.get(name, torch.zeros_like(new)).to(new.device)
        self.state[name] = torch.where(new[1].any(), decay * old + (1 - decay) * new, old)
        return self.mean(name).to(total.device)

    def mean(self, name: str) -> Tensor:
        """The mean under a name, float32. Raises KeyError if it was never updated."""
        total, count = self.state[name]
        return torch.where(count > 0, total / count.clamp(min=torch.finfo(count.dtype).tiny), 0).float()
