"""Labelled grids of pictures."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LABEL_HEIGHT = 18


def to_pil(image: Tensor) -> Image.Image:
    """An image `[3, H, W]` in [0, 1] as a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def labelled_rows(rows: Mapping[str, Tensor], min_side: int = 96) -> Image.Image:
    """One labelled row of pictures for each entry.

    Args:
        rows: label -> images `[N, 3, H, W]` in [0, 1], all of one shape.
        min_side: smaller pictures are enlarged, pixel by pixel, to about this many pixels.
    """
    count, _, height, width = next(iter(rows.values())).shape
    zoom = max(1, min_side // min(height, width))
    canvas = Image.new("RGB", (count * width * zoom, len(rows) * (height * zoom + LABEL_HEIGHT)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for i, (label, images) in enumerate(rows.items()):
        top = i * (height * zoom + LABEL_HEIGHT)
        draw.text((4, top + 1), label, fill="black", font=font)
        strip = torch.cat(list(images), dim=2)
        picture = to_pil(strip).resize((count * width * zoom, height * zoom), Image.Resampling.NEAREST)
        canvas.paste(picture, (0, top + LABEL_HEIGHT))
    return canvas
