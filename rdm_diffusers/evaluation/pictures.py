"""Picture files, and labelled grids of pictures.

Only files are measured, 8 bits a channel, so that drawn and given pictures are treated alike.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
READ_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
READ_AT_ONCE = 32  # fixed, so that no sampling setting changes the measurements
LABEL_HEIGHT = 18


def to_pil(image: Tensor) -> Image.Image:
    """An image `[3, H, W]` in [0, 1] as a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_image(image: Tensor, path: Path, aside: Path) -> None:
    """Writes `[3, H, W]` in [0, 1] as a PNG; after a kill, `path` is complete or absent.

    Args:
        image: the picture.
        path: where it goes.
        aside: a temporary name in the same folder, a different one for each process.
    """
    to_pil(image).save(aside, format="PNG")
    aside.replace(path)


def list_images(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted by name.

    Raises:
        ValueError: if the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} does not exist; give a folder of pictures.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not files:
        raise ValueError(f"The folder {folder} holds no pictures ({', '.join(SUFFIXES)}); give another.")
    return files


def read_image(path: Path) -> Tensor:
    """A picture `[3, H, W]`, uint8.

    Raises:
        ValueError: if it cannot be read, or if a checksum in it is wrong.
    """
    try:
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as picture:
            picture.verify()  # decoding ignores a PNG's checksums
        with Image.open(BytesIO(content)) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except READ_ERRORS as error:
        raise ValueError(f"The picture {path} cannot be read ({error}); remove it and start again.") from error


def unreadable(files: Sequence[Path]) -> dict[Path, str]:
    """The pictures that `read_image` refuses, each with its error message."""

    def problem(path: Path) -> str | None:
        try:
            read_image(path)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = zip(files, pool.map(problem, files), strict=True)
        return {path: message for path, message in problems if message is not None}


def read_batches(files: Sequence[Path], label: str | None = None, batch_size: int = READ_AT_ONCE) -> Iterator[Tensor]:
    """The pictures in their order, `[B, 3, H, W]` uint8; a batch holds pictures of one size.

    Args:
        files: the pictures.
        label: of a progress bar; none by default.
        batch_size: the largest B.

    Raises:
        ValueError: if one cannot be read.
    """
    batch: list[Tensor] = []
    for path in tqdm(files, desc=label, unit="image", disable=label is None):
        image = read_image(path)
        if batch and (len(batch) == batch_size or image.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)


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
    first = files[: columns * rows]
    sheet = Image.new("RGB", (min(columns, len(first)) * side, -(-len(first) // columns) * side), "white")
    for i, file in enumerate(first):
        with Image.open(file) as picture:
            zoom = side / max(picture.size)
            size = (max(1, round(picture.width * zoom)), max(1, round(picture.height * zoom)))
            resample = Image.Resampling.NEAREST if zoom > 1 else Image.Resampling.LANCZOS
            sheet.paste(picture.convert("RGB").resize(size, resample), (i % columns * side, i // columns * side))
    return sheet
