"""What must be finite before a role's weights move: losses, rewards' directions and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..program import RunError

SAFE = "nothing was saved over the last checkpoint. "
OF_RATES = "Resume from it with a lower learning rate."
OF_FP16 = (
    "Resume from it with a lower learning rate; if that fails, the network needs more than float16's range, and only a "
    "new run with --mixed_precision bf16 or no will do."
)


class NonFiniteError(RunError):
    """A loss, reward or gradient is not finite; names the term and, where one is at fault, the prompt and step."""


@dataclass
class FiniteChecks:
    """Notes on the device which values are finite, and reads all of that at once, before an optimiser's step.

    Each reading makes the processor wait for everything that the device has yet to compute.
    """

    remedy: str = OF_RATES  # what to do where a value is not finite
    notes: list[tuple[str, Tensor, Callable[[int], str]]] = field(default_factory=list)

    def note(self, term: str, values: Tensor, name_of: Callable[[int], str]) -> None:
        """Notes whether a term's `values [N, ...]` are finite; `name_of` gives the prompt and step of each of the N."""
        self.notes.append((term, values.isfinite().reshape(len(values), -1).all(1), name_of))

    def require(self, gradient_norm: Tensor, may_overflow: bool = False) -> bool:
        """Raises NonFiniteError for the first noted term that is not finite, or for the norm; forgets the notes.

        If the gradients `may_overflow`, because they were scaled for float16, the norm alone is no error.

        Returns:
            Whether the norm is finite.
        """
        notes, self.notes = self.notes, []
        if torch.cat([gradient_norm.isfinite().reshape(1), *(finite for _, finite, _ in notes)]).all():
            return True
        for term, finite, name_of in notes:
            spoilt = (~finite).nonzero()
            if len(spoilt):
                raise NonFiniteError(f"The {term} is not finite for {name_of(int(spoilt[0, 0]))}; {SAFE}{self.remedy}")
        if may_overflow:
            return False
        raise NonFiniteError(f"The gradient is not finite; {SAFE}{self.remedy}")
