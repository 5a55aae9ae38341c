"""Symbolic links in folders that others may have made: those that leave their folder are not followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .folders import write_whole

BLOBS = "blobs"  # in the Hub's cache, of a repository and of all


def real_path(folder: Path, path: Path, writing: bool = False) -> Path:
    """Where a path in a folder leads when all links are followed; use it from then on, as a link may change.

    The folder itself, and the folders above it, may be links. A link need not lead to anything.

    Args:
        folder: what the path must not leave; of a snapshot in the Hub's cache the blobs belong to it.
        path: in the folder.
        writing: whether it is to be written, which blobs must not be.

    Raises:
        ValueError: naming the link and its target, if the path leaves the folder or leads to itself.
    """
    root = folder.resolve()
    allowed = [root, *([] if writing else _blobs_of(root))]
    real = _resolved(path)
    if not any(real.is_relative_to(place) for place in allowed):
        link = next(each for each in _steps(folder, path) if not _is_in(allowed, each))
        raise ValueError(
            f"{link} is a link to {os.readlink(link)}, which is not in {folder}; replace it by what it stands for, or "
            "remove it."
        )
    return real


def write_inside(folder: Path, name: str, text: str) -> Path:
    """Writes a text file of a folder, whole or not at all; never through a link that leaves the folder.

    Args:
        folder: where it is.
        name: the file's.
        text: in UTF-8.

    Returns:
        The file's path in the folder.

    Raises:
        ValueError: as `real_path`.
    """
    target = real_path(folder, folder / name, writing=True)
    write_whole(target, text)
    return folder / name


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (RuntimeError, OSError) as error:  # a circle, by the release of Python
        raise ValueError(f"{path} is a link that leads to itself; remove it.") from error


def _is_in(allowed: list[Path], path: Path) -> bool:
    return any(_resolved(path).is_relative_to(place) for place in allowed)


def _steps(folder: Path, path: Path) -> Iterator[Path]:
    """The path's own folders and itself, from `folder` on."""
    parts = path.relative_to(folder).parts
    return (folder.joinpath(*parts[: i + 1]) for i in range(len(parts)))


def _blobs_of(root: Path) -> list[Path]:
    """Where the Hub's cache keeps the files of a snapshot, or of a folder in one."""
    for place in [root, *root.parents]:
        repository = place.parent.parent
        if place.parent.name == "snapshots" and repository.name.startswith("models--"):
            return [repository / BLOBS, repository.parent / BLOBS]
    return []
