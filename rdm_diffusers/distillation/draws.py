"""Randomness without hidden state: every draw is keyed by the seed, its purpose and the group that it serves.

So a group's numbers depend on no batch, process or restart, and a checkpoint needs the number of updates alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; the CPU does not wait for what the device has yet to compute.

    Except on Apple's GPUs, where a copy that nobody waits for may arrive too late.
    """
    kinds = {tensor.device.type, torch.device(device).type}
    pinned = tensor.pin_memory() if tensor.device.type == "cpu" and "cuda" in kinds else tensor
    return pinned.to(device, non_blocking="mps" not in kinds)


@dataclass(frozen=True)
class Draws:
    """Named random numbers for groups of samples.

    Args:
        seed: the run's seed.
        group_size: G, the number of samples in a group.
        device: where the numbers go; they are drawn on the CPU, so that every device gets the same. That takes .01 s of
            an update for SDXL at 1024 pixels and .06 s for FLUX, in groups of 4 (`benchmarks/host.py`); SDXL's whole
            update took 11.6 s on an H200.
    """

    seed: int
    group_size: int
    device: torch.device | str = "cpu"

    def generator(self, purpose: str, index: int) -> torch.Generator:
        """The generator of one purpose and group (or epoch, or whatever `index` counts)."""
        return torch.Generator().manual_seed(self.number(purpose, index))

    def number(self, purpose: str, index: int) -> int:
        """The 63-bit seed of one purpose and index."""
        digest = hashlib.blake2b(f"{self.seed}/{purpose}/{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def normal(self, purpose: str, groups: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Standard normal numbers `[len(groups) * G, *shape]`, float32, group after group."""
        size = (self.group_size, *shape)
        parts = [torch.randn(size, generator=self.generator(purpose, group)) for group in groups]
        return sent(torch.cat(parts), self.device)

    def uniform(self, purpose: str, groups: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1) `[len(groups) * G]`, float32."""
        parts = [torch.rand(self.group_size, generator=self.generator(purpose, group)) for group in groups]
        return sent(torch.cat(parts), self.device)

    def subset(self, purpose: str, group: int, count: int, of: int) -> list[int]:
        """`count` different whole numbers below `of`, ascending, one choice per group."""
        chosen = torch.randperm(of, generator=self.generator(purpose, group))[:count]
        return sorted(chosen.tolist())
