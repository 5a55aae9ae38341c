"""A cache in parts: safetensors files that are whole or absent, each named by its number and by its digest."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..folders import PARTIAL, aside_of, digest_of_file

SUFFIX = ".safetensors"


def whole_parts(folder: Path, warning: str | None = None) -> dict[int, Path]:
    """The parts whose contents match the digests in their names, by number.

    Each of the others is warned of, if a `warning` is given; the part's path replaces `{path}` in it.
    """
    found = {}
    for path in sorted(folder.glob(f"*-*{SUFFIX}")):
        number, digest = path.stem.rsplit("-", 1)
        if not number.isdecimal():
            continue
        if _digest(path) == digest:
            found[int(number)] = path
        elif warning:
            warnings.warn(warning.replace("{path}", str(path)), stacklevel=3)
    return found


def write_part(
    folder: Path, number: int, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    """Writes a part aside, and puts it in the place of any other of its number; OSError if it cannot be written."""
    name = f"{number:06d}"
    partial = aside_of(folder / f"{name}-{os.getpid()}")
    try:
        save_file(dict(tensors), partial, metadata)
        target = folder / f"{name}-{_digest(partial)}{SUFFIX}"
        for other in folder.glob(f"{name}-*{SUFFIX}"):
            if other != target:
                other.unlink(missing_ok=True)
        return partial.replace(target)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left."""
    for partial in folder.glob(f"{PARTIAL}*"):
        partial.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    try:
        return digest_of_file(path)[:32]
    except OSError:
        return "unreadable"
