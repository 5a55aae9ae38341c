"""A LoRA under ComfyUI's own names of Lumina 2, which has one joint matrix of queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
OWN_NAMES = {"attn.to_out.0": "attention.out"} | {f"feed_forward.linear_{i}": f"feed_forward.w{i}" for i in (1, 2, 3)}


def as_joint(weights: Mapping[str, Tensor], alpha: float, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """A LoRA's weights as `diffusion_model.layers.0.attention.qkv.lora_A.weight` and so on.

    The joint matrix's LoRA is exact: it has the ranks of its parts after one another, and each part's rows alone.

    Args:
        weights: `[rank, in]` and `[out, rank]` by their names in diffusers, which begin with the component.
        alpha: the LoRA's, for all modules; it is multiplied into the second matrices.
        config: of the teacher's network.
    """
    queries = config["hidden_size"]
    others = queries // config["num_attention_heads"] * config["num_kv_heads"]
    rows = {"to_q": (0, queries), "to_k": (queries, others), "to_v": (queries + others, others)}
    tensors: dict[str, Tensor] = {}
    joint: dict[str, list[tuple[tuple[int, int], Tensor, Tensor]]] = {}
    for name, down in weights.items():
        if name.endswith(DOWN):
            path = name.removesuffix(DOWN)
            up = weights[path + UP] * (alpha / len(down))
            block, _, layer = path.removeprefix("transformer.").rpartition(".attn.")
            if layer in rows:
                joint.setdefault(block, []).append((rows[layer], down, up))
            else:
                tensors |= _pair(_own_name(path), down, up)
    for block, parts in joint.items():
        whole = torch.cat([down for _, down, _ in parts])
        up, rank = whole.new_zeros(queries + 2 * others, len(whole)), 0
        for (start, count), down, part in parts:
            up[start : start + count, rank : rank + len(down)] = part
            rank += len(down)
        tensors |= _pair(f"{block}.attention.qkv", whole, up)
    return tensors


def _own_name(path: str) -> str:
    """ComfyUI's path of a module, for diffusers' `transformer.layers.0.feed_forward.linear_1`."""
    path = path.removeprefix("transformer.").replace("norm1.linear", "adaLN_modulation.1")
    end = next((end for end in OWN_NAMES if path.endswith(end)), "")
    return path.removesuffix(end) + OWN_NAMES.get(end, "")


def _pair(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"diffusion_model.{path}{DOWN}": down, f"diffusion_model.{path}{UP}": up}
