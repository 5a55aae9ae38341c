"""Where student and fake score start if there is a target: at the target."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import lora_layers
from ..networks import ADAPTERS, TARGET, TEACHER, Networks, SeparateNetworks
from ..sharding import gather
from .checkpoints import copy_into

NOTHING = 1e-6  # of the largest singular value


@torch.no_grad()
def start_at_target(networks: Networks) -> None:
    """Makes student and fake score predict what the target predicts, or as nearly as their rank allows.

    LoRAs become the nearest of their rank to the target's, layer by layer; full weights have it added. So the student
    need not travel from the unguided teacher, and the fake score need not follow it there. Every process must call.
    """
    full = networks.denoisers if isinstance(networks, SeparateNetworks) else None
    teacher = networks.modules[0] if full is None else full[TEACHER]
    for name, layer in lora_layers(teacher).items():
        if ADAPTERS[TARGET] not in layer.lora_A:
            continue
        down, up = (gather(side[ADAPTERS[TARGET]].weight) for side in (layer.lora_A, layer.lora_B))
        up = up * layer.scaling[ADAPTERS[TARGET]]
        for role in networks.trained_roles:
            if full is not None:
                weight = full[role].get_submodule(name).get_parameter("weight")
                copy_into(weight, gather(weight) + (up.flatten(1) @ down.flatten(1)).view_as(weight))
            elif (adapter := ADAPTERS[role]) in layer.lora_A:
                sides = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                a, b = (gather(side).clone() for side in sides)  # what is above the target's rank stays as it is
                nearest_a, nearest_b = nearest(down, up, len(a))
                a[: len(nearest_a)], b[:, : len(nearest_a)] = nearest_a, nearest_b / layer.scaling[adapter]
                copy_into(sides[0], a)
                copy_into(sides[1], b)


def nearest(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The A and B of the rank, or of the given one if that is lower, whose product is nearest to a LoRA's.

    Args:
        down, up: A `[r, in, ...]` and B `[out, r, ...]`.
        rank: the highest rank of the result; a LoRA that is 0 has rank 0.
    """
    left, right = torch.linalg.qr(up.flatten(1)), torch.linalg.qr(down.flatten(1).T)
    u, values, v = torch.linalg.svd(left.R @ right.R.T)
    rank = min(rank, int((values > NOTHING * values[0]).sum()))  # a direction of zeros could not learn
    root = values[:rank].sqrt()
    a, b = root[:, None] * (v[:rank] @ right.Q.T), left.Q @ u[:, :rank] * root
    return a.reshape(rank, *down.shape[1:]), b.reshape(len(up), rank, *up.shape[2:])
