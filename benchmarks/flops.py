"""Floating-point operations of a piece of work by the dtype that they are done in."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class FlopsByDtype(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention, forward and backward.

    Attributes:
        counts: operations by dtype of the first tensor that each was given.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            first = next(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.counts[first.dtype] += count(*args, **(kwargs or {}), out_val=output)
        return output

    def share(self, dtype: torch.dtype) -> float:
        """The part of all operations that were done in a dtype, 0 to 1."""
        return self.counts[dtype] / max(self.counts.total(), 1)
