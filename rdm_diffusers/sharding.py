"""FSDP2 (torch's `fully_shard`): networks, gradients and optimiser states in shards over all processes.

The options are those of `accelerate launch --use_fsdp --fsdp_version 2`. Sharded tensors are `DTensor`s. Checkpoints
hold whole tensors, so that a file does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: ModelMixin, accelerator: Accelerator, dtype: torch.dtype | None = None) -> None:
    """Shards a network over all processes, block by block, in place.

    Weights are gathered for each block's forward and backward, and freed after both: a root that stayed gathered
    after a forward without gradients would miss what optimisers and moving averages write into the shards.

    Args:
        network: on the CPU or the device. Its shards are on the device.
        accelerator: of the processes and the device.
        dtype: what weights are gathered and computed in, instead of autocast; their own by default. Shards and the
            gradients that are averaged keep the precision of float32. The caller casts the inputs.
    """
    # FSDP's own casts of inputs would round the times and the positions that networks keep in float32.
    policy = MixedPrecisionPolicy(dtype, dtype and torch.float32, cast_forward_inputs=dtype is None)
    plugin = FullyShardedDataParallelPlugin()
    names = plugin.transformer_cls_names_to_wrap or network._no_split_modules or ()
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in reversed(list(network.modules())):  # inner blocks first
        if type(module).__name__ in names:
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def average_in_backward(network: nn.Module, averages: bool) -> None:
    """Whether the next backward of a sharded network averages its gradients over all processes.

    If not, each process keeps whole gradients, in float32, and the next backward that averages includes them.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(averages)


def gather(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole one on every process, all of which must call this; any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_copies(weights: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole copies of tensors, float32, on the CPU. Every process must call this; without `keep` it gets none."""
    whole = ((name, gather(tensor.detach())) for name, tensor in weights.items())
    return {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in whole if keep}


def shard_like(tensor: Tensor, reference: Tensor) -> Tensor:
    """Shards a whole tensor, the same on every process, like a sharded reference, on the reference's device.

    Tensors of another shape than the reference's stay whole; optimisers' step counts are such.
    """
    if isinstance(reference, DTensor) and tensor.shape == reference.shape:
        return distribute_tensor(tensor.to(reference.device), reference.device_mesh, reference.placements)
    return tensor


def is_sharded_launch() -> bool:
    """Whether `accelerate launch` runs with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether networks are in shards: with FSDP on several processes."""
    return is_sharded_launch() and accelerator.num_processes > 1
