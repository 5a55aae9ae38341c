"""One LoRA that does what two do: the teacher's and the student's, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

from ..adapters import lora_layers
from ..families import LoraLayers

DOWN, UP = ".lora_A.weight", ".lora_B.weight"


def join_loras(
    denoiser: nn.Module, added: LoraLayers, weights: Mapping[str, Tensor], adapter: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """A LoRA for the plain base: exactly `B = [B_teacher, scale B_student]` and `A = [A_teacher; A_student]`.

    All layers get the highest rank, and zeros where they need less, because the file has one rank.

    Args:
        denoiser: the network, for the names of its layers.
        added: the teacher's LoRAs in it, at a scale of 1.
        weights: the student's, float32, on the CPU.
        adapter: the student's shape.

    Returns:
        The weights by their names, and their shape, whose alpha is the rank.
    """
    scale = adapter.lora_alpha / adapter.r
    own = {name.removesuffix(DOWN) for name in weights if name.endswith(DOWN)}
    joined: LoraLayers = {}
    for name in sorted(own | added.keys()):
        parts = [tuple(each.to("cpu", torch.float32) for each in added[name])] if name in added else []
        parts += [(weights[name + DOWN], scale * weights[name + UP])] if name in own else []
        joined[name] = torch.cat([down for down, _ in parts]), torch.cat([up for _, up in parts], dim=1)
    names = list(joined)
    for name, layer in _matched(denoiser, names).items():  # peft adapts these, too, because it compares ends of names
        joined[name] = _nothing(layer)
    rank = max(len(down) for down, _ in joined.values())
    matrices: dict[str, Tensor] = {}
    for name, (down, up) in joined.items():
        missing = rank - len(down)
        matrices[name + DOWN] = F.pad(down, (0, 0) * (down.ndim - 1) + (0, missing)).contiguous()
        matrices[name + UP] = F.pad(up, (0, 0) * (up.ndim - 2) + (0, missing)).contiguous()
    return matrices, replace(adapter, r=rank, lora_alpha=rank, target_modules=names)


def _matched(denoiser: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """The layers without matrices whose names end as one of these does."""
    ends = tuple(f".{name}" for name in names)
    layers = {name: layer for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    adapted = {name: layer.get_base_layer() for name, layer in lora_layers(denoiser).items()}
    inner = tuple(f"{name}." for name in adapted)  # the adapters themselves
    found = {name: layer for name, layer in layers.items() if not name.startswith(inner)} | adapted
    return {name: layer for name, layer in found.items() if name.endswith(ends) and name not in names}


def _nothing(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A of `[1, in, ...]` and B of `[out, 1, ...]`, which add nothing."""
    outputs, *inputs = layer.get_parameter("weight").shape
    return torch.zeros(1, *inputs), torch.zeros(outputs, 1, *(1 for _ in inputs[1:]))
