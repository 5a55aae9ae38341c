"""Pictures as CLIP and its kin want to see them, differentiable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """What a model's own preprocessing does, bicubic (a = -0.5, as in Pillow) with antialiasing; defaults are CLIP's.

    Args:
        size: height and width of the result, in pixels.
        fit: `crop` scales the shorter side to `size` and cuts the middle out; `pad` scales the longer side to `size`
            and centres the picture on black.
        rounds_up: where the middle is, if an odd number of pixels is cut: `False` cuts the smaller half before it
            (transformers), `True` halves and rounds to even (torchvision).
        clamps: whether what the filter overshoots is brought back to [0, 1], as any 8-bit picture does; torchvision
            leaves it on float tensors, as in HPSv2.
    """

    size: int = 224
    fit: Literal["crop", "pad"] = "crop"
    rounds_up: bool = False
    clamps: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """Resizes, cuts or pads, and normalises.

        The official ones, of Pillow, round to 8 bits after resizing, which has no gradient; this does not.

        Args:
            images: `[B, 3, H, W]`, float in [0, 1].

        Returns:
            `[B, 3, size, size]`, in the images' dtype, float32 at least. Gradients flow to the images, except where
            clamping cuts them off.
        """
        images = as_float(images)
        target = self._target(*images.shape[-2:])
        if target != images.shape[-2:]:
            images = F.interpolate(images, target, mode="bicubic", antialias=True)
            images = images.clamp(0, 1) if self.clamps else images
        return normalized(self._cropped(images) if self.fit == "crop" else self._padded(images))

    def _target(self, height: int, width: int) -> tuple[int, int]:
        """Height and width before cutting or padding: cut off when cropping, rounded when padding, at least 1."""
        if self.fit == "pad":
            scale = self.size / max(height, width)
            return max(round(height * scale), 1), max(round(width * scale), 1)
        short, long = sorted((height, width))
        longer = self.size * long // short
        return (self.size, longer) if height <= width else (longer, self.size)

    def _cropped(self, images: Tensor) -> Tensor:
        surplus = (extent - self.size for extent in images.shape[-2:])
        top, left = (round(each / 2) if self.rounds_up else each // 2 for each in surplus)
        return images[..., top : top + self.size, left : left + self.size]

    def _padded(self, images: Tensor) -> Tensor:
        down, right = (self.size - extent for extent in images.shape[-2:])
        return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def normalized(images: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` minus CLIP's mean, over its standard deviation. Gradients flow to the images."""
    mean, std = (torch.tensor(values).to(images)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def as_float(values: Tensor) -> Tensor:
    """float64 as it is, anything else as float32."""
    return values if values.dtype == torch.float64 else values.float()
