"""A discriminator on the features of the fake score's network, as DMD2 has it (arXiv 2405.14867)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

WIDTH = 256  # of the head's hidden layers


class Features:
    """What a block of a network puts out, while it is asked for.

    Nothing is computed from it inside the network's forward: a checkpointed block is run again in the backward, and
    must save the same tensors then.

    Args:
        block: puts out `[B, C, h, w]` or `[B, L, C]`, or several tensors, of which the last is taken.
    """

    def __init__(self, block: nn.Module) -> None:
        self._taken: list[Tensor] | None = None
        block.register_forward_hook(self._take)

    def _take(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._taken is not None:
            self._taken.append(output[-1] if isinstance(output, tuple | list) else output)

    @contextmanager
    def collected(self) -> Iterator[list[Tensor]]:
        """A context whose list holds, afterwards, `[B, L, C]` for each forward inside it."""
        self._taken, found = [], list[Tensor]()
        try:
            yield found
            found += [each.flatten(2).transpose(1, 2) if each.ndim == 4 else each for each in self._taken]
        finally:
            self._taken = None


class Discriminator(nn.Module):
    """A small head that turns features into one logit a sample: log p(picture) - log p(sample), once it has learnt.

    Every place is read by itself, then their mean is. The last layer is 0 at first, so that the logit is, too. Float32,
    whatever the network computes in. DMD2's own head has strided convolutions, for one kind of network and size.

    Args:
        features: what it reads.
        channels: C.
    """

    def __init__(self, features: Features, channels: int) -> None:
        super().__init__()
        self.features = features
        self.places = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, WIDTH), nn.SiLU())
        last = nn.Linear(WIDTH, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.whole = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), last)

    def forward(self, features: Tensor) -> Tensor:
        """Logits `[B]` of features `[B, L, C]`. Gradients flow to both."""
        logits: Tensor = self.whole(self.places(features.float()).mean(1))
        return logits.squeeze(1)
