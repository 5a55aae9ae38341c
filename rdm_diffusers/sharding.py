"""FSDP2: every network's weights, gradients and optimiser states in shards over all processes.

torch's `fully_shard`, with the options of `accelerate launch --use_fsdp --fsdp_version 2`. Sharded tensors are
`DTensor`s; checkpoints hold them whole, so that a file does not depend on the number of processes.
"""

from __future__ import annotations

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import ModelMixin
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: ModelMixin, accelerator: Accelerator) -> None:
    """Shards a network over all processes, block by block, in place.

    The weights are gathered for each block's forward and backward, and freed after both: a root that stayed gathered
    after a forward without gradients would miss what optimisers and moving averages write into the shards.

    Args:
        network: on the CPU or the device; its shards are on the device afterwards.
        accelerator: names the processes and the device.
    """
    plugin = FullyShardedDataParallelPlugin()
    names = plugin.transformer_cls_names_to_wrap or network._no_split_modules or ()
    options: dict[str, Any] = dict(
        mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
        reshard_after_forward=True,
    )
    for module in reversed(list(network.modules())):  # blocks within blocks first
        if type(module).__name__ in names:
            fully_shard(module, **options)
    fully_shard(network, **options)


def gather(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on every process, all of which must call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor, the same on every process, on the reference's device and in its shards if it has any.

    Tensors of another shape than the reference's, as optimisers' step counts are, stay whole.
    """
    if isinstance(reference, DTensor) and tensor.shape == reference.shape:
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return tensor


def is_sharded_launch() -> bool:
    """Whether `accelerate launch` was told to use FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
