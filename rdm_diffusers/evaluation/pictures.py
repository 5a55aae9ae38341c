"""Labelled grids of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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


def contact_sheet(files: Sequence[Path], columns: int = 8, rows: int = 6, side: int = 160) -> Image.Image:
    """The first `columns` x `rows` pictures, each fitted into a square of `side` pixels; small ones pixel by pixel."""
    shown = files[: columns * rows]
    sheet = Image.new("RGB", (min(columns, len(shown)) * side, -(-len(shown) // columns) * side), "white")
    for i, file in enumerate(shown):
        with Image.open(file) as picture:
            zoom = side / max(picture.size)
            size = (max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))
            how = Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.convert("RGB").resize(size, how), (i % columns * side, i // columns * side))
    return sheet
