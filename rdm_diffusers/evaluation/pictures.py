"""Picture files: reading, writing, pairing with prompts by the numbers in their names, and grids of pictures.

Only files are measured, 8 bits a channel, so that drawn and given pictures are treated alike.
"""

from __future__ import annotations

import re
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
NUMBER = re.compile(r"(\d+)")


def to_pil(image: Tensor) -> Image.Image:
    """An image `[3, H, W]` in [0, 1] as a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())


def save_image(image: Tensor, path: Path, aside: Path) -> None:
    """Writes `[3, H, W]` in [0, 1] as a PNG; after a kill, `path` is complete or absent.

    `aside` is a temporary name in the same folder, a different one for each process.
    """
    to_pil(image).save(aside, format="PNG")
    aside.replace(path)


def list_images(folder: Path) -> list[Path]:
    """The pictures in a folder, sorted by name; ValueError if the folder is missing or holds none."""
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} does not exist; give a folder of pictures.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not files:
        raise ValueError(f"The folder {folder} holds no pictures ({', '.join(SUFFIXES)}); give another.")
    return files


def read_image(path: Path) -> Tensor:
    """A picture `[3, H, W]`, uint8; ValueError if it cannot be read, or if a checksum in it is wrong."""
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


def read_batches(files: Sequence[Path], label: str | None = None) -> Iterator[Tensor]:
    """The pictures in their order, `[B, 3, H, W]` uint8; a batch holds up to 32 pictures of one size.

    `label` names a progress bar. Raises ValueError if a picture cannot be read.
    """
    batch: list[Tensor] = []
    for path in tqdm(files, desc=label, unit="image", disable=label is None):
        image = read_image(path)
        if batch and (len(batch) == READ_AT_ONCE or image.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)


def pair(files: Sequence[Path], prompts: Sequence[str], num_images: int | None = None) -> list[Path]:
    """The first pictures in the order of their prompts: picture i belongs to prompt i modulo the number of prompts.

    ValueError unless the names are numbered without gaps from 0 or 1, or there are as many pictures as prompts.
    """
    ordered = sorted(files, key=natural_key)
    taken = ordered[:num_images]
    if not prompts or len(ordered) == len(prompts):
        return taken
    numbers = _numbers_of(taken)
    first = numbers[0] if numbers else None
    if first not in (0, 1) or numbers != list(range(first, first + len(taken))):
        raise ValueError(
            f"The pictures in {ordered[0].parent} cannot be paired with the prompts: there are {len(ordered)} pictures "
            f"and {len(prompts)} prompts, and {_numbering_problem(taken, numbers)}. Number the pictures like their "
            "prompts, from 0 or from 1 without gaps, or give as many prompts as pictures, in the order of their names."
        )
    return taken


def describe_pairs(files: Sequence[Path], prompts: Sequence[str]) -> str:
    """One line with the first and the last pair of picture and prompt."""
    indices = [0] if len(files) == 1 else [0, len(files) - 1]
    pairs = [f"{files[i].name} with {prompts[i % len(prompts)][:60]!r}" for i in indices]
    return f"Pictures and prompts are paired in their order: {', ..., '.join(pairs)}."


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts `2.png` before `10.png`."""
    parts = [part for part in NUMBER.split(path.stem) if part]
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts] + [(2, 0, path.suffix)]


def _numbers_of(files: Sequence[Path]) -> list[int]:
    """The numbers in names that differ in one number only; empty if they differ in more, or have no number."""
    parts = [NUMBER.split(file.stem) for file in files]
    if len({len(part) for part in parts}) != 1 or len(parts[0]) < 3:
        return []
    columns = list(zip(*parts, strict=True))  # texts at even places, numbers at odd ones
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1] or [len(columns) - 2]
    return [int(text) for text in columns[varying[0]]] if len(varying) == 1 and varying[0] % 2 else []


def _numbering_problem(files: Sequence[Path], numbers: Sequence[int]) -> str:
    if not numbers:
        return "their names do not differ in one number alone"
    for file, before, number in zip(files[1:], numbers, numbers[1:], strict=False):
        if number != before + 1:
            return f"number {before} is followed by {file.name}"
    return f"the first is {files[0].name}"


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
        strip = to_pil(torch.cat(list(images), dim=2))
        picture = strip.resize((count * width * zoom, height * zoom), Image.Resampling.NEAREST)
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
