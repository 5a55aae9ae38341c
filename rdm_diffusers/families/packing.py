"""Latents as rows of patches of 2 x 2, as the transformers of FLUX and Qwen-Image take them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` -> `[B, (H / 2) (W / 2), 4 C]`."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // 2) * (width // 2), channels * 4)


def unpack(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `pack`, to the shape of `like [B, C, H, W]`."""
    batch, channels, height, width = like.shape
    patches = rows.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def patch_positions(latents: Tensor) -> Tensor:
    """Row and column of each patch, behind a 0: `[(H / 2) (W / 2), 3]`."""
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(latents.device)
