"""Pictures as files: what is measured is what was written, 8 bits a channel."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .pictures import to_pil

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
READ_AT_ONCE = 32  # always as many, so that no setting of the sampler's moves what is measured


def list_images(folder: Path) -> list[Path]:
    """The pictures in a folder, by name.

    Raises:
        ValueError: if the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise ValueError(f"The folder {folder} does not exist; give a folder of pictures.")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not found:
        raise ValueError(f"The folder {folder} holds no pictures ({', '.join(SUFFIXES)}); give another.")
    return found


def save_image(image: Tensor, path: Path, aside: Path) -> None:
    """Writes `[3, H, W]` in [0, 1] as a PNG; whatever happens, `path` is a whole picture or is not there.

    Args:
        image: the picture.
        path: where it goes.
        aside: a name in the same folder under which it is written first; every process has its own.
    """
    to_pil(image).save(aside, format="PNG")
    aside.replace(path)


def read_image(path: Path) -> Tensor:
    """A picture `[3, H, W]`, uint8.

    Raises:
        ValueError: if it cannot be read, or if it was changed so that a check sum in it shows.
    """
    try:
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as picture:
            picture.verify()  # a PNG's check sums, which are not looked at when it is decoded
        with Image.open(BytesIO(content)) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except BROKEN as error:
        raise ValueError(f"The picture {path} cannot be read ({error}); remove it and start again.") from error


def damaged(files: Sequence[Path]) -> dict[Path, str]:
    """Those of the pictures that `read_image` refuses, and its sentence."""

    def complaint(path: Path) -> str | None:
        try:
            read_image(path)
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        said = dict(zip(files, pool.map(complaint, files), strict=True))
    return {path: sentence for path, sentence in said.items() if sentence is not None}


def read_batches(files: Sequence[Path], shown: str | None = None, at_once: int = READ_AT_ONCE) -> Iterator[Tensor]:
    """The pictures in their order, `[B, 3, H, W]` uint8; neighbours of unlike size come in batches of their own.

    Args:
        files: the pictures.
        shown: what a progress bar calls the work; none by default.
        at_once: B at most.

    Raises:
        ValueError: if one cannot be read.
    """
    batch: list[Tensor] = []
    for path in tqdm(files, desc=shown, unit="image", disable=shown is None):
        image = read_image(path)
        if batch and (len(batch) == at_once or image.shape != batch[0].shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)
