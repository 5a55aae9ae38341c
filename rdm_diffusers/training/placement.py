"""Where a run's networks are: on the device while they work, in the machine's memory otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from torch import nn

from ..networks import Networks
from ..sharding import is_sharded_launch, shard


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Moves the modules to the device, and afterwards back to where they were; frees the device's memory."""
    homes = [next(module.parameters()).device for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)
        free_memory()


def place(networks: Networks, accelerator: Accelerator) -> None:
    """Puts the three roles on the device, or in shards on all devices where FSDP was asked for.

    Before optimisers are made. A quantised teacher beside full-weight roles stays whole.
    """

    def put(network: nn.Module) -> None:
        if is_sharded_launch() and accelerator.num_processes > 1 and getattr(network, "hf_quantizer", None) is None:
            shard(network, accelerator)
        else:
            network.to(accelerator.device)

    networks.place(put)
